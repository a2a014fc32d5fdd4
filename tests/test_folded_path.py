"""Two components in one float: what comes back, what noise does to it, and that prefixes stay exact."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from stage1_tokenizer import Tokenizer
from stage1_tokenizer.convolutional import ConvDecoder
from stage1_tokenizer.folded_path import SPREAD, STEP, FoldedPath, snake
from stage1_tokenizer.linear_path import LinearPath
from stage1_tokenizer.metrics import psnr
from stage1_tokenizer.order import PrefixLengths, keep_mask
from stage1_tokenizer.path_only import BlindEncoder, PathBottleneck
from stage1_tokenizer.pca import PCA
from tests.tiny import SIZE, C, K

N = 512


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Pictures of SIZE pixels that are Gaussian, smooth more than fine, so that components fall off."""
    noise = torch.randn(N, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    coarse = torch.nn.functional.interpolate(
        torch.randn(N, 3, 4, 4, generator=torch.Generator().manual_seed(1)), size=SIZE, mode="bilinear"
    )
    return (0.25 * coarse + 0.02 * noise).clamp(-1, 1)


def fitted(images: Tensor, noise: float = 0.011) -> FoldedPath:
    path = FoldedPath(SIZE, K, C, noise)
    path.fit(images)
    return path


def everything(images: Tensor, k: int = K) -> Tensor:
    return keep_mask(torch.full((len(images),), k), K)


def decibels(path: LinearPath, images: Tensor, noise: float = 0.0) -> float:
    z = path.encode(images, K)
    z = z + noise * torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    return psnr(path.decode(z, everything(images)), images).mean().item()


def test_the_weak_components_come_back_exactly_and_the_strong_ones_within_half_a_step(images: Tensor) -> None:
    path = fitted(images)
    pictures = path.decode(path.encode(images, K), everything(images))
    sent, back = (path.pairs(LinearPath.encode(path, x, 2 * K).flatten(1)) for x in (images, pictures))
    assert ((sent[0] - back[0]).abs() <= 0.5 * path.step + 1e-3).all()
    torch.testing.assert_close(back[1], sent[1].clamp(-5.3, 5.3), atol=0.02, rtol=0)


@pytest.mark.parametrize("k", [1, 3])
def test_a_prefix_of_latents_is_a_prefix_of_components(images: Tensor, k: int) -> None:
    path, pca = fitted(images), PCA.fit(images, 2 * K * C)
    z = path.encode(images, K)
    assert torch.equal(path.encode(images, k), z[:, :k])
    hidden = path.decode(torch.cat([z[:, :k], 9 * torch.randn(N, K - k, C)], 1), everything(images, k))
    torch.testing.assert_close(hidden, path.decode(z, everything(images, k)), msg="hidden latents do not come through")
    error = (hidden - pca.reconstruct(images, 2 * C * k)).square().mean()
    assert error < 0.1 * (images - pca.reconstruct(images, C * k)).square().mean(), "2C components, not C"


def test_the_weak_component_does_not_jump_where_the_step_changes(images: Tensor) -> None:
    path = fitted(images)
    border = 0.5 * path.step[None]
    below, above = (path.decode(border * factor, everything(images[:1])) for factor in (0.999, 1.001))
    before, after = (path.pairs(LinearPath.encode(path, x, 2 * K).flatten(1))[1] for x in (below, above))
    torch.testing.assert_close(before, after, atol=0.05, rtol=0)
    assert before.abs().min() > 2, "at the edge of a step, where a code without turns would jump from end to end"
    n, v = torch.arange(-3.0, 4), torch.rand(7)
    torch.testing.assert_close(snake(n, snake(n, v)), v)


def test_the_step_is_the_one_with_the_least_error() -> None:
    """The two terms of the docstring, and their sum's minimum, by drawing."""
    generator, nu, weak = torch.Generator().manual_seed(0), 0.005, 0.5
    a, b, noise = torch.randn(3, 200_000, generator=generator).unbind(0)

    def error(step: float) -> tuple[float, float]:
        n = (a / step).round()
        z = (n + snake(n, torch.special.ndtr(b / SPREAD)) - 0.5) * step + nu * noise
        m = (z / step).round()
        v = snake(m, z / step - m + 0.5).clamp(1e-3, 1 - 1e-3)
        return (m * step - a).square().mean().item(), (SPREAD * torch.special.ndtri(v) - b).square().mean().item()

    step = STEP * (nu * weak) ** 0.5
    of_a, of_b = error(step)
    assert of_a == pytest.approx(step**2 / 12, rel=0.15)
    assert of_b == pytest.approx(32.6 * nu**2 / step**2, rel=0.15)
    less, best, more = (error(factor * step)[0] + weak**2 * error(factor * step)[1] for factor in (0.6, 1, 1.7))
    assert best < less and best < more


def test_a_fitted_path_has_its_best_steps(images: Tensor) -> None:
    path = fitted(images, 0.02)
    best, step = decibels(path, images, 0.02), path.step.clone()
    for factor in (0.6, 1.7):
        path.step.copy_(factor * step)
        assert decibels(path, images, 0.02) < best - 0.05


def test_it_beats_one_component_a_float_while_noise_is_small_and_only_then(images: Tensor) -> None:
    folded, plain = fitted(images), LinearPath(SIZE, K, C)
    plain.fit(images)
    assert decibels(folded, images, 0.011) > decibels(plain, images, 0.011) + 0.5
    assert decibels(folded, images) > decibels(folded, images, 0.011)
    assert decibels(folded, images, 0.2) < decibels(plain, images, 0.2)


@pytest.mark.parametrize("path", [LinearPath, FoldedPath])
def test_a_tokenizer_whose_code_is_the_path_alone(path: type[LinearPath], images: Tensor, tmp_path: Path) -> None:
    parts = BlindEncoder(K), PathBottleneck(K, C), ConvDecoder(SIZE, K, C, (8,), (1,), 16, base=True)
    tokenizer = Tokenizer(SIZE, *parts, PrefixLengths(K), linear_path=path(SIZE, K, C))
    assert tokenizer.linear_path is not None
    tokenizer.linear_path.fit(images)
    losses, _ = tokenizer.train().losses(images[:8])
    tokenizer.total(losses).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())
    tokenizer.eval()
    assert torch.equal(tokenizer.encode(images[:8]), tokenizer.linear_path.encode(images[:8], K))
    tokenizer.fit_statistics([images])
    z = tokenizer.encode(images[:8])
    torch.testing.assert_close(tokenizer.encode(images[:8], 2), z[:, :2])
    tokenizer.save_pretrained(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    torch.testing.assert_close(loaded.decode(loaded.encode(images[:8])), tokenizer.decode(z))


def test_another_step_is_another_latent_space(images: Tensor) -> None:
    made = []
    for noise in (0.011, 0.02):
        parts = BlindEncoder(K), PathBottleneck(K, C), ConvDecoder(SIZE, K, C, (8,), (1,), 16, base=True)
        made.append(Tokenizer(SIZE, *parts, linear_path=fitted(images, noise)).fingerprint)
    assert made[0] != made[1]


def test_what_does_not_fit_is_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match="got noise 0, wanted above 0"):
        FoldedPath(SIZE, K, C, noise=0)
    with pytest.raises(ValueError, match="got noise -1, wanted a standard deviation"):
        PathBottleneck(K, C, noise=-1)
    decoder = ConvDecoder(SIZE, K, C, (8,), (1,), 16)
    with pytest.raises(ValueError, match="got no linear path for a PathBottleneck"):
        Tokenizer(SIZE, BlindEncoder(K), PathBottleneck(K, C), decoder).encode(images[:2])
