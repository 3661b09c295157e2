"""Monitors on disk: linear heads on hidden states, trained on labelled spans or prompts, and how they are named."""

from safelm.safety.monitors.folder import SavedHead, read_head, save_head
from safelm.safety.monitors.loading import load_monitor

__all__ = ["SavedHead", "load_monitor", "read_head", "save_head"]
