"""How a tokenizer is trained: the command line, the Lightning modules, optimiser, checkpoints, losses."""
