"""The mixture head: its density is one, its draws are from it, guidance and temperature do what they are said to."""

import math

import pytest
import torch
from torch import Tensor, nn

from stage2_prior.heads.base import HeadError
from stage2_prior.heads.mixture import Mixture, MixtureHead
from stage2_prior.heads.solvers import Midpoint
from stage2_prior.prior import CausalPrior
from tests.small_priors import CAPTIONS, C, D, K, awake, parts
from tests.toys import TOYS, draw, train


def random_mixture(rows: int = 1, components: int = 3, channels: int = 1) -> Mixture:
    g = torch.Generator().manual_seed(3)
    weights = torch.randn(1, components, generator=g).log_softmax(-1)
    means = 2 * torch.randn(1, components, channels, generator=g)
    widths = 0.5 * torch.randn(1, components, channels, generator=g) - 0.5
    return Mixture(*(part.expand(rows, *part.shape[1:]) for part in (weights, means, widths)))


def moments(mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Exact mean (C,) and covariance (C,C) of the first row."""
    w, mu, s = (part[0] for part in mixture)
    mean = w.exp() @ mu
    return mean, torch.einsum("j,jc,jd->cd", w.exp(), mu - mean, mu - mean) + (w.exp() @ (2 * s).exp()).diag()


def test_a_density_integrates_to_one() -> None:
    grid = torch.linspace(-12, 12, 4001)
    mixture = random_mixture(len(grid))
    nats = mixture.log_prob(grid[:, None])
    assert abs(torch.trapezoid(nats.exp(), grid) - 1) < 1e-4
    heavy = mixture._replace(log_weights=mixture.log_weights + 0.3)
    assert abs(torch.trapezoid(heavy.log_prob(grid[:, None]).exp(), grid) - math.exp(0.3)) < 1e-3  # control
    normal = -0.5 * grid.square() - 0.919
    assert (nats - normal)[1500:2500].abs().max() > 0.2  # it is no normal density


def test_draws_have_the_moments_and_the_entropy_of_the_density() -> None:
    n = 40_000
    mixture = random_mixture(n, channels=2)
    mean, covariance = moments(mixture)
    x = mixture.draw(1.0, torch.Generator().manual_seed(1))
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(x.T), covariance, rtol=0.05, atol=0.03)
    line = random_mixture(n)
    grid = torch.linspace(-12, 12, 4001)
    density = random_mixture(len(grid)).log_prob(grid[:, None])
    exact = torch.trapezoid(density.exp() * density, grid)
    found = [line.log_prob(line.draw(t, torch.Generator().manual_seed(1))).mean() for t in (1.0, 0.7)]
    assert abs(found[0] - exact) < 0.02 < abs(found[1] - exact)  # control: cooled draws are likelier


def test_temperature_sharpens_weights_and_narrows_draws() -> None:
    n = 20_000
    apart = Mixture(
        torch.tensor([0.7, 0.3]).log().expand(n, -1),
        torch.tensor([[-5.0], [5.0]]).expand(n, -1, -1),
        torch.zeros(n, 2, 1),
    )
    for t in (0.5, 1.0, 2.0):
        x = apart.draw(t, torch.Generator().manual_seed(1))
        share = torch.tensor([0.7, 0.3]).pow(1 / t)
        left = x[:, 0] < 0
        assert abs(left.float().mean() - share[0] / share.sum()) < 0.02 or t == 2.0  # at 2 the tails meet
        assert t == 2.0 or abs(x[left].std() - t) < 0.03
    cold = apart.draw(0.0, torch.Generator().manual_seed(1))
    assert torch.equal(cold, torch.full((n, 1), -5.0))


def test_guidance_extrapolates_components() -> None:
    one = Mixture(torch.zeros(1, 1), torch.tensor([[[1.0]]]), torch.tensor([[[math.log(0.5)]]]))
    other = Mixture(torch.zeros(1, 1), torch.tensor([[[0.0]]]), torch.tensor([[[0.0]]]))
    guided = one.guided(other, 3.0)
    assert guided.means.item() == 3.0 and guided.log_widths.exp().item() == pytest.approx(0.5)
    half = one.guided(other, 0.5)
    assert half.means.item() == 0.5 and half.log_widths.exp().item() == pytest.approx(0.5**0.5)
    c, u = torch.tensor([[0.6, 0.4]]), torch.tensor([[0.2, 0.8]])
    shared = random_mixture(components=2)
    mixed = shared._replace(log_weights=c.log()).guided(shared._replace(log_weights=u.log()), 2.0)
    product = c**2 / u  # p_c^w p_u^(1-w)
    torch.testing.assert_close(mixed.log_weights.exp(), product / product.sum())
    torch.testing.assert_close(mixed.means, shared.means)
    assert (mixed.log_weights.exp() - c).abs().max() > 0.1  # control


@pytest.mark.slow
def test_a_trained_mixture_finds_both_modes_and_the_density_of_a_known_toy() -> None:
    torch.manual_seed(0)
    head = train(MixtureHead(2, len(TOYS), components=8, width=64), 1500)
    x = draw(head, TOYS.index("bimodal"), 2000)
    assert (x[:, 0].abs() > 0.6).float().mean() > 0.97 and 0.4 < (x[:, 0] > 0).float().mean() < 0.6
    assert abs(x[:, 1].std().item() - 0.1) < 0.02
    cond = torch.eye(len(TOYS))[TOYS.index("bimodal")].expand(1000, -1)
    g = torch.Generator().manual_seed(5)
    side = torch.where(torch.rand(1000, generator=g) < 0.5, -1.0, 1.0)
    real = torch.stack([side, torch.zeros(1000)], 1) + 0.1 * torch.randn(1000, 2, generator=g)
    e = ((real - torch.stack([side, torch.zeros(1000)], 1)) / 0.1).square().sum(1)
    exact = -0.5 * e - math.log(2 * math.pi * 0.01) - math.log(2)
    assert abs((head.log_prob(cond, real) - exact).mean().item()) < 0.05
    assert head.log_prob(cond[:1], torch.zeros(1, 2)) < -10  # control: between the modes there is nothing


def test_a_prior_with_a_mixture_draws_in_one_evaluation_and_scores_exactly() -> None:
    vocabulary, backbone, _ = parts()
    prior = awake(CausalPrior(K, C, vocabulary, backbone, MixtureHead(C, D, components=4, width=16)))
    assert isinstance(prior, CausalPrior)
    z = prior.sample(CAPTIONS, 2.0, generator=torch.Generator().manual_seed(1))
    assert z.shape == (3, K, C) and prior.num_evaluations() == 1
    nats = prior.log_prob(z, CAPTIONS)
    torch.testing.assert_close(nats, prior.log_prob(z, CAPTIONS, steps=2))  # there is no solver
    torch.testing.assert_close(
        -nats / C, prior.losses(z, prior.encode_text(CAPTIONS))
    )  # what is trained is what is scored
    with pytest.raises(HeadError, match="1 evaluation and no solver"):
        prior.sample(CAPTIONS, steps=8)
    with pytest.raises(HeadError, match="Midpoint for a MixtureHead"):
        prior.sample(CAPTIONS, solver=Midpoint())


def test_components_begin_apart_and_no_width_falls_below_the_floor() -> None:
    head = MixtureHead(2, 4, components=5, floor=0.05)
    mixture = head.mixture(torch.randn(3, 4))
    assert torch.pdist(mixture.means[0]).min() > 1e-2
    torch.testing.assert_close(mixture.log_widths.exp(), torch.full((3, 5, 2), 1.05))
    nn.init.constant_(head.out.bias, -50.0)
    assert head.mixture(torch.randn(3, 4)).log_widths.exp().min() >= 0.05 - 1e-6
    for options in ({"components": 0}, {"floor": 0.0}):
        with pytest.raises(HeadError, match="wanted at least 1 component"):
            MixtureHead(2, 4, **options)  # type: ignore[arg-type]
