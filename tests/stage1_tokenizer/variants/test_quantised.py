"""Discrete controls: exact sets of values, gradients through them, no collapse, positions that do not meet."""

import math
from typing import Any

import pytest
import torch

from stage1_tokenizer.spec import build
from stage1_tokenizer.variants.quantised import FSQBottleneck, VQBottleneck, entropy_bits, straight_through

BOTTLENECKS = [
    lambda: FSQBottleneck(width=12, num_latents=6, levels=(8, 5, 2, 3)),
    lambda: VQBottleneck(width=12, num_latents=6, latent_dim=4, codes=64),
]


@pytest.mark.parametrize("make", BOTTLENECKS)
def test_a_prefix_is_exact_and_encoding_is_deterministic(make: Any) -> None:
    bottleneck, h = make(), torch.randn(5, 6, 12)
    mean, std = bottleneck.posterior(h)
    assert mean.shape == (5, 6, bottleneck.latent_dim) and not std.any()
    assert torch.equal(bottleneck.posterior(h[:, :2])[0], mean[:, :2])
    torch.testing.assert_close(bottleneck(h)[0], mean, atol=1e-6, rtol=0)
    later = h.clone()
    later[:, 3] += 1
    assert torch.equal(bottleneck.posterior(later)[0][:, :3], mean[:, :3])


@pytest.mark.parametrize("make", BOTTLENECKS)
def test_gradients_pass_the_rounding_and_the_module_can_be_rebuilt(make: Any) -> None:
    bottleneck, h = make(), torch.randn(5, 6, 12, requires_grad=True)
    z, _ = bottleneck(h)
    z.square().sum().backward()
    assert h.grad is not None and h.grad.abs().sum() > 0
    again = build(bottleneck.spec)
    again.load_state_dict(bottleneck.state_dict())
    assert torch.equal(again.posterior(h)[0], bottleneck.posterior(h)[0])


def test_fsq_takes_every_level_and_no_other_value() -> None:
    bottleneck = FSQBottleneck(width=12, num_latents=6, levels=(8, 5, 2, 3))
    with torch.no_grad():
        z = bottleneck.posterior(20 * torch.randn(4000, 6, 12))[0]
    for channel, levels in enumerate((8, 5, 2, 3)):
        assert len(z[..., channel].unique()) == levels
    assert z.min() == -1 and z.max() == 1
    assert bottleneck.bits_per_latent == pytest.approx(math.log2(8 * 5 * 2 * 3))
    used = bottleneck(torch.randn(4000, 6, 12))[1]["bits_used"]
    assert 0.8 * bottleneck.bits_per_latent < used <= bottleneck.bits_per_latent + 1e-4


def test_vq_puts_out_the_nearest_code() -> None:
    bottleneck = VQBottleneck(width=12, num_latents=6, latent_dim=4, codes=64)
    with torch.no_grad():
        bottleneck.basis.weight.copy_(torch.randn(4, 4))
        y, code, index = bottleneck.quantise(torch.randn(5, 6, 12), None)
        distances = torch.cdist(y.flatten(0, 1), bottleneck.codebook())
    assert torch.equal(distances.argmin(1), index.flatten())
    assert torch.equal(code.flatten(0, 1), bottleneck.codebook()[index.flatten()])


def test_vq_learns_clusters_without_dead_codes() -> None:
    """Features far from every code at first: the map of the codebook follows, the quantisation error falls."""
    bottleneck = VQBottleneck(width=4, num_latents=1, latent_dim=4, codes=64, weight=1.0)
    optimizer = torch.optim.Adam(bottleneck.parameters(), lr=0.02)
    h = torch.randn(512, 1, 4) @ torch.diag(torch.tensor([5.0, 2.0, 0.3, 0.1]))
    first = last = None
    for _ in range(150):
        z, losses = bottleneck(h)
        loss = losses["commit"] + (z - h).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = first or loss.item(), loss.item()
    assert first is not None and last is not None and last < 0.5 * first
    assert losses["bits_used"] > 0.6 * bottleneck.bits_per_latent


def test_helpers() -> None:
    soft = torch.tensor([0.3], requires_grad=True)
    hard = straight_through(soft, soft.round())
    hard.backward()
    assert hard.item() == 0.0 and soft.grad == 1.0
    assert entropy_bits(torch.tensor([4.0, 4.0, 0.0])) == pytest.approx(1.0)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 levels or more"):
        FSQBottleneck(levels=(8, 1))
    with pytest.raises(ValueError, match="at least 2"):
        VQBottleneck(codes=1)
