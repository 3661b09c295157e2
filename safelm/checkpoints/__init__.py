"""Orbax checkpoints with fingerprints that are verified when they are restored straight into shards."""
