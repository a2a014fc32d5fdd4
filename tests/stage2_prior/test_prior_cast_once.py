"""Weights held in the format of the products: the same sample bit for bit, and float32 again afterwards."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from stage1_tokenizer.text.vocabulary import CaptionVocabulary
from stage2_prior.backbone import RotaryBackbone
from stage2_prior.cast_once import cast_once, cast_weights
from stage2_prior.heads.base import FlowHead
from stage2_prior.heads.nets import HoistedNet
from stage2_prior.prior import CausalPrior

CAPTIONS = ["a red circle", "a blue star on a white background"]


@pytest.fixture
def prior() -> CausalPrior:
    torch.manual_seed(0)
    vocabulary = CaptionVocabulary(rows=32, context_length=12)
    vocabulary.fit(CAPTIONS)
    found = CausalPrior(5, 3, vocabulary, RotaryBackbone(32, 2, 2, 17), FlowHead(HoistedNet(3, 32, 24, 2)))
    for parameter in found.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return found.eval()


def draw(prior: CausalPrior) -> Tensor:
    return prior.sample(CAPTIONS, 2.0, generator=torch.Generator().manual_seed(1))


def test_a_sample_is_that_of_autocast_bit_for_bit(prior: CausalPrior, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [(p, p.dtype, p.requires_grad) for p in prior.parameters()]
    seen: set[torch.dtype] = set()
    assert isinstance(prior.head, FlowHead)
    prior.head.net.out.register_forward_hook(lambda layer, *_: seen.add(layer.weight.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        held = draw(prior)
        assert seen == {torch.bfloat16}
        seen.clear()
        monkeypatch.setattr("stage2_prior.cast_once.cast_weights", lambda module: nullcontext())
        assert torch.equal(held, draw(prior))
        assert seen == {torch.float32}
    for (parameter, *was), now in zip(before, prior.parameters(), strict=True):
        assert parameter is now and [now.dtype, now.requires_grad] == was
    assert not torch.equal(held, draw(prior))  # control: without autocast all is float32


def test_weights_come_back_after_an_error_and_stay_inside_an_outer_block(prior: CausalPrior) -> None:
    weight = prior.latent_in.weight

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = prior.latent_in

        @cast_once
        def fail(self) -> None:
            assert self.layer.weight.dtype == torch.bfloat16
            raise RuntimeError("on purpose")

    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="on purpose"):
            Failing().fail()
        assert prior.latent_in.weight is weight
        with cast_weights(prior):
            outer = prior.latent_in.weight
            draw(prior)
            assert prior.latent_in.weight is outer
    with cast_weights(prior):
        assert prior.latent_in.weight is weight  # no autocast: nothing to hold
