"""The next noise level as a target: the chain's law, what its answer implies, what of it cannot be predicted."""

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.flow import interpolate
from stage2_prior.heads.base import HeadError
from stage2_prior.heads.chain import level_below, step
from stage2_prior.heads.ddpm import DDPM, DataTarget, NextLevelTarget, alpha_sigma, alpha_sigma_at
from stage2_prior.heads.flow import CleanOutput, NextLevelOutput
from stage2_prior.heads.solvers import Midpoint, SamplerError

MU, STD = 0.5, 0.3  # of Gaussian data, for which every expectation is known


def denoised(x_t: Tensor, alpha: float, sigma: float) -> Tensor:
    """E[x | x_t] for x ~ N(MU, STD^2)."""
    return MU + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MU)


@pytest.mark.parametrize("t", [0.03, 0.4, 0.97])
def test_two_levels_are_those_of_the_chain_forwards(t: float) -> None:
    """x_s has its own noise level, and what leads from it to x_t is independent of it."""
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 200_000, generator=g, dtype=torch.float64)
    at, below = torch.tensor(t, dtype=torch.float64), level_below(torch.tensor(t, dtype=torch.float64), 10)
    (alpha, sigma), (alpha_s, sigma_s) = (1 - at, at), (1 - below, below)
    x_t = alpha * x + sigma * noise
    x_s = step(alpha, sigma, alpha_s, sigma_s).sample(x, x_t, g)
    own, fresh = x_s - alpha_s * x, x_t - alpha / alpha_s * x_s
    beta = sigma**2 - (alpha / alpha_s * sigma_s) ** 2
    for value, wanted in ((own.var(), sigma_s**2), (fresh.var(), beta)):
        torch.testing.assert_close(value, wanted, rtol=0.02, atol=1e-12)
    for a, b in ((own, x), (fresh, x), (own, fresh)):
        assert abs((a * b).mean()) < 0.01 * (a.std() * b.std()) + 1e-9
    if below > 0:
        assert abs((own * noise).mean()) > 0.1 * own.std()  # control: of the noise in x_t it is a part


@pytest.mark.parametrize("t", [0.004, 0.3, 0.9, 1.0])
def test_the_answer_in_expectation_implies_the_data(t: float) -> None:
    x_t = torch.randn(50, 3, dtype=torch.float64)
    target, output = NextLevelTarget(20), NextLevelOutput(20)
    at = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = alpha_sigma_at(t)
    data = denoised(x_t, alpha, sigma)
    mean = target.step(at).data * data + target.step(at).noisy * x_t
    torch.testing.assert_close(target.data(x_t, mean, t), data)
    data = denoised(x_t, 1 - t, t)
    mean = output.step(at).data * data + output.step(at).noisy * x_t
    wanted = (x_t - data) / t
    torch.testing.assert_close(output(x_t, mean, t), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output(x_t, mean, at), wanted, rtol=1e-4, atol=1e-4)


def test_samplers_draw_the_data_from_exact_answers() -> None:
    g = torch.Generator().manual_seed(0)
    e = torch.randn(20_000, 1, generator=g, dtype=torch.float64)
    target, output = NextLevelTarget(100), NextLevelOutput(10)

    def denoise(x_t: Tensor, t: float, by: NextLevelTarget | DataTarget) -> Tensor:
        data = denoised(x_t, *alpha_sigma_at(t))
        if isinstance(by, DataTarget):
            return by.data(x_t, data, t)
        at = by.step(torch.tensor(t, dtype=torch.float64))
        return by.data(x_t, at.data * data + at.noisy * x_t, t)

    draws = [
        DDPM(100)(lambda x, t, by=by: denoise(x, t, by), e, torch.Generator().manual_seed(1))  # type: ignore[misc]
        for by in (target, DataTarget())
    ]
    torch.testing.assert_close(*draws, rtol=0, atol=1e-6)
    assert abs(draws[0].mean() - MU) < 0.01 and 0.9 < draws[0].std() / STD < 1.0

    def field(x_t: Tensor, t: float) -> Tensor:
        at = output.step(torch.tensor(t))
        return output(x_t, at.data * denoised(x_t, 1 - t, t) + at.noisy * x_t, t)

    z = Midpoint(16)(field, e, g)
    assert abs(z.mean() - MU) < 0.01 and abs(z.std() / STD - 1) < 0.02


def test_of_the_next_level_a_part_cannot_be_predicted_and_of_the_data_nothing() -> None:
    """Data that is one point: the best answers are known, and the loss that is left is the target's own variance."""
    x, noise = torch.full((100_000, 1), MU), torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0))
    t = torch.full((100_000, 1), 0.5)
    output, x_t = NextLevelOutput(4), interpolate(x, noise, t)
    at = output.step(t)
    loss = output.error(x, noise, at.data * x + at.noisy * x_t, t, torch.Generator().manual_seed(1)).mean()
    assert loss.item() == pytest.approx(at.variance[0].item(), rel=0.02) and loss > 0.03
    assert CleanOutput().error(x, noise, x, t).mean() < 1e-10
    target = NextLevelTarget(4)
    alpha, sigma = alpha_sigma(t)
    asked = target.target(x, noise, t, torch.Generator().manual_seed(1))
    left = asked - target.step(t).data * x - target.step(t).noisy * (alpha * x + sigma * noise)
    assert left.var().item() == pytest.approx(target.step(t).variance[0].item(), rel=0.02)


def test_levels_are_checked() -> None:
    with pytest.raises(SamplerError, match="levels=0"):
        NextLevelTarget(0)
    with pytest.raises(HeadError, match="levels=0"):
        NextLevelOutput(0)
