"""Compiles for a TPU slice without having one: does a config fit, and how fast can it be?"""
