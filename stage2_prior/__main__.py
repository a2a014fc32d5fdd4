"""Command line of stage 2.

    python -m stage2_prior fit|validate|test|predict --config configs/stage2/NAME.yaml
    python -m stage2_prior play --run_dir runs/demo
    python -m stage2_prior compare|sweep|probe|showcase|patches|pyramid|frequencies|autoencoder|titok|amed --help

The first four are Lightning's; the others read finished runs or data, and load no config.
"""

import importlib
import sys

from stage1_tokenizer.commands import answered

PROG = "python -m stage2_prior"
OF_RUNS = {
    "fit": "train a prior on latent shards, then export it to RUN_DIR/prior",
    "validate": "loss of the exported prior on the val split",
    "test": "draw pictures for held-out captions and measure them: RUN_DIR/generation/report.html",
    "predict": "draw a picture for every caption of a file (--data.captions_file) into RUN_DIR/images",
}
OTHERS = {  # command -> its module, what it does
    "play": ("stage2_prior.play.command", "a local page to unspool pictures, write captions, edit and read"),
    "compare": ("stage2_prior.evaluation.compare", "figures of finished runs side by side, over their seeds"),
    "sweep": (
        "stage2_prior.evaluation.sweep",
        "what guidance, solvers and evaluations buy, and their cost",
    ),
    "probe": ("stage2_prior.evaluation.probe", "linear probes of a prior's hidden states, by position and depth"),
    "showcase": ("stage2_prior.evaluation.showcase", "the README's picture and table, made from run folders"),
    "patches": ("stage2_prior.variants.patches", "raw patches as a line of latents: the control of a learned line"),
    "pyramid": ("stage2_prior.variants.pyramid", "a pyramid of scales as a line of latents"),
    "frequencies": ("stage2_prior.variants.frequencies", "frequencies, lowest first, as a line of latents"),
    "autoencoder": ("stage2_prior.variants.autoencoder", "a pretrained KL autoencoder's grid as a line of latents"),
    "titok": ("stage2_prior.variants.released_titok", "a released TiTok's or TA-TiTok's latents"),
    "amed": ("stage2_prior.heads.amed", "distil a solver of few evaluations for a trained prior"),
}


def main(args: list[str] | None = None) -> int:
    """Run one command; `args` as on the command line, None for the process's own. Returns the exit status."""
    word, *rest = (sys.argv[1:] if args is None else args) or [""]
    status = answered(PROG, word, OF_RUNS | {command: purpose for command, (_, purpose) in OTHERS.items()})
    if status is not None:
        return status
    if word in OTHERS:
        return int(importlib.import_module(OTHERS[word][0]).main(rest))
    from stage1_tokenizer.training.cli import run_cli
    from stage2_prior.training.latent_data import PriorDataModule
    from stage2_prior.training.lit_prior import LitPrior

    run_cli("stage2", LitPrior, PriorDataModule, PROG, args, purposes=OF_RUNS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
