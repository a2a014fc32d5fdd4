"""A line that costs what it was given: the optimum for Gaussian data at the start, and a KL that is steered there."""

import math

import pytest
import torch

from stage1_tokenizer import LinearPath, RateBottleneck
from stage1_tokenizer.prefixes import keep_mask
from stage1_tokenizer.variants.rated import water_level

K, C, SIDE, BITS = 4, 8, 8, 40.0


def gaussian_pictures(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    spectrum = 0.3 * torch.arange(1, 61).float().pow(-1.0)
    mix = torch.linalg.qr(torch.randn(3 * SIDE * SIDE, 60, generator=generator))[0].T * spectrum[:, None]
    return (torch.randn(n, 60, generator=generator) @ mix).view(n, 3, SIDE, SIDE)


def silent_beside(path: LinearPath, bits: float) -> RateBottleneck:
    bottleneck = RateBottleneck(16, K, C, bits=bits)
    bottleneck.start_silent()
    bottleneck.start_beside(path.variances, 3 * SIDE * SIDE)
    with torch.no_grad():
        bottleneck.project.weight.zero_()
        bottleneck.project.bias[..., :C] = 0
    return bottleneck


def fitted_path() -> LinearPath:
    path = LinearPath(SIDE, K, C)
    path.fit(gaussian_pictures(4000))
    return path


def test_water_is_level() -> None:
    variances = torch.tensor([16.0, 4.0, 1.0, 0.01])
    level, noise = water_level(variances, nats=math.log(4) + math.log(2))
    # Above water: 16 and 4 and 1. Level 1/... : ln(16/t)/2 + ln(4/t)/2 + ln(1/t)/2 = 3 ln 2  =>  t = 1.
    assert level.item() == pytest.approx(1.0, rel=1e-4)
    assert noise.tolist() == pytest.approx([1 / 16, 1 / 4, 1.0, 1.0], rel=1e-4)


@torch.no_grad()
def test_the_start_costs_the_rate_and_has_the_distortion_of_theory() -> None:
    path, images = fitted_path(), gaussian_pictures(4000)
    bottleneck = silent_beside(path, BITS).eval()
    y, keep = path.encode(images, K), keep_mask(torch.full((len(images),), K), K)
    z, parts = bottleneck(torch.zeros(len(images), K, 16), y)
    assert parts["rate_bits"].item() == pytest.approx(BITS, rel=0.01)
    error = (path.decode(bottleneck.linear(z), keep) - images).square().flatten(1).sum(1).mean().item()
    lost = (path.decode(y, keep) - images).square().flatten(1).sum(1).mean().item()
    kept = (bottleneck.noise * path.variances).sum().item()  # sum of min(theta, lambda)
    assert error == pytest.approx(lost + kept, rel=0.02)
    # The control: the same latents read without the factor sqrt(1 - d).
    assert (path.decode(z, keep) - images).square().flatten(1).sum(1).mean().item() > 1.05 * error


def test_the_price_follows_from_the_level() -> None:
    """At the start no change of a component's noise makes error plus price smaller: the gradient is zero."""
    path, images = fitted_path(), gaussian_pictures(4000)
    y, keep = path.encode(images, K), keep_mask(torch.full((len(images),), K), K)

    def gradient(price: float) -> float:
        bottleneck = silent_beside(path, BITS)
        bottleneck.log_factor += math.log(price)
        torch.manual_seed(0)
        z, parts = bottleneck(torch.zeros(len(images), K, 16), y)
        ((path.decode(bottleneck.linear(z), keep) - images).square().mean() + parts["kl"]).backward()
        assert bottleneck.project.bias.grad is not None
        return bottleneck.project.bias.grad[..., C:].norm().item()

    assert gradient(1.0) < 0.1 * min(gradient(0.5), gradient(2.0))


@pytest.mark.parametrize("bits", [10.0, 60.0])
def test_the_rate_is_steered_to_what_was_asked_for(bits: float) -> None:
    """From a price of about 100 bits, with a decoder that reads latents as they are."""
    torch.manual_seed(0)
    bottleneck = RateBottleneck(C, K, C, bits=bits, weight=1e-2, pace=0.05)
    optimizer, rates = torch.optim.Adam(bottleneck.parameters(), lr=0.02), []
    for _ in range(400):
        x = torch.randn(64, K, C) * torch.linspace(1.5, 0.2, K)[:, None]
        z, parts = bottleneck(x)
        rates.append(parts["rate_bits"].item())
        loss = (z * 0.7 - x).square().mean() + parts["kl"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(rates[-100:]) / 100 == pytest.approx(bits, rel=0.05)
    factor = bottleneck.eval().log_factor.clone()
    bottleneck(torch.randn(8, K, C))
    assert torch.equal(bottleneck.log_factor, factor), "outside of training nothing is steered"


@pytest.mark.parametrize("options", [{"bits": 0.0}, {"pace": 0.0}, {"weight": 0.0}])
def test_a_rate_that_cannot_be_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="wanted all above 0"):
        RateBottleneck(16, K, C, **options)
