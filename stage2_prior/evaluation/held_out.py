"""The held-out samples that a prior is judged on: what can be asked for, their latents and their pictures, in batches.

A prior may be trained on latent shards or on pictures that are encoded in the step; a report needs both of every
sample, and looks that they are of the same ones.

Letters: N samples, M of them in the sample, K latents, C latent channels.
"""

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from data.reading.datamodule import ImageDataModule
from data.reading.order import spread_rows
from data.schema import DataError
from stage1_tokenizer.evaluation.picture_data import batches, chosen, described, give_back_freed
from stage1_tokenizer.text.ranks import rank, world_size
from stage2_prior.captions import asked_rows, check_enough
from stage2_prior.latent_space import LatentSpace

SAMPLE = 10_000  # pictures whose latents and features are kept one by one


class HeldOutData(Protocol):
    """What a report asks of the data module that a prior was trained with, of latents or of pictures."""

    data_dir: str

    def split(self, split: str) -> Sized: ...

    def samples(self, split: str, rows: list[int]) -> dict[str, Any]: ...


@dataclass(frozen=True)
class HeldOut:
    """Held-out samples that a prior can be asked for, without latents or pictures.

    rows: their numbers in the val split. asked: the caption to ask with. samples: captions, attributes and labels.
    total: the samples that were looked at, also those that have nothing to ask for.
    """

    rows: list[int]
    asked: list[str]
    samples: dict[str, Any]
    total: int

    @classmethod
    def of(cls, data: HeldOutData, ask: Callable[[list[str], int], str], limit: int, batch_size: int) -> "HeldOut":
        """Of `limit` samples spread over the val split. Raises DataError where fewer than 8 can be asked for."""
        rows = spread_rows(len(data.split("val")), limit)
        samples = described([described([batch]) for batch in batches(data, "val", rows, batch_size)])
        kept, asked = asked_rows(ask, samples)
        check_enough(kept, len(rows))
        return cls([rows[i] for i in kept], asked, chosen(samples, kept), len(rows))

    @property
    def sample(self) -> list[int]:
        """Numbers of the M samples whose latents and features are kept."""
        return spread_rows(len(self.rows), SAMPLE)

    def batches(
        self, data: HeldOutData, images: ImageDataModule, tokenizer: LatentSpace, batch_size: int
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Number of the first, latents (B,K,C), standard deviations, pictures (B,3,H,W); of this rank's share.

        Pictures are encoded where data has no latents.

        Raises DataError where latents and pictures are of different samples.
        """
        device = next(iter(tokenizer.state_dict().values())).device  # type: ignore[attr-defined]
        for at in range(rank() * batch_size, len(self.rows), world_size() * batch_size):
            give_back_freed()
            rows = self.rows[at : at + batch_size]
            held = data.samples("val", rows)
            pictures = same_samples(data, images, rows, held["keys"])["images"]
            if "latents" in held:
                yield at, held["latents"], held["latents_std"], pictures
            else:
                mean, std = tokenizer.posterior(held["images"].to(device))
                yield at, mean.cpu(), std.cpu(), pictures


def same_samples(of: HeldOutData, images: ImageDataModule, rows: list[int], keys: list[str]) -> dict[str, Any]:
    """The pictures of val samples `rows`, whose keys in `of` are these. Raises DataError where they have others."""
    samples = images.samples("val", rows) if max(rows) < len(images.split("val")) else {"keys": None}
    if samples["keys"] != keys:
        raise DataError(
            f"the latents in {of.data_dir} and the pictures in {images.data_dir} are of different samples; write the"
            " latents again with `python -m stage1_tokenizer predict`, or set images_dir"
        )
    return samples


@dataclass(frozen=True)
class Lines:
    """Latents of the sample: mean and std (M,K,C), and what is said about them."""

    mean: Tensor
    std: Tensor
    asked: list[str]
    samples: dict[str, Any]

    def drawn(self, seed: int) -> Tensor:
        """(M,K,C) with posterior noise, as in training."""
        return self.mean + self.std * torch.randn(self.mean.shape, generator=torch.Generator().manual_seed(seed))
