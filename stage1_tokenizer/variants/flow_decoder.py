"""Stochastic pixel decoder: a small transformer that predicts the clean image along a linear path (no VAE).

A deterministic decoder of a short prefix shows the average of all pictures that the prefix leaves open: a blur. This
one draws one of them. x_t = (1-t) x + t noise; the network sees x_t, t and the visible latents and says the clean image
x (as Li & He 2025, "Back to basics", argue for pixel space); the loss is the squared error of the velocity it implies,
(x - x^)^2 / t^2 with the denominator floored. Training times are logit-normal, shifted towards noise with resolution
(Hoogeboom et al. 2023, "simple diffusion": larger images need more noise for the same signal-to-noise ratio), and
sampling is the midpoint rule on a grid refined at the data end.

Letters: B batch, K latents, C channels, N pixel patches, D width, t time (0 data, 1 noise).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.decoder import ConvTail, Decoder
from stage1_tokenizer.flow import interpolate, midpoint, power_grid, v_from_x
from stage1_tokenizer.layers import Block, LayerNorm, Linears, StaticMix, decayed, embedding, training_only

REFERENCE_SIZE = 32  # resolution at which training times are not shifted


class TimeEmbedding(nn.Module):
    """(B,) times in [0, 1] -> (B,D), by random Fourier features and one layer."""

    frequencies: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.logspace(-1, 2, width // 2))
        self.layer = decayed(nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        return self.layer(torch.cat([angles.cos(), angles.sin()], -1))  # (B,D)


class FlowDecoder(Decoder):
    """Flow decoder in pixel space with the layout of `ViTDecoder`.

    Args:
        image_size, patch_size, num_latents, latent_dim, width, depth, heads, tail_channels, tail_depth: as ViTDecoder.
        steps: midpoint steps of sampling; each costs two evaluations of the network.
        time_mean: mean of logit(t) in training at 32 pixels; larger sizes add log(size / 32).
        floor: smallest t in the loss's denominator.
        coarsest: side from which the error is counted at every doubling up to `image_size`, each weighted by 1 / side
            (Hoogeboom et al. 2023, section 3.3): fine detail is most of a large picture's error and the least of what
            a decoder must get right. None: at full size alone.
        base: also see the linear path's reconstruction, and say the clean image as a correction to it. The tokenizer
            must have a linear path.
        checkpointing: compute blocks again in the backward pass instead of keeping their activations.
        dropout: share of rows whose latents are all hidden in training, which guidance needs.
        guidance: of `decode`: 1 draws what the prefix says; w above 1 goes w times as far from what is drawn without
            latents (Ho & Salimans 2021), for twice the evaluations.
    Raises ValueError for sizes out of range, and for guidance without dropout.
    """

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 8,
        num_latents: int = 16,
        latent_dim: int = 16,
        width: int = 128,
        depth: int = 3,
        heads: int = 2,
        tail_channels: int = 32,
        tail_depth: int = 2,
        steps: int = 4,
        time_mean: float = 0.0,
        floor: float = 0.1,
        coarsest: int | None = None,
        base: bool = False,
        checkpointing: bool = False,
        dropout: float = 0.0,
        guidance: float = 1.0,
    ):
        super().__init__()
        training_only(self, "checkpointing")
        if steps < 1 or not 0 < floor < 1:
            raise ValueError(f"got steps {steps}, floor {floor}; want at least 1 step and a floor within (0, 1).")
        if not 0 <= dropout < 1 or not 0 <= guidance < math.inf:
            raise ValueError(f"got dropout {dropout}, guidance {guidance}; want a share below 1 and a finite factor.")
        if guidance != 1 and not dropout:
            raise ValueError(
                f"got guidance {guidance} and dropout 0, wanted a decoder that has seen no latents; raise it."
            )
        self.dropout, self.guidance = dropout, guidance
        self.sides = [
            image_size >> i for i in range(image_size.bit_length()) if image_size >> i >= (coarsest or image_size)
        ]
        if coarsest is not None and coarsest not in self.sides:
            raise ValueError(
                f"got coarsest {coarsest} for pictures of {image_size}, want the side over a power of two."
            )
        self.image_size, self.patch_size, self.num_latents = image_size, patch_size, num_latents
        self.steps, self.floor = steps, floor
        self.time_mean = time_mean + math.log(image_size / REFERENCE_SIZE)
        side = image_size // patch_size
        self.latent = Linears(num_latents, latent_dim, width)
        self.null, self.position = embedding(num_latents, width), embedding(num_latents, width)
        self.queries = embedding(side * side, width)
        self.mix = StaticMix(width, num_latents, side * side)
        self.noisy = decayed(nn.Conv2d(3, width, patch_size, stride=patch_size))
        self.base = decayed(nn.Conv2d(3, width, patch_size, stride=patch_size)) if base else None
        self.time = TimeEmbedding(width)
        self.blocks = nn.ModuleList(Block(width, heads, cross=True, checkpointing=checkpointing) for _ in range(depth))
        self.norm = LayerNorm(width)
        self.patch = decayed(nn.Linear(width, 3 * patch_size**2))
        with torch.no_grad():
            self.patch.weight *= 0.1
        self.tail = ConvTail(width, patch_size, tail_channels, tail_depth, inputs=3 if base else 2)

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor, base: Tensor | None = None) -> Tensor:
        """The clean image as seen from x_t (B,3,H,W) at t (B,), given latent tokens (B,K,D): (B,3,H,W)."""
        time = self.time(t)[:, None]  # (B,1,D)
        x = self.queries + self.mix(tokens) + self.noisy(x_t).flatten(2).transpose(1, 2) + time  # (B,N,D)
        seen = [x_t]
        if self.base is not None:
            if base is None:
                raise ValueError("got no base for a FlowDecoder with base: true; give the tokenizer a linear_path.")
            x = x + self.base(base).flatten(2).transpose(1, 2)
            seen.append(base)
        context = torch.cat([tokens + self.position, time.to(tokens.dtype)], 1)  # (B,K+1,D)
        for block in self.blocks:
            x = block(x, context)
        x = self.norm(x)
        side = self.image_size // self.patch_size
        patches = self.patch(x).transpose(1, 2).unflatten(2, (side, side))
        coarse = F.pixel_shuffle(patches, self.patch_size).float()  # (B,3,H,W)
        if self.base is not None and base is not None:
            coarse = coarse + base
        return coarse + self.tail(torch.cat([coarse, *seen], 1), x).float()

    def tokens(self, z: Tensor, keep_mask: Tensor) -> Tensor:
        return torch.where(keep_mask[..., None], self.latent(z).to(self.null.dtype), self.null)  # (B,K,D)

    @property
    def last_weight(self) -> Tensor:
        return self.tail.out.weight

    def losses(self, z: Tensor, keep_mask: Tensor, images: Tensor, base: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(predicted clean image (B,3,H,W), velocity loss per image (B,)) at one random time per image."""
        if self.training and self.dropout:
            drop = torch.rand(len(z), device=z.device) < self.dropout  # (B,)
            keep_mask, base = keep_mask & ~drop[:, None], without(base, drop)
        t = torch.sigmoid(torch.randn(len(z), device=z.device) + self.time_mean)
        tt = t[:, None, None, None]
        x_t = interpolate(images, torch.randn_like(images), tt)
        x = self(x_t, t, self.tokens(z, keep_mask), base)
        return x, self.error(x - images) / t.clamp_min(self.floor).square()

    def error(self, difference: Tensor) -> Tensor:
        """(B,3,H,W) -> (B,) its mean square, averaged over `sides`, each weighted by 1 / side."""
        weights = [1 / side for side in self.sides]
        errors = [F.adaptive_avg_pool2d(difference, side).square().mean((1, 2, 3)) for side in self.sides]
        return sum((w * e for w, e in zip(weights, errors, strict=True)), torch.zeros_like(errors[0])) / sum(weights)

    def decode(
        self, z: Tensor, keep_mask: Tensor, base: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """One picture per row, drawn with `generator`: midpoint steps from noise, t = (1-u)^1.5."""
        shape = (len(z), 3, self.image_size, self.image_size)
        x = torch.randn(shape, generator=generator, device=z.device)
        guided = self.guidance != 1
        if guided:  # twins that see no latent
            base = None if base is None else torch.cat([base, torch.zeros_like(base)])
            z, keep_mask = torch.cat([z, z]), torch.cat([keep_mask, torch.zeros_like(keep_mask)])
        tokens = self.tokens(z, keep_mask)

        def field(x_t: Tensor, t: float) -> Tensor:
            rows = torch.cat([x_t, x_t]) if guided else x_t
            clean = self(rows, torch.full((len(rows),), t, device=z.device), tokens, base)
            if guided:
                given, alone = clean.chunk(2)
                clean = torch.lerp(alone, given, self.guidance)
            return v_from_x(x_t, clean, t)

        return midpoint(field, x, power_grid(self.steps))


def without(base: Tensor | None, drop: Tensor) -> Tensor | None:
    """The linear path's reconstructions (B,3,H,W), zero in rows where `drop` (B,)."""
    return None if base is None else base.masked_fill(drop[:, None, None, None], 0)
