"""Rates, areas and differences with their intervals; corrections for many tests and for imperfect judges."""
