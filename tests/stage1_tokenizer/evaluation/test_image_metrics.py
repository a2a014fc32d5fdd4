"""Picture metrics against closed forms, an independent implementation, and constructed cases."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from stage1_tokenizer.evaluation.image_metrics import Skipped, lpips_metric
from stage1_tokenizer.similarity import _gaussian_band, psnr, ssim


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


def test_lpips_without_its_trunk_is_skipped_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    result = lpips_metric("alex")
    assert isinstance(result, Skipped) and result.name == "lpips[alex]" and "alexnet" in result.how_to_fix
    missing = lpips_metric("alex", weights="nowhere.pth")
    assert isinstance(missing, Skipped) and "nowhere.pth" in missing.reason and "lpips_weights" in missing.how_to_fix
