"""A refactor proves itself: what shipped configs compute, as numbers that must not change.

For a config (and overlays), shrunk where it is large: the loss of the first five steps at a fixed seed in float32, and
fingerprints of `encode`, `decode` and `sample` on fixed inputs after these steps. `same_numbers.json` holds them.

    python -m tests.same_numbers            compare, to the last bit; exit status 1 where something differs
    python -m tests.same_numbers --record   write them anew, after a change of arithmetic that was meant

Bits are those of one machine; the test (test_same_numbers.py) allows for another one's rounding.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.reading.datamodule import ImageDataModule
from stage1_tokenizer.training.lit_tokenizer import LitTokenizer
from stage2_prior.training.latent_data import PriorDataModule
from stage2_prior.training.lit_prior import LitPrior
from tests.benchmarks.bench_tokenizers import Parsed

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path(__file__).with_suffix(".json")
CAPTIONS = ["a photo of a cat", "a large red circle", "a small blue star left of a green square", "a photo of a ship"]
STAGES: dict[str, tuple[type, type]] = {
    "stage1": (LitTokenizer, ImageDataModule),
    "stage2": (LitPrior, PriorDataModule),
}
T, E, D = (f"--model.init_args.tokenizer.init_args.{part}" for part in ("text", "encoder", "decoder"))
SMALL_256 = [  # imagenet256's parts at 64 pixels and width 32
    "--sizes.image_size=64",
    "--sizes.width=32",
    f"{E}.init_args.trunk.init_args.depth=1",
    f"{E}.init_args.trunk.init_args.heads=2",
    f"{E}.init_args.trunk.init_args.stem_width=8",
    f"{E}.init_args.depth=1",
    f"{E}.init_args.heads=2",
    f"{D}.init_args.width=32",
    f"{D}.init_args.depth=1",
    f"{D}.init_args.heads=2",
    f"{D}.init_args.tail_channels=8",
    f"{T}.init_args.tower.init_args.width=32",
    f"{T}.init_args.tower.init_args.layers=1",
    f"{T}.init_args.tower.init_args.heads=2",
]
PRIOR = "--model.prior.init_args"
SMALL_PRIOR_256 = [
    "--sizes.width=64",
    f"{PRIOR}.backbone.init_args.depth=2",
    f"{PRIOR}.backbone.init_args.heads=2",
    f"{PRIOR}.head.init_args.net.init_args.width=64",
]
# name -> (stage, configs one over another, options that shrink it)
CASES: dict[str, tuple[str, list[str], list[str]]] = {
    "demo": ("stage1", ["stage1/demo"], []),
    "scenes64": ("stage1", ["stage1/scenes64"], []),
    "cifar10": ("stage1", ["stage1/cifar10"], []),
    "imagenet256": ("stage1", ["stage1/imagenet256"], SMALL_256),
    **{
        f"demo+{name}": ("stage1", ["stage1/demo", f"variants/{name}"], [])
        for name in (
            "captioning",
            "fsq",
            "narrow_latents",
            "noise_bottleneck",
            "text_full_length",
            "text_last_query",
            "text_max_query",
            "text_sigmoid",
            "titok",
            "vq",
        )
    },
    "cifar10+transformers": ("stage1", ["stage1/cifar10", "variants/transformers"], []),
    "cifar10+flow_decoder": ("stage1", ["stage1/cifar10", "variants/flow_decoder"], []),
    "prior demo": ("stage2", ["stage2/demo"], []),
    "prior scenes64": ("stage2", ["stage2/scenes64"], []),
    "prior cifar10": ("stage2", ["stage2/cifar10"], []),
    "prior imagenet256": ("stage2", ["stage2/imagenet256"], SMALL_PRIOR_256),
    **{
        f"prior demo+{name}": ("stage2", ["stage2/demo", f"variants/prior_{name}"], [])
        for name in (
            "adaln_head",
            "added_condition",
            "captioning",
            "clean_output",
            "diffusion_head",
            "masked",
            "mse_head",
            "noise_extended",
            "noise_output",
            "random_order",
            "reversed_order",
            "rotary_backbone",
            "unconditional",
            "word_sum",
        )
    },
    "prior cifar10+class_label": ("stage2", ["stage2/cifar10", "variants/prior_class_label"], []),
    "prior cifar10+patches": ("stage2", ["stage2/cifar10", "variants/prior_patches"], []),
}


def build(stage: str, configs: list[str], options: list[str]) -> Any:
    """The lit module of these configs (names of shipped ones, or paths), as `fit` builds it, at seed 0."""
    torch.manual_seed(0)
    files = [f"--config={name if name.endswith('.yaml') else ROOT / 'configs' / f'{name}.yaml'}" for name in configs]
    return Parsed(stage, *STAGES[stage], stage, ["fit", *files, "--run_dir=none", *options]).model


def pictures(n: int, size: int) -> Tensor:
    """(n,3,size,size) smooth random pictures in [-1, 1]."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")


