"""Weight decay shrinks maps and leaves everything else alone."""

import pytest
import torch

from stage1_tokenizer.decoder import Decoder, ViTDecoder
from stage1_tokenizer.encoder import Encoder, PatchTrunk, QFormerEncoder
from stage1_tokenizer.training.optim import MuonAdamW, parameter_groups
from stage1_tokenizer.variants.convolutional import ConvDecoder, ConvTrunk
from stage1_tokenizer.variants.flow_decoder import FlowDecoder
from stage1_tokenizer.variants.titok import TiTokEncoder
from tests.tiny import SIZE, WIDTH, C, K, awaken


def encoders() -> dict[str, Encoder]:
    return {
        "qformer": QFormerEncoder(PatchTrunk(SIZE, 4, WIDTH, 1, 2, stem_width=8), K, 2, 2),
        "masked patches": QFormerEncoder(PatchTrunk(SIZE, 4, WIDTH, 1, 2, stem_width=8, mask_ratio=0.5), K, 1, 2),
        "convolutions": QFormerEncoder(ConvTrunk(SIZE, (8, 16), (1, 1), WIDTH), K, 1, 2),
        "titok": TiTokEncoder(PatchTrunk(SIZE, 4, WIDTH, 0, 2, stem_width=8), K, 2, 2),
    }


def decoders() -> dict[str, Decoder]:
    return {
        "vit": ViTDecoder(SIZE, 4, K, C, WIDTH, 1, 2, tail_channels=8, tail_depth=1),
        "convolutions": ConvDecoder(SIZE, K, C, (8, 16), (1, 1), WIDTH),
        "flow": FlowDecoder(SIZE, 4, K, C, WIDTH, 1, 2, tail_channels=8, tail_depth=1),
    }


@pytest.mark.parametrize("decoder", decoders())
def test_weight_decay_shrinks_maps_and_leaves_everything_else_alone(decoder: str) -> None:
    module = torch.nn.ModuleDict({"encoder": encoders()["masked patches"], "decoder": decoders()[decoder]})
    awaken(module)
    groups = {group["group"]: group["params"] for group in parameter_groups(module)}
    names = {p: name for name, p in module.named_parameters()}
    decayed = {names[p] for p in groups["decay"]}
    assert {"encoder.trunk.stem.weight", "encoder.trunk.patch.weight", "encoder.mix.weight"} <= decayed
    last = {"decoder.out.weight"} if decoder == "convolutions" else {"decoder.patch.weight", "decoder.tail.out.weight"}
    assert {"decoder.latent.weight"} | last <= decayed
    plain = {names[p].rpartition(".")[2] for p in groups["plain"]}
    assert plain <= {"bias", "gain", "weight", "queries", "position", "null"}
    assert all("norm" in names[p] for p in groups["plain"] if names[p].endswith("weight")), "only those of norms"

    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = MuonAdamW(parameter_groups(module), lr=0.1, weight_decay=0.5)
    optimizer.step()
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if name in decayed else 1.0), atol=1e-6, rtol=1e-5)
