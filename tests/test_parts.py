"""Every encoder, bottleneck and decoder keeps the contract: exact prefixes, gradients, files."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from stage1_tokenizer import Tokenizer
from stage1_tokenizer.bottleneck import KLBottleneck
from stage1_tokenizer.bottleneck_norm import NoiseBottleneck, NormBottleneck
from stage1_tokenizer.contract import Bottleneck, Decoder, Encoder
from stage1_tokenizer.decoder import ViTDecoder
from stage1_tokenizer.discrete import FSQBottleneck, VQBottleneck
from stage1_tokenizer.encoder import PatchTrunk, QFormerEncoder
from stage1_tokenizer.flow_decoder import FlowDecoder
from stage1_tokenizer.order import PrefixLengths, keep_mask
from stage1_tokenizer.timm_trunk import TimmTrunk
from stage1_tokenizer.titok import TiTokEncoder
from tests.tiny import SIZE, WIDTH, C, K, awaken, pictures

TIMM = "vit_tiny_patch16_224"


def encoders() -> dict[str, Encoder]:
    return {
        "qformer": QFormerEncoder(PatchTrunk(SIZE, 4, WIDTH, 1, 2, stem_width=8), K, 2, 2),
        "masked patches": QFormerEncoder(PatchTrunk(SIZE, 4, WIDTH, 1, 2, stem_width=8, mask_ratio=0.5), K, 1, 2),
        "titok": TiTokEncoder(PatchTrunk(SIZE, 4, WIDTH, 0, 2, stem_width=8), K, 2, 2),
    }


def bottlenecks() -> dict[str, Bottleneck]:
    return {
        "kl": KLBottleneck(WIDTH, K, C),
        "norm": NormBottleneck(WIDTH, K, C),
        "noise": NoiseBottleneck(WIDTH, K, C),
        "fsq": FSQBottleneck(WIDTH, K, (8, 8, 5, 5)),
        "vq": VQBottleneck(WIDTH, K, C, codes=64),
    }


def decoders() -> dict[str, Decoder]:
    return {
        "vit": ViTDecoder(SIZE, 4, K, C, WIDTH, 1, 2, tail_channels=8, tail_depth=1),
        "flow": FlowDecoder(SIZE, 4, K, C, WIDTH, 1, 2, tail_channels=8, tail_depth=1),
    }


@pytest.mark.parametrize("decoder", decoders())
@pytest.mark.parametrize("bottleneck", bottlenecks())
@pytest.mark.parametrize("encoder", encoders())
def test_every_combination_keeps_the_contract(encoder: str, bottleneck: str, decoder: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(SIZE, encoders()[encoder], bottlenecks()[bottleneck], decoders()[decoder], PrefixLengths(K))
    awaken(tokenizer)
    parts, reconstruction = tokenizer.train().losses(pictures(4))
    tokenizer.total(parts).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())
    assert reconstruction.shape == (4, 3, SIZE, SIZE)

    tokenizer.eval()
    full = tokenizer.encode(pictures())
    for k in (1, 3, K):
        torch.testing.assert_close(tokenizer.encode(pictures(), k), full[:, :k], atol=1e-5, rtol=0)
    tokenizer.save_pretrained(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.encode(pictures()), full, atol=0, rtol=0)
    x, y = (m.decode(full[:, :2], generator=torch.Generator().manual_seed(3)) for m in (tokenizer, loaded))
    torch.testing.assert_close(x, y, atol=0, rtol=0)


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


def test_noise_is_for_training_only() -> None:
    bottleneck = NoiseBottleneck(WIDTH, K, C)
    h = torch.randn(2, K, WIDTH)
    assert (bottleneck(h)[0] - bottleneck(h)[0]).abs().max() > 0.01
    mean, std = bottleneck.posterior(h)
    assert not std.any() and torch.equal(mean, bottleneck.posterior(h)[0])
    torch.testing.assert_close(mean.var(-1, correction=0), torch.ones(2, K), atol=1e-3, rtol=0)


def test_timm_trunk_loads_weights_from_a_file_and_gives_patches_only(tmp_path: Path) -> None:
    torch.manual_seed(1)
    reference = timm.create_model(TIMM, img_size=32, num_classes=0).eval()
    save_file(reference.state_dict(), tmp_path / "vit.safetensors")
    trunk = TimmTrunk(TIMM, 32, checkpoint=str(tmp_path / "vit.safetensors"), frozen=True).eval()
    images = pictures(2, 32)
    assert trunk(images).shape == (2, trunk.num_patches, trunk.width) and trunk.num_patches == 4
    normalised = ((images + 1) / 2 - trunk.mean) / trunk.std
    torch.testing.assert_close(trunk(images), reference.forward_features(normalised)[:, 1:], atol=1e-5, rtol=0)
    assert not any(p.requires_grad for p in trunk.parameters())
    encoder = QFormerEncoder(trunk, K, 1, 2).eval()
    awaken(encoder)
    torch.testing.assert_close(encoder(images, 2), encoder(images)[:, :2], atol=1e-5, rtol=0)


def test_missing_weights_are_an_error() -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; wanted weights of"):
        TimmTrunk(TIMM, 32, checkpoint="nowhere.safetensors")
