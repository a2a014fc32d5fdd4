"""The squared error as a head: one Gaussian of fixed width around a predicted mean. The control of all others.

Its samples are the mean, or the mean plus noise; latents given a past are neither, and where a latent has two modes the
mean lies between them, where nothing is.

Letters: M rows, C latent channels, D condition width.
"""

import torch
from torch import Tensor, nn

from stage1_tokenizer.layers import decayed
from stage2_prior.guidance import ALWAYS
from stage2_prior.heads.base import Head, HeadError, Plan, guided_rows, one_evaluation
from stage2_prior.heads.solvers import Solver


class MSEHead(Head):
    """The Gaussian assumption: predict the mean, add noise of one fixed size.

    Args:
        latent_dim, cond_dim: C and D.
        sigma: standard deviation of the noise that `sample` adds; 0 returns the mean (as Emu2 does).
        width: of the hidden layer.
    """

    def __init__(self, latent_dim: int, cond_dim: int, sigma: float = 0.0, width: int = 320):
        super().__init__()
        if sigma < 0:
            raise HeadError(f"got sigma={sigma}, wanted 0 or a positive standard deviation.")
        self.latent_dim, self.cond_dim, self.sigma = latent_dim, cond_dim, sigma
        self.net = nn.Sequential(decayed(nn.Linear(cond_dim, width)), nn.SiLU(), decayed(nn.Linear(width, latent_dim)))

    def loss(self, cond: Tensor, target: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return (self.net(cond).float() - target.float()).square().mean(-1)  # (M,)

    def plan(self, steps: int | None = None, solver: Solver | None = None) -> Plan:
        return one_evaluation(self, steps, solver)

    def sample(
        self,
        cond: Tensor,
        uncond: Tensor | None = None,
        guidance: float = 1.0,
        *,
        interval: tuple[float, float] = ALWAYS,
        plan: Plan | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As `Head.sample`; the means are guided. There is no time here, so that `interval` has no say."""
        rows = guided_rows(cond, uncond, guidance)
        mean = self.net(rows).float()
        if len(rows) > len(cond):
            mean_c, mean_u = mean.chunk(2)
            mean = torch.lerp(mean_u, mean_c, guidance)
        draw = torch.randn(mean.shape, generator=generator, device=mean.device)
        return mean + self.sigma * temperature * draw
