"""Compiling for a TPU slice that is not there: does a config fit, and how fast can it be."""
