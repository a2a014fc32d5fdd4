"""Every encoder, bottleneck and decoder keeps the contract: exact prefixes, gradients, files."""

from pathlib import Path

import pytest
import torch

from stage1_tokenizer import Tokenizer
from stage1_tokenizer.bottleneck import Bottleneck, KLBottleneck
from stage1_tokenizer.decoder import Decoder, ViTDecoder
from stage1_tokenizer.encoder import Encoder, PatchTrunk, QFormerEncoder
from stage1_tokenizer.prefixes import PrefixLengths
from stage1_tokenizer.variants.convolutional import ConvDecoder, ConvTrunk
from stage1_tokenizer.variants.flow_decoder import FlowDecoder
from stage1_tokenizer.variants.normed import NoiseBottleneck, NormBottleneck
from stage1_tokenizer.variants.quantised import FSQBottleneck, VQBottleneck
from stage1_tokenizer.variants.rated import RateBottleneck
from stage1_tokenizer.variants.titok import TiTokEncoder
from tests.tiny import SIZE, WIDTH, C, K, awaken, pictures


def encoders() -> dict[str, Encoder]:
    return {
        "qformer": QFormerEncoder(PatchTrunk(SIZE, 4, WIDTH, 1, 2, stem_width=8), K, 2, 2),
        "masked patches": QFormerEncoder(PatchTrunk(SIZE, 4, WIDTH, 1, 2, stem_width=8, mask_ratio=0.5), K, 1, 2),
        "convolutions": QFormerEncoder(ConvTrunk(SIZE, (8, 16), (1, 1), WIDTH), K, 1, 2),
        "titok": TiTokEncoder(PatchTrunk(SIZE, 4, WIDTH, 0, 2, stem_width=8), K, 2, 2),
    }


def bottlenecks() -> dict[str, Bottleneck]:
    return {
        "kl": KLBottleneck(WIDTH, K, C),
        "rate": RateBottleneck(WIDTH, K, C, bits=20),
        "norm": NormBottleneck(WIDTH, K, C),
        "noise": NoiseBottleneck(WIDTH, K, C),
        "fsq": FSQBottleneck(WIDTH, K, (8, 8, 5, 5)),
        "vq": VQBottleneck(WIDTH, K, C, codes=64),
    }


def decoders() -> dict[str, Decoder]:
    return {
        "vit": ViTDecoder(SIZE, 4, K, C, WIDTH, 1, 2, tail_channels=8, tail_depth=1),
        "convolutions": ConvDecoder(SIZE, K, C, (8, 16), (1, 1), WIDTH),
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
