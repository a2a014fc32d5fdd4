"""Captions of earlier steps as negatives: what is kept, what it does to the loss, and where it is saved."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from stage1_tokenizer import Tokenizer
from stage1_tokenizer.text.contrast import MaxOverQueries, SigmoidContrast, SoftmaxContrast
from stage1_tokenizer.text.memory import CaptionMemory
from stage1_tokenizer.text.readers import PrefixReader
from stage1_tokenizer.text.supervision import PrefixText
from stage1_tokenizer.text.towers import TextTower
from stage1_tokenizer.text.vocabulary import CaptionVocabulary
from tests.tiny import CAPTIONS, C, K, awaken, pictures, prefix_text, tiny_tokenizer

E, L = 16, 12
OTHERS = ["a green star", "a green star below a red circle", "three red stars", "one blue circle"]


def text_part(memory: CaptionMemory | None, contrast: type[nn.Module] = SoftmaxContrast) -> PrefixText:
    torch.manual_seed(0)
    vocabulary = CaptionVocabulary(64, L)
    vocabulary.fit(CAPTIONS + OTHERS)
    made = contrast()
    assert isinstance(made, SoftmaxContrast | SigmoidContrast | MaxOverQueries)
    text = PrefixText(TextTower(vocabulary, 32, 1, 2, E), PrefixReader(K, C, 32, E), made, [1, K], memory=memory)
    awaken(text)
    return text.train()


def ids_of(text: PrefixText, captions: list[str]) -> torch.Tensor:
    return text.vocabulary.encode(captions)[0]


def test_the_oldest_captions_give_way() -> None:
    memory = CaptionMemory(5, 1, 1)
    for first in (0, 3, 6):
        numbers = torch.arange(first, first + 3)[:, None]
        memory.store(numbers.float(), numbers)
    assert sorted(memory.ids.flatten().tolist()) == [4, 5, 6, 7, 8] and torch.equal(memory.embedded, memory.ids.float())
    numbers = torch.arange(10, 17)[:, None]
    memory.store(numbers.float(), numbers)
    assert sorted(memory.ids.flatten().tolist()) == [12, 13, 14, 15, 16]


@pytest.mark.parametrize("contrast", [SoftmaxContrast, SigmoidContrast, MaxOverQueries])
def test_captions_of_earlier_steps_are_negatives_and_the_same_caption_is_none(contrast: type[nn.Module]) -> None:
    text, plain = text_part(CaptionMemory(8, E, L), contrast), text_part(None, contrast)
    z = torch.randn(4, K, C)
    ids = ids_of(text, CAPTIONS)
    alone = plain.losses(z, ids)["text"]
    torch.testing.assert_close(text.losses(z, ids)["text"], alone, msg="an empty memory changes nothing")
    again = text.losses(z, ids)["text"]  # now it holds these four captions
    if contrast is not SigmoidContrast:  # whose pairs count one by one
        # each shares its target with its copy, and half of the loss, that over captions, has everything twice
        torch.testing.assert_close(again, alone + 0.5 * math.log(2))
    text.losses(z, ids_of(text, OTHERS))
    text.losses(z, ids_of(text, [OTHERS[i] for i in (1, 0, 3, 2)]))
    assert text.losses(z, ids)["text"] > alone + 0.1


def test_pictures_choose_among_all_captions_and_captions_among_the_pictures() -> None:
    """By hand: two pictures, their captions, an earlier one that says what the first does, and one that does not."""
    torch.manual_seed(0)
    image, text = (nn.functional.normalize(torch.randn(n, 1, E), dim=-1) for n in (2, 4))
    same = torch.tensor([[True, False, True, False], [False, True, False, False]])
    contrast = SoftmaxContrast(10.0)
    logits = 10 * image[:, 0] @ text[:, 0].T
    rows, columns = -logits.log_softmax(1), -logits[:, :2].log_softmax(0)
    wanted = 0.5 * (0.5 * (rows[0, 0] + rows[0, 2]) + rows[1, 1] + columns[0, 0] + columns[1, 1]) / 2
    torch.testing.assert_close(contrast(image, text, same[None]), wanted[None])


def test_pictures_without_captions_leave_nothing_behind() -> None:
    text = text_part(CaptionMemory(6, E, L))
    assert text.memory is not None
    text.losses(torch.randn(4, K, C), ids_of(text, ["", "", "a red circle", ""]))
    assert text.memory.embedded.any(-1).sum() == 1
    z, ids = torch.randn(4, K, C), ids_of(text, CAPTIONS)
    found = text.losses(z, ids)["text"]
    text.memory.ids.zero_()
    text.memory.embedded.zero_()
    text.memory.store(text.tower(ids_of(text, ["a red circle"])), ids_of(text, ["a red circle"]))
    torch.testing.assert_close(text.losses(z, ids)["text"], found)


def test_nothing_is_learned_through_what_is_kept_and_nothing_is_kept_outside_training() -> None:
    text = text_part(CaptionMemory(8, E, L))
    assert text.memory is not None
    z = torch.randn(4, K, C, requires_grad=True)
    for captions in (OTHERS, CAPTIONS):
        text.losses(z, ids_of(text, captions))["text"].backward()  # the second one through the first one's captions
    before = text.memory.embedded.clone()
    assert before.any() and not before.requires_grad
    text.eval().losses(z, ids_of(text, [*OTHERS[2:], *CAPTIONS[2:]]))
    assert torch.equal(text.memory.embedded, before)


def with_memory(seed: int = 0) -> Tokenizer:
    tokenizer = tiny_tokenizer(seed=seed)
    text = prefix_text(tokenizer)
    torch.manual_seed(seed)
    tokenizer.text = PrefixText(text.tower, text.reader, text.contrast, text.lengths, memory=CaptionMemory(8, E, L))
    return tokenizer


def test_a_checkpoint_has_it_and_an_export_has_not(tmp_path: Path) -> None:
    tokenizer = with_memory()
    text = prefix_text(tokenizer)
    text.train().losses(torch.randn(4, K, C), ids_of(text, CAPTIONS))
    other = with_memory(1)
    other.load_state_dict(tokenizer.state_dict())
    kept = prefix_text(other).memory
    assert kept is not None and text.memory is not None and torch.equal(kept.embedded, text.memory.embedded)
    tokenizer.eval().save_pretrained(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert prefix_text(loaded).memory is None
    z = tokenizer.encode(pictures())
    assert torch.equal(loaded.embed_latents(z), tokenizer.embed_latents(z))
    fresh = with_memory(2)
    fresh.start_from(loaded)
    assert torch.equal(fresh.embed_latents(z), tokenizer.embed_latents(z))
    loaded.start_from(tokenizer)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="got size 0, wanted at least 1"):
        CaptionMemory(0)
    with pytest.raises(ValueError, match="memory has embed_dim 8 and context_length 12 but the tower 16 and 12"):
        text_part(CaptionMemory(4, 8, L))
