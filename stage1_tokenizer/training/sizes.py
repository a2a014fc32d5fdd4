"""Sizes once: image side, K, C and width stand in one place of a config and reach the parts when it is parsed.

    sizes: {image_size: 32, num_latents: 24, latent_dim: 5, width: 128}

Each is linked (jsonargparse's `link_arguments`) to the arguments of parts that must agree with it; a part whose class
has no such argument is left alone, and a config without `sizes` names them part by part. `--print_config` leaves linked
arguments out. A part with another value than this and its class's default is an error of one sentence.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from stage1_tokenizer.spec import find_class

TOKENIZER, PRIOR = "model.tokenizer", "model.prior"
# (size, part, its argument): parts by their path without init_args
LINKS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "stage1": (
        ("image_size", "data", "image_size"),
        ("image_size", TOKENIZER, "image_size"),
        ("image_size", f"{TOKENIZER}.decoder", "image_size"),
        ("image_size", f"{TOKENIZER}.linear_path", "image_size"),
        *(
            ("num_latents", f"{TOKENIZER}.{part}", "num_latents")
            for part in (
                "encoder",
                "bottleneck",
                "decoder",
                "lengths",
                "linear_path",
                "predictor",
                "alignment",
                "text.reader",
                "text.captioner",
            )
        ),
        *(
            ("latent_dim", f"{TOKENIZER}.{part}", "latent_dim")
            for part in (
                "bottleneck",
                "decoder",
                "linear_path",
                "predictor",
                "alignment",
                "text.reader",
                "text.captioner",
            )
        ),
        *(
            (size, f"{TOKENIZER}.encoder.trunk{part}", size)
            for size in ("image_size", "width")
            for part in ("", ".first", ".second")
        ),
        ("width", f"{TOKENIZER}.bottleneck", "width"),
    ),
    "stage2": (
        ("num_latents", PRIOR, "num_latents"),
        ("latent_dim", PRIOR, "latent_dim"),
        ("latent_dim", f"{PRIOR}.head", "latent_dim"),
        ("latent_dim", f"{PRIOR}.head.net", "latent_dim"),
        ("width", f"{PRIOR}.backbone", "width"),
        ("width", f"{PRIOR}.condition", "width"),
        ("width", f"{PRIOR}.head", "cond_dim"),
        ("width", f"{PRIOR}.head.net", "cond_dim"),
    ),
}


class SizeError(ValueError):
    """A part of a config that contradicts its sizes."""


@dataclass(frozen=True)
class Sizes:
    """Sizes that several parts share; None leaves each part to itself.

    Args:
        image_size: side of the pictures in pixels.
        num_latents: K.
        latent_dim: C, floats of a latent.
        width: D, of the features that become latents (stage 1), or of the transformer (stage 2).
    """

    image_size: int | None = None
    num_latents: int | None = None
    latent_dim: int | None = None
    width: int | None = None


def link_sizes(parser: LightningArgumentParser, stage: str) -> None:
    """Add the group `sizes` to the parser of a stage, linked to the parts of its model and data."""
    parser.add_class_arguments(Sizes, "sizes")
    for size, part, argument in LINKS[stage]:
        root, *path = part.split(".")
        steps = [step for name in path for step in ("init_args", name)]
        target = ".".join([root, *steps, "init_args", argument])
        source = (f"sizes.{size}", root)
        compute = agreed(size, part, steps, argument)
        parser.link_arguments(source, target, compute_fn=compute, apply_on="parse")


def agreed(size: str, part: str, steps: list[str], argument: str) -> Callable[[int | None, Any], Any]:
    """The value of a part's argument, given the size and the config of `model` or `data`."""

    def value(wanted: int | None, root: Any) -> Any:
        node = root
        for step in steps:
            node = node.get(step) if isinstance(node, Namespace) else None
        got = node.get("init_args", Namespace()).get(argument) if isinstance(node, Namespace) else None
        if wanted is None or got is None or not isinstance(node, Namespace):
            return got if wanted is None else wanted
        if got not in (wanted, default_of(node.class_path, argument)):
            raise SizeError(
                f"sizes.{size} is {wanted}, but {part}.{argument} is {got}: leave one of them out, or make them equal."
            )
        return wanted

    return value


def default_of(class_path: str, argument: str) -> Any:
    """The default of a constructor's argument."""
    return inspect.signature(find_class(class_path)).parameters[argument].default
