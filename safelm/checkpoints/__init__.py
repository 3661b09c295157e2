"""Orbax checkpoints that are sealed, verified, and restored straight into shards."""
