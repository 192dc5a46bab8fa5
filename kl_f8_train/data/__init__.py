"""Which images, from where? Plan, shards, cache, loaders."""
