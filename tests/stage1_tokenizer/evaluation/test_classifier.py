"""Classifiers of the reports: that they learn to read pictures, and when a kept one is used."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.sources.scenes import Scenes
from stage1_tokenizer.evaluation.attributes import Slots
from stage1_tokenizer.evaluation.classifier import AttributeClassifier, LabelClassifier, slot_accuracy
from stage1_tokenizer.evaluation.classifier_fit import (
    Budget,
    _backward,
    fit_classifier,
    load_classifier,
    report_classifier,
    save_classifier,
)
from stage1_tokenizer.evaluation.picture_data import draw_training
from tests.tiny import rows_of


class Data:
    """Training pictures (fields of a batch) with a data module's methods; its own split."""

    def __init__(self, folder: Path, fields: dict[str, Any]) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_text("{}")
        self.data_dir, self.val_batch_size, self.fields = str(folder), 8, fields

    def split(self, split: str) -> torch.Tensor:
        assert split == "train"
        return self.fields["images"]

    def samples(self, split: str, rows: list[int]) -> dict[str, Any]:
        return rows_of(self.fields, rows)


def colours(num: int) -> dict[str, Any]:
    """`num` red, then green, then blue pictures: in the order of class folders."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(num)
    images = torch.rand(3 * num, 3, 16, 16, generator=generator) - 1
    images[torch.arange(3 * num), labels] += 1
    return {"images": images, "labels": labels, "attributes": [{}] * 3 * num}


def scenes(num: int, **options: Any) -> dict[str, Any]:
    attributes, pixels = Scenes(num, seed=1, **options).draw(np.arange(num))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return {"images": images, "attributes": attributes, "labels": torch.full((num,), -1)}


@pytest.mark.slow
def test_attribute_classifier_reads_small_scenes() -> None:
    """Place, background and colour of one object, from a thousand scenes of 16 pixels, in seconds."""
    data = scenes(1300, size=16, max_objects=1)
    slots = Slots.of_scenes(data["attributes"])
    torch.manual_seed(0)
    classifier = AttributeClassifier(slots, image_size=16, width=24, feature_dim=64)
    train = {name: values[:1000] for name, values in data.items()}
    fit_classifier(classifier, train, Budget(steps=160, seconds=60, batch_size=64), seed=0)
    accuracy = slot_accuracy(classifier, data["images"][1000:], slots.targets(data["attributes"][1000:]))
    assert accuracy["layout"] > 0.97 and accuracy["background"] > 0.97 and accuracy["object1.colour"] > 0.9
    assert accuracy["all"] <= min(share for name, share in accuracy.items() if name != "all")
    shuffled = slot_accuracy(classifier, data["images"][1000:].roll(1, 0), slots.targets(data["attributes"][1000:]))
    assert shuffled["layout"] < 0.5, "the control must fail"


def test_training_stops_at_its_target_and_at_its_time() -> None:
    data = scenes(60, size=16, max_objects=1)
    slots = Slots({"layout": Slots.of_scenes(data["attributes"]).classes["layout"]})

    class OnlyLayout(AttributeClassifier):
        def targets(self, batch: Any) -> torch.Tensor:
            return Slots.of_scenes(data["attributes"]).targets(batch["attributes"])[:, :1]

    classifier, seen = OnlyLayout(slots, 16, width=8), []
    classifier.trunk.register_forward_pre_hook(lambda *_: seen.append(classifier.training))
    fit_classifier(classifier, data, Budget(50, 60, target=0.0, batch_size=16, check_every=3), seed=0)
    assert sum(seen) == 3
    seen.clear()
    fit_classifier(classifier, data, Budget(50, 1e-9, batch_size=16, check_every=3), seed=0)
    assert sum(seen) == 1


def test_pictures_whose_places_are_not_read_are_shifted_in_training() -> None:
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = AttributeClassifier(Slots({"tone": ["", "dark"]}), 32, width=8).augment(images, torch.Generator())
    moved = [any(torch.equal(x.roll((i, j), (1, 2))[:, 2:-2, 2:-2], y[:, 2:-2, 2:-2]) for i in range(-2, 3)
                 for j in range(-2, 3)) for x, y in zip(images, seen, strict=True)]  # fmt: skip
    assert all(moved) and not torch.equal(images, seen)
    scenes_of = AttributeClassifier(Slots({"tone": ["", "dark"], "object1.place": ["left"]}), 32, width=8)
    assert torch.equal(scenes_of.augment(images, torch.Generator()), images)


def test_a_small_set_is_trained_on_but_for_a_hundred() -> None:
    data, classifier = colours(320), LabelClassifier(Slots({"class": ["0", "1", "2"]}), width=4)
    fit_classifier(classifier, data, Budget(15, 60, batch_size=64), seed=0)
    assert classifier.trained_on == 860, "a hundred say when to stop"


def test_label_classifier_tells_colours_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (240,), generator=generator)
    images = torch.rand(240, 3, 16, 16, generator=generator) - 1
    images[torch.arange(240), labels] += 1
    classifier = LabelClassifier(Slots({"class": ["0", "1", "2"]}), width=8)
    data = {"images": images, "labels": labels, "attributes": [{}] * 240}
    assert fit_classifier(classifier, data, Budget(40, 60, batch_size=32), seed=0) > 0.9


def test_classes_in_stored_order_are_all_trained() -> None:
    """Were the last pictures set aside, none of the last class would be trained on, and none of another looked at."""
    torch.manual_seed(0)
    classifier, data = LabelClassifier(Slots({"class": ["0", "1", "2"]}), width=8), colours(80)
    assert fit_classifier(classifier, data, Budget(40, 60, batch_size=32), seed=0) > 0.9
    assert slot_accuracy(classifier, data["images"], data["labels"][:, None])["all"] > 0.9


def test_a_part_of_the_training_pictures_is_drawn_at_random(tmp_path: Path) -> None:
    data = Data(tmp_path, colours(40))
    drawn, again, other = (draw_training(data, 30, seed) for seed in (0, 0, 1))
    assert len(drawn["images"]) == 30 and drawn["labels"].unique().tolist() == [0, 1, 2]
    assert drawn["labels"][:10].unique().tolist() == [0, 1, 2], "a part of the part, too"
    assert torch.equal(drawn["images"], again["images"]) and not torch.equal(drawn["images"], other["images"])
    whole = draw_training(data, 1000, 0)
    assert whole["labels"].bincount().tolist() == [40, 40, 40] and whole["labels"].diff().any()
    assert torch.equal(whole["labels"], whole["images"].mean(dim=(2, 3)).argmax(1)), "rows stay together"


def test_a_report_classifier_knows_classes_behind_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stage1_tokenizer.evaluation.classifier_fit.TRAINING_PICTURES", 60)
    classifier = report_classifier(Data(tmp_path, colours(80)), tmp_path, budget=Budget(1, 60, batch_size=8))
    assert classifier is not None and classifier.slots.sizes == [3]


def test_pictures_of_a_report_classifier_are_read_and_not_held(tmp_path: Path) -> None:
    data, asked = Data(tmp_path, colours(80)), []
    read = data.samples
    data.samples = lambda split, rows: asked.append(len(rows)) or read(split, rows)  # type: ignore[method-assign, func-returns-value]
    classifier = report_classifier(data, tmp_path, budget=Budget(3, 60, batch_size=16))
    assert classifier is not None and classifier.trained_on == 48 and max(asked) == 64, (
        "what names classes, and no more"
    )
    again = report_classifier(data, tmp_path)
    assert again is not None and again.trained_on == 48


def test_a_batch_of_large_pictures_goes_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is that of the whole batch, but for what batch norm sees."""
    module = "stage1_tokenizer.evaluation.classifier_fit"
    data, seen, gradients = colours(16), [], []
    classifier = LabelClassifier(Slots({"class": ["0", "1", "2"]}), width=8)
    classifier.trunk.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    for pixels in (2**19, 16 * 16 * 16):
        monkeypatch.setattr(f"{module}.PIXELS", pixels)
        classifier.zero_grad()
        bias = classifier.heads.bias
        _backward(classifier.eval(), data["images"], data["labels"][:, None], torch.Generator().manual_seed(0))
        gradients.append(bias.grad.clone())  # type: ignore[union-attr]
    assert seen == [48, 16, 16, 16]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.2, atol=0.02)  # parts are shifted by other draws


