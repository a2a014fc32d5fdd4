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


def asked_rows(ask: Callable[[list[str], int], str], samples: dict[str, Any]) -> tuple[list[int], list[str]]:
    """Numbers of the samples of a batch that a prior can be asked for, and the caption to ask with for each.

    ask: `Condition.ask`. samples: a batch with `captions` and `labels`.
    """
    asked = [ask(captions, int(label)) for captions, label in zip(samples["captions"], samples["labels"], strict=True)]
    rows = [i for i, caption in enumerate(asked) if caption.strip()]
    return rows, [asked[i] for i in rows]


def check_enough(rows: list[int], total: int) -> None:
    """Raises DataError where fewer than 8 of `total` samples can be asked for."""
    if len(rows) < FEWEST:
        raise DataError(
            f"{len(rows)} of {total} held-out samples have a caption, wanted at least {FEWEST} to report on"
        )


def askable(ask: Callable[[list[str], int], str], samples: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The samples of a batch that a prior can be asked for, as a batch, and the caption to ask with for each.

    Arguments as `asked_rows`; a batch has whatever else, lists or tensors of one length. Errors as `check_enough`.
    """
    rows, asked = asked_rows(ask, samples)
    check_enough(rows, len(samples["captions"]))
    if len(rows) < len(samples["captions"]):
        samples = {n: v[rows] if isinstance(v, Tensor) else [v[i] for i in rows] for n, v in samples.items()}
    return samples, asked
