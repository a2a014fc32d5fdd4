"""Convolutions: they start from a base, correct it at every level, and fit their picture."""

import pytest
import torch

from stage1_tokenizer.variants.convolutional import ConvDecoder, ConvTrunk
from tests.tiny import SIZE, WIDTH, C, K, awaken, pictures


@pytest.mark.parametrize(("channels", "depths"), [((8,), (1,)), ((8, 12, 16), (1, 0, 2))])
def test_convolutions_start_from_a_base_and_correct_it_at_every_level(
    channels: tuple[int, ...], depths: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    decoder = ConvDecoder(SIZE, K, C, channels, depths, WIDTH, base=True)
    awaken(decoder)
    z, keep = torch.randn(3, K, C), torch.ones(3, K, dtype=torch.bool)
    base = pictures(3).requires_grad_()
    decoder(z, keep, base).sum().backward()
    assert base.grad is not None and (base.grad - 1).abs().max() > 0.01, "more than the sum that it ends in"
    for level in decoder.base:
        assert isinstance(level, torch.nn.Conv2d) and level.weight.grad is not None and level.weight.grad.any()
    hidden = torch.zeros(3, K, dtype=torch.bool)
    assert torch.equal(decoder(z, hidden, base), decoder(-z, hidden, base)), "hidden latents do not come through"
    trunk = ConvTrunk(SIZE, channels, depths, WIDTH)
    assert trunk(pictures()).shape == (5, trunk.num_patches, WIDTH)
    assert trunk.num_patches == (SIZE // 2 ** len(channels)) ** 2


def test_convolutions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got image_size 24 and 4 levels, wanted a multiple of 2\^levels"):
        ConvDecoder(24, K, C, (8, 8, 8, 8), (1, 1, 1, 1), WIDTH)
    with pytest.raises(ValueError, match=r"got channels \(8, 16\) and depths \(1,\)"):
        ConvTrunk(SIZE, (8, 16), (1,), WIDTH)
    with pytest.raises(ValueError, match=r"wanted \(B, 3, 16, 16\)"):
        ConvTrunk(SIZE, (8,), (1,), WIDTH)(pictures(2, 32))
