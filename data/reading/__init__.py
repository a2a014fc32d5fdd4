"""From shards to batches: index, order, data modules."""
