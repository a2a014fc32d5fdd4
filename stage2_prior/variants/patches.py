"""Raw pixel patches as latents: the lossless input, a picture cut on a grid and nothing else.

The counterpart of a learned tokenizer with the same contract (`encode`, `decode`, statistics, identity), so that every
prior, head and order can be asked what learning the latents is worth. The line has no order of its own: choose raster,
spiral or zigzag (stage2_prior.orders). A prefix decodes with the missing patches at their mean.

    python -m stage2_prior patches --run_dir runs/patches --data runs/demo/data --image_size 32 --patch_size 8

writes runs/patches/tokenizer (an export that the prior's commands accept) and runs/patches/latents.

Letters: B batch, K patches = (S / p)^2 row by row, C = 3 p^2 channels, S side of the picture, p side of a patch.
"""

import argparse
import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.reading.datamodule import ImageDataModule
from data.reading.latents import LatentShardWriter, write_latent_manifest
from data.schema import SPLITS
from stage1_tokenizer.export import save_module
from stage1_tokenizer.spec import Spec
from stage2_prior.latent_space import PriorError

LEAST_SCALE = 0.02  # of a channel, so that a pixel that never changes is not divided by nothing


class PatchLatents(Spec, nn.Module):
    """Patches of `patch_size` pixels of pictures of `image_size`, standardised per patch and channel."""

    latent_mean: Tensor
    latent_scale: Tensor

    def __init__(self, image_size: int = 32, patch_size: int = 8):
        super().__init__()
        if patch_size < 1 or image_size % patch_size:
            raise PriorError(f"got patch_size={patch_size} for pictures of {image_size}, wanted a divisor of the side.")
        self.image_size, self.patch_size = image_size, patch_size
        self.num_latents, self.latent_dim = (image_size // patch_size) ** 2, 3 * patch_size**2
        self.register_buffer("latent_mean", torch.zeros(self.num_latents, self.latent_dim))
        self.register_buffer("latent_scale", torch.ones(self.num_latents, self.latent_dim))

    def cut(self, images: Tensor) -> Tensor:
        """images (B,3,S,S) -> patches (B,K,C)."""
        return F.pixel_unshuffle(images.float(), self.patch_size).flatten(2).transpose(1, 2)

    def encode(self, images: Tensor) -> Tensor:
        """images (B,3,S,S) in [-1,1] -> z (B,K,C), standardised; loses nothing."""
        return (self.cut(images) - self.latent_mean) / self.latent_scale

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(encode(images), zeros): there is no noise in it."""
        z = self.encode(images)
        return z, torch.zeros_like(z)

    def decode(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """z (B,k,C) -> images (B,3,S,S) in [-1,1]; patches from k on are at their mean."""
        if z.ndim != 3 or not 1 <= z.shape[1] <= self.num_latents or z.shape[2] != self.latent_dim:
            raise PriorError(
                f"got latents of shape {tuple(z.shape)}, wanted (B, 1 to {self.num_latents}, {self.latent_dim})."
            )
        z = F.pad(z.float(), (0, 0, 0, self.num_latents - z.shape[1]))
        side = self.image_size // self.patch_size
        raw = (z * self.latent_scale + self.latent_mean).transpose(1, 2).unflatten(2, (side, side))
        return F.pixel_shuffle(raw, self.patch_size).clamp(-1, 1)

    @torch.no_grad()
    def fit_statistics(self, batches: Iterable[Tensor]) -> int:
        """Set mean and scale per patch and channel from training pictures; returns how many were read."""
        n, total, square = 0, torch.zeros(()).double(), torch.zeros(()).double()
        for images in batches:
            patches = self.cut(images).double()
            n, total, square = n + len(patches), total + patches.sum(0), square + patches.square().sum(0)
        if n < 2:
            raise PriorError(f"got {n} pictures for the statistics, wanted at least 2; check the training split.")
        self.latent_mean.copy_(total / n)
        self.latent_scale.copy_((square / n - (total / n).square()).clamp_min(LEAST_SCALE**2).sqrt())
        return n

    @property
    def fingerprint(self) -> str:
        """Identity of this latent space: a hash of its sizes and statistics."""
        digest = hashlib.sha256(f"patches {self.image_size} {self.patch_size}".encode())
        for tensor in (self.latent_mean, self.latent_scale):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def main(arguments: list[str] | None = None) -> int:
    """Fit the statistics, export, and write latent shards of both splits; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m stage2_prior patches", description="Raw pixel patches as latents.")
    parser.add_argument("--run_dir", type=Path, required=True, help="folder that gets tokenizer/ and latents/")
    parser.add_argument("--data", type=Path, required=True, help="image shards")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--patch_size", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=500)
    options = parser.parse_args(arguments)
    try:
        patches = PatchLatents(options.image_size, options.patch_size).eval()
        images = ImageDataModule(str(options.data), options.batch_size, image_size=options.image_size)
        patches.fit_statistics(batch["images"] for batch in images.train_dataloader())
        images.predict_splits = SPLITS
        for split, loader in zip(SPLITS, images.predict_dataloader(), strict=True):
            with LatentShardWriter(options.run_dir / "latents", split) as writer:
                for batch in loader:
                    writer.write_batch(batch, *patches.posterior(batch["images"]))
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    sizes = (patches.num_latents, patches.latent_dim)
    write_latent_manifest(options.run_dir / "latents", *sizes, patches.fingerprint, str(options.data))
    save_module(patches, options.run_dir / "tokenizer")
    print(f"{sizes[0]} patches of {sizes[1]} floats: {options.run_dir / 'latents'}")
    return 0


if __name__ == "__main__":
    from stage2_prior.variants.patches import (
        main as run,  # not this module: an export must not name a class of `__main__`
    )

    raise SystemExit(run())
