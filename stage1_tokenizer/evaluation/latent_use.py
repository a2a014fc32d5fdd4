"""What each position of the line carries: active units, the share of variance that is signal, and its rate in bits.

A number of floats is no size of a code: a float with much noise carries little, one without noise has no bound. The
rate is the size that counts. Watch active units along the line too: a position that training has given up on has none.

Letters: N pictures, K latents, C channels of a latent.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stage1_tokenizer.tokenizer import Tokenizer

ACTIVE_VARIANCE = 0.01  # Burda et al. 2015, section 4.2: a unit whose posterior mean varies more than this is in use


@dataclass(frozen=True)
class LatentUse:
    """What each latent position carries; every tensor is (K,)."""

    active_units: Tensor  # channels whose posterior mean varies over pictures, 0..C
    mean_variance: Tensor  # variance of the posterior mean, mean over channels; 1 = all variance is signal
    rate_bits: Tensor  # mean KL(q(z|x) || N(0, 1)) summed over channels, in bits; inf for a deterministic code


def latent_use(mean: Tensor, std: Tensor) -> LatentUse:
    """Use of each latent position from standardised posteriors: mean and std (N, K, C) of N pictures.

    Standardised means that posterior samples have mean 0 and variance 1 over the pictures, so the KL to N(0, 1) is the
    rate of a code whose receiver knows only those two moments: an upper bound of the information in the position.
    """
    if mean.shape != std.shape or mean.ndim != 3:
        raise ValueError(
            f"got mean {tuple(mean.shape)} and std {tuple(std.shape)}, wanted two equal (N, K, C); give one posterior"
        )
    mean, std = mean.double().cpu(), std.double().cpu()
    variance = mean.var(dim=0, correction=0)  # (K, C)
    kl = 0.5 * (mean.square() + std.square() - 1) - std.log()  # (N, K, C); inf where std = 0
    return LatentUse(
        active_units=(variance > ACTIVE_VARIANCE).sum(dim=1),
        mean_variance=variance.mean(dim=1),
        rate_bits=kl.mean(dim=0).sum(dim=1) / math.log(2),
    )


def code_bits(tokenizer: Tokenizer, images: Tensor) -> list[float]:
    """Bits of the first 1, 2, ..., K latents: a symbol's, or the rate that the noise leaves (`latent_use`)."""
    each = getattr(tokenizer.bottleneck, "bits_per_latent", None)
    if each is not None:
        return [each * k for k in range(1, tokenizer.num_latents + 1)]
    with torch.inference_mode():
        use = latent_use(*tokenizer.posterior(images.to(tokenizer.latent_mean.device)))
    return list(itertools.accumulate(use.rate_bits.tolist()))


@torch.inference_mode()
def received(tokenizer: Tokenizer, images: Tensor, seed: int = 0) -> Tensor:
    """images (N,3,H,W) -> z (N,K,C) as a receiver of `code_bits` gets them: symbols, or means with their noise."""
    mean, std = tokenizer.posterior(images.to(tokenizer.latent_mean.device))
    return mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed)).to(mean)
