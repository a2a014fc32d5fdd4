"""The held-out samples that a prior is judged on: their latents or pictures, and the same samples' pictures.

A prior may be trained on latent shards or on pictures that are encoded in the step; a report needs both of every
sample, and looks that they are of the same ones.

Letters: N samples, K latents, C latent channels.
"""

from collections.abc import Sized
from typing import Any, Protocol

import torch

from data.reading.datamodule import ImageDataModule
from data.reading.order import spread_rows
from data.schema import DataError
from stage2_prior.latent_space import LatentSpace


class HeldOutData(Protocol):
    """What a report asks of the data module that a prior was trained with, of latents or of pictures."""

    data_dir: str

    def split(self, split: str) -> Sized: ...

    def arrays(self, split: str, limit: int | None = None) -> dict[str, Any]: ...


def held_out_latents(data: HeldOutData, tokenizer: LatentSpace, limit: int, batch_size: int) -> dict[str, Any]:
    """`limit` samples spread over the val split, with `latents` and `latents_std` (N,K,C); pictures are encoded."""
    held = data.arrays("val", limit)
    if "latents" not in held:
        device = next(iter(tokenizer.state_dict().values())).device  # type: ignore[attr-defined]
        parts = [tokenizer.posterior(x.to(device)) for x in held["images"].split(batch_size)]
        held["latents"], held["latents_std"] = (torch.cat(x).cpu() for x in zip(*parts, strict=True))
    return held


def same_samples(of: HeldOutData, images: ImageDataModule, held: dict[str, Any], limit: int) -> dict[str, Any]:
    """The pictures of `held`, which is `of.arrays("val", limit)`. Raises DataError where they are of other samples."""
    rows = spread_rows(len(of.split("val")), limit)
    samples = images.samples("val", rows) if rows[-1] < len(images.split("val")) else {"keys": None}
    if samples["keys"] != held["keys"]:
        raise DataError(
            f"the latents in {of.data_dir} and the pictures in {images.data_dir} are of different samples; write the"
            " latents again with `python -m stage1_tokenizer predict`, or set images_dir"
        )
    return samples
