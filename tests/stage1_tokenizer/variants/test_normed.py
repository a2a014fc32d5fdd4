"""Latent noise: how much of the latent and how much noise the decoder is given in training."""

import torch

from stage1_tokenizer.variants.normed import NoiseBottleneck
from tests.tiny import WIDTH, C, K


def parts_of(strength: float, most: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(share of the latent, standard deviation of what is added), per picture, by least squares over K x C floats."""
    torch.manual_seed(0)
    bottleneck = NoiseBottleneck(WIDTH, 64, 16, strength, most)
    h = torch.randn(1, 64, WIDTH).expand(2000, -1, -1)
    z, _ = bottleneck.posterior(h[:1])
    noisy, _ = bottleneck(h)
    share = (noisy * z).flatten(1).sum(1) / z.square().sum()
    return share, (noisy - share[:, None, None] * z).flatten(1).std(1)


def test_a_latent_gives_way_to_as_much_noise_as_is_put_in() -> None:
    """(1 - u) z + u gamma noise: shares run uniformly over (1 - most, 1), and the noise is gamma times what went."""
    share, noise = parts_of(strength=0.5, most=0.8)
    assert 0.15 < share.min() < 0.25 and 0.97 < share.max() < 1.03
    assert abs(share.mean().item() - 0.6) < 0.02
    far = share < 0.9
    assert (noise[far] / (1 - share[far]) / 0.5 - 1).abs().mean() < 0.08  # of 1,024 floats


def test_encoding_has_no_noise() -> None:
    bottleneck = NoiseBottleneck(WIDTH, K, C)
    h = torch.randn(3, K, WIDTH)
    mean, std = bottleneck.posterior(h)
    assert torch.equal(mean, bottleneck.posterior(h)[0]) and not std.any()
    assert (bottleneck(h)[0] - mean).abs().max() > 0.01  # control


def test_noise_is_for_training_only() -> None:
    bottleneck = NoiseBottleneck(WIDTH, K, C)
    h = torch.randn(2, K, WIDTH)
    assert (bottleneck(h)[0] - bottleneck(h)[0]).abs().max() > 0.01
    mean, std = bottleneck.posterior(h)
    assert not std.any() and torch.equal(mean, bottleneck.posterior(h)[0])
    torch.testing.assert_close(mean.var(-1, correction=0), torch.ones(2, K), atol=1e-3, rtol=0)
