"""Decoding, resizing and encoding of single pictures."""
