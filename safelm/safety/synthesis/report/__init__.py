"""What became of the documents: the funnel, and the report made of it."""

from safelm.safety.synthesis.report.funnel import Attempt, Funnel

__all__ = ["Attempt", "Funnel"]
