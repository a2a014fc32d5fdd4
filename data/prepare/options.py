"""Everything that decides what `prepare` writes, besides the source itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from data.prepare.quality import Filters
from data.schema import (
    DataError,
)
from data.sources.open import SourceConfig


@dataclass(frozen=True)
class PrepareConfig:
    """What `prepare` makes of a source.

    Args:
        source: where the pairs come from.
        size: side S of the pictures, in pixels.
        resize: a policy of `data.pictures.resize.geometry`.
        format: "jpg", "png" or "webp", or "keep": the bytes of the source, untouched.
        quality: of jpg and webp, 1 to 100.
        val_fraction: share of the keys that go to val, 0 to 1; sources with splits of their own keep them.
        shard_size: items of the source per chunk, so at most that many samples per shard; where the items are tars,
            each becomes one shard per split, whatever its size.
        filters: what is left out.
        score_model, score_weights: an open_clip model by name or json, and its weights; None scores nothing.
        min_score: pairs whose cosine under that model is lower are left out.
    """

    source: SourceConfig
    size: int = 256
    resize: str = "center_crop"
    format: str = "jpg"
    quality: int = 95
    val_fraction: float = 0.05
    shard_size: int = 2000
    filters: Filters = field(default_factory=Filters)
    score_model: str = "ViT-B-32"
    score_weights: str | None = None
    min_score: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction <= 1:
            raise DataError(f"val_fraction is {self.val_fraction}, it is a share from 0 to 1")
        if self.shard_size < 1 or self.size < 1:
            raise DataError(f"shard_size {self.shard_size} and size {self.size} must be at least 1")
        if not 1 <= self.quality <= 100:
            raise DataError(f"quality is {self.quality}, wanted 1 to 100")
        if self.format not in ("jpg", "png", "webp", "keep"):
            raise DataError(f"format is {self.format!r}, wanted jpg, png, webp or keep")
        if self.format == "keep" and self.resize != "no":
            raise DataError(f"format keep leaves the bytes untouched, so resize must be no and not {self.resize}")
