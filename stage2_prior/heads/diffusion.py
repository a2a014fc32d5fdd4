"""The head of Li et al. 2024, "Autoregressive image generation without vector quantization" (MAR): a small diffusion
model on the cosine schedule as the loss of one latent. The flow head's predecessor and control.

L = E || target - net(x_t | t, cond) ||^2 with t uniform, stratified over the draws of one latent, which share one
condition. Sampling is ancestral (DDPM, 100 steps) with a temperature on every draw, or DDIM. The variance of a step is
fixed (`DDPM.variance`).

Letters: M rows, C latent channels, D condition width, S draws of t.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from stage1_tokenizer.flow import stratified_uniform
from stage2_prior.heads.base import SolverHead
from stage2_prior.heads.ddpm import DDPM, NoiseTarget, Target, alpha_sigma
from stage2_prior.heads.nets import HeadNet
from stage2_prior.heads.solvers import Solver


class DiffusionHead(SolverHead):
    """Diffusion loss of one latent.

    Args:
        net: the network, with latent width C and condition width D.
        target: what the network predicts (None: the noise).
        solver: DDPM or DDIM with its grid (None: DDPM x 100).
        draws: draws of t per latent and step.
    """

    answers_with = "data"
    retired: ClassVar[dict[str, Any]] = {"variance": None}

    def __init__(
        self,
        net: HeadNet,
        target: Target | None = None,
        solver: Solver | None = None,
        draws: int = 4,
    ):
        super().__init__(net, DDPM() if solver is None else solver, draws)
        self.target: Target = NoiseTarget() if target is None else target

    def loss(self, cond: Tensor, target: Tensor, generator: torch.Generator | None = None) -> Tensor:
        x = target.float()  # (M,C)
        t = stratified_uniform(len(x), self.draws, generator, x.device)  # (S,M)
        alpha, sigma = (a.unsqueeze(-1) for a in alpha_sigma(t))  # (S,M,1)
        noise = torch.randn(self.draws, *x.shape, generator=generator, device=x.device)  # (S,M,C)
        x_t = alpha * x + sigma * noise
        answer = self.net(x_t, self.net.time(t), self.net.condition(cond)).float()  # (S,M,C)
        loss = (answer - self.target.target(x, noise, t.unsqueeze(-1), generator)).square()
        return loss.mean(dim=(0, -1))  # (M,)

    def field(self, x: Tensor, answer: Tensor, t: float) -> Tensor:
        return self.target.data(x, answer, t)
