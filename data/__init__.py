"""Image-text pairs: from whatever people have (`sources`) to shards (`prepare`, `shards`) to batches (`datamodule`).

This room imports no model code. Nothing is imported here either, so that `python -m data prepare` starts without torch.
"""
