"""Monitors: at every token a level from 0 to 1, how harmful the text up to it is, from the model's own forward pass."""

from safelm.inference.monitors.kinds import LinearHead, RefusalProbability, TagProbability
from safelm.inference.monitors.monitor import Monitor, check_monitor, extra_flops_per_token, reading_flops_per_token
from safelm.inference.monitors.reading import levels

__all__ = [
    "LinearHead",
    "Monitor",
    "RefusalProbability",
    "TagProbability",
    "check_monitor",
    "extra_flops_per_token",
    "levels",
    "reading_flops_per_token",
]
