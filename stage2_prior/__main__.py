"""Command line of stage 2.

    python -m stage2_prior fit|validate|test|predict --config configs/stage2/NAME.yaml
    python -m stage2_prior play --run_dir runs/demo
    python -m stage2_prior compare|sweep|probe|showcase|patches|pyramid|frequencies|autoencoder|amed --help

The first four are Lightning's; the others read finished runs or data, and load no config.
"""

import importlib
import sys

COMMANDS = {
    "compare": "stage2_prior.evaluation.compare",
    "sweep": "stage2_prior.evaluation.sweep",
    "probe": "stage2_prior.evaluation.probe",
    "showcase": "stage2_prior.evaluation.showcase",
    "patches": "stage2_prior.variants.patches",
    "pyramid": "stage2_prior.variants.pyramid",
    "frequencies": "stage2_prior.variants.frequencies",
    "autoencoder": "stage2_prior.variants.autoencoder",
    "amed": "stage2_prior.heads.amed",
    "play": "stage2_prior.play.command",
}


def main(args: list[str] | None = None) -> int:
    """Run one command; `args` as on the command line, None for the process's own. Returns the exit status."""
    word, *rest = (sys.argv[1:] if args is None else args) or [""]
    if word in COMMANDS:
        status: int = importlib.import_module(COMMANDS[word]).main(rest)
        return status
    from stage1_tokenizer.training.cli import run_cli
    from stage2_prior.training.latent_data import PriorDataModule
    from stage2_prior.training.lit_prior import LitPrior

    run_cli("stage2", LitPrior, PriorDataModule, "python -m stage2_prior", args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
