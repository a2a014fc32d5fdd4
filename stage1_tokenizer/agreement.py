"""What the parts of a tokenizer and its input must agree on, and how a latent space is known.

Letters: K latents, C latent channels.
"""

import hashlib
import json
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from stage1_tokenizer.bottleneck import Bottleneck
from stage1_tokenizer.encoder import Encoder


def check_sizes(encoder: Encoder, bottleneck: Bottleneck, parts: Mapping[str, Any]) -> None:
    """K is the encoder's and C the bottleneck's; every other part by name (None: not there) must have the same.

    A size is an attribute, or else an argument of the constructor; a part that has neither cannot disagree. Raises
    ValueError naming the first two parts that do.
    """
    sizes = {
        "num_latents": ("encoder.num_latents", encoder.num_latents),
        "latent_dim": ("bottleneck.latent_dim", bottleneck.latent_dim),
    }
    for name, part in parts.items():
        for size, (owner, wanted) in sizes.items():
            got = getattr(part, size, part.spec["init_args"].get(size, wanted)) if part is not None else wanted
            if got != wanted:
                raise ValueError(f"{owner} is {wanted} but {name}.{size} is {got}; make them equal.")


def is_count(value: Any) -> bool:
    """True for whole numbers, those of a traced shape too; a bool is none."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """True for real numbers, NaN among them; a bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_images(images: Tensor, size: int, look: bool) -> Tensor:
    """The images in float32. Raises ValueError unless they are (B,3,size,size), B >= 1, and floating point; with `look`
    also finite and in [-1, 1], which waits for the device."""
    if not isinstance(images, Tensor):
        raise ValueError(f"got images as {type(images).__name__}, wanted a tensor (B, 3, {size}, {size}).")
    if images.ndim != 4 or images.shape[1:] != (3, size, size) or images.shape[0] == 0:
        raise ValueError(f"got images of shape {tuple(images.shape)}, wanted (B, 3, {size}, {size}); resize them.")
    if not images.is_floating_point():
        raise ValueError(f"got images of dtype {images.dtype}, wanted float in [-1, 1]; use x / 127.5 - 1.")
    if look and not torch.compiler.is_compiling():
        low, high = images.amin().item(), images.amax().item()
        if not (low >= -1.01 and high <= 1.01):  # also false for NaN
            raise ValueError(f"got pixels within [{low:.3g}, {high:.3g}], wanted finite values in [-1, 1].")
    return images.float()


def check_latents(z: Tensor, latent_dim: int) -> Tensor:
    """The latents in float32. Raises ValueError unless they are (B,k,latent_dim), B >= 1, and floating point."""
    if not isinstance(z, Tensor):
        raise ValueError(f"got latents as {type(z).__name__}, wanted a tensor (B, k, {latent_dim}).")
    if z.ndim != 3 or z.shape[-1] != latent_dim or z.shape[0] == 0 or not z.is_floating_point():
        raise ValueError(f"got {z.dtype} latents of shape {tuple(z.shape)}, wanted (B, k, {latent_dim}) of floats.")
    return z.float()


def fingerprint_of(described: str, state: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of a latent space: `describe`'s text, encoder, bottleneck, linear path and statistics."""
    digest = hashlib.sha256(described.encode())
    for name, tensor in sorted(state.items()):
        if name.startswith(("encoder.", "bottleneck.", "linear_path.", "latent_")):
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def describe(encoder: dict[str, Any], bottleneck: dict[str, Any]) -> str:
    """Specs of encoder and bottleneck as the text that a fingerprint begins with.

    A loaded tokenizer keeps the text of its export: classes move and constructors gain arguments, and a latent space
    stays what it was.
    """
    return json.dumps([encoder, bottleneck], sort_keys=True)
