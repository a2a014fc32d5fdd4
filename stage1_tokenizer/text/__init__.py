"""Text supervision of the first latents."""
