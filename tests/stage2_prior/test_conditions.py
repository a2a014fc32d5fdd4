"""What a prior is asked with: every condition, in every prior that takes it."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stage1_tokenizer.layers import MATRIX
from stage1_tokenizer.text.towers import OpenClipTower, TextTower, WholeVocabulary
from stage1_tokenizer.text.vocabulary import CaptionVocabulary
from stage2_prior import CausalPrior, Prior
from stage2_prior.backbone import Backbone
from stage2_prior.conditions import ClassCondition, Condition, ConditionError, NoCondition, TextTowerCondition
from stage2_prior.heads.flow import FlowHead
from stage2_prior.heads.nets import HoistedNet
from stage2_prior.prior import PriorError
from stage2_prior.variants.captioning import CaptioningPrior
from stage2_prior.variants.masked import MaskedPrior
from stage2_prior.variants.noise_extended import NoiseExtendedPrior
from tests.tiny import CAPTIONS, TINY_CLIP, awaken, prefix_text, tiny_clip, tiny_tokenizer

K, C, D = 4, 3, 32
NAMES = ["cat", "dog", "fire truck", "truck"]
LABELLED = ["a photo of a cat", "Fire truck", "a DOG on a mat"]


class Data:
    """Captions and labels, as a data module gives them."""

    def __init__(self, labels: list[int]):
        self.labels = torch.tensor(labels)

    def train_captions(self) -> Any:
        yield from CAPTIONS

    def arrays(self, split: str, limit: int | None = None) -> dict[str, Any]:
        return {"labels": self.labels[:limit]}


def never() -> nn.Module:
    raise AssertionError("this condition asks for no tokenizer")


def text_tower(taught: bool = True) -> TextTowerCondition:
    source = tiny_tokenizer()
    other = prefix_text(tiny_tokenizer(seed=1)).tower
    assert isinstance(other, TextTower)
    condition = TextTowerCondition(D, other)
    if taught:
        assert condition.prepare(Data([]), lambda: source) == ""
    return condition


def clip_tower() -> TextTowerCondition:
    """The tower of a tokenizer that was trained with one of open_clip's."""
    with TemporaryDirectory() as folder:
        tiny_clip(Path(folder))  # makes the model known
    theirs, other = (OpenClipTower(WholeVocabulary(12), TINY_CLIP, frozen=False) for _ in range(2))
    condition = TextTowerCondition(D, other)
    source: Any = SimpleNamespace(text=SimpleNamespace(tower=theirs))
    assert condition.prepare(Data([]), lambda: source) == ""
    ids, mask = condition.encode(CAPTIONS)
    with torch.no_grad():
        wanted = theirs.tokens(ids)
        assert wanted.shape == (len(CAPTIONS), 12, theirs.token_width)
        torch.testing.assert_close(condition(ids), condition.into(wanted))
        pooled = theirs.transformer(theirs.clip_ids(ids))  # still its plain answer
    assert pooled.shape == (len(CAPTIONS), theirs.embed_dim) and mask.any()
    return condition


def classes() -> ClassCondition:
    return ClassCondition(D, NAMES)


def make(kind: type[Prior], condition: Condition, dropout: float = 0.1) -> Any:
    backbone = Backbone(D, 2, 2, max_tokens=20)
    torch.manual_seed(0)
    args = () if kind is NoiseExtendedPrior else (FlowHead(HoistedNet(C, D, 24, 2)),)
    more = {"sets": 2} if kind is MaskedPrior else {}
    prior: Any = kind(K, C, None, backbone, *args, caption_dropout=dropout, condition=condition, **more)  # type: ignore
    awaken(prior)
    return prior.eval()


def draw(prior: Prior, captions: list[str], guidance: float = 2.0) -> Tensor:
    return prior.sample(captions, guidance, steps=2, generator=torch.Generator().manual_seed(1))


PRIORS = [CausalPrior, MaskedPrior, NoiseExtendedPrior]
ASKED = [(text_tower, CAPTIONS[:3]), (clip_tower, CAPTIONS[:3]), (classes, LABELLED)]


