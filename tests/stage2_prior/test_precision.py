"""A prior whose matrices are held in bfloat16: it draws and scores nearly as in float32, path and solver stay that."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stage2_prior import Prior
from stage2_prior.prior import CausalPrior
from stage2_prior.variants.captioning import CaptioningPrior
from stage2_prior.variants.masked import MaskedPrior
from stage2_prior.variants.noise_extended import NoiseExtendedPrior
from tests.small_priors import CAPTIONS, C, K, awake, parts


def make(kind: str) -> Prior:
    vocabulary, backbone, head = parts(tokens=13)
    if kind == "noise-extended":
        return awake(NoiseExtendedPrior(K, C, vocabulary, backbone))
    if kind == "masked":
        return awake(MaskedPrior(K, C, vocabulary, backbone, head, sets=3))
    return awake((CaptioningPrior if kind == "captioning" else CausalPrior)(K, C, vocabulary, backbone, head))


def draw(prior: Prior, captions: list[str], steps: int = 8) -> Tensor:
    return prior.sample(captions, 2.0, steps, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["causal", "masked", "captioning", "noise-extended"])
def test_a_held_prior_draws_and_scores_nearly_the_same(kind: str, tmp_path: Path) -> None:
    prior = make(kind)
    prior.save_pretrained(tmp_path)
    held = Prior.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu")
    captions = CAPTIONS * 40
    ours, plain = draw(held, captions), draw(prior, captions)
    assert ours.dtype == torch.float32 and not torch.equal(ours, plain)
    flat = torch.stack([ours.flatten(), plain.flatten()])
    assert torch.corrcoef(flat)[0, 1] > 0.999
    assert ((ours.std((0, 2)) / plain.std((0, 2))) - 1).abs().max() < 0.02  # spread at every position
    other = draw(prior, captions[::-1])
    assert torch.corrcoef(torch.stack([other.flatten(), plain.flatten()]))[0, 1] < 0.999  # control: other captions
    z = plain[:3]
    nats, exact = (p.log_prob(z, CAPTIONS, 8) for p in (held, prior))
    assert (nats - exact).abs().mean() < 0.05 * C * 0.5 * math.log(2 * math.pi * math.e)


def test_matrices_alone_are_held_and_the_export_is_read_again(tmp_path: Path) -> None:
    prior = make("causal").hold(torch.bfloat16)
    matrices = {f"{name}.weight" for name, m in prior.named_modules() if isinstance(m, nn.Linear)}
    for name, parameter in prior.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if name in matrices else torch.float32), name
    prior.save_pretrained(tmp_path)
    again = Prior.from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(draw(again.hold(torch.bfloat16), CAPTIONS), draw(prior, CAPTIONS))


def test_a_held_sample_is_that_of_autocast_bit_for_bit() -> None:
    prior = make("causal")
    with torch.autocast("cpu", torch.bfloat16):
        cast = draw(prior, CAPTIONS)
    assert torch.equal(draw(prior.hold(torch.bfloat16), CAPTIONS), cast)


def test_a_held_prior_reads_captions() -> None:
    prior = make("captioning")
    assert isinstance(prior, CaptioningPrior)
    nn.init.normal_(prior.next_word.weight, std=1.0)
    z = draw(prior, CAPTIONS)
    read = prior.caption(z)
    assert prior.hold(torch.bfloat16).caption(z)[0][:5] == read[0][:5] and any(read)
