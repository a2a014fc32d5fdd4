"""How a tokenizer is judged: reconstruction, retrieval, distances, and the page that shows them."""