def fingerprint(x: Tensor) -> dict[str, Any]:
    """A hash of the bits, and three numbers for another machine: mean, standard deviation, first value."""
    x = x.detach().float().contiguous()
    hashed = hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16]
    return {"hash": hashed, "values": [x.mean().item(), x.std().item(), x.flatten()[0].item()]}


def tokenizer_numbers(lit: Any) -> dict[str, Any]:
    tokenizer = lit.tokenizer.train()
    if tokenizer.text is not None:
        tokenizer.vocabulary.fit(CAPTIONS)
    images = pictures(4, tokenizer.image_size)
    if tokenizer.linear_path is not None:
        tokenizer.linear_path.fit(pictures(40, tokenizer.image_size))
    ids = tokenizer.vocabulary.encode(CAPTIONS)[0] if tokenizer.text is not None else None
    optimizer, losses = lit.tokenizer_optimizer(), []
    torch.manual_seed(2)
    for step in range(5):
        parts, _ = tokenizer.losses(images, ids, step)
        loss = tokenizer.total(parts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tokenizer.eval()
    with torch.no_grad():
        z = tokenizer.encode(images)
        short = tokenizer.decode(z[:, :2], generator=torch.Generator().manual_seed(3))
        full = tokenizer.decode(z, generator=torch.Generator().manual_seed(3))
    return {"losses": losses, "encode": fingerprint(z), "decode": fingerprint(full), "decode 2": fingerprint(short)}


def prior_numbers(lit: Any) -> dict[str, Any]:
    prior = lit.prior.train()
    if prior.vocabulary is not None:
        prior.vocabulary.fit(CAPTIONS)
    captions = [CAPTIONS[0], CAPTIONS[3]] * 2 if "class" in type(prior.words).__name__.lower() else CAPTIONS
    z = torch.randn(4, prior.num_latents, prior.latent_dim, generator=torch.Generator().manual_seed(1))
    optimizer = lit.optimizer_options.build(prior)
    losses = []
    torch.manual_seed(2)
    for _ in range(5):
        parts = prior.objective(z, prior.encode_text(captions), weights=lit.position_weights)
        loss = torch.stack(list(parts.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    prior.eval()
    with torch.no_grad():
        drawn = prior.sample(captions[:2], generator=torch.Generator().manual_seed(3))
    return {"losses": losses, "sample": fingerprint(drawn)}


def numbers(name: str) -> dict[str, Any]:
    """What case `name` computes here and now."""
    stage, configs, options = CASES[name]
    lit = build(stage, configs, options)
    return tokenizer_numbers(lit) if stage == "stage1" else prior_numbers(lit)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="write the numbers instead of comparing them")
    parser.add_argument("--only", nargs="*", default=list(CASES), help="names of cases")
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order
    if options.record:
        known = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
        known |= {name: numbers(name) for name in options.only}
        RECORD.write_text(json.dumps({name: known[name] for name in CASES if name in known}, indent=1) + "\n")
        return 0
    known, differ = json.loads(RECORD.read_text()), 0
    for name in options.only:
        got = numbers(name)
        wrong = [key for key, value in known[name].items() if got[key] != value]
        differ += bool(wrong)
        print(f"{name}: " + (f"differs in {', '.join(wrong)}" if wrong else "the same"), flush=True)
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
