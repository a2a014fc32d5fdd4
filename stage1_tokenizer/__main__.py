"""Command line of stage 1.

    python -m stage1_tokenizer fit|validate|test|predict --config configs/stage1/NAME.yaml
    python -m stage1_tokenizer reconstruct --tokenizer DIR photo.jpg --latents 1 2 4 8 --out grid.png
    python -m stage1_tokenizer export_onnx --tokenizer DIR --out DIR
    python -m stage1_tokenizer glyphs --tokenizer DIR --data SHARDS --out DIR

The first four are Lightning's; the others work on an exported folder, and load no config.
"""

import importlib
import sys

COMMANDS = {
    "reconstruct": "stage1_tokenizer.evaluation.reconstruct",
    "export_onnx": "stage1_tokenizer.graphs",
    "glyphs": "stage1_tokenizer.evaluation.glyph_reading",
}


def main(args: list[str] | None = None) -> int:
    """Run one command; `args` as on the command line, None for the process's own. Returns the exit status."""
    word, *rest = (sys.argv[1:] if args is None else args) or [""]
    if word in COMMANDS:
        status: int = importlib.import_module(COMMANDS[word]).main(rest)
        return status
    from data.reading.datamodule import ImageDataModule
    from stage1_tokenizer.training.cli import run_cli
    from stage1_tokenizer.training.latent_writer import LatentWriter
    from stage1_tokenizer.training.lit_tokenizer import LitTokenizer

    run_cli("stage1", LitTokenizer, ImageDataModule, "python -m stage1_tokenizer", args, [LatentWriter()])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
