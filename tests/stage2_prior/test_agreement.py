"""Parts that must fit each other: heads and solvers, guidance and priors, samples and what a prior can be asked."""

from typing import Any

import pytest
import torch
from torch import Tensor

from data.schema import DataError
from stage1_tokenizer.text.vocabulary import CaptionVocabulary
from stage2_prior import CausalPrior
from stage2_prior.backbone import Backbone, RotaryBackbone
from stage2_prior.captions import askable
from stage2_prior.conditions import CaptionWords, ClassCondition, ConditionError, NoCondition
from stage2_prior.evaluation.sweep import schedule_of
from stage2_prior.guidance import FallingGuidance, Guidance, RisingGuidance
from stage2_prior.heads.ddpm import DDIM, DDPM
from stage2_prior.heads.diffusion import DiffusionHead
from stage2_prior.heads.flow import FlowHead
from stage2_prior.heads.nets import HoistedNet
from stage2_prior.heads.solvers import AdamsBashforth, Euler, Midpoint, SamplerError
from stage2_prior.variants.masked import MaskedPrior
from stage2_prior.variants.noise_extended import NoiseExtendedPrior
from tests.tiny import CAPTIONS, awaken

K, C, D = 4, 3, 32


def vocabulary() -> CaptionVocabulary:
    words = CaptionVocabulary(rows=32, context_length=12)
    words.fit(CAPTIONS)
    return words


def awake(kind: str) -> CausalPrior | NoiseExtendedPrior | MaskedPrior:
    torch.manual_seed(0)
    backbone, head = Backbone(D, 1, 2, max_tokens=20), FlowHead(HoistedNet(C, D, 32, 1))
    prior: CausalPrior | NoiseExtendedPrior | MaskedPrior
    if kind == "causal":
        prior = CausalPrior(K, C, vocabulary(), backbone, head)
    elif kind == "masked":
        prior = MaskedPrior(K, C, vocabulary(), backbone, head, sets=2)
    else:
        prior = NoiseExtendedPrior(K, C, vocabulary(), backbone)
    awaken(prior)
    return prior.eval()


@pytest.mark.parametrize("solver", [DDIM(4), DDPM(4)])
def test_a_flow_takes_no_solver_of_a_diffusion(solver: DDIM | DDPM) -> None:
    """It would take velocities for data and draw a fourteenth of the spread."""
    with pytest.raises(SamplerError, match="asks for data, with a FlowHead"):
        FlowHead(HoistedNet(C, D), solver=solver)
    with pytest.raises(SamplerError, match="with a NoiseExtendedPrior"):
        NoiseExtendedPrior(K, C, vocabulary(), Backbone(D, 1, 2, max_tokens=20), solver=solver)
    with pytest.raises(SamplerError, match="with a FlowHead"):
        awake("causal").num_evaluations(4, solver)


@pytest.mark.parametrize("solver", [Midpoint(), Euler(), AdamsBashforth()])
def test_a_diffusion_takes_no_solver_of_a_flow(solver: Midpoint | Euler | AdamsBashforth) -> None:
    with pytest.raises(SamplerError, match="asks for velocity, with a DiffusionHead"):
        DiffusionHead(HoistedNet(C, D), solver=solver)


def test_steps_are_whole_and_rotary_heads_even() -> None:
    with pytest.raises(SamplerError, match="whole multiple"):
        Midpoint().with_evaluations(4.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="even width"):
        RotaryBackbone(30, 1, 2)


@pytest.mark.parametrize("kind", ["causal", "masked", "noise_extended"])
def test_guidance_of_zero_is_unconditional_within_its_interval_only(kind: str) -> None:
    """At other times the caption is asked, so that two captions differ; without an interval they do not."""
    prior = awake(kind)

    def draw(caption: str, guidance: Guidance) -> Tensor:
        return prior.sample([caption], guidance, generator=torch.Generator().manual_seed(1))

    always, sometimes = Guidance(0.0), Guidance(0.0, 0.2, 0.6)
    assert torch.equal(draw(CAPTIONS[0], always), draw(CAPTIONS[1], always))
    apart = (draw(CAPTIONS[0], sometimes) - draw(CAPTIONS[1], sometimes)).abs().amax((0, 2))  # (K,)
    assert apart.min() > 1e-4
    falling = [FallingGuidance(0.0, 0.2, 0.6), FallingGuidance(0.0)]
    first = [draw(CAPTIONS[0], g)[:, 0] - draw(CAPTIONS[1], g)[:, 0] for g in falling]
    assert first[0].abs().max() > 1e-4
    assert kind == "masked" or first[1].abs().max() == 0  # a set of several latents has the mean of their scales


def test_a_sweep_takes_any_schedule() -> None:
    rising = schedule_of("stage2_prior.RisingGuidance", 3.0, (0.1, 0.9))
    assert isinstance(rising, RisingGuidance) and (rising.scale, rising.interval) == (3.0, (0.1, 0.9))
    with pytest.raises(ValueError, match="Euler"):
        schedule_of("stage2_prior.Euler", 3.0, (0.0, 1.0))


def test_samples_that_say_nothing_are_left_out_of_reports() -> None:
    n = 12
    batch: dict[str, Any] = {
        "captions": [["short", "a longer one"], [], [""], *([["word"]] * (n - 3))],
        "labels": torch.tensor([0, 1, 5, *([2] * (n - 3))]),
        "keys": [str(i) for i in range(n)],
        "latents": torch.arange(n),
    }
    kept, asked = askable(CaptionWords(vocabulary(), D).ask, batch)
    assert asked == ["a longer one", *(["word"] * (n - 3))]
    assert kept["keys"] == [str(i) for i in range(n) if i not in (1, 2)] and kept["latents"].tolist()[1] == 3
    kept, asked = askable(ClassCondition(D, ["cat", "dog", "cow"]).ask, batch)  # label 5 has no name
    assert asked[:3] == ["cat", "dog", "cow"] and kept["keys"][2] == "3" and len(asked) == n - 1
    assert askable(NoCondition(D).ask, batch)[1][:3] == ["a longer one", "anything", "anything"]
    with pytest.raises(DataError, match="wanted at least 8"):
        askable(CaptionWords(vocabulary(), D).ask, {name: values[:8] for name, values in batch.items()})


def test_a_label_without_a_name_is_refused_wherever_it_comes() -> None:
    """The first thousand samples are checked before training; one behind them must not become "no caption"."""
    condition = ClassCondition(D, ["cat", "dog"])
    captions = [""] * 3
    ids, _, silent = condition.encode_samples(captions, torch.tensor([0, -1, 1]))
    assert ids[[0, 2], 0].tolist() == [0, 1] and silent.tolist() == [False, True, False]
    for label in (2, 7):
        with pytest.raises(ConditionError, match="one per name"):
            condition.encode_samples(captions, torch.tensor([0, 1, label]))
