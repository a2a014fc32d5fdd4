"""What a linear path reads of every bottleneck's latents, and the ids of discrete ones."""

import math
from typing import Any

import pytest
import torch

from stage1_tokenizer import FSQBottleneck, KLBottleneck, LinearPath, NoiseBottleneck, NormBottleneck, VQBottleneck
from stage1_tokenizer.bottleneck import Bottleneck
from stage1_tokenizer.prefixes import keep_mask

K, C, SIDE = 4, 8, 8


def path_alone(bottleneck: Bottleneck, straight: bool = False) -> float:
    """Mean squared error, over that of PCA itself, of pictures through a silent encoder and the linear path alone.

    straight: latents are read as coefficients, whatever they are: the control.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(600, 60, generator=generator) @ torch.randn(60, 3 * SIDE * SIDE, generator=generator) * 0.02
    images, path = images.view(-1, 3, SIDE, SIDE), LinearPath(SIDE, K, C)
    path.fit(images)
    bottleneck.start_silent()
    with torch.no_grad():
        coefficients, keep = path.encode(images, K), keep_mask(torch.full((len(images),), K), K)
        z, _ = bottleneck.posterior(torch.zeros(len(images), K, 16), coefficients)
        read = z if straight else bottleneck.linear(z)
        errors = [(path.decode(x, keep) - images).square().mean().item() for x in (read, coefficients)]
    return errors[0] / errors[1]


@pytest.mark.parametrize("levels", [5, 8])
def test_symbols_are_read_at_their_means(levels: int) -> None:
    bottleneck = FSQBottleneck(16, K, (levels,) * C)
    excess, control = (path_alone(bottleneck, straight) - 1 for straight in (False, True))
    assert 0 < excess < 0.6 * control


def test_what_is_not_changed_is_read_as_it_is() -> None:
    assert path_alone(KLBottleneck(16, K, C)) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", [NormBottleneck, NoiseBottleneck])
def test_normalised_latents_are_read_at_their_expected_norm(kind: type[Any]) -> None:
    bottleneck, y = kind(16, K, C), torch.randn(20_000, 1, C)
    z, _ = bottleneck.posterior(torch.zeros(len(y), 1, 16), y)
    read = bottleneck.linear(z)
    slope = (y * z).mean() / z.square().mean()  # the best factor on z for unit normals
    torch.testing.assert_close(read, z * slope, rtol=2e-2, atol=1e-3)
    assert path_alone(bottleneck) <= path_alone(bottleneck, straight=True)


def test_a_symbols_mean_is_that_of_the_normals_that_become_it() -> None:
    bottleneck, y = FSQBottleneck(16, 1, (5, 8)), torch.randn(200_000, 1, 2)
    bottleneck.start_silent()
    with torch.no_grad():
        bottleneck.project.bias.zero_()
        z, _ = bottleneck.posterior(torch.zeros(len(y), 1, 16), y)
        symbols, read = bottleneck.symbols(z), bottleneck.linear(z)
    for channel, levels in enumerate((5, 8)):
        for symbol in range(levels):
            there = symbols[..., channel] == symbol
            if there.sum() > 500:
                wanted = y[..., channel][there].mean()
                assert read[..., channel][there].mean().item() == pytest.approx(wanted.item(), abs=0.05)


@pytest.mark.parametrize("bottleneck", [FSQBottleneck(16, K, (5, 4, 3)), VQBottleneck(16, K, 3, codes=32)])
def test_ids_name_every_code_and_snapping_twice_is_snapping_once(bottleneck: Any) -> None:
    codes = round(2**bottleneck.bits_per_latent)
    ids = torch.arange(codes)[:, None]
    with torch.no_grad():
        z = bottleneck.from_ids(ids)
        assert torch.equal(bottleneck.ids(z), ids)
        snapped = bottleneck.snap(z + 0.01 * torch.randn_like(z))
        assert torch.equal(bottleneck.snap(snapped), snapped) and torch.allclose(snapped, z, atol=1e-6)
    for wrong in (-1, codes):
        with pytest.raises(ValueError, match=f"wanted 0 to {codes - 1}"):
            bottleneck.from_ids(torch.tensor([[wrong]]))


def test_too_many_codes_to_count_are_refused() -> None:
    bottleneck = FSQBottleneck(16, 1, (8,) * 30)
    assert bottleneck.bits_per_latent == pytest.approx(30 * math.log2(8))
    with pytest.raises(ValueError, match="got 90 bits a latent, wanted below 63"):
        bottleneck.ids(torch.zeros(1, 1, 30))
