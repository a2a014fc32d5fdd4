"""Random crops: parts of the stored picture, another one in every epoch, the same for any batch, worker or restart."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.pictures.transforms import to_pixels
from data.reading.datamodule import ImageDataModule
from data.reading.order import Batch
from data.schema import DataError
from data.sources.open import SourceConfig
from tests.data_samples import flickr_folder, prepared

SIDE = 24


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that keep their aspect, their short side 24 pixels, as png: what is stored is what is cropped."""
    folder = flickr_folder(tmp_path_factory.mktemp("flickr"), count=12)
    for file in (folder / "Images").iterdir():
        ramp = np.linspace(0, 255, 72, dtype=np.uint8)
        Image.fromarray(np.broadcast_to(ramp[None, :, None], (48, 72, 3)).copy()).save(file, quality=100)
    out = tmp_path_factory.mktemp("wide")
    prepared(
        SourceConfig("folder", (str(folder),)), out, resize="keep_ratio", size=SIDE, format="png", val_fraction=0.3
    )
    return out


def train(path: Path, **options: object) -> ImageDataModule:
    return ImageDataModule(str(path), image_size=SIDE, random_crop=True, **options)  # type: ignore[arg-type]


def crops(path: Path, epoch: int, samples: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    images: torch.Tensor = train(path, seed=seed).split("train")[Batch(epoch, 0, samples)]["images"]
    return images


def test_a_crop_is_a_part_of_the_stored_picture(wide: Path) -> None:
    data = train(wide)
    reader = data.split("train").reader
    for sample, crop in enumerate(crops(wide, 3, (0, 1, 2, 3))):
        member = next(name for name in reader.member_names(sample) if name == "png")
        with Image.open(io.BytesIO(reader.read(sample, member) or b"")) as picture:
            stored = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        assert stored.shape == (3, SIDE, 36)
        assert any(torch.equal(stored[:, :, left : left + SIDE], crop) for left in range(36 - SIDE + 1))


def test_crops_change_with_the_epoch_and_with_nothing_else(wide: Path) -> None:
    samples = (0, 1, 2, 3, 4, 5)
    first = crops(wide, 0, samples)
    assert torch.equal(first, crops(wide, 0, samples))
    alone = torch.cat([crops(wide, 0, (sample,)) for sample in reversed(samples)]).flip(0)
    assert torch.equal(first, alone), "whatever batch a sample is in"
    others = [crops(wide, 1, samples), crops(wide, 0, samples, seed=1)]
    for other in others:
        assert (first != other).flatten(1).any(1).sum() >= 3
    offsets = {crop[0, 0, 0].item() for epoch in range(12) for crop in crops(wide, epoch, samples)}
    assert len(offsets) > 6, "all places come up"


def test_what_is_measured_is_not_cropped_at_random(wide: Path) -> None:
    cropped, plain = train(wide), ImageDataModule(str(wide), image_size=SIDE)
    assert cropped.split("train")[Batch(0, 0, (0, 1))]["images"].shape == (2, 3, SIDE, SIDE)  # training goes on
    for split in ("train", "val"):
        assert torch.equal(to_pixels(cropped.arrays(split)["images"]), to_pixels(plain.arrays(split)["images"]))
    with pytest.raises(DataError, match="in_memory cannot be true"):
        train(wide, in_memory=True)


def test_a_picture_that_does_not_decode_is_named(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = train(wide).split("train")
    monkeypatch.setattr(type(images), "encoded", lambda self, sample: b"no picture")
    with pytest.raises(DataError, match="sample .*: the picture does not decode"):
        images[Batch(0, 0, (0,))]
