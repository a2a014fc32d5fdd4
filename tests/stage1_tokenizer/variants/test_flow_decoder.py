"""The flow decoder's training times: which they are at which resolution."""

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.decoder import Decoder, ViTDecoder
from stage1_tokenizer.prefixes import keep_mask
from stage1_tokenizer.variants.convolutional import ConvDecoder
from stage1_tokenizer.variants.flow_decoder import FlowDecoder
from tests.tiny import SIZE, WIDTH, C, K, pictures


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


def decoders() -> dict[str, Decoder]:
    return {
        "vit": ViTDecoder(SIZE, 4, K, C, WIDTH, 1, 2, tail_channels=8, tail_depth=1),
        "convolutions": ConvDecoder(SIZE, K, C, (8, 16), (1, 1), WIDTH),
        "flow": FlowDecoder(SIZE, 4, K, C, WIDTH, 1, 2, tail_channels=8, tail_depth=1),
    }


def test_flow_decoder_draws_what_the_latents_say_and_either_picture_where_they_say_nothing() -> None:
    decoder = decoders()["flow"]
    z = torch.randn(2, K, C).repeat_interleave(32, 0)
    images = pictures(2).repeat_interleave(32, 0)
    told, untold = (keep_mask(torch.full((64,), k), K) for k in (K, 0))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=5e-3)
    for step in range(300):
        loss = decoder.losses(z, told if step % 2 else untold, images)[1].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def share_nearer_to_the_right_one(keep: torch.Tensor) -> float:
        drawn = decoder.decode(z, keep, generator=torch.Generator().manual_seed(0))
        right, wrong = (drawn - images).square().mean((1, 2, 3)), (drawn - images.flip(0)).square().mean((1, 2, 3))
        assert (torch.minimum(right, wrong) < 0.35 * torch.maximum(right, wrong)).float().mean() > 0.8, "no averages"
        return (right < wrong).float().mean().item()

    assert share_nearer_to_the_right_one(told) == 1.0
    assert 0.2 < share_nearer_to_the_right_one(untold) < 0.8


def test_flow_decoder_corrects_the_linear_path_where_it_is_told_to() -> None:
    torch.manual_seed(2)
    decoder = FlowDecoder(SIZE, 4, K, C, WIDTH, 1, 2, tail_channels=8, tail_depth=1, base=True)
    plain = decoders()["flow"]
    z, keep, base = torch.randn(3, K, C), torch.ones(3, K, dtype=torch.bool), pictures(3)
    x_t, t = torch.randn(3, 3, SIZE, SIZE), torch.full((3,), 0.5)
    tokens = decoder.tokens(z, keep)
    change = decoder(x_t, t, tokens, base + 0.1) - decoder(x_t, t, tokens, base)
    assert (change.mean() - 0.1).abs() < 0.05, "the base comes through"

    def draw(d: FlowDecoder, base: torch.Tensor | None) -> torch.Tensor:
        with torch.no_grad():
            return d.decode(z, keep, base, generator=torch.Generator().manual_seed(0))

    assert isinstance(plain, FlowDecoder) and torch.equal(draw(plain, base), draw(plain, None))
    assert not torch.equal(draw(decoder, base), draw(decoder, base.flip(0)))
    decoder.losses(z, keep, pictures(3), base)[1].mean().backward()
    assert decoder.base is not None and decoder.base.weight.grad is not None and decoder.base.weight.grad.any()
    with pytest.raises(ValueError, match="linear_path"):
        decoder.decode(z, keep)


def test_guidance_goes_beyond_what_the_latents_say() -> None:
    """A network that answers with the mean of its tokens draws just that: guided, a + w (b - a) of what it says
    without latents (a) and with (b)."""
    drawn = {}
    for w in (0.0, 1.0, 2.5):
        decoder = small(8, dropout=0.1, guidance=w)
        decoder.forward = lambda x_t, t, tokens, base: tokens.mean((1, 2))[:, None, None, None].expand_as(x_t)  # type: ignore[method-assign,misc,assignment]
        torch.manual_seed(0)
        torch.nn.init.normal_(decoder.null)
        torch.nn.init.normal_(decoder.latent.weight)
        with torch.no_grad():
            drawn[w] = decoder.decode(torch.ones(2, K, C), torch.ones(2, K, dtype=torch.bool))
    wanted = drawn[0.0] + 2.5 * (drawn[1.0] - drawn[0.0])
    assert (drawn[1.0] - drawn[0.0]).abs().min() > 0.01
    torch.testing.assert_close(drawn[2.5], wanted, rtol=0, atol=1e-4)


def test_in_training_a_share_of_the_rows_sees_no_latent() -> None:
    decoder, seen = small(8, dropout=0.3, base=True), []

    def forward(x_t: Tensor, t: Tensor, tokens: Tensor, base: Tensor) -> Tensor:
        seen.append((tokens == decoder.null).all(2).all(1))
        assert torch.equal(seen[-1], (base == 0).flatten(1).all(1)), "the linear path would say it"
        return torch.zeros_like(x_t)

    decoder.forward = forward  # type: ignore[method-assign,assignment]
    images, keep = torch.ones(2000, 3, 8, 8), torch.ones(2000, K, dtype=torch.bool)
    z = torch.randn(2000, K, C)
    decoder.train().losses(z, keep, images, images)
    decoder.eval().losses(z, keep, images, images)
    assert seen[0].float().mean().item() == pytest.approx(0.3, abs=0.04) and not seen[1].any()


def test_guidance_needs_a_decoder_that_was_trained_for_it() -> None:
    with pytest.raises(ValueError, match="got guidance 2.0 and dropout 0"):
        small(8, guidance=2.0)
