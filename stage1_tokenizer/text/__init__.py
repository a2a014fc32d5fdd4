"""Text supervision: what captions ask of the first latents."""