@pytest.mark.parametrize(("condition", "captions"), ASKED, ids=["text-tower", "clip-tower", "class"])
@pytest.mark.parametrize("kind", PRIORS)
def test_captions_count_and_an_export_draws_the_same(
    kind: type[Prior], condition: Callable[[], Condition], captions: list[str], tmp_path: Path
) -> None:
    prior = make(kind, condition())
    z = draw(prior, captions)
    other = draw(prior, [captions[1], *captions[1:]])
    assert (z[0] - other[0]).abs().max() > 1e-3 and (z[1:] - other[1:]).abs().max() < 1e-4  # rows are independent
    assert torch.equal(draw(prior, captions, 0.0), draw(prior, captions[::-1], 0.0))  # unconditional: no say
    assert not torch.equal(draw(prior, captions, 1.0), z)  # guidance has twins to work with
    prior.save_pretrained(tmp_path)
    assert torch.equal(draw(Prior.from_pretrained(tmp_path), captions), z)  # nothing else is needed


@pytest.mark.parametrize(("condition", "captions"), ASKED, ids=["text-tower", "clip-tower", "class"])
def test_captions_are_dropped_in_training(condition: Callable[[], Condition], captions: list[str]) -> None:
    prior = make(CausalPrior, condition(), dropout=1.0)
    z = torch.randn(3, K, C)

    def loss(captions: list[str]) -> Tensor:
        return prior.losses(z, prior.encode_text(captions), torch.Generator().manual_seed(0))

    assert (loss(captions) - loss(captions[::-1])).abs().max() > 1e-4
    prior.train()
    torch.testing.assert_close(loss(captions), loss(captions[::-1]))


@pytest.mark.parametrize("kind", PRIORS)
def test_an_unconditional_prior_ignores_captions_and_spends_nothing_on_twins(kind: type[Prior]) -> None:
    prior = make(kind, NoCondition(D))
    assert torch.equal(draw(prior, CAPTIONS[:3]), draw(prior, ["x", "y", "z"]))
    assert torch.equal(draw(prior, CAPTIONS[:3], 3.0), draw(prior, CAPTIONS[:3], 0.0))
    text, scales, _ = prior.guided_text(CAPTIONS[:3], 3.0, 1.0)
    assert len(text.ids) == 3 and set(scales) == {1.0}
    assert draw(prior, CAPTIONS[:3])[0].sub(draw(prior, CAPTIONS[:3])[1]).abs().max() > 0.1  # control: samples differ


# -- text tower -------------------------------------------------------------------------------------------------------


def test_token_features_are_those_of_the_tower_and_see_no_padding() -> None:
    """The end token's feature, projected by the tower, is what the tokenizer's own `embed_text` pools."""
    tokenizer, condition = tiny_tokenizer(), text_tower()
    ids, mask = condition.encode(CAPTIONS)
    condition.into = nn.Identity()  # type: ignore[assignment]
    rows = condition(ids)  # (B,L,E)
    last = rows[torch.arange(len(ids)), mask.sum(1) - 1]
    pooled = torch.nn.functional.normalize(last @ condition.tower.transformer.text_projection, dim=-1)
    torch.testing.assert_close(pooled, tokenizer.embed_text(CAPTIONS), rtol=0, atol=1e-5)
    alone = condition(condition.encode(CAPTIONS[:1])[0][:, : int(mask[0].sum())])
    torch.testing.assert_close(alone[0], rows[0, : int(mask[0].sum())], rtol=0, atol=1e-5)


def test_last_blocks_of_the_tower_may_be_left_out() -> None:
    vocabulary = CaptionVocabulary(rows=32, context_length=12)
    vocabulary.fit(CAPTIONS)
    tower = TextTower(vocabulary, width=32, layers=2, heads=2, embed_dim=16)
    awaken(tower)
    condition = TextTowerCondition(D, tower, skip=1)
    ids, _ = condition.encode(CAPTIONS)
    with torch.no_grad():
        text: Any = tower.transformer
        seen: list[Any] = []
        hook = text.transformer.resblocks[0].register_forward_hook(lambda _, __, out: seen.append(out))
        text(ids)
        hook.remove()
        first = seen[0]
        wanted = torch.nn.functional.layer_norm(first, (32,))
        torch.testing.assert_close(condition(ids), condition.into(wanted), rtol=0, atol=1e-5)
        assert (tower.tokens(ids) - wanted).abs().max() > 0.1
        assert tower.tokens(ids).shape == tower.tokens(ids, 1).shape  # no hook stays behind
    for skip in (-1, 2):
        with pytest.raises(ConditionError, match="one must be left"):
            TextTowerCondition(D, tower, skip)


