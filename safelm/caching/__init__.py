"""Turns SeqIO tasks into token stores, shard by shard, for `safelm.cache_tasks`."""
