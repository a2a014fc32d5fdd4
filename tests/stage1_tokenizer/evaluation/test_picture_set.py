"""What a report keeps of pictures: no more pixels than are shown, and the same figures in batches of any size."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.evaluation import reconstruction_pass
from stage1_tokenizer.evaluation.attributes import Slots
from stage1_tokenizer.evaluation.classifier import AttributeClassifier
from stage1_tokenizer.evaluation.frechet import FeatureExtractor, RandomConvFeatures
from stage1_tokenizer.evaluation.picture_data import training_rows
from stage1_tokenizer.evaluation.picture_set import PictureSet
from stage1_tokenizer.evaluation.reconstruction_read import distances, probe, read_back
from stage1_tokenizer.similarity import psnr
from tests.stage1_tokenizer.evaluation.test_reconstruction import FakeData, linear_tokenizer


def flat(value: Any, place: str = "") -> dict[str, float]:
    """Numbers of nested metrics by their place."""
    if isinstance(value, dict):
        return {k: v for name, item in value.items() for k, v in flat(item, f"{place}/{name}").items()}
    if isinstance(value, list):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{place}/{i}").items()}
    return {place: float(value)} if isinstance(value, (int, float)) else {}


def test_a_reports_figures_do_not_depend_on_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on which pictures of a batch are in the sample of those whose latents and features are kept."""
    monkeypatch.setattr(reconstruction_pass, "LINES", 15)
    monkeypatch.setattr(reconstruction_pass, "NEIGHBOUR_PICTURES", 17)
    data, found = FakeData(tmp_path), []
    classifier = AttributeClassifier(Slots.of_scenes(data.splits["train"]["attributes"]), 16, width=8, feature_dim=32)
    tokenizer = linear_tokenizer(data)
    extractors: list[FeatureExtractor] = [classifier.eval(), RandomConvFeatures()]
    for batch in (3, 24):
        data.val_batch_size = batch
        meters = reconstruction_pass.Meters({"psnr": psnr}, extractors)
        held, learned, linear = reconstruction_pass.measure(tokenizer, tokenizer.pca, data, [1, 4], 24, meters, 0)
        rows = training_rows(data, 40, seed=0)
        train = reconstruction_pass.training_pass(tokenizer, tokenizer.pca, data, rows, 24, 40, extractors)
        assert held.set.n == train.set.n == 24 and len(held.lines.z) == 15
        assert train.lines is not None and len(train.lines.z) == 40 == len(train.samples["captions"])
        figures = {
            **learned.means(),
            **distances(held, learned, linear, train.set, extractors),
            "read": read_back(classifier, held, learned, linear),
            "probe": probe(classifier, train.lines, held.lines, [1]),
        }
        found.append(flat(figures))
    assert len(found[0]) > 70
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)


class Watched(FakeData):
    """Pictures of which it is known how many are alive."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.alive: list[weakref.ref[Tensor]] = []
        self.most = 0

    def samples(self, split: str, rows: list[int]) -> dict[str, Any]:
        batch = super().samples(split, rows)
        batch["images"] = batch["images"].clone()
        self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(batch["images"])]
        self.most = max(self.most, sum(len(ref()) for ref in self.alive))  # type: ignore[arg-type, misc]
        return batch


def test_no_picture_is_held_that_is_not_shown(tmp_path: Path) -> None:
    data = Watched(tmp_path)
    data.val_batch_size, data.most = 4, 0
    tokenizer = linear_tokenizer(data)
    held, learned, _ = reconstruction_pass.measure(
        tokenizer, tokenizer.pca, data, [1, 4], 24, reconstruction_pass.Meters({}, [RandomConvFeatures()]), 0
    )
    assert data.most <= 8, "this batch, and the one that is being read"
    for pictures in (held.set, *learned.sets.values()):
        assert pictures.n == 24 and len(pictures.pictures) == reconstruction_pass.GRID_PICTURES
        kept = sum(x.untyped_storage().nbytes() for x in pictures.pictures.values())
        assert kept == 8 * 3 * 16 * 16 * 4, "and not the batches that they came in"


def test_a_set_keeps_its_sample_and_what_is_shown() -> None:
    images = torch.rand(20, 3, 16, 16) * 2 - 1
    extractor = RandomConvFeatures()
    pictures = PictureSet([extractor], sample=[0, 9, 19], shown=[7])
    for part in images.split(6):
        assert pictures.add(part)[extractor.feature_name].shape == (len(part), 448)
    wanted = extractor.features(images[[0, 9, 19]])
    torch.testing.assert_close(pictures.rows(extractor.feature_name), wanted, rtol=1e-4, atol=1e-5)
    assert list(pictures.pictures) == [7] and torch.equal(pictures.pictures[7], images[7])
