"""Rate and active units of positions against closed forms."""

import pytest
import torch

from stage1_tokenizer.evaluation.latent_use import latent_use


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
