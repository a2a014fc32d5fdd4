"""From pairs to shards: chunks, engines, filters, manifest, checks."""
