"""Any number of results side by side: models by stages, with intervals, differences and their tests."""

from safelm.evaluate.comparing.results import Column, Comparison, Row, Run, compare, read_runs

__all__ = ["Column", "Comparison", "Row", "Run", "compare", "read_runs"]
