"""Do the samplers draw from the right distribution? Closed forms and exact fields, each with a control that must fail.

On the linear path a Gaussian target N(mu, s^2) has the exact velocity -mu + s_t' (x - (1-t) mu) / s_t with
s_t^2 = (1-t)^2 s^2 + t^2, and the probability-flow map takes noise e to mu + s e. What a mixture's x_t says of its data
and noise is the responsibility-weighted mean of what its components say, on any path x_t = a x + b noise.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.flow import noise_from_v, v_from_noise, v_from_x, x_from_v
from stage2_prior.heads import solvers as samplers
from stage2_prior.heads.amed import AMED
from stage2_prior.heads.ddpm import DDIM, DDPM, alpha_sigma_at
from stage2_prior.heads.solvers import Field, SamplerError, Solver

MU, S = torch.tensor([0.5, -1.0, 0.0]).double(), torch.tensor([0.3, 0.7, 1.2]).double()


def gaussian_field(mu: Tensor, s: Tensor) -> Field:
    def field(x: Tensor, t: float) -> Tensor:
        variance = (1 - t) ** 2 * s**2 + t**2
        return -mu + (t - (1 - t) * s**2) / variance * (x - (1 - t) * mu)

    return field


def mixture_ends(weights: Tensor, mu: Tensor, s: Tensor, x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    """Expected data and noise (M,C) at x = a data + b noise; weights (J,), mu and s (J,C), covariances diagonal."""
    variance = (a * s) ** 2 + b**2  # (J,C)
    squares = x**2 @ (1 / variance).T - 2 * a * x @ (mu / variance).T + (a**2 * mu**2 / variance).sum(-1)
    r = (weights.log() - 0.5 * (squares + variance.log().sum(-1))).softmax(-1)  # (M,J)
    to_data, to_noise = a * s**2 / variance, b / variance  # of a component's offset x - a mu
    return r @ (mu - a * to_data * mu) + x * (r @ to_data), x * (r @ to_noise) - r @ (a * to_noise * mu)


def mixture_field(weights: Tensor, mu: Tensor, s: Tensor) -> Field:
    """The velocity on the linear path."""

    def field(x: Tensor, t: float) -> Tensor:
        data, e = mixture_ends(weights, mu, s, x, 1 - t, t)
        return e - data

    return field


def mixture_denoiser(weights: Tensor, mu: Tensor, s: Tensor) -> Field:
    """The expected data on the cosine schedule, which the samplers of a diffusion ask for."""
    return lambda x, t: mixture_ends(weights, mu, s, x, *alpha_sigma_at(t))[0]


def noise(rows: int, channels: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- 1: per sample against the closed form, and the order of every method --------------------------------------------

METHODS: list[tuple[Callable[..., Tensor], int]] = [
    (samplers.euler, 1),
    (samplers.mid_time_euler, 1),
    (samplers.midpoint, 2),
    (samplers.heun, 2),
    (samplers.adams_bashforth, 2),
    (samplers.dpm_solver_2m, 2),
]


@pytest.mark.parametrize(("method", "order"), METHODS, ids=lambda m: getattr(m, "__name__", str(m)))
def test_a_gaussian_is_mapped_as_the_closed_form_says(method: Callable[..., Tensor], order: int) -> None:
    e = noise(200, 3)
    x = method(gaussian_field(MU, S), e, samplers.power_grid(64, 1.5))
    assert (x - (MU + S * e)).norm(dim=1).mean() < (0.05 if order == 1 else 0.005)


@pytest.mark.parametrize(("method", "order"), METHODS, ids=lambda m: getattr(m, "__name__", str(m)))
def test_error_falls_with_the_order_of_the_method(method: Callable[..., Tensor], order: int) -> None:
    """On a mixture: on one Gaussian midpoint is of third order, by luck."""
    field, e = mixture_field(*(part[:3] for part in modes(3))), noise(100, 3)
    grid = [0.9 - 0.8 * i / 2048 for i in range(2049)]
    exact = samplers.heun(field, e, grid)

    def error(steps: int) -> float:
        return (method(field, e, grid[:: 2048 // steps]) - exact).norm(dim=1).mean().item()

    ratio = error(64) / error(128)
    assert abs(ratio - 2**order) < 0.2 * 2**order  # control: order 1 is nowhere near 4, order 2 nowhere near 2


# -- 2: an exact field with many modes --------------------------------------------------------------------------------

SOLVERS: list[Solver] = [
    samplers.Midpoint(),
    samplers.Midpoint(steps=6),
    samplers.Euler(steps=100),
    samplers.MidTimeEuler(steps=30, power=1.5),
    samplers.Heun(steps=12),
    samplers.AdamsBashforth(steps=24),
    samplers.DPMSolver2M(steps=24),
    samplers.EulerMaruyama(steps=50, power=2.0),
    AMED(steps=6),
    DDIM(steps=100),
    DDPM(steps=100),
]
MODES = 8


def modes(channels: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    mu = torch.randn(MODES, channels, generator=g, dtype=torch.float64)
    s = 0.05 + 0.35 * torch.rand(MODES, channels, generator=g, dtype=torch.float64)
    weights = torch.full((MODES,), 1 / MODES, dtype=torch.float64)
    return weights, mu, s


def draw_mixture(rows: int, seed: int) -> Tensor:
    _, mu, s = modes()
    which = torch.randint(MODES, (rows,), generator=torch.Generator().manual_seed(seed))
    return mu[which] + s[which] * noise(rows, mu.shape[1], seed + 1)


def sliced_distance(a: Tensor, b: Tensor) -> float:
    """Mean 1-Wasserstein distance over 64 random directions."""
    directions = torch.nn.functional.normalize(noise(a.shape[1], 64, 99), dim=0)
    return ((a @ directions).sort(0).values - (b @ directions).sort(0).values).abs().mean().item()


def judge(x: Tensor) -> tuple[float, float, float]:
    """Sliced distance over its own floor at this n, total variation of mode shares, worst relative error of a std."""
    _, mu, s = modes()
    truth = [draw_mixture(len(x), seed) for seed in (11, 23)]
    ratio = sliced_distance(x, truth[0]) / sliced_distance(truth[1], truth[0])

    def shares(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = -0.5 * (((x[:, None] - mu) / s) ** 2).sum(-1) - s.log().sum(-1)
        which = logits.argmax(1)
        spread = torch.stack([((x[which == j] - mu[j]) / s[j]).square().mean().sqrt() for j in range(MODES)])
        return which.bincount(minlength=MODES) / len(x), spread

    share, spread = shares(x)
    return ratio, (share - 1 / MODES).abs().sum().item() / 2, (spread - 1).abs().max().item()


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_a_mixture_is_sampled_with_its_modes_and_spreads(solver: Solver) -> None:
    field = (mixture_denoiser if solver.asks == "data" else mixture_field)(*modes())
    found = [judge(solver(field, noise(6000, 16, i), torch.Generator().manual_seed(i))) for i in (1, 2, 3)]
    assert all(ratio < 1.5 and spread < 0.1 for ratio, _, spread in found), found
    assert sum(total_variation for _, total_variation, _ in found) / 3 < 0.03, found  # perfect draws: .014 +- .004 each


def test_control_few_euler_steps_shrink_the_modes() -> None:
    ratio, _, spread = judge(samplers.Euler(steps=8)(mixture_field(*modes()), noise(6000, 16, 1)))
    assert spread > 0.2 and ratio > 1.5


# -- 3: three parameterisations of one oracle -------------------------------------------------------------------------


def test_data_noise_and_velocity_answers_give_the_same_trajectory() -> None:
    oracle, grid = mixture_field(*modes()), [0.95 - 0.9 * i / 20 for i in range(21)]
    as_data: Field = lambda x, t: v_from_x(x, x_from_v(x, oracle(x, t), t), t)  # noqa: E731
    as_noise: Field = lambda x, t: v_from_noise(x, noise_from_v(x, oracle(x, t), t), t)  # noqa: E731
    wrong: Field = lambda x, t: v_from_noise(x, x_from_v(x, oracle(x, t), t), t)  # noqa: E731
    x = noise(50, 16)
    expected = samplers.midpoint(oracle, x, grid)
    for field in (as_data, as_noise):
        torch.testing.assert_close(samplers.midpoint(field, x, grid), expected, rtol=0, atol=1e-9)
    assert (samplers.midpoint(wrong, x, grid) - expected).abs().max() > 0.1  # control


# -- 7: temperature ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [samplers.Midpoint(steps=8), samplers.EulerMaruyama(steps=100)])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1.3])
def test_temperature_scales_the_spread_and_not_the_mean(solver: Solver, temperature: float) -> None:
    mu, s = MU, torch.ones(3).double()
    x = solver(gaussian_field(mu, s), temperature * noise(20_000, 3), torch.Generator().manual_seed(1), temperature)
    torch.testing.assert_close(x.std(0), temperature * s, rtol=0.04, atol=0.02)
    torch.testing.assert_close(x.mean(0), mu, rtol=0, atol=0.05)


def test_control_scaling_the_injected_noise_alone_is_another_thing() -> None:
    solver = samplers.EulerMaruyama(steps=100)
    x = solver(gaussian_field(MU, torch.ones(3).double()), noise(20_000, 3), torch.Generator().manual_seed(1), 0.0)
    assert x.std() > 0.1  # the first draw was not cooled: this is not a sample at temperature 0


# -- 8: cost ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_evaluations_are_counted_right(solver: Solver) -> None:
    if isinstance(solver, AMED):  # as distilled: every interval has a place of its own
        solver = AMED(steps=6)
        torch.nn.init.uniform_(solver.where, 0.2, 0.8, generator=torch.Generator().manual_seed(1))
    calls: list[float] = []

    def field(x: Tensor, t: float) -> Tensor:
        calls.append(t)
        return -x

    solver(field, noise(4, 2), torch.Generator())
    assert calls == solver.times() and len(calls) == solver.num_evaluations
    assert solver.with_evaluations(12).num_evaluations == 12
    assert solver.grid()[0] == 1.0 and solver.grid()[-1] == 0.0


def test_impossible_costs_are_refused() -> None:
    with pytest.raises(SamplerError, match="multiple of 2"):
        samplers.Heun().with_evaluations(5)
    with pytest.raises(SamplerError, match="at least 1"):
        samplers.Euler(steps=0)
    with pytest.raises(SamplerError, match="positive"):
        samplers.Euler(power=-1.0)


def test_grids_go_down_from_one_to_zero() -> None:
    for grid in (samplers.power_grid(7, 1.5), samplers.logit_grid(7)):
        assert len(grid) == 8 and grid == sorted(grid, reverse=True) and (grid[0], grid[-1]) == (1.0, 0.0)
    assert math.isclose(samplers.power_grid(4, 1.5)[2], 0.5**1.5)
