"""Which caption speaks for a sample: the one rule that training, conditions and reports share.

A sample may have several captions, or none, and a label. Training draws one of them (`LitPrior`), everything else takes
the longest, which is the one that says most. What a prior can be asked for besides (the name of a class, "anything") is
up to its `Condition.ask`; `askable` leaves out the samples that a condition has nothing to ask for.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from data.schema import DataError

FEWEST = 8  # samples that a report needs


def longest(captions: list[str]) -> str:
    """The longest caption; of equally long ones the first; "" where there is none."""
    return max(captions, key=len, default="")


def askable(ask: Callable[[list[str], int], str], samples: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The samples of a batch that a prior can be asked for, as a batch, and the caption to ask with for each.

    ask: `Condition.ask`. samples: a batch with `captions`, `labels` and whatever else, lists or tensors of one length.
    Raises DataError where there are fewer than 8.
    """
    asked = [ask(captions, int(label)) for captions, label in zip(samples["captions"], samples["labels"], strict=True)]
    rows = [i for i, caption in enumerate(asked) if caption.strip()]
    if len(rows) < FEWEST:
        raise DataError(
            f"{len(rows)} of {len(asked)} held-out samples have a caption, wanted at least {FEWEST} to report on"
        )
    if len(rows) < len(asked):
        samples = {n: v[rows] if isinstance(v, Tensor) else [v[i] for i in rows] for n, v in samples.items()}
    return samples, [asked[i] for i in rows]
