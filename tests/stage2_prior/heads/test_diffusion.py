"""The diffusion head: its schedule, its samplers, its targets, its learned variance."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from stage1_tokenizer.training.optim import MuonAdamW, parameter_groups, warmup_flat_cosine
from stage2_prior.heads.base import FlowHead, HeadError
from stage2_prior.heads.ddpm import (
    DDIM,
    DDPM,
    DataTarget,
    LearnedVariance,
    NoiseTarget,
    VelocityTarget,
    alpha_sigma,
    alpha_sigma_at,
    step_variances,
)
from stage2_prior.heads.diffusion import DiffusionHead
from stage2_prior.heads.nets import HoistedNet
from stage2_prior.heads.solvers import Field, SamplerError
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
        alpha, sigma = alpha_sigma_at(t)
        return NoiseTarget().data(x_t, (sigma * x_t).clamp(-5, 5) + 0.05 * torch.sign(x_t), alpha, sigma)

    for steps in (100, 1000):
        x = DDPM(steps)(denoise, torch.randn(2000, 4), torch.Generator().manual_seed(0))
        assert 0.8 < x.std() < 1.2, "with alpha ending at 5e-5, as the paper's does, it is above 10"


@pytest.mark.parametrize("target", [NoiseTarget(), DataTarget(), VelocityTarget()])
def test_every_diffusion_target_gives_back_the_data(target: NoiseTarget | DataTarget | VelocityTarget) -> None:
    x, noise = torch.randn(2, 30, 2, dtype=torch.float64)
    for t in (0.1, 0.5, 0.9):
        alpha, sigma = alpha_sigma_at(t)
        answer = target.target(x, noise, torch.tensor(alpha), torch.tensor(sigma))
        torch.testing.assert_close(target.data(alpha * x + sigma * noise, answer, alpha, sigma), x)


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


KNOWN = (0.2, 1.0)  # standard deviations of two Gaussians, told apart by the condition


def best_share(t: float, s: float, spread: float) -> float:
    """Where the variance of p(x_s | x_t) lies between the two bounds, for data N(0, spread^2)."""
    (alpha, sigma), (alpha_s, _), (beta, posterior) = alpha_sigma_at(t), alpha_sigma_at(s), step_variances(t, s)
    of_data = spread**2 * sigma**2 / (alpha**2 * spread**2 + sigma**2)  # Var[x | x_t]
    return math.log1p((alpha_s * beta / sigma**2) ** 2 * of_data / posterior) / math.log(beta / posterior)


@pytest.fixture(scope="module")
def learned() -> DiffusionHead:
    """Ten steps, so that the right variance matters."""
    torch.manual_seed(0)
    net = HoistedNet(1, 2, width=48, depth=2, answers=2)
    head = DiffusionHead(net, VelocityTarget(), DDPM(10), variance=LearnedVariance(levels=10))
    optimizer = MuonAdamW(parameter_groups(head), lr=3e-3, matrix_lr=0.02)
    base, g = [group["lr"] for group in optimizer.param_groups], torch.Generator().manual_seed(0)
    cond = torch.eye(2).repeat_interleave(128, 0)
    for step in range(400):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * warmup_flat_cosine(step, 400)
        x = cond @ torch.tensor(KNOWN)[:, None] * torch.randn(256, 1, generator=g)
        loss = head.loss(cond, x, g).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval()


@pytest.mark.slow
def test_a_learned_variance_is_the_known_one(learned: DiffusionHead) -> None:
    grid, g = DDPM(10).grid(), torch.Generator().manual_seed(1)
    assert learned.variance is not None
    for kind, spread in enumerate(KNOWN):
        cond = torch.eye(2)[kind].expand(4000, -1)
        for t, s in list(pairwise(grid))[2:-1:2]:
            alpha, sigma = alpha_sigma_at(t)
            x, noise = spread * torch.randn(4000, 1, generator=g), torch.randn(4000, 1, generator=g)
            x_t, time = alpha * x + sigma * noise, torch.tensor(t)
            with torch.no_grad():
                answer = learned.net(x_t, learned.net.time(time), learned.net.condition(cond))
                found = learned.field(x_t, answer, t)
                assert isinstance(found, tuple)
                data, u = found
                beta, posterior = step_variances(t, s)
                wrong = math.log(beta / posterior) * ((1 + u.mean().item()) / 2 - best_share(t, s, spread))
                assert abs(wrong) < 0.12, (spread, t, wrong)  # of the logarithm of the variance
                ours, low, high = (
                    learned.variance.bound(x, data, u * a + b, torch.full((4000,), t)).mean()
                    for a, b in ((1, 0), (0, -1), (0, 1))
                )
            assert ours < min(low, high) + 0.01, (spread, t)
            misses = [math.log(beta / posterior) * (b - best_share(t, s, spread)) for b in (0, 1)]
        assert max(map(abs, misses)) > 0.3  # control: at the last of these times one of the bounds is far off
        spreads = {}
        for name, head in (("learned", learned), ("fixed", FixedTwin(learned))):
            with torch.no_grad():
                spreads[name] = head.sample(cond, generator=torch.Generator().manual_seed(3)).std().item() / spread
        alpha, sigma = alpha_sigma_at(grid[-2])  # the last step returns the mean of the data given this one
        exact = alpha * spread / math.hypot(alpha * spread, sigma)
        assert abs(spreads["learned"] - exact) < 0.05 < abs(spreads["fixed"] - exact), (spreads, exact)


class FixedTwin(DiffusionHead):
    """Control: the same network with the posterior's variance in place of its own."""

    def __init__(self, twin: DiffusionHead):
        super().__init__(twin.net, twin.target, twin.solver, variance=twin.variance)

    def field(self, x: Tensor, answer: Tensor, t: float) -> Tensor:
        found = super().field(x, answer, t)
        assert isinstance(found, tuple)
        return found[0]


