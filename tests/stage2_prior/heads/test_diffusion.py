"""The diffusion head: its schedule, its samplers, its targets."""

import pytest
import torch
from torch import Tensor

from stage2_prior.heads.ddpm import (
    DDIM,
    DDPM,
    DataTarget,
    NoiseTarget,
    VelocityTarget,
    alpha_sigma,
    alpha_sigma_at,
)
from stage2_prior.heads.diffusion import DiffusionHead
from stage2_prior.heads.nets import HoistedNet
from stage2_prior.heads.solvers import Field
from tests.toys import TOYS, draw, train


def gaussian_denoiser(mu: float, s: float) -> Field:
    """E[x | x_t] for x ~ N(mu, s^2) on the cosine schedule."""

    def denoise(x: Tensor, t: float) -> Tensor:
        alpha, sigma = alpha_sigma_at(t)
        return mu + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (x - alpha * mu)

    return denoise


def test_cosine_schedule_keeps_variance_and_runs_from_data_to_noise() -> None:
    alpha, sigma = alpha_sigma(torch.linspace(0, 1, 101))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(101))
    assert alpha[0] == 1 and 0.0099 < alpha[-1] < 0.0101 and bool((alpha.diff() < 0).all())


def test_ddim_is_of_first_order_and_ddpm_has_the_right_spread() -> None:
    e = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = [(DDIM(n)(gaussian_denoiser(0.5, 0.3), e) - (0.5 + 0.3 * e)).abs().mean() for n in (100, 200)]
    assert 1.6 < errors[0] / errors[1] < 2.4 and errors[1] < 0.01
    g = torch.Generator().manual_seed(1)
    spread = {v: DDPM(100, variance=v)(gaussian_denoiser(0.5, 0.3), e, g).std().item() / 0.3 for v in (0.0, 1.0)}
    assert 0.9 < spread[0.0] < 1.0 < spread[1.0] < 1.1  # the two bounds lie on the two sides
    few = DDPM(10)(gaussian_denoiser(0.5, 0.3), e, g).std().item() / 0.3
    assert few < 0.85  # control: ten ancestral steps shrink
    torch.testing.assert_close(
        DDPM(200)(gaussian_denoiser(0.5, 1.0), 0.5 * e, g, 0.5).std().item(), 0.5, rtol=0.05, atol=0
    )


def test_a_small_error_of_the_noise_stays_small() -> None:
    """On N(0, 1) the noise given x_t is sigma x_t, exactly; a network misses it a little, and has never seen 5."""
    torch.manual_seed(0)

    def denoise(x_t: Tensor, t: float) -> Tensor:
        sigma = alpha_sigma_at(t)[1]
        return NoiseTarget().data(x_t, (sigma * x_t).clamp(-5, 5) + 0.05 * torch.sign(x_t), t)

    for steps in (100, 1000):
        x = DDPM(steps)(denoise, torch.randn(2000, 4), torch.Generator().manual_seed(0))
        assert 0.8 < x.std() < 1.2, "with alpha ending at 5e-5, as the paper's does, it is above 10"


@pytest.mark.parametrize("target", [NoiseTarget(), DataTarget(), VelocityTarget()])
def test_every_diffusion_target_gives_back_the_data(target: NoiseTarget | DataTarget | VelocityTarget) -> None:
    x, noise = torch.randn(2, 30, 2, dtype=torch.float64)
    for t in (0.1, 0.5, 0.9):
        alpha, sigma = alpha_sigma_at(t)
        answer = target.target(x, noise, torch.tensor(t))
        torch.testing.assert_close(target.data(alpha * x + sigma * noise, answer, t), x)


@pytest.mark.slow
def test_a_trained_diffusion_head_finds_both_modes() -> None:
    torch.manual_seed(0)
    head = DiffusionHead(HoistedNet(2, len(TOYS), width=48, depth=2), VelocityTarget())
    train(head, 500)
    for solver in (DDPM(100, variance=0.5), DDIM(100)):
        head.solver = solver
        ours = draw(head, TOYS.index("bimodal"), 1000)
        assert (ours[:, 0].abs() > 0.6).float().mean() > 0.95 and 0.4 < (ours[:, 0] > 0).float().mean() < 0.6
        assert abs(ours[:, 1].std().item() - 0.1) < 0.04
