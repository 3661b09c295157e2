"""One page over any number of checkpoints: what was measured, under which protocol, and how it changed in training."""
