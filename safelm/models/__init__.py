"""The decoder: config, layers, attention and its kernels, losses, and how arrays are sharded."""
