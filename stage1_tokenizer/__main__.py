"""Command line of stage 1.

    python -m stage1_tokenizer fit|validate|test|predict --config configs/stage1/NAME.yaml
    python -m stage1_tokenizer reconstruct --tokenizer DIR photo.jpg --latents 1 2 4 8 --out grid.png
    python -m stage1_tokenizer export_onnx --tokenizer DIR --out DIR
    python -m stage1_tokenizer glyphs --tokenizer DIR --data SHARDS --out DIR
    python -m stage1_tokenizer judge --data SHARDS --image_size 64 --out DIR

The first four are Lightning's; the others load no config.
"""

import importlib
import sys

from stage1_tokenizer.commands import answered

PROG = "python -m stage1_tokenizer"
OF_RUNS = {
    "fit": "train a tokenizer on image shards, then export it to RUN_DIR/tokenizer",
    "validate": "PSNR of the exported tokenizer by prefix length, on the val split",
    "test": "measure the exported tokenizer on held-out pictures: RUN_DIR/reconstruction/report.html",
    "predict": "encode all pictures to latent shards in RUN_DIR/latents, which stage 2 trains on",
}
OTHERS = {  # command -> its module, what it does
    "reconstruct": ("stage1_tokenizer.evaluation.reconstruct", "pictures from their first k latents, as one grid"),
    "export_onnx": ("stage1_tokenizer.graphs", "write encode.onnx and decode.onnx for programs without torch"),
    "judge": (
        "stage1_tokenizer.evaluation.judge",
        "train a judge of captions on ImageNet features, for stage 2's report",
    ),
    "glyphs": ("stage1_tokenizer.evaluation.glyph_reading", "how many characters a line of latents can carry"),
}


def main(args: list[str] | None = None) -> int:
    """Run one command; `args` as on the command line, None for the process's own. Returns the exit status."""
    word, *rest = (sys.argv[1:] if args is None else args) or [""]
    status = answered(PROG, word, OF_RUNS | {command: purpose for command, (_, purpose) in OTHERS.items()})
    if status is not None:
        return status
    if word in OTHERS:
        return int(importlib.import_module(OTHERS[word][0]).main(rest))
    from data.reading.datamodule import ImageDataModule
    from stage1_tokenizer.training.cli import run_cli
    from stage1_tokenizer.training.latent_writer import LatentWriter
    from stage1_tokenizer.training.lit_tokenizer import LitTokenizer

    run_cli("stage1", LitTokenizer, ImageDataModule, PROG, args, [LatentWriter()], OF_RUNS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
