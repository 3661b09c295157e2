"""Compares any number of results: models by stages, with intervals, differences and tests."""

from safelm.evaluate.comparing.results import Column, Comparison, Row, Run, compare, read_runs

__all__ = ["Column", "Comparison", "Row", "Run", "compare", "read_runs"]
