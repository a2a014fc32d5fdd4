"""Samples of a prior for a list of captions, decoded and timed: what the generation report and the sweep measure.

Letters: N captions, K latents, C latent channels.
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stage1_tokenizer.evaluation.picture_data import give_back_freed
from stage1_tokenizer.precision import matmul_dtype
from stage2_prior.base import Prior
from stage2_prior.guidance import Guidance
from stage2_prior.heads.solvers import Solver
from stage2_prior.latent_space import LatentSpace


@dataclass
class Samples:
    """Latents and pictures of all captions at one guidance scale, on the CPU, and what they cost."""

    latents: Tensor  # (N,K,C)
    images: Tensor  # (N,3,H,W) in [-1, 1]
    seconds: float  # decoding included


@dataclass(frozen=True)
class Sampler:
    """How samples are drawn.

    steps: evaluations of the head per latent (None: its default). solver: in place of the head's own (None).
    batch_size: captions per call of `sample`. seed: the same for every call, so that settings differ in nothing else.
    """

    steps: int | None = None
    batch_size: int = 250
    seed: int = 0
    solver: Solver | None = None

    def __call__(
        self, prior: Prior, tokenizer: LatentSpace, captions: list[str], guidance: float | Guidance
    ) -> Samples:
        """Latents and pictures of all captions."""
        start = time.perf_counter()
        starts = range(0, len(captions), self.batch_size)
        latents, pictures = zip(*self.batches(prior, tokenizer, captions, guidance, starts), strict=True)
        return Samples(torch.cat(latents), torch.cat(pictures), time.perf_counter() - start)

    @torch.no_grad()
    def batches(
        self, prior: Prior, tokenizer: LatentSpace, captions: list[str], guidance: float | Guidance, starts: range
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The same batch by batch; matrix products in bfloat16 where that is fast.

        starts: numbers of the captions at which batches begin. Each has a seed of its own, whatever is drawn before.
        """
        device = device_of(prior)
        generator = torch.Generator(device=device)
        dtype = matmul_dtype(device)
        if dtype != torch.float32:
            prior = copy.deepcopy(prior).hold(dtype)  # else every call of every layer converts its weights
        for at in starts:
            give_back_freed()
            generator.manual_seed(self.seed + at)
            asked = captions[at : at + self.batch_size]
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                z = prior.sample(asked, guidance, self.steps, generator=generator, solver=self.solver)
                pictures = tokenizer.decode(z, generator).cpu()
            yield z.cpu(), pictures


def space_device(tokenizer: LatentSpace) -> torch.device:
    """Where the weights of a tokenizer, learned or fixed, lie."""
    return next(iter(tokenizer.state_dict().values())).device  # type: ignore[attr-defined]


def decode_all(tokenizer: LatentSpace, z: Tensor, batch_size: int = 250) -> Tensor:
    """Latents (N,k,C) -> pictures (N,3,H,W) on the CPU, `batch_size` at a time."""
    device = space_device(tokenizer)
    return torch.cat([tokenizer.decode(part.to(device)).cpu() for part in z.split(batch_size)])


def device_of(module: torch.nn.Module) -> torch.device:
    """Where the parameters of a module lie."""
    return next(module.parameters()).device


def spread(samples: Tensor, data: Tensor) -> dict[str, Any]:
    """The drift meter: standard deviation of samples over data, both (N,K,C), by position, and its slope.

    slope_along_line: of the ratio, from the first position to the last; 0 where no error adds up.
    """
    ours, wanted = samples.var(dim=0).mean(dim=-1), data.var(dim=0).mean(dim=-1)  # (K,)
    ratio = (ours / wanted).sqrt()
    at = torch.linspace(-0.5, 0.5, len(ratio))
    return {
        "std_ratio": ratio.tolist(),
        "lowest": ratio.min().item(),
        "highest": ratio.max().item(),
        "slope_along_line": ((at * ratio).sum() / at.square().sum()).item() if len(ratio) > 1 else 0.0,
        "overall": (ours.mean() / wanted.mean()).sqrt().item(),
    }
