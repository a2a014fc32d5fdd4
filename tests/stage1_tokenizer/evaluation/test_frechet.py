"""Frechet distance against the closed form of Gaussians; precision and recall on constructed sets."""

import pytest
import scipy.linalg
import torch

from stage1_tokenizer.evaluation.frechet import (
    Moments,
    RandomConvFeatures,
    frechet_distance,
    precision_recall,
)


def gaussian(n: int, dim: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + shift


def whitened(n: int, dim: int, seed: int) -> torch.Tensor:
    """A sample whose own mean is exactly 0 and covariance exactly the identity."""
    x = gaussian(n, dim, seed)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T


def test_closed_form_of_two_gaussians() -> None:
    a, b = whitened(500, 6, 0), whitened(400, 6, 1)
    scales = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, 0.1], dtype=torch.float64)
    shift = torch.tensor([0.0, 1.0, 0.0, 0.0, -2.0, 0.5], dtype=torch.float64)
    expected = (shift.square() + (scales - 1).square()).sum().item()
    assert frechet_distance(a, b * scales + shift) == pytest.approx(expected, rel=1e-9)


def test_agrees_with_the_matrix_square_root() -> None:
    a = gaussian(300, 5, 0) @ gaussian(5, 5, 3)
    b = gaussian(200, 5, 1) @ gaussian(5, 5, 4) + 1
    s_a, s_b = torch.cov(a.T).numpy(), torch.cov(b.T).numpy()
    root = scipy.linalg.sqrtm(s_a @ s_b).real
    expected = (a.mean(0) - b.mean(0)).square().sum().item() + (s_a + s_b - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_same_set_is_at_zero_and_symmetric() -> None:
    a, b = gaussian(100, 8, 0), gaussian(100, 8, 1, scale=2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_fewer_pictures_than_features() -> None:
    a, b = gaussian(20, 64, 0), gaussian(30, 64, 1)
    s_a, s_b = torch.cov(a.T).numpy(), torch.cov(b.T).numpy()
    cross = torch.linalg.eigvals(torch.from_numpy(s_a @ s_b)).real.clamp_min(0).sqrt().sum().item()
    expected = (a.mean(0) - b.mean(0)).square().sum().item() + s_a.trace() + s_b.trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def moments(features: torch.Tensor, batch: int) -> Moments:
    found = Moments()
    for part in features.split(batch):
        found.add(part)
    return found


@pytest.mark.parametrize(("n", "dim"), [(300, 6), (40, 64)])
def test_moments_of_batches_are_those_of_the_whole(n: int, dim: int) -> None:
    """Also far from 0, where plain sums of squares would lose nine digits, and with fewer pictures than features."""
    a, b = gaussian(n, dim, 0) + 3e4, gaussian(n, dim, 1, scale=2) + 3e4
    expected = frechet_distance(a, b)
    for batch in (1, 7, n):
        assert frechet_distance(moments(a, batch), moments(b, batch)) == pytest.approx(expected, rel=1e-5)
        assert frechet_distance(moments(a, batch), b) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(moments(a, 7), moments(a, n)) < 1e-5 * expected
    merged = moments(a[: n // 3], 7)
    merged.merge(moments(a[n // 3 :], n))
    assert frechet_distance(merged, a) < 1e-5 * expected
    assert frechet_distance(merged, b) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="wanted \\(B, "):
        moments(a, 7).add(torch.zeros(2, dim + 1))


def test_distance_grows_with_blur() -> None:
    images = torch.rand(200, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    extract = RandomConvFeatures(seed=0).features
    blurred = [torch.nn.functional.avg_pool2d(images, k, 1, k // 2, count_include_pad=False) for k in (3, 5)]
    distances = [frechet_distance(extract(images), extract(x)) for x in blurred]
    assert 0 < distances[0] < distances[1]


def test_random_features_are_named_by_seed_and_repeat() -> None:
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    a, b, c = RandomConvFeatures(0), RandomConvFeatures(0), RandomConvFeatures(1)
    torch.testing.assert_close(a.features(images), b.features(images), rtol=0, atol=0)
    assert a.feature_name == "random-conv-s0" and not torch.allclose(a.features(images), c.features(images))


def test_precision_and_recall_tell_missing_modes_from_wrong_ones() -> None:
    modes = torch.cat([gaussian(100, 2, 0, 0.1), gaussian(100, 2, 1, 0.1, shift=10)])
    one_mode = gaussian(200, 2, 2, 0.1)
    precision, recall = precision_recall(modes, one_mode)
    assert precision > 0.8 and 0.3 < recall < 0.55
    precision, recall = precision_recall(modes, gaussian(200, 2, 3, 0.1, shift=-10))
    assert precision == 0 and recall == 0


def test_balls_reach_the_nearest_neighbour() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # all radii are 1
    fake = torch.tensor([[-0.9], [-1.1], [3.5], [10.0]])  # radii 0.2, 0.2, 4.4, 6.5
    assert precision_recall(real, fake, neighbours=1) == (0.5, 1.0)
    assert precision_recall(real, fake, neighbours=2) == (0.75, 1.0)
