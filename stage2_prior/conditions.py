"""What a prior is asked with: captions become a few tokens in front of the line. Chosen by class path.

* `CaptionWords` (default; a prior given a `vocabulary` makes its own): every word of the caption through an embedding
  that is trained with the prior. It learns the words of its data and nothing else.
* `TextTowerCondition`: the frozen text tower of the tokenizer, all its token features and not only the pooled vector.
  Its weights are copied when training starts and exported with the prior, which then needs no tokenizer to be asked.
* `ClassCondition`: an integer label, one token. Training reads the labels of the shards, `sample` the class that a
  caption names ("a photo of a cat" is "cat"), so that captions stay the one way of asking.
* `NoCondition`: one token that is always the same. The prior is unconditional, and captions only count the samples.

All have a null row besides, for "no caption": what an unconditional sample is asked with and what a share of the
training captions is replaced by. A row is known by its id; `null` is the id of that one.

Letters: B batch, L tokens of a caption, D width, W width of the text tower.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stage1_tokenizer.layers import MATRIX, embedding, mark
from stage1_tokenizer.spec import Spec
from stage1_tokenizer.text.towers import Tower
from stage1_tokenizer.text.vocabulary import END, CaptionVocabulary
from stage2_prior.captions import longest

WORD_STD = 0.7
PROBE = 1000  # training samples whose labels are checked before the first step


class ConditionError(ValueError):
    """Captions, labels or a tokenizer that a condition cannot work with."""


class TrainingData(Protocol):
    """What a condition may learn from before training."""

    def train_captions(self) -> Iterator[str]: ...

    def arrays(self, split: str, limit: int | None = None) -> dict[str, Any]: ...


class Condition(nn.Module):
    """Contract: `encode` captions to ids, `forward` ids to rows of the sequence.

    width: D, the backbone's. context_length: the most tokens a caption takes. null: the id of "no caption".
    constant: True where every caption gives the same rows, so that guidance has nothing to guide with.
    """

    width: int
    context_length: int
    null: int
    constant = False

    def prepare(self, data: TrainingData, tokenizer: Callable[[], nn.Module]) -> str:
        """Learn what is fixed before the first step; returns a sentence for the user, or "".

        `tokenizer` loads the exported tokenizer, if it is called. Raises ConditionError where something is missing.
        """
        return ""

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """B captions -> ids (B,L) long and text_mask (B,L) bool, True = a real token, on this module's device."""
        raise NotImplementedError

    def encode_samples(self, captions: list[str], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Training samples, caption "" where there is none, labels (B,) with -1 for none.

        Returns ids and text_mask as `encode`, and which samples say nothing, (B,) bool.
        """
        return *self.encode(captions), torch.tensor([not caption for caption in captions])

    def ask(self, captions: list[str], label: int) -> str:
        """What a sample with these captions and this label (-1: none) is asked for with; "" where nothing says so."""
        return longest(captions)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B,L), `null` among them -> rows (B,L,D)."""
        raise NotImplementedError


class CaptionWords(nn.Embedding, Condition):
    """The rows of a vocabulary and, last, the null word, trained with the prior.

    The vocabulary is a part of the prior itself, where exported folders keep it; here it is only referred to.
    """

    def __init__(self, vocabulary: CaptionVocabulary, width: int):
        super().__init__(vocabulary.rows + 1, width)
        nn.init.normal_(self.weight, std=WORD_STD)
        object.__setattr__(self, "vocabulary", vocabulary)  # not a submodule: its tables would be stored twice
        self.vocabulary: CaptionVocabulary
        self.width, self.context_length, self.null = width, vocabulary.context_length, vocabulary.rows

    def prepare(self, data: TrainingData, tokenizer: Callable[[], nn.Module]) -> str:
        left_out = self.vocabulary.fit(data.train_captions())
        return f"vocabulary: {left_out} rare tokens share the unknown row; raise `rows` to keep them" * bool(left_out)

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        return self.vocabulary.encode(captions)


class WordSum(nn.Embedding):
    """One row per word of the caption, summed and added to every token of the line.

    Attention must first learn which one word of a caption a latent is about; a rare word (one of a hundred that scenes
    are labelled with) is found late. The sum says which words there are to all latents at once, though not in which
    order, from which attention then only has to pick. Rows start at zero: attention learns as fast as without it.
    """

    def __init__(self, condition: Condition):
        super().__init__(condition.null + 1, condition.width)
        nn.init.zeros_(self.weight)

    def forward(self, ids: Tensor, text_mask: Tensor) -> Tensor:  # type: ignore[override]
        """ids and text_mask (B,L) -> (B,1,D)."""
        return (super().forward(ids) * text_mask[..., None]).sum(1, keepdim=True)


class TextTowerCondition(Spec, Condition):
    """Token features of a tokenizer's frozen text tower, through one trained linear map.

    Args:
        width: D.
        tower: built as the tokenizer's own (text.tower of its config), trained from scratch or a pretrained one of
            open_clip; its weights and vocabulary come from there.
        skip: last blocks of the tower to leave out. A contrastive loss sees one pooled token: what the last block
            answers for the others is what nobody asked it for, and the block before it often says more.
    """

    def __init__(self, width: int, tower: Tower, skip: int = 0):
        super().__init__()
        most = max(0, tower.num_blocks - 1)
        if not 0 <= skip <= most:
            raise ConditionError(
                f"got skip={skip} for a text tower of {tower.num_blocks} blocks, wanted 0 to {most}: one must be left."
            )
        self.skip = skip
        self.width, self.context_length = width, tower.vocabulary.context_length
        self.null = tower.vocabulary.rows
        self.tower = tower.requires_grad_(False)
        self.into = nn.Linear(tower.token_width, width)
        assert isinstance(self.into.weight, nn.Parameter), "a fresh layer's"
        mark(self.into.weight, MATRIX)  # features are correlated: under AdamW words of two objects stay mixed up
        nn.init.normal_(self.into.weight, std=WORD_STD * tower.token_width**-0.5)
        self.nobody = embedding(width, std=WORD_STD)

    def prepare(self, data: TrainingData, tokenizer: Callable[[], nn.Module]) -> str:
        theirs = getattr(getattr(tokenizer(), "text", None), "tower", None)
        if theirs is None:
            raise ConditionError(
                "got a tokenizer without a text tower for a TextTowerCondition; use one that was trained with text,"
                " or give the prior a vocabulary instead."
            )
        if theirs.spec != self.tower.spec:
            raise ConditionError(
                f"the condition's tower is {self.tower.spec['init_args']}, but the tokenizer's is"
                f" {theirs.spec['init_args']}; copy text.tower from the tokenizer's config."
            )
        self.tower.load_state_dict(theirs.state_dict())
        return ""

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        return self.tower.vocabulary.encode(captions)

    def forward(self, ids: Tensor) -> Tensor:
        nobody = ids == self.null
        with torch.no_grad():
            features = self.tower.tokens(ids.masked_fill(nobody, END), self.skip)  # (B,L,W)
        return torch.where(nobody[..., None], self.nobody, self.into(features).to(self.nobody.dtype))  # (B,L,D)


class ClassCondition(Spec, Condition):
    """One token per class.

    Args:
        width: D.
        names: of the classes, in the order of the labels (label 0 first).
    """

    context_length = 1

    def __init__(self, width: int, names: list[str]):
        super().__init__()
        plain = [name.lower().strip() for name in names]
        if not plain or not all(plain) or len(set(plain)) < len(plain):
            raise ConditionError(f"got the class names {names!r:.80}, wanted at least one, all different, none empty.")
        self.width, self.null = width, len(names)
        self.classes = nn.Embedding(len(names) + 1, width)
        nn.init.normal_(self.classes.weight, std=WORD_STD)
        self.label_of = {name: label for label, name in enumerate(plain)}
        longest_first = sorted(plain, key=len, reverse=True)  # a "fire truck" is no "truck"
        self.pattern = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w)")

    def prepare(self, data: TrainingData, tokenizer: Callable[[], nn.Module]) -> str:
        labels = data.arrays("train", PROBE)["labels"]
        if not -1 < int(labels.max()) < self.null:
            raise ConditionError(
                f"the training samples have labels up to {int(labels.max())} (-1: none), but there are {self.null}"
                " names; give ClassCondition a name for every label, and data that has labels."
            )
        return ""

    def label(self, caption: str) -> int:
        """The one class that a caption names. Raises ConditionError where it names none, or several."""
        found = {self.label_of[name] for name in self.pattern.findall(caption.lower())}
        if len(found) != 1:
            raise ConditionError(
                f"the caption {caption!r:.60} names {len(found)} classes, wanted one of: {', '.join(self.label_of)}."
            )
        return found.pop()

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([[self.label(caption)] for caption in captions], device=self.classes.weight.device)
        return ids, torch.ones_like(ids, dtype=torch.bool)

    def ask(self, captions: list[str], label: int) -> str:
        """The label's name, whatever the captions say."""
        return list(self.label_of)[label] if 0 <= label < self.null else ""

    def encode_samples(self, captions: list[str], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Labels decide, whatever the captions say. Raises ConditionError for one without a name (an IndexError, where
        looking at it would wait for an accelerator)."""
        if labels.device.type == "cpu" and int(labels.max()) >= self.null:
            raise ConditionError(f"got the label {int(labels.max())}, wanted at most {self.null - 1}: one per name.")
        ids = labels.to(self.classes.weight.device)[:, None].clamp(min=0)
        ids = torch.where(ids < self.null, ids, self.null + 1)  # never the null row by accident
        return ids, torch.ones_like(ids, dtype=torch.bool), labels < 0

    def forward(self, ids: Tensor) -> Tensor:
        return self.classes(ids)


class NoCondition(Spec, Condition):
    """The null row and nothing else. width: D."""

    context_length = 1
    null = 0
    constant = True

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.nobody = embedding(width, std=WORD_STD)

    def ask(self, captions: list[str], label: int) -> str:
        return super().ask(captions, label) or "anything"

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(captions), 1, dtype=torch.long, device=self.nobody.device)
        return ids, torch.ones_like(ids, dtype=torch.bool)

    def forward(self, ids: Tensor) -> Tensor:
        return self.nobody.expand(*ids.shape, -1)


def words_of(vocabulary: CaptionVocabulary | None, condition: Condition | None, width: int) -> Condition:
    """The condition of a prior: its own words over `vocabulary`, or `condition`.

    Raises ConditionError where both or neither are given, or the width differs.
    """
    if (vocabulary is None) == (condition is None):
        raise ConditionError(
            f"got {'neither' if vocabulary is None else 'both'} `vocabulary` and `condition`; give the prior a"
            " vocabulary (it then learns its own words), or set that to null and choose a condition."
        )
    if vocabulary is not None:
        return CaptionWords(vocabulary, width)
    assert condition is not None, "one of both is given"
    if condition.width != width:
        raise ConditionError(f"condition.width is {condition.width}, backbone.width is {width}; make them equal.")
    return condition
