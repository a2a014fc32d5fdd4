"""Other priors: each keeps the contract of `base.Prior`."""