def test_augmentation_moves_pictures_and_keeps_their_pixels() -> None:
    classifier = LabelClassifier(Slots({"class": ["0", "1"]}), width=8)
    ramp = torch.arange(16.0).expand(64, 3, 16, 16) / 16
    seen = classifier.augment(ramp, torch.Generator().manual_seed(0))
    assert seen.shape == ramp.shape and set(seen.unique().tolist()) <= set(ramp.unique().tolist())
    rising = seen[:, 0, 0, 8] > seen[:, 0, 0, 6]
    assert 0.2 < rising.float().mean() < 0.8, "half of them are mirrored"


def test_a_kept_classifier_is_read_back_and_belongs_to_its_data(tmp_path: Path) -> None:
    data = scenes(20, size=16)
    classifier = AttributeClassifier(Slots.of_scenes(data["attributes"]), 16, feature_dim=256).eval()
    save_classifier(classifier, tmp_path, "abc", 16, 0.5)
    again = load_classifier(tmp_path, "abc")
    assert again is not None and again.slots.names == classifier.slots.names
    torch.testing.assert_close(again.features(data["images"]), classifier.features(data["images"]))
    assert load_classifier(tmp_path, "other") is None and load_classifier(tmp_path / "none", "abc") is None


def test_pictures_without_classes_have_no_classifier(tmp_path: Path) -> None:
    captioned = {"attributes": [{}], "labels": torch.tensor([-1]), "images": torch.zeros(1, 3, 8, 8)}
    assert report_classifier(Data(tmp_path, captioned), tmp_path) is None


def test_training_is_a_function_of_its_seed_alone(tmp_path: Path) -> None:
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(ord(name))
        before = torch.random.get_rng_state()
        data = Data(tmp_path / name, scenes(30, size=16))
        classifier = report_classifier(data, tmp_path / name, seed, budget=Budget(3, 60, batch_size=8))
        assert classifier is not None and torch.equal(before, torch.random.get_rng_state())
        made.append(classifier.heads.weight)
    torch.testing.assert_close(made[0], made[1])
    assert not torch.allclose(made[0], made[2])