def test_the_tower_is_frozen_and_its_map_is_trained() -> None:
    prior = make(CausalPrior, text_tower(), dropout=0.0).train()
    before = {n: p.clone() for n, p in prior.words.tower.state_dict().items()}
    prior.losses(torch.randn(3, K, C), prior.encode_text(CAPTIONS[:3])).mean().backward()
    assert not any(p.requires_grad or p.grad is not None for p in prior.words.tower.parameters())
    assert prior.words.into.weight.grad.abs().max() > 0 and getattr(prior.words.into.weight, "group", None) == MATRIX
    assert all(torch.equal(before[n], p) for n, p in prior.words.tower.state_dict().items())


def test_towers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConditionError, match="without a text tower"):
        text_tower(False).prepare(Data([]), lambda: tiny_tokenizer(text=False))
    wider = tiny_tokenizer()
    prefix_text(wider).tower.spec["init_args"]["layers"] = 7
    with pytest.raises(ConditionError, match="'layers': 7.*copy text.tower"):
        text_tower(False).prepare(Data([]), lambda: wider)
    with pytest.raises(ValueError, match="no rows yet"):
        TextTowerCondition(D, TextTower(CaptionVocabulary(64, 12), 32, 1, 2, 16)).encode(["a cat"])


# -- classes ----------------------------------------------------------------------------------------------------------


def test_captions_name_classes_and_labels_decide_in_training() -> None:
    condition = classes()
    assert condition.encode(["a photo of a fire truck.", "truck", "DOG"])[0].flatten().tolist() == [2, 3, 1]
    for caption in ("a catalogue", "a cat and a dog", "nothing"):
        with pytest.raises(ConditionError, match="wanted one of: cat, dog"):
            condition.encode([caption])
    prior = make(CausalPrior, condition)
    text = prior.encode_samples(["a dog", "", "whatever"], torch.tensor([0, 2, -1]))
    assert text.ids.flatten().tolist() == [0, 2, prior.null]  # not the caption's dog; no label is no condition
    assert condition.prepare(Data([-1, 3]), never) == ""


@pytest.mark.parametrize("labels", [[-1, -1], [0, 4]])
def test_data_without_labels_or_with_too_many_is_refused(labels: list[int]) -> None:
    with pytest.raises(ConditionError, match="a name for every label"):
        classes().prepare(Data(labels), never)


@pytest.mark.parametrize("names", [[], ["cat", "Cat"], ["cat", " "]])
def test_class_names_are_checked(names: list[str]) -> None:
    with pytest.raises(ConditionError, match="all different"):
        ClassCondition(D, names)


# -- what fits what ---------------------------------------------------------------------------------------------------


def test_contradictions_are_refused_naming_both_options() -> None:
    vocabulary, head = CaptionVocabulary(64, 12), FlowHead(HoistedNet(C, D, 24, 2))
    backbone = Backbone(D, 1, 2, max_tokens=40)
    with pytest.raises(ConditionError, match="both `vocabulary` and `condition`"):
        CausalPrior(K, C, vocabulary, backbone, head, condition=NoCondition(D))
    with pytest.raises(ConditionError, match="neither `vocabulary` and `condition`"):
        MaskedPrior(K, C, None, backbone, head)
    with pytest.raises(ConditionError, match=r"condition.width is 16, backbone.width is 32"):
        NoiseExtendedPrior(K, C, None, backbone, condition=NoCondition(16))
    with pytest.raises(PriorError, match="`vocabulary`, or use a CausalPrior"):
        CaptioningPrior(K, C, None, backbone, head, condition=NoCondition(D))
    with pytest.raises(PriorError, match="max_tokens"):
        CausalPrior(K, C, None, Backbone(D, 1, 2, max_tokens=K), head, condition=NoCondition(D))
