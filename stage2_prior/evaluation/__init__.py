"""How a prior is judged: generation, distances, likelihood, sweeps and comparisons."""
