"""Latents that are a fixed map of the pixels: linear maps, of which a whole line loses nothing, or a given autoencoder.

The counterpart of a learned tokenizer with the same contract (`encode`, `decode`, statistics, identity), so that every
prior, head and order can be asked what learning the latents is worth. Members: raw patches (`patches`), a pyramid of
scales (`pyramid`), frequencies (`frequencies`), released latents (`autoencoder`, `titok`). A prefix decodes with the
missing latents at their mean.

    python -m stage2_prior patches --run_dir runs/patches --data runs/demo/data --image_size 32 --patch_size 8

and likewise for the others; it writes runs/patches/tokenizer (an export that the prior's commands accept) and
runs/patches/latents.

Letters: B batch, K latents, C latent channels, S side of the picture.
"""

import argparse
import hashlib
from collections.abc import Callable, Iterable
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


class FixedLatents(Spec, nn.Module):
    """Contract of the members: `cut` a picture and `join` it; statistics per position and channel here.

    Args:
        image_size: S. num_latents, latent_dim: K and C.
        identity: what two spaces of equal statistics differ in.
    """

    latent_mean: Tensor
    latent_scale: Tensor

    def __init__(self, image_size: int, num_latents: int, latent_dim: int, identity: str):
        super().__init__()
        self.image_size, self.num_latents, self.latent_dim, self.identity = (
            image_size,
            num_latents,
            latent_dim,
            identity,
        )
        self.register_buffer("latent_mean", torch.zeros(num_latents, latent_dim))
        self.register_buffer("latent_scale", torch.ones(num_latents, latent_dim))

    def cut(self, images: Tensor) -> Tensor:
        """images (B,3,S,S) -> latents (B,K,C) before standardisation."""
        raise NotImplementedError

    def join(self, latents: Tensor) -> Tensor:
        """The inverse of `cut`, of latents (B,K,C) that need not be a picture's -> images (B,3,S,S), unbounded."""
        raise NotImplementedError

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and noise of the latents (B,K,C) before standardisation; a member without noise leaves it at 0."""
        latents = self.cut(images)
        return latents, torch.zeros_like(latents)

    def encode(self, images: Tensor) -> Tensor:
        """images (B,3,S,S) in [-1,1] -> z (B,K,C), standardised."""
        return self.posterior(images)[0]

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of z, each (B,K,C)."""
        with torch.autocast(images.device.type, enabled=False):  # bfloat16 would lose what a fixed map keeps
            mean, std = self.moments(images.float())
        return (mean - self.latent_mean) / self.latent_scale, std / self.latent_scale

    def decode(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """z (B,k,C) -> images (B,3,S,S) in [-1,1]; latents from k on are at their mean."""
        if z.ndim != 3 or not 1 <= z.shape[1] <= self.num_latents or z.shape[2] != self.latent_dim:
            raise PriorError(
                f"got latents of shape {tuple(z.shape)}, wanted (B, 1 to {self.num_latents}, {self.latent_dim})."
            )
        z = F.pad(z.float(), (0, 0, 0, self.num_latents - z.shape[1]))
        with torch.autocast(z.device.type, enabled=False):
            return self.join(z * self.latent_scale + self.latent_mean).clamp(-1, 1)

    @torch.no_grad()
    def fit_statistics(self, batches: Iterable[Tensor]) -> int:
        """Set mean and scale per position and channel from training pictures; returns how many were read."""
        n, total, square = 0, torch.zeros(()).double(), torch.zeros(()).double()
        for images in batches:
            mean, std = (x.double().cpu() for x in self.moments(images.float()))
            n, total, square = n + len(mean), total + mean.sum(0), square + (mean.square() + std.square()).sum(0)
        if n < 2:
            raise PriorError(f"got {n} pictures for the statistics, wanted at least 2; check the training split.")
        self.latent_mean.copy_(total / n)
        self.latent_scale.copy_((square / n - (total / n).square()).clamp_min(LEAST_SCALE**2).sqrt())
        return n

    @property
    def fingerprint(self) -> str:
        """Identity of this latent space: a hash of its sizes and statistics."""
        digest = hashlib.sha256(self.identity.encode())
        for tensor in (self.latent_mean, self.latent_scale):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def with_weights(fingerprint: str, module: nn.Module) -> str:
    """Identity of a latent space that weights belong to: a hash of `fingerprint` and the state of `module`."""
    digest = hashlib.sha256(fingerprint.encode())
    for _, tensor in sorted(module.state_dict().items()):
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def arguments(word: str, about: str) -> argparse.ArgumentParser:
    """What the commands of all members take."""
    parser = argparse.ArgumentParser(prog=f"python -m stage2_prior {word}", description=about)
    parser.add_argument("--run_dir", type=Path, required=True, help="folder that gets tokenizer/ and latents/")
    parser.add_argument("--data", type=Path, required=True, help="image shards")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=500)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parser


def run(
    parser: argparse.ArgumentParser, words: list[str] | None, build: Callable[[argparse.Namespace], FixedLatents]
) -> int:
    """Fit the statistics, export, and write latent shards of both splits; returns the exit status."""
    options = parser.parse_args(words)
    try:
        space = build(options).eval().to(options.device)
        images = ImageDataModule(str(options.data), options.batch_size, image_size=options.image_size)
        space.fit_statistics(batch["images"].to(options.device) for batch in images.train_dataloader())
        images.predict_splits = SPLITS
        for split, loader in zip(SPLITS, images.predict_dataloader(), strict=True):
            with LatentShardWriter(options.run_dir / "latents", split) as writer:
                for batch in loader:
                    with torch.no_grad():
                        moments = space.posterior(batch["images"].to(options.device))
                    writer.write_batch(batch, *(x.cpu() for x in moments))
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    sizes = (space.num_latents, space.latent_dim)
    write_latent_manifest(options.run_dir / "latents", *sizes, space.fingerprint, str(options.data))
    save_module(space, options.run_dir / "tokenizer")
    print(f"{sizes[0]} latents of {sizes[1]} floats: {options.run_dir / 'latents'}")
    return 0
