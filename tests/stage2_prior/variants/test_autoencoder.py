"""A KL autoencoder of diffusers as a latent space: the library's numbers, safetensors only, an export of its own."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from data.__main__ import main as data_main
from data.reading.datamodule import LatentDataModule
from stage2_prior.__main__ import main
from stage2_prior.latent_space import PriorError, load_space
from stage2_prior.variants.autoencoder import AutoencoderLatents
from tests.tiny import pictures

DOWN, UP = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random autoencoder of 20,000 weights that makes 4 x 4 x 6 of a picture of 16 pixels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    made = AutoencoderKL(
        down_block_types=DOWN, up_block_types=UP, block_out_channels=(8, 8, 8), latent_channels=6, norm_num_groups=4
    )
    target: Path = tmp_path_factory.mktemp("autoencoder")
    made.save_pretrained(target)  # type: ignore[attr-defined]
    return target


@torch.no_grad()
@pytest.mark.parametrize(("cells", "size"), [(1, (16, 6)), (2, (4, 24))])
def test_latents_are_the_librarys_row_by_row_and_standardised(folder: Path, cells: int, size: tuple[int, int]) -> None:
    from diffusers import AutoencoderKL

    library = AutoencoderKL.from_pretrained(folder)
    space, images = AutoencoderLatents(16, str(folder), cells=cells).eval(), pictures(6)
    mean, std = space.posterior(images)
    assert mean.shape == std.shape == (6, *size) == (6, space.num_latents, space.latent_dim)
    found = library.encode(images).latent_dist
    if cells == 1:
        torch.testing.assert_close(mean, found.mean.flatten(2).transpose(1, 2))
        torch.testing.assert_close(std, found.std.flatten(2).transpose(1, 2))
    torch.testing.assert_close(space.decode(mean), library.decode(found.mean).sample.clamp(-1, 1), rtol=0, atol=1e-5)

    assert space.fit_statistics([images[:2], images[2:]]) == 6
    mean, std = space.posterior(images)
    assert mean.mean(0).abs().max() < 1e-4
    torch.testing.assert_close((mean.square() + std.square()).mean(0), torch.ones(size), rtol=0, atol=1e-3)
    torch.testing.assert_close(space.decode(mean), library.decode(found.mean).sample.clamp(-1, 1), rtol=0, atol=1e-4)
    assert torch.equal(space.encode(images), mean) and space.decode(mean[:, :2]).shape == images.shape


def test_an_export_needs_the_folder_no_more_and_has_an_identity(folder: Path, tmp_path: Path) -> None:
    words = ["prepare", "--source", "scenes", "--num", "24", "--size", "16", "--val-fraction", "0.25", "--workers", "1"]
    assert data_main([*words, "--out", str(tmp_path / "data")]) == 0
    own = shutil.copytree(folder, tmp_path / "own")
    run = ["autoencoder", "--run_dir", str(tmp_path), "--data", str(tmp_path / "data"), "--image_size", "16"]
    assert main([*run, "--folder", str(own)]) == 0
    shutil.rmtree(own)
    space, data = load_space(tmp_path / "tokenizer"), LatentDataModule(str(tmp_path / "latents"))
    assert data.latent_info["tokenizer_fingerprint"] == space.fingerprint
    held = data.arrays("val")
    assert held["latents"].shape[1:] == (16, 6) and (held["latents_std"] > 0).all()
    assert space.decode(held["latents"]).shape[1:] == (3, 16, 16)
    config = (tmp_path / "tokenizer" / "config.json").read_text()
    assert str(tmp_path) not in config and json.loads(config)["class_path"] == "stage2_prior.AutoencoderLatents"
    assert isinstance(space, AutoencoderLatents)
    with torch.no_grad():
        next(space.autoencoder.parameters()).add_(0.1)
    assert space.fingerprint != data.latent_info["tokenizer_fingerprint"]


def test_folders_of_another_kind_are_refused(folder: Path, tmp_path: Path) -> None:
    for name, content, message in (
        ("none", None, "no config.json"),
        ("other", '{"_class_name": "UNet2DModel"}', "holds a UNet2DModel, wanted an AutoencoderKL"),
        ("list", "[]", "holds a None"),
        ("broken", "{", "is no JSON"),
    ):
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "config.json").write_text(content)
        with pytest.raises(PriorError, match=message):
            AutoencoderLatents(16, str(tmp_path / name))
    (tmp_path / "pickled").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "pickled")
    (tmp_path / "pickled" / "diffusion_pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(PriorError, match="can run code"):
        AutoencoderLatents(16, str(tmp_path / "pickled"))
    for size, cells in ((18, 1), (16, 3), (16, 0)):
        with pytest.raises(PriorError, match="wanted a multiple of"):
            AutoencoderLatents(size, str(folder), cells=cells)
    for arguments in ({}, {"folder": str(folder), "config": {}}):
        with pytest.raises(PriorError, match="give the folder"):
            AutoencoderLatents(16, **arguments)  # type: ignore[arg-type]