def test_the_bound_moves_the_variance_alone_and_no_variance_is_no_change() -> None:
    torch.manual_seed(0)
    head = DiffusionHead(HoistedNet(2, 4, answers=2), variance=LearnedVariance())
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.2)
    cond, x = torch.randn(6, 4), torch.randn(6, 2)
    head.loss(cond, x, torch.Generator().manual_seed(1)).mean().backward()
    assert head.net.out.weight.grad is not None
    mean, variance = head.net.out.weight.grad.clone().chunk(2)
    assert variance.abs().max() > 0
    plain = DiffusionHead(HoistedNet(2, 4))
    state = {k: v[:2] if k.startswith("net.out.") else v for k, v in head.state_dict().items()}
    plain.load_state_dict(state)
    plain.loss(cond, x, torch.Generator().manual_seed(1)).mean().backward()
    torch.testing.assert_close(mean, plain.net.out.weight.grad)  # of the squared error alone
    with torch.no_grad():
        c, u = torch.randn(2, 6, 4)
        assert head.sample(c, u, 2.0, generator=torch.Generator().manual_seed(1)).shape == (6, 2)


def test_a_learned_variance_needs_a_second_answer_and_ancestral_steps() -> None:
    with pytest.raises(HeadError, match="answers=1"):
        DiffusionHead(HoistedNet(2, 4), variance=LearnedVariance())
    with pytest.raises(HeadError, match="answers=2"):
        DiffusionHead(HoistedNet(2, 4, answers=2))
    with pytest.raises(HeadError, match="2 answers"):
        FlowHead(HoistedNet(2, 4, answers=2))
    with pytest.raises(HeadError, match="DDIM with a learned variance"):
        DiffusionHead(HoistedNet(2, 4, answers=2), solver=DDIM(), variance=LearnedVariance())
    with pytest.raises(SamplerError, match="levels=1"):
        LearnedVariance(levels=1)
