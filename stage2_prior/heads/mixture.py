"""A mixture of Gaussians as a head, as in GIVT (Tschannen et al. 2023, "GIVT: Generative infinite-vocabulary
transformers"): the density is there in closed form, and a sample costs one evaluation and no solver.

    p(x | cond) = sum_j pi_j N(x; mu_j, diag(s_j^2)),  j = 1..J          loss = -log p / C, nats per channel

What it cannot do is a density whose channels depend on each other in a way that J axis-parallel ellipsoids do not
cover; that is what the flow head's evaluations buy, and the table of heads has the figures.

Choices, with reasons:
* Widths are floor + softplus: a component that sits on one training latent would else have a likelihood without bound.
* Means start spread as the data are (normal, variance 1), all else at zero: components that start alike stay alike.
* Guidance: component j of a conditional and of an unconditional row are answers of the same output, so that log-weights
  and means are extrapolated, u + w (c - u), component by component; log-widths too, but for w > 1 they stay the
  conditional's, since extrapolated widths shrink to nothing or blow up. Where both rows share means and widths this is
  p_c^w p_u^(1-w) of the components, exactly. GIVT's own way, rejection from the product of densities, needs many draws.
* Temperature t: normal draws times t, weights to the power 1/t; at 0 the mean of the likeliest component.

Letters: M rows, C latent channels, D condition width, J components.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.layers import decayed
from stage2_prior.guidance import ALWAYS
from stage2_prior.heads.base import Head, HeadError, Plan, guided_rows, one_evaluation
from stage2_prior.heads.categorical import draw_ids
from stage2_prior.heads.solvers import Solver


class Mixture(NamedTuple):
    """J Gaussians for every row, float32."""

    log_weights: Tensor  # (M,J), normalised
    means: Tensor  # (M,J,C)
    log_widths: Tensor  # (M,J,C), of standard deviations

    def log_prob(self, x: Tensor) -> Tensor:
        """x (M,C) -> (M,) nats."""
        e = (x[:, None] - self.means) * (-self.log_widths).exp()  # (M,J,C)
        each = -0.5 * (e.square() + math.log(2 * math.pi)) - self.log_widths
        return (self.log_weights + each.sum(-1)).logsumexp(-1)

    def guided(self, unconditional: "Mixture", guidance: float) -> "Mixture":
        """`guidance` w, from this conditional one and an unconditional one."""
        logits = torch.lerp(unconditional.log_weights, self.log_weights, guidance)
        return Mixture(
            logits.log_softmax(-1),
            torch.lerp(unconditional.means, self.means, guidance),
            torch.lerp(unconditional.log_widths, self.log_widths, min(guidance, 1.0)),
        )

    def draw(self, temperature: float, generator: torch.Generator | None) -> Tensor:
        """(M,C), one of each row."""
        which = draw_ids(self.log_weights, temperature, generator)[:, None, None]  # (M,1,1)
        at = which.expand(-1, 1, self.means.shape[-1])
        mean, width = self.means.gather(1, at)[:, 0], self.log_widths.gather(1, at)[:, 0].exp()  # (M,C)
        return mean + width * temperature * torch.randn(mean.shape, generator=generator, device=mean.device)


class MixtureHead(Head):
    """J Gaussians with diagonal covariances.

    Args:
        latent_dim, cond_dim: C and D.
        components: J.
        width: of the hidden layer.
        floor: smallest standard deviation, in the units of standardised latents.
    """

    has_density = True

    def __init__(self, latent_dim: int, cond_dim: int, components: int = 16, width: int = 320, floor: float = 0.01):
        super().__init__()
        if components < 1 or not floor > 0:
            raise HeadError(
                f"got components={components}, floor={floor}; wanted at least 1 component and a floor above 0."
            )
        self.latent_dim, self.cond_dim, self.components, self.floor = latent_dim, cond_dim, components, floor
        self.hidden = decayed(nn.Linear(cond_dim, width))
        self.out = decayed(nn.Linear(width, components * (1 + 2 * latent_dim)))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        nn.init.normal_(self.out.bias[components : components * (1 + latent_dim)])  # the means

    def mixture(self, cond: Tensor) -> Mixture:
        """(M, D) -> the mixture of each row."""
        j, c = self.components, self.latent_dim
        logits, means, widths = self.out(F.silu(self.hidden(cond))).float().split([j, j * c, j * c], dim=-1)
        log_widths = (self.floor + F.softplus(widths + math.log(math.e - 1))).log()  # softplus is 1 at the start
        return Mixture(logits.log_softmax(-1), means.unflatten(-1, (j, c)), log_widths.unflatten(-1, (j, c)))

    def loss(self, cond: Tensor, target: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return -self.mixture(cond).log_prob(target.float()) / self.latent_dim  # (M,)

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
        """As `Head.sample`. There is no time here, so that `interval` has no say."""
        rows = guided_rows(cond, uncond, guidance)
        mixture = self.mixture(rows)
        if len(rows) > len(cond):
            m = len(cond)
            mixture = Mixture(*(part[:m] for part in mixture)).guided(
                Mixture(*(part[m:] for part in mixture)), guidance
            )
        return mixture.draw(temperature, generator)

    @torch.no_grad()
    def log_prob(self, cond: Tensor, x: Tensor, steps: int = 32) -> Tensor:
        """As `Head.log_prob`, in closed form: `steps` has no say."""
        return self.mixture(cond).log_prob(x)
