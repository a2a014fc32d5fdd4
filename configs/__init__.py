"""Shipped configs: stage1/ and stage2/ one file per run, variants/ overlays of a few lines, data/ options of `prepare`.

They are a package so that an installed copy finds them: `--config demo` means stage1/demo.yaml or stage2/demo.yaml of
the command's stage, `--config variants/no_text` an overlay, wherever the command is run.
"""
