"""Two-dimensional toys that heads are trained on, told apart by their condition rows."""

import math

import torch
from torch import Tensor

from stage1_tokenizer.training.optim import MuonAdamW, parameter_groups, warmup_flat_cosine
from stage2_prior.heads.base import Head

TOYS = ("moons", "ring", "bimodal", "narrow")


def toy(name: str, n: int, g: torch.Generator) -> Tensor:
    """(n, 2) points: two moons, a ring, two points with a little noise, a Gaussian of condition number 100."""
    e, u = torch.randn(n, 2, generator=g), torch.rand(n, generator=g)
    if name == "moons":
        angle, upper = math.pi * torch.rand(n, generator=g), (u < 0.5).float()
        x = torch.stack([angle.cos() + (1 - upper) - 0.5, (2 * upper - 1) * angle.sin() + 0.5 * (1 - upper) - 0.25], 1)
        return x + 0.08 * e
    if name == "ring":
        return torch.stack([(2 * math.pi * u).cos(), (2 * math.pi * u).sin()], 1) + 0.08 * e
    if name == "bimodal":
        return torch.stack([torch.where(u < 0.5, -1.0, 1.0), torch.zeros(n)], 1) + 0.1 * e
    return e * torch.tensor([1.5, 0.15]) @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]])


def rows(index: int, n: int) -> Tensor:
    return torch.eye(len(TOYS))[index].expand(n, -1)


def train(head: Head, steps: int, batch: int = 256) -> Head:
    """A few seconds: AdamW and Muon, cosine to zero, every toy in every batch."""
    g = torch.Generator().manual_seed(0)
    optimizer = MuonAdamW(parameter_groups(head), lr=3e-3, matrix_lr=0.02)
    base = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * warmup_flat_cosine(step, steps)
        x = torch.cat([toy(name, batch // len(TOYS), g) for name in TOYS])
        cond = torch.eye(len(TOYS)).repeat_interleave(batch // len(TOYS), 0)
        loss = head.loss(cond, x, g).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval()


def draw(head: Head, index: int, n: int, temperature: float = 1.0, steps: int | None = None, seed: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return head.sample(rows(index, n), plan=head.plan(steps), temperature=temperature, generator=g)
