"""Does a picture show what its caption asks for: every attribute read right, by kind of caption.

The reader is the report's own classifier, whose accuracy on real pictures stands beside every figure. Captions fall
into groups by the number of objects, and by whether training pictures have this combination of attributes: what a prior
makes of combinations that it has not seen is the figure that memory alone cannot reach.

Letters: N pictures, S slots.
"""

from typing import Any

import torch
from torch import Tensor

from data.reading.datamodule import ImageDataModule
from stage1_tokenizer.evaluation.attributes import LETTER
from stage1_tokenizer.evaluation.classifier import Classifier
from stage1_tokenizer.evaluation.picture_data import batches

FEWEST = 20  # captions in a group that is divided further


def faithfulness_report(
    classifier: Classifier,
    readings: dict[str, Tensor],
    images: ImageDataModule,
    real: dict[str, Any],
) -> dict[str, Any]:
    """Entries `faithfulness` (share right by group, of every set of pictures by name) and `group_sizes`.

    readings: name -> (N,S), what the classifier reads in pictures made for the captions of `real`, samples of the val
    split of `images`.
    """
    groups = caption_groups(classifier, images, real)
    return {
        "faithfulness": {name: faithfulness(classifier, x, real, groups) for name, x in readings.items()},
        "group_sizes": {name: int(rows.sum()) for name, rows in groups.items()},
    }


def caption_groups(classifier: Classifier, images: ImageDataModule, real: dict[str, Any]) -> dict[str, Tensor]:
    """Rows of the held-out pictures by what they show, each (N,) bool; empty groups are left out.

    A combination is seen if training pictures have all its attributes together, whatever their words: with a word,
    nearly every scene is new. Since more objects make more combinations, and are harder, groups of equally many objects
    are also divided into seen and unseen combinations, where there are enough of both.
    """
    n = len(real["attributes"])
    groups = {"all": torch.ones(n, dtype=torch.bool)}
    if all(real["attributes"]):
        counts = {}
        if all("objects" in a for a in real["attributes"]):
            objects = torch.tensor([len(a["objects"]) for a in real["attributes"]])
            counts = {f"{int(k)} object{'s' if k > 1 else ''}": objects == k for k in objects.unique()}
        seen = _seen(classifier, images, real)
        both = {"seen combination": seen, "unseen combination": ~seen}
        groups |= counts | both
        for name, rows in counts.items():
            parts = {f"{name}, {which}": rows & those for which, those in both.items()}
            if all(int(part.sum()) >= FEWEST for part in parts.values()):
                groups |= parts
    return {name: rows for name, rows in groups.items() if bool(rows.any())}


def _seen(classifier: Classifier, images: ImageDataModule, real: dict[str, Any]) -> Tensor:
    """(N,) bool: some training picture has the same attributes, words aside."""
    compared = torch.tensor([not name.startswith(LETTER) for name in classifier.slots.names])
    every = range(len(images.split("train")))
    combinations: set[tuple[int, ...]] = set()
    for batch in batches(images, "train", every, images.val_batch_size):
        trained = classifier.slots.targets(batch["attributes"])[:, compared]
        combinations |= {tuple(row) for row in trained.tolist()}
    return torch.tensor([tuple(row) in combinations for row in classifier.targets(real)[:, compared].tolist()])


def faithfulness(
    classifier: Classifier, predictions: Tensor, real: dict[str, Any], groups: dict[str, Tensor]
) -> dict[str, float]:
    """Share of pictures in which everything is read right, by group; predictions (N,S): what the classifier reads.

    Under "GROUP, without ...", the same without shapes, words (if there are any), or both.
    """
    right = predictions == classifier.targets(real)  # (N,S)
    slots = classifier.slots.names
    out = {name: right[rows].all(dim=1).float().mean().item() for name, rows in groups.items()}
    shapes = torch.tensor([name.endswith(".shape") for name in slots])
    words = torch.tensor([name.startswith(LETTER) for name in slots])
    left_out = {"shapes": shapes} if shapes.any() else {}
    if words.any():
        left_out |= {"words": words, "shapes and words": shapes | words}
    for what, hidden in left_out.items():
        rest = right[:, ~hidden].all(dim=1).float()
        out |= {f"{name}, without {what}": rest[rows].mean().item() for name, rows in groups.items()}
    return out
