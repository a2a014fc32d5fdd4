"""Other encoders, bottlenecks and decoders: each keeps a contract of the model and is unknown to its files."""
