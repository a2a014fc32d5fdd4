"""Picture and latent metrics against closed forms, an independent implementation, and constructed cases."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from stage1_tokenizer.evaluation.image_metrics import (
    Skipped,
    _gaussian_band,
    latent_use,
    lpips_metric,
    psnr,
    retrieval,
    ssim,
)


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_psnr_of_a_constant_error_is_its_closed_form(pictures: torch.Tensor) -> None:
    offsets = torch.tensor([0.01, 0.02, 0.1, 0.5])
    values = psnr(pictures + offsets[:, None, None, None], pictures)
    torch.testing.assert_close(values, 20 * torch.log10(2 / offsets), rtol=0, atol=1e-3)


def test_psnr_is_per_image_and_finite_for_a_perfect_copy(pictures: torch.Tensor) -> None:
    copy = pictures.clone()
    copy[1] += 0.1
    values = psnr(copy, pictures)
    assert values[0] == pytest.approx(100) and values[1] == pytest.approx(20 * math.log10(20), abs=1e-3)


def test_ssim_agrees_with_scikit_image(pictures: torch.Tensor) -> None:
    noisy = (pictures + 0.2 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    expected = [
        structural_similarity(
            a.double().permute(1, 2, 0).numpy(),
            b.double().permute(1, 2, 0).numpy(),
            channel_axis=2,
            data_range=2.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            win_size=11,
        )
        for a, b in zip(noisy, pictures, strict=True)
    ]
    np.testing.assert_allclose(ssim(noisy, pictures).numpy(), expected, atol=1e-5)


def test_ssim_is_float32_under_autocast(pictures: torch.Tensor) -> None:
    smooth = torch.nn.functional.interpolate(pictures[..., :3, :3], size=24, mode="bilinear")
    near = (smooth + 0.03 * pictures).clamp(-1, 1)
    expected = ssim(near, smooth)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ssim(near, smooth), expected)


def test_the_window_of_ssim_is_made_once_and_serves_losses_after_a_report() -> None:
    cpu = torch.device("cpu")
    with torch.inference_mode():
        band = _gaussian_band(23, cpu)
    assert _gaussian_band(23, cpu) is band and not band.is_inference()
    x = torch.rand(1, 3, 23, 23, requires_grad=True)
    ssim(x, torch.rand(1, 3, 23, 23)).sum().backward()
    assert x.grad is not None and x.grad.any()


def test_pictures_of_two_sizes_are_refused(pictures: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="wanted two equal"):
        psnr(pictures, pictures[:, :, :8])
    with pytest.raises(ValueError, match="11 or more"):
        ssim(pictures[:, :, :8], pictures[:, :, :8])


def test_retrieval_counts_identical_captions_as_hits() -> None:
    captions = ["a", "b", "b", "c"]
    eye = torch.eye(4)
    swapped = eye[[0, 2, 1, 3]]  # the two pictures of "b" find each other's caption
    result = retrieval(eye, swapped, captions, captions)
    assert result.recall == {1: 1.0, 5: 1.0}
    assert result.chance[1] == pytest.approx((1 + 2 + 2 + 1) / 16)


def test_copies_of_a_wrong_caption_take_one_rank() -> None:
    captions = ["a"] * 5 + ["b"] * 5 + ["c"]
    candidates = torch.eye(3).repeat_interleave(torch.tensor([5, 5, 1]), dim=0)
    query = torch.tensor([[0.9, 0.8, 0.1], [0.1, 0.8, 0.9]])  # right ones: second of "a", third of "c"
    result = retrieval(query, candidates, ["b", "a"], captions, ranks=(1, 2, 3))
    assert result.recall == {1: 0.0, 2: 0.5, 3: 1.0}


def test_retrieval_of_wrong_and_constant_embeddings() -> None:
    captions = [str(i) for i in range(10)]
    eye = torch.eye(10)
    assert retrieval(eye, eye.roll(1, 0), captions, captions, ranks=(1,)).recall[1] == 0
    constant = torch.ones(10, 3)
    result = retrieval(constant, constant, captions, captions)
    assert result.recall == {1: 0.0, 5: 0.0}, "ties must not count as hits"
    assert result.chance[5] == pytest.approx(0.5)


def test_retrieval_ranks() -> None:
    candidates = torch.eye(3)
    queries = torch.tensor([[0.9, 0.5, 0.1], [0.5, 0.4, 0.1], [0.1, 0.9, 0.5]])  # ranks of the right one: 1, 2, 2
    result = retrieval(queries, candidates, ["a", "b", "c"], ["a", "b", "c"], ranks=(1, 2))
    assert result.recall[1] == pytest.approx(1 / 3) and result.recall[2] == 1.0


def test_embeddings_that_are_not_numbers_find_nothing() -> None:
    captions, eye = [str(i) for i in range(8)], torch.eye(8)
    broken = eye.clone()
    broken[0], broken[1, 3] = float("nan"), float("inf")
    one, all_of_them = (
        retrieval(broken, eye, captions, captions),
        retrieval(eye * float("nan"), eye, captions, captions),
    )
    assert one.recall == {1: 0.75, 5: 0.75} and all_of_them.recall == {1: 0.0, 5: 0.0}
    assert one.bits == pytest.approx(0.75 * 3, abs=0.01) and all_of_them.bits == 0, "the others still tell theirs"
    few = retrieval(eye[:2] * float("nan"), eye[:2], captions[:2], captions[:2])
    assert few.recall == {1: 0.0, 5: 0.0}, "nor among fewer candidates than are looked at"


def test_the_best_of_several_vectors_of_a_query_counts() -> None:
    captions, eye = [str(i) for i in range(6)], torch.eye(6)
    wrong = eye.roll(1, 0)
    queries = torch.stack([0.5 * wrong, eye], dim=1)  # (Q, 2, E)
    assert retrieval(queries, eye, captions, captions).recall[1] == 1.0
    assert retrieval(queries[:, :1], eye, captions, captions).recall[1] == 0.0


def test_caption_bits_of_perfect_useless_and_grouped_embeddings() -> None:
    captions = [str(i) for i in range(64)]
    perfect = retrieval(torch.eye(64), torch.eye(64), captions, captions)
    assert perfect.bits == pytest.approx(6, abs=0.01) and perfect.most_bits == pytest.approx(6)
    constant = torch.ones(64, 2) / 2**0.5
    assert retrieval(constant, constant, captions, captions).bits == pytest.approx(0, abs=1e-6)
    assert retrieval(torch.eye(64), torch.eye(64).roll(1, 0), captions, captions).bits == 0, "wrong is not negative"
    groups = torch.eye(8).repeat_interleave(8, dim=0)  # the group of eight is known, the one in it is not: 3 bits
    assert retrieval(groups, groups, captions, captions).bits == pytest.approx(3, abs=0.01)
    shared = [str(i // 8) for i in range(64)]
    told = retrieval(groups, groups, shared, shared)
    assert told.bits == pytest.approx(3, abs=0.01) and told.most_bits == pytest.approx(3)


def test_retrieval_chance_is_what_random_embeddings_reach() -> None:
    generator = torch.Generator().manual_seed(0)
    captions = [str(i % 40) for i in range(400)]
    a, b = (torch.randn(400, 8, generator=generator) for _ in range(2))
    result = retrieval(a, b, captions, captions, ranks=(5,))
    assert result.recall[5] == pytest.approx(result.chance[5], abs=0.05)
    assert 0.1 < result.chance[5] < 0.13


def test_rate_of_a_gaussian_channel_and_active_units() -> None:
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(20000, 1, 1, generator=generator)
    snr = 15.0  # signal variance over noise variance: capacity log2(1 + 15) / 2 = 2 bits
    mean = torch.cat([signal * (snr / (1 + snr)) ** 0.5, torch.zeros_like(signal)], dim=2)
    std = torch.tensor([(1 / (1 + snr)) ** 0.5, 1.0]).expand_as(mean)
    use = latent_use(mean, std)
    assert use.rate_bits.item() == pytest.approx(2.0, abs=0.03)
    assert use.active_units.tolist() == [1]


def test_rate_of_a_deterministic_code_is_infinite() -> None:
    assert latent_use(torch.randn(10, 2, 3), torch.zeros(10, 2, 3)).rate_bits.isinf().all()


def test_lpips_without_its_trunk_is_skipped_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    result = lpips_metric("alex")
    assert isinstance(result, Skipped) and result.name == "lpips[alex]" and "alexnet" in result.how_to_fix
    missing = lpips_metric("alex", weights="nowhere.pth")
    assert isinstance(missing, Skipped) and "nowhere.pth" in missing.reason and "lpips_weights" in missing.how_to_fix
    with pytest.raises(ValueError, match="wanted one of"):
        lpips_metric("resnet")
