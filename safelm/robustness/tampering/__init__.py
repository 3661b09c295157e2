"""Attacks on weights: finetuning with and without adapters, abliteration, pruning, rounding, merging, tag erasure."""
