"""How a prior is trained and what it reads."""
