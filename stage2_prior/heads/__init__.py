"""The per-latent losses: each turns the transformer's output into a distribution of one latent."""
