"""The flow decoder's training times: which they are at which resolution."""

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.variants.flow_decoder import FlowDecoder
from tests.tiny import C, K


def small(size: int, **options: float) -> FlowDecoder:
    return FlowDecoder(size, size // 2, K, C, 8, 1, 1, tail_channels=4, tail_depth=1, **options)  # type: ignore[arg-type]


def training_times(decoder: FlowDecoder, n: int = 2000) -> Tensor:
    """(n,) times that `losses` asks at; the network itself is left out."""
    asked: list[Tensor] = []

    def forward(x_t: Tensor, t: Tensor, tokens: Tensor, base: Tensor | None = None) -> Tensor:
        asked.append(t)
        return torch.zeros_like(x_t)

    decoder.forward = forward  # type: ignore[method-assign,assignment]
    images = torch.zeros(1, 3, decoder.image_size, decoder.image_size).expand(n, -1, -1, -1)
    torch.manual_seed(0)
    decoder.losses(torch.zeros(n, K, C), torch.ones(n, K, dtype=torch.bool), images)
    return asked[0]


@pytest.mark.parametrize(("size", "factor"), [(16, 0.5), (32, 1.0), (64, 2.0)])
def test_larger_pictures_are_trained_at_more_noise_by_their_side(size: int, factor: float) -> None:
    """Noise to signal, t / (1 - t), grows with the side: averaging s x s pixels divides the noise by s
    (Hoogeboom et al. 2023, eq. 4)."""
    t = training_times(small(size))
    odds = (t / (1 - t)).log()
    assert odds.std().item() == pytest.approx(1.0, abs=0.05)
    assert odds.mean().exp().item() == pytest.approx(factor, rel=0.08)


def test_the_shift_comes_on_top_of_the_mean_that_is_asked_for() -> None:
    t = training_times(small(64, time_mean=-1.0))
    assert (t / (1 - t)).log().mean().exp().item() == pytest.approx(2 / torch.tensor(1.0).exp().item(), rel=0.08)


def test_errors_are_counted_at_every_scale_by_one_over_its_side() -> None:
    at = torch.arange(64)
    flat, fine = torch.ones(2, 3, 64, 64), ((at[:, None] + at) % 2 * 2.0 - 1).expand(2, 3, -1, -1)
    plain, scales = small(64), small(64, coarsest=16)
    assert plain.sides == [64] and scales.sides == [64, 32, 16]
    for decoder in (plain, scales):
        torch.testing.assert_close(decoder.error(flat), torch.ones(2))  # the same at every scale
    torch.testing.assert_close(plain.error(fine), torch.ones(2))
    share = (1 / 64) / (1 / 64 + 1 / 32 + 1 / 16)
    torch.testing.assert_close(scales.error(fine), torch.full((2,), share))  # seen at full size only
    blocks = fine.repeat_interleave(2, -1).repeat_interleave(2, -2)[..., :64, :64]
    torch.testing.assert_close(scales.error(blocks), torch.full((2,), 3 * share))


@pytest.mark.parametrize("coarsest", [24, 0, 128])
def test_a_coarsest_side_that_is_no_half_of_a_half_is_refused(coarsest: int) -> None:
    with pytest.raises(ValueError, match=f"coarsest {coarsest} for pictures of 64"):
        small(64, coarsest=coarsest)
