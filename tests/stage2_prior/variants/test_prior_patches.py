"""Raw pixel patches as latents: nothing is lost, and the prior's commands accept them."""

import json
from pathlib import Path

import pytest
import torch

from data.__main__ import main as data_main
from data.reading.datamodule import LatentDataModule
from stage2_prior.latent_space import PriorError, load_space
from stage2_prior.orders import SpiralOrder
from stage2_prior.variants.patches import PatchLatents, main
from tests.warm import command


def test_patches_lose_nothing_and_prefixes_fill_with_the_mean() -> None:
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    patches = PatchLatents(16, 4)
    assert patches.fit_statistics([images[:3], images[3:]]) == 5
    z = patches.encode(images)
    assert z.shape == (5, 16, 48) and z.mean(0).abs().max() < 1e-5
    torch.testing.assert_close(patches.decode(z), images, rtol=0, atol=1e-5)
    half = patches.decode(z[:, :8])
    torch.testing.assert_close(half[:, :, :8], images[:, :, :8], rtol=0, atol=1e-5)  # row by row: the upper half
    torch.testing.assert_close(half[:, :, 8:], images[:, :, 8:].mean(0).expand(5, -1, -1, -1), rtol=0, atol=1e-5)
    with pytest.raises(PriorError, match="wanted"):
        patches.decode(z[..., :3])


def test_identity_follows_the_statistics() -> None:
    one, two = PatchLatents(16, 4), PatchLatents(16, 4)
    assert one.fingerprint == two.fingerprint != PatchLatents(16, 8).fingerprint
    two.fit_statistics([torch.rand(4, 3, 16, 16)])
    assert one.fingerprint != two.fingerprint
    with pytest.raises(PriorError, match="divisor"):
        PatchLatents(16, 5)


def test_command_writes_latents_and_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["prepare", "--source", "scenes", "--num", "40", "--size", "16", "--val-fraction", "0.25"]
    assert data_main([*arguments, "--workers", "1", "--out", str(tmp_path / "data")]) == 0
    options = ["--run_dir", str(tmp_path), "--data", str(tmp_path / "data"), "--image_size", "16", "--patch_size", "4"]
    assert main(options) == 0
    done = command("stage2_prior.variants.patches", *options)
    assert done.returncode == 0, done.stderr[-2000:]  # as a command: its export must not name a class of `__main__`
    space = load_space(tmp_path / "tokenizer")
    data = LatentDataModule(str(tmp_path / "latents"))
    assert data.latent_info["tokenizer_fingerprint"] == space.fingerprint
    held = data.arrays("val")
    assert held["latents"].shape[1:] == (16, 48) and not held["latents_std"].any()
    assert space.decode(held["latents"]).shape[1:] == (3, 16, 16)
    assert len(SpiralOrder(4, 4).positions(space.num_latents)) == 16
    with pytest.raises(SystemExit):
        main([*options[:-1], "5"])
    assert "divisor" in capsys.readouterr().err
    assert json.loads((tmp_path / "tokenizer" / "config.json").read_text())["class_path"].endswith("PatchLatents")
    (tmp_path / "tokenizer" / "config.json").write_text(
        json.dumps({"format": 1, "class_path": "stage2_prior.Euler", "init_args": {}})
    )
    with pytest.raises(ValueError, match="export|wanted a tokenizer"):
        load_space(tmp_path / "tokenizer")
