"""Distil a few-step solver (`heads.amed`) for the prior of a run, on the condition rows of its held-out latents.

    python -m stage2_prior.training.distil --run_dir runs/demo --steps 4      # writes runs/demo/prior_amed

The export is the run's prior with the distilled solver as its head's own; the prior of the run stays as it is.
"""

import argparse
from pathlib import Path

import torch

from data.reading.datamodule import LatentDataModule
from stage1_tokenizer.precision import default_device
from stage2_prior.base import Prior
from stage2_prior.captions import askable
from stage2_prior.heads.amed import fit_amed
from stage2_prior.heads.flow import FlowHead
from stage2_prior.prior import CausalPrior


def main(arguments: list[str] | None = None) -> Path:
    """Distil and export; returns the folder of the prior with its new default solver."""
    parser = argparse.ArgumentParser(prog="python -m stage2_prior.training.distil", description="Distil a solver.")
    parser.add_argument("--run_dir", type=Path, required=True, help="run with prior/ and latents/")
    parser.add_argument("--steps", type=int, default=4, help="evaluations of the head per latent, even")
    parser.add_argument(
        "--guidances", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0], help="scales that it will sample with"
    )
    parser.add_argument("--lines", type=int, default=500, help="held-out lines whose condition rows are used")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=default_device(), help="cpu or cuda")
    options = parser.parse_args(arguments)
    if options.steps < 2 or options.steps % 2:
        parser.error(f"got --steps {options.steps}, wanted an even number of at least 2")
    prior = Prior.from_pretrained(options.run_dir / "prior", device=options.device)
    if not isinstance(prior, CausalPrior) or not isinstance(prior.head, FlowHead):
        parser.error(f"{options.run_dir / 'prior'} has no flow head to distil on")
    data = LatentDataModule(str(options.run_dir / "latents"))
    info = data.latent_info
    prior.check_space(info["num_latents"], info["latent_dim"], info["tokenizer_fingerprint"])
    held, captions = askable(prior.words.ask, data.arrays("val", options.lines))
    torch.manual_seed(options.seed)
    with torch.no_grad():
        z = (held["latents"] + held["latents_std"] * torch.randn(held["latents"].shape)).to(options.device)
        text = prior.encode_text(captions)
        null = prior.without_caption(text, torch.ones(len(captions), dtype=torch.bool, device=text.ids.device))
        cond, uncond = (prior.conditions(z, rows).flatten(0, 1) for rows in (text, null))
    solver = fit_amed(prior.head, cond, uncond, options.guidances, options.steps // 2)
    prior.head.solver = solver
    prior.spec["init_args"]["head"]["init_args"]["solver"] = solver.spec
    folder = prior.save_pretrained(options.run_dir / "prior_amed")
    places = ", ".join(f"{where:.3f}" for where in solver.where.tolist())
    print(f"AMED with {options.steps} evaluations (second ones at {places} of their intervals): {folder}")
    return folder


if __name__ == "__main__":
    main()
