"""SeqIO tasks to token stores: what `safelm.cache_tasks` does, shard by shard."""
