"""Groups of captions in the generation report: seen and unseen combinations, and what "everything right" leaves out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data.__main__ import main as data_main
from data.reading.datamodule import ImageDataModule
from stage1_tokenizer.evaluation.attributes import Slots, scene_values
from stage1_tokenizer.evaluation.classifier import AttributeClassifier
from stage2_prior.evaluation.faithfulness import caption_groups, faithfulness


def test_groups_tell_seen_from_unseen_whatever_the_word(tmp_path: Path) -> None:
    """A scene is seen if its attributes are, with another word too; groups that are too small are not divided."""
    arguments = ["prepare", "--source", "scenes", "--num", "900", "--size", "64", "--words", "0.75", "--workers", "2"]
    assert data_main([*arguments, "--val-fraction", "0.5", "--out", str(tmp_path / "data")]) == 0
    images = ImageDataModule(str(tmp_path / "data"), image_size=64)
    real = images.arrays("val")
    slots = Slots.of_scenes(images.arrays("train")["attributes"])
    classifier = AttributeClassifier(slots, 64)
    groups = caption_groups(classifier, images, real)

    def shown(scene: dict[str, Any]) -> str:
        return json.dumps({name: value for name, value in scene_values(scene).items() if not name.startswith("letter")})

    trained = {shown(scene) for scene in images.arrays("train")["attributes"]}
    assert groups["seen combination"].tolist() == [shown(scene) in trained for scene in real["attributes"]]
    one = groups["1 object"]
    assert torch.equal(groups["1 object, seen combination"], one & groups["seen combination"])
    assert "2 objects, seen combination" not in groups, "hardly any"

    wanted = slots.targets(real["attributes"])
    letters = torch.tensor([name.startswith("letter") for name in slots.names])
    blind = torch.where(letters & (wanted != 0), 0, wanted)  # reads everything right but words
    read = faithfulness(classifier, blind, real, groups)
    wordless = sum(scene["word"] is None for scene in real["attributes"]) / len(one)
    assert read["all"] == pytest.approx(wordless) and 0.1 < wordless < 0.4
    assert read["all, without words"] == read["all, without shapes and words"] == 1
    assert read["all, without shapes"] == pytest.approx(wordless)
