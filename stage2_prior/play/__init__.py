"""A local page to play with a tokenizer and its prior."""
