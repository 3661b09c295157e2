"""The report of a run: its funnel, and the pages and charts made from it."""

from safelm.safety.synthesis.report.funnel import Attempt, Funnel

__all__ = ["Attempt", "Funnel"]
