"""Two values in one float: what comes back, what noise does to it, how the step is learned, and exact prefixes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from stage1_tokenizer import Tokenizer
from stage1_tokenizer.bottleneck import KLBottleneck
from stage1_tokenizer.contract import Bottleneck
from stage1_tokenizer.encoder import PatchTrunk, QFormerEncoder
from stage1_tokenizer.evaluation.image_metrics import psnr
from stage1_tokenizer.linear_path import LinearPath
from stage1_tokenizer.prefixes import PrefixLengths
from stage1_tokenizer.text.supervision import PrefixReader, PrefixText, SoftmaxContrast, TextTower
from stage1_tokenizer.text.vocabulary import CaptionVocabulary
from stage1_tokenizer.variants.convolutional import ConvDecoder
from stage1_tokenizer.variants.folded import STEP, FoldedBottleneck, pairs, snake, unpaired
from stage1_tokenizer.variants.path_only import BlindEncoder, PathBottleneck
from tests.tiny import CAPTIONS, SIZE, WIDTH, C, K, awaken

N = 512


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Pictures of SIZE pixels that are Gaussian, smooth more than fine, so that components fall off."""
    noise = torch.randn(N, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    coarse = torch.nn.functional.interpolate(
        torch.randn(N, 3, 4, 4, generator=torch.Generator().manual_seed(1)), size=SIZE, mode="bilinear"
    )
    return (0.25 * coarse + 0.02 * noise).clamp(-1, 1)


@pytest.fixture
def values() -> Tensor:
    return torch.randn(N, K, 2 * C, generator=torch.Generator().manual_seed(2))


def folded() -> FoldedBottleneck:
    """With another step at every place, as after training."""
    bottleneck = FoldedBottleneck(WIDTH, K, C)
    with torch.no_grad():
        bottleneck.log_step.add_(torch.linspace(-0.3, 0.3, K * C).view(K, C))
    return bottleneck


def tokenizer_of(bottleneck: Bottleneck, images: Tensor, blind: bool = False, text: bool = False) -> Tokenizer:
    """On a linear path, in eval mode; an encoder that is not blind has something to say."""
    dim = bottleneck.read_dim
    vocabulary = CaptionVocabulary(64, 12)
    vocabulary.fit(CAPTIONS)
    reading = PrefixText(
        TextTower(vocabulary, 32, 1, 2, 16), PrefixReader(K, dim, 32, 16), SoftmaxContrast(), [1, 2, K]
    )
    tokenizer = Tokenizer(
        SIZE,
        BlindEncoder(K) if blind else QFormerEncoder(PatchTrunk(SIZE, 4, WIDTH, 1, 2, stem_width=8), K, 1, 2),
        bottleneck,
        ConvDecoder(SIZE, K, dim, (8,), (1,), 16, base=True),
        PrefixLengths(K),
        reading if text else None,
        LinearPath(SIZE, K, dim),
    )
    assert tokenizer.linear_path is not None
    tokenizer.linear_path.fit(images)
    if not blind:
        awaken(tokenizer)
        with torch.no_grad():
            bottleneck.project.weight[..., : bottleneck.read_dim].normal_(std=WIDTH**-0.5)  # it starts silent
    return tokenizer.eval()


def test_the_weak_values_come_back_exactly_and_the_strong_ones_within_half_a_step(values: Tensor) -> None:
    bottleneck = folded()
    z = bottleneck.fold(values)
    assert z.shape == (N, K, C)
    sent, back = pairs(values), pairs(bottleneck.read(z))
    assert ((sent[0] - back[0]).abs() <= 0.5 * bottleneck.step(K) + 1e-3).all()
    torch.testing.assert_close(back[1], sent[1].clamp(-5.3, 5.3), atol=0.02, rtol=0)
    assert torch.equal(unpaired(*pairs(values)), values)


def test_the_weak_value_does_not_jump_where_the_step_changes() -> None:
    bottleneck = folded()
    border = 0.5 * bottleneck.step(K)[None]
    (before, below), (after, above) = (pairs(bottleneck.read(border * factor)) for factor in (0.999, 1.001))
    torch.testing.assert_close(below, above, atol=0.05, rtol=0)
    assert below.abs().min() > 2, "at the edge of a step, where a code without turns would jump from end to end"
    torch.testing.assert_close(after - before, bottleneck.step(K)[None])
    n, v = torch.arange(-3.0, 4), torch.rand(7)
    torch.testing.assert_close(snake(n, snake(n, v)), v)


def test_training_sees_what_is_read_of_noisy_latents_and_gradients_pass_straight_through(
    values: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    bottleneck, noise = folded(), torch.randn(N, K, C)
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    bottleneck.start_silent()
    y = values.requires_grad_()
    seen, losses = bottleneck(torch.zeros(N, K, WIDTH), y)
    with torch.no_grad():
        torch.testing.assert_close(seen, bottleneck.read(bottleneck.fold(y) + bottleneck.noise * noise))
    weights = torch.randn(seen.shape)
    (seen * weights).sum().backward()
    torch.testing.assert_close(y.grad, weights)
    assert losses["kl"] == bottleneck.weight * losses["kl_nats"]


def test_a_weak_value_out_of_range_can_only_come_back() -> None:
    bottleneck = folded()
    bottleneck.start_silent()
    y = torch.zeros(1, K, 2 * C)
    y[..., C:] = 8.0
    y[..., :C] = 8.0
    y.requires_grad_()
    for direction, passed in ((1.0, 1.0), (-1.0, 0.0)):  # descent goes against it
        seen, _ = bottleneck(torch.zeros(1, K, WIDTH), y)
        gradient = torch.autograd.grad(direction * seen.sum(), y)[0]
        assert (gradient[..., C:] == passed * direction).all() and (gradient[..., :C] == direction).all()
    pull = torch.autograd.grad(bottleneck(torch.zeros(1, K, WIDTH), y)[1]["kl"], y)[0]
    assert (pull > 0).all(), "and its weight brings it back"


@pytest.mark.parametrize(("start", "ratio", "noise"), [(3.0, 0.3, 0.005), (0.3, 0.9, 0.01)])
def test_the_step_that_is_learned_is_the_one_with_the_least_error(start: float, ratio: float, noise: float) -> None:
    """The errors are those of the docstring, and descent ends where their sum is least."""
    torch.manual_seed(0)
    best = STEP * (noise * ratio) ** 0.5
    bottleneck = FoldedBottleneck(WIDTH, 1, 1, noise)
    with torch.no_grad():
        bottleneck.log_step.fill_(best).log_()
    y = torch.randn(200_000, 1, 2)
    h = torch.zeros(len(y), 1, WIDTH)

    def errors() -> Tensor:
        return (bottleneck(h, y)[0] - y).square().mean((0, 1))

    bottleneck.start_silent()
    of_a, of_b = errors().tolist()
    assert of_a == pytest.approx(best**2 / 12, rel=0.15)
    assert of_b == pytest.approx(32.6 * noise**2 / best**2, rel=0.15)
    with torch.no_grad():
        bottleneck.log_step.fill_(start * best).log_()
    y, h = y[:20_000], h[:20_000]
    optimizer = torch.optim.Adam([bottleneck.log_step], lr=0.05)
    for _ in range(80):
        of_a, of_b = errors()
        optimizer.zero_grad()
        (of_a + ratio**2 * of_b).backward()
        optimizer.step()
    assert bottleneck.step(1).item() == pytest.approx(best, rel=0.1)


def test_it_beats_one_value_a_float_while_noise_is_small_and_only_then(images: Tensor) -> None:
    """Both codes are their linear paths', and the pictures those that the paths make of them."""

    def decibels(bottleneck: Bottleneck, noise: float) -> float:
        tokenizer = tokenizer_of(bottleneck, images, blind=True)
        with torch.no_grad():
            for parameter in tokenizer.decoder.parameters():
                parameter.zero_()  # the base alone
        z = tokenizer.encode(images)
        z = z + noise * torch.randn(z.shape, generator=torch.Generator().manual_seed(4))
        return psnr(tokenizer.decode(z), images).mean().item()

    two, one = FoldedBottleneck(1, K, C), PathBottleneck(K, C)
    assert decibels(two, 0.005) > decibels(one, 0.005) + 0.5
    assert decibels(two, 0) > decibels(two, 0.011)
    assert decibels(two, 0.2) < decibels(one, 0.2)


def test_prefixes_are_exact_and_are_read_by_decoder_and_text(images: Tensor, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(folded(), images, text=True)
    tokenizer.fit_statistics([images])
    z = tokenizer.encode(images[:64])
    assert z.shape == (64, K, C)
    for k in (1, 3):
        assert torch.equal(tokenizer.encode(images[:64], k), z[:, :k])
        assert torch.equal(tokenizer.read(z[:, :k]), tokenizer.read(z)[:, :k])
        other = torch.cat([z[:, :k], torch.randn(64, K - k, C)], 1)
        assert torch.equal(tokenizer.embed_latents(other[:, :k]), tokenizer.embed_latents(z[:, :k]))
        assert tokenizer.decode(z[:, :k]).shape == (64, 3, SIZE, SIZE)
    assert tokenizer.read(z).shape == (64, K, 2 * C)
    tokenizer.save_pretrained(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    torch.testing.assert_close(loaded.decode(loaded.encode(images[:8])), tokenizer.decode(z[:8]))
    with torch.no_grad():
        tokenizer.bottleneck.get_parameter("log_step").add_(0.01)
    assert tokenizer.fingerprint != loaded.fingerprint, "another step is another latent space"


def test_encoder_and_step_learn_from_pixels_and_from_text(images: Tensor) -> None:
    tokenizer = tokenizer_of(folded(), images, text=True).train()
    ids = tokenizer.vocabulary.encode(CAPTIONS * 2)[0]
    losses, _ = tokenizer.losses(images[:8], ids)
    assert {"pixel", "prefix", "text", "kl"} <= losses.keys()
    tokenizer.total(losses).backward()
    for name in ("log_step", "project.weight"):
        gradient = tokenizer.bottleneck.get_parameter(name).grad
        assert gradient is not None and gradient.isfinite().all() and gradient.any()
    assert all(p.grad is not None for p in tokenizer.encoder.parameters())


def test_a_tokenizer_whose_code_is_the_path_alone(images: Tensor) -> None:
    tokenizer = tokenizer_of(PathBottleneck(K, C), images, blind=True)
    losses, _ = tokenizer.train().losses(images[:8])
    tokenizer.total(losses).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())
    tokenizer.eval()
    assert tokenizer.linear_path is not None
    assert torch.equal(tokenizer.encode(images[:8]), tokenizer.linear_path.encode(images[:8], K))


def test_what_does_not_fit_is_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match="got noise 0, ratio 0.3; wanted both above 0"):
        FoldedBottleneck(WIDTH, K, C, noise=0)
    with pytest.raises(ValueError, match="got noise -1, wanted a standard deviation"):
        PathBottleneck(K, C, noise=-1)
    decoder = ConvDecoder(SIZE, K, C, (8,), (1,), 16)
    with pytest.raises(ValueError, match="got no linear path for a PathBottleneck"):
        Tokenizer(SIZE, BlindEncoder(K), PathBottleneck(K, C), decoder).encode(images[:2])
    with pytest.raises(ValueError, match=f"bottleneck.read_dim is {2 * C} but decoder.latent_dim is {C}"):
        Tokenizer(SIZE, BlindEncoder(K), FoldedBottleneck(1, K, C), decoder, linear_path=LinearPath(SIZE, K, 2 * C))
    with pytest.raises(ValueError, match=f"bottleneck.latent_dim is {C} but linear_path.latent_dim is {2 * C}"):
        Tokenizer(SIZE, BlindEncoder(K), KLBottleneck(1, K, C), decoder, linear_path=LinearPath(SIZE, K, 2 * C))
