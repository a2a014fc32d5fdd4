"""The head of Li et al. 2024, "Autoregressive image generation without vector quantization" (MAR): a small diffusion
model on the cosine schedule as the loss of one latent. The flow head's predecessor and control.

L = E || target - net(x_t | t, cond) ||^2 with t uniform, stratified over the draws of one latent, which share one
condition. Sampling is ancestral (DDPM, 100 steps) with a temperature on every draw, or DDIM. The variance of a step is
fixed (`DDPM.variance`) unless a `LearnedVariance` is given, for which the network answers twice.

Letters: M rows, C latent channels, D condition width, S draws of t.
"""

import torch
from torch import Tensor

from stage1_tokenizer.flow import stratified_uniform
from stage2_prior.heads.base import HeadError, SolverHead
from stage2_prior.heads.ddpm import DDPM, LearnedVariance, NoiseTarget, Target, alpha_sigma, alpha_sigma_at
from stage2_prior.heads.nets import HeadNet
from stage2_prior.heads.solvers import Solver


class DiffusionHead(SolverHead):
    """Diffusion loss of one latent.

    Args:
        net: the network, with latent width C and condition width D.
        target: what the network is asked for (None: the noise).
        solver: DDPM or DDIM with its grid (None: DDPM x 100).
        draws: draws of t per latent and step.
        variance: how the variance of a step is learned (None: not at all). The network then needs answers=2, and the
            solver must be one that injects noise, DDPM.
    """

    answers_with = "data"

    def __init__(
        self,
        net: HeadNet,
        target: Target | None = None,
        solver: Solver | None = None,
        draws: int = 4,
        variance: LearnedVariance | None = None,
    ):
        super().__init__(net, DDPM() if solver is None else solver, draws)
        answers = 1 if variance is None else 2
        if net.answers != answers:
            raise HeadError(
                f"got a network with answers={net.answers} and variance={variance}, wanted answers={answers}: a learned"
                " variance, and nothing else, is a second answer."
            )
        if variance is not None and not isinstance(self.solver, DDPM):
            raise HeadError(
                f"got the solver {type(self.solver).__name__} with a learned variance, wanted DDPM: only ancestral"
                " steps have a variance; leave out one of the two."
            )
        self.target: Target = NoiseTarget() if target is None else target
        self.variance = variance

    def loss(self, cond: Tensor, target: Tensor, generator: torch.Generator | None = None) -> Tensor:
        x = target.float()  # (M,C)
        t = stratified_uniform(len(x), self.draws, generator, x.device)  # (S,M)
        alpha, sigma = (a.unsqueeze(-1) for a in alpha_sigma(t))  # (S,M,1)
        noise = torch.randn(self.draws, *x.shape, generator=generator, device=x.device)  # (S,M,C)
        x_t = alpha * x + sigma * noise
        answer = self.net(x_t, self.net.time(t), self.net.condition(cond)).float()  # (S,M,C) or (S,M,2C)
        answer, *u = answer.split(self.latent_dim, dim=-1)
        loss = (answer - self.target.target(x, noise, alpha, sigma)).square()
        if self.variance is not None:
            data = self.target.data(x_t, answer, alpha, sigma)
            loss = loss + self.variance.weight * self.variance.bound(x, data, u[0], t)
        return loss.mean(dim=(0, -1))  # (M,)

    def guided(self, answer_c: Tensor, answer_u: Tensor, guidance: float) -> Tensor:
        """A learned variance is not guided: it stays that of the conditional rows, as in MAR."""
        c = self.latent_dim
        return torch.cat([super().guided(answer_c[:, :c], answer_u[:, :c], guidance), answer_c[:, c:]], dim=1)

    def field(self, x: Tensor, answer: Tensor, t: float) -> Tensor | tuple[Tensor, Tensor]:
        answer, *u = answer.split(self.latent_dim, dim=-1)
        data = self.target.data(x, answer, *alpha_sigma_at(t))
        return (data, u[0]) if u else data
