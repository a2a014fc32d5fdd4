"""The causal loop as a whole on a process with a known joint law: does a long line drift?

z_i = a z_{i-1} + s e_i, L = 32. The head knows the exact conditional field: whatever the covariance of samples lacks
is the solver's doing, piled up along the line (the slope of the spread over position is the report's drift meter).
"""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from stage1_tokenizer.text.vocabulary import CaptionVocabulary
from stage2_prior.backbone import Backbone, Cache
from stage2_prior.heads.flow import FlowHead
from stage2_prior.heads.nets import HeadNet
from stage2_prior.heads.solvers import Euler, EulerMaruyama, Midpoint, Solver
from stage2_prior.prior import CausalPrior

LENGTH, A, S, N = 32, 0.9, 0.4, 4000


class LastToken(Backbone):
    """A backbone whose condition row is the last token: the previous latent, as `latent_in` wrote it."""

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor | BlockMask | None = None, cache: Cache | None = None
    ) -> Tensor:
        if cache is not None:
            cache.length += x.shape[1]
        return x


class ExactStep(HeadNet):
    """Velocity of N(condition, S^2)."""

    def time(self, t: Tensor) -> Tensor:
        return t.unsqueeze(-1)

    def condition(self, c: Tensor) -> Tensor:
        return c

    def forward(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        slope = (time - (1 - time) * S**2) / ((1 - time) ** 2 * S**2 + time**2)
        return -condition + slope * (x - (1 - time) * condition)


def process_prior(solver: Solver) -> CausalPrior:
    vocabulary = CaptionVocabulary(rows=16, context_length=4)
    vocabulary.fit(["go"])
    head = FlowHead(ExactStep(1, 1, 2, 0), solver=solver)
    prior = CausalPrior(LENGTH, 1, vocabulary, LastToken(1, 0, 1, max_tokens=LENGTH + 4), head)
    with torch.no_grad():
        prior.start.zero_()
        prior.latent_in.weight.fill_(A)
        assert prior.latent_in.bias is not None
        prior.latent_in.bias.zero_()
    return prior.eval()


def covariance() -> Tensor:
    """(L,L): Cov(z_i, z_j) = S^2 sum over shared steps of A^(i-k) A^(j-k)."""
    step = torch.tensor([[A ** (i - k) if k <= i else 0.0 for k in range(LENGTH)] for i in range(LENGTH)])
    return S**2 * step @ step.T


def drawn(solver: Solver, temperature: float = 1.0) -> Tensor:
    prior = process_prior(solver)
    return prior.sample(["go"] * N, 1.0, temperature=temperature, generator=torch.Generator().manual_seed(1))[..., 0]


def spread_and_slope(z: Tensor) -> tuple[Tensor, float]:
    ratio = z.std(0) / covariance().diagonal().sqrt()  # (L,)
    at = torch.linspace(-0.5, 0.5, LENGTH)
    return ratio, ((at * ratio).sum() / at.square().sum()).item()


@pytest.mark.parametrize("solver", [Midpoint(), EulerMaruyama(40, 2.0)], ids=["midpoint-8", "sde-40"])
def test_a_line_of_32_has_the_joint_covariance_of_the_process(solver: Solver) -> None:
    z = drawn(solver)
    ratio, slope = spread_and_slope(z)
    assert (ratio - 1).abs().max() < 0.06 and abs(slope) < 0.06
    assert (torch.cov(z.T) - covariance()).abs().max() < 0.12 * covariance().max()
    assert z.mean(0).abs().max() < 0.1


def test_controls_drift_as_they_must() -> None:
    ratio, _ = spread_and_slope(drawn(Euler(steps=4)))
    assert ratio.max() < 0.9  # few Euler steps shrink every latent
    cold, _ = spread_and_slope(drawn(Midpoint(), temperature=0.8))
    assert (cold - 0.8).abs().max() < 0.06  # a linear process cools as a whole
    assert math.isclose(covariance()[0, 0].item(), S**2, rel_tol=1e-5)
