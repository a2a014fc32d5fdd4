"""Stage 1: images to an ordered line of continuous latents, and any prefix of it back to pixels."""

from stage1_tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
