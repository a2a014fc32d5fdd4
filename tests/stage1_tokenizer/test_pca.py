"""PCA: optimal, monotone, and exact against a full singular value decomposition."""

import itertools

import pytest
import torch

from stage1_tokenizer.pca import PCA
from stage1_tokenizer.similarity import psnr


def correlated(n: int, seed: int = 0) -> torch.Tensor:
    """Pictures (n, 3, 8, 8) whose 192 directions have variances falling as 1 / rank^2, well inside [-1, 1]."""
    mixing = torch.linalg.qr(torch.randn(192, 192, generator=torch.Generator().manual_seed(7))).Q
    codes = torch.randn(n, 192, generator=torch.Generator().manual_seed(seed)) / torch.arange(1, 193)
    return (0.3 * codes @ mixing).clamp(-1, 1).reshape(n, 3, 8, 8)


def test_error_is_that_of_the_best_subspace() -> None:
    images = correlated(400)
    pca = PCA.fit(images, 20)
    x = images.flatten(1)
    singular = torch.linalg.svdvals(x - x.mean(0))
    for floats in (1, 5, 20):
        error = (pca.reconstruct(images, floats) - images).square().sum()
        assert error.item() == pytest.approx(singular[floats:].square().sum().item(), rel=2e-3)


def test_components_are_orthonormal_and_ordered() -> None:
    pca = PCA.fit(correlated(400), 20)
    torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(20), atol=1e-4, rtol=0)
    assert (pca.explained.diff() <= 0).all() and 0.9 < pca.explained.sum() <= 1


def test_more_floats_are_better_on_held_out_pictures() -> None:
    pca, held_out = PCA.fit(correlated(500), 64), correlated(100, seed=1)
    values = [psnr(pca.reconstruct(held_out, floats), held_out).mean().item() for floats in (1, 4, 16, 64)]
    assert all(later > earlier + 1 for earlier, later in itertools.pairwise(values))


def test_a_prefix_of_the_code_is_the_smaller_code() -> None:
    images = correlated(300)
    pca = PCA.fit(images, 16)
    torch.testing.assert_close(pca.decode(pca.encode(images)[:, :5]), pca.reconstruct(images, 5))


def test_a_fit_follows_its_seed_and_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (PCA.fit(correlated(300), 16, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.components, same.components) and not torch.equal(one.components, other.components)


def test_large_pictures_have_the_same_components(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few large pictures they come from the products between pictures, in the place of these."""
    images, held_out = correlated(100), correlated(20, seed=1)
    usual, before = PCA.fit(images, 120), images.clone()
    monkeypatch.setattr("stage1_tokenizer.pca.LARGE", 0)
    monkeypatch.setattr("stage1_tokenizer.pca.BLOCK", 50)
    large = PCA.fit(images, 120)
    assert large.components.untyped_storage().nbytes() == 4 * large.components.numel()  # the pictures are let go
    assert torch.equal(images, before) and large.num_floats == usual.num_floats == 99
    torch.testing.assert_close(large.explained, usual.explained, rtol=1e-3, atol=1e-7)
    for floats in (1, 10, 99):
        wanted = usual.reconstruct(held_out, floats)
        torch.testing.assert_close(large.reconstruct(held_out, floats), wanted, rtol=0, atol=1e-3)


def test_few_pictures_give_few_floats() -> None:
    pca = PCA.fit(correlated(10), 64)
    assert pca.num_floats == 9
    torch.testing.assert_close(pca.reconstruct(correlated(10), 64), correlated(10), atol=1e-3, rtol=0)


def test_other_pictures_are_refused() -> None:
    pca = PCA.fit(correlated(20), 4)
    with pytest.raises(ValueError, match="as fitted"):
        pca.encode(torch.zeros(2, 3, 16, 16))
