"""`python -m stage1_tokenizer fit|validate|test|predict --config configs/stage1/NAME.yaml`."""

from data.reading.datamodule import ImageDataModule
from stage1_tokenizer.training.cli import run_cli
from stage1_tokenizer.training.lit_tokenizer import LitTokenizer


def main(args: list[str] | None = None) -> None:
    """Run one command; `args` as on the command line, None for the process's own."""
    run_cli("stage1", LitTokenizer, ImageDataModule, "python -m stage1_tokenizer", args)


if __name__ == "__main__":
    main()
