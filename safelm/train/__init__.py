"""Training: the run, its step, optimizer, metrics, faults, and going on after a stop."""
