"""Raw patches, pyramids and frequencies as latents: nothing is lost, and the prior's commands accept them."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.__main__ import main as data_main
from data.reading.datamodule import LatentDataModule
from stage2_prior.__main__ import main
from stage2_prior.latent_space import PriorError, load_space
from stage2_prior.orders import ScaleOrder, SpiralOrder
from stage2_prior.variants.fixed_latents import FixedLatents
from stage2_prior.variants.frequencies import FrequencyLatents, cosine_basis
from stage2_prior.variants.patches import PatchLatents
from stage2_prior.variants.pyramid import PyramidLatents

SPACES = {
    "patches": (lambda: PatchLatents(16, 4), (16, 48)),
    "pyramid": (lambda: PyramidLatents(16, 4), (21, 48)),
    "frequencies": (lambda: FrequencyLatents(16, 32), (32, 24)),
}


def pictures(n: int = 5) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("make", "size"), SPACES.values(), ids=SPACES)
def test_a_line_loses_nothing_and_a_prefix_fills_with_the_mean(make, size) -> None:  # type: ignore[no-untyped-def]
    space, images = make(), pictures()
    assert isinstance(space, FixedLatents) and space.fit_statistics([images[:3], images[3:]]) == 5
    z = space.encode(images)
    assert z.shape == (5, *size) == (5, space.num_latents, space.latent_dim) and z.mean(0).abs().max() < 1e-5
    torch.testing.assert_close(space.decode(z), images, rtol=0, atol=1e-5)
    errors = [(space.decode(z[:, :k]) - images).square().mean().item() for k in range(1, size[0] + 1)]
    assert errors[-1] < 1e-9 < 0.05 < errors[0]
    filled = torch.cat([z[:, :2], torch.zeros(5, size[0] - 2, size[1])], dim=1)
    assert torch.equal(space.decode(z[:, :2]), space.decode(filled))
    with pytest.raises(PriorError, match="wanted"):
        space.decode(z[..., :3])


@pytest.mark.parametrize(("make", "size"), SPACES.values(), ids=SPACES)
def test_identity_follows_the_statistics(make, size) -> None:  # type: ignore[no-untyped-def]
    one, two = make(), make()
    others = {other().fingerprint for other, _ in SPACES.values()}
    assert one.fingerprint == two.fingerprint in others and len(others) == 3
    two.fit_statistics([pictures()])
    assert one.fingerprint != two.fingerprint


@pytest.mark.parametrize(("make", "size"), SPACES.values(), ids=SPACES)
def test_autocast_rounds_nothing(make, size) -> None:  # type: ignore[no-untyped-def]
    """A report draws and decodes under the autocast of training."""
    space, images = make(), pictures()
    z = space.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        coded, again = space.encode(images), space.decode(z)
    assert torch.equal(coded, z) and again.dtype == torch.float32 and torch.equal(again, space.decode(z))


def test_patches_are_stored_row_by_row() -> None:
    images, patches = pictures(), PatchLatents(16, 4)
    patches.fit_statistics([images])
    half = patches.decode(patches.encode(images)[:, :8])
    torch.testing.assert_close(half[:, :, :8], images[:, :, :8], rtol=0, atol=1e-5)
    torch.testing.assert_close(half[:, :, 8:], images[:, :, 8:].mean(0).expand(5, -1, -1, -1), rtol=0, atol=1e-5)


def test_the_first_scales_are_the_small_picture_enlarged_and_cells_lie_where_they_say() -> None:
    images, pyramid = pictures(), PyramidLatents(16, 4)
    latents = pyramid.cut(images)
    for n, size in ((1, 4), (5, 8)):
        first = torch.cat([latents[:, :n], torch.zeros(5, 21 - n, 48)], dim=1)
        shrunk = torch.nn.functional.adaptive_avg_pool2d(images, size)
        enlarged = shrunk
        for side in (8, 16):
            if side > size:
                enlarged = torch.nn.functional.interpolate(enlarged, size=side, mode="bilinear")
        torch.testing.assert_close(pyramid.join(first), enlarged, rtol=0, atol=1e-5)
    order = ScaleOrder([1, 2, 4])
    assert len(order.positions(pyramid.num_latents)) == 21
    cell = torch.zeros(1, 21, 48)
    cell[:, 5 + 4 * 2 + 3] = 1  # of the finest scale: row 2, column 3
    lit = pyramid.join(cell)[0, 0] != 0
    assert lit[8:12, 12:].all() and lit.sum() == 16
    cell = torch.zeros(1, 21, 48)
    cell[:, 1 + order.parents(2)[4 * 2 + 3]] = 1  # what its token carries: the cell that it lies in
    assert (pyramid.join(cell)[0, 0, 8:12, 12:] != 0).all()


def test_frequencies_rise_along_the_line_and_are_those_of_the_picture() -> None:
    basis = cosine_basis(16)
    torch.testing.assert_close(basis @ basis.T, torch.eye(16, dtype=torch.float64))
    space, at = FrequencyLatents(16, 32), torch.arange(16.0)
    wave = ((2 * at + 1) * 3 * math.pi / 32).cos()  # the third, along one side
    z = space.cut(wave.expand(1, 3, 16, 16).clone())[0].unflatten(1, (3, 8))
    (place,) = (z[:, 0].flatten().abs() > 1e-4).nonzero()[:, 0].tolist()
    u = torch.arange(16)
    lower = int((u[:, None].square() + u.square() < 9).sum())
    assert lower <= place <= lower + 1, "behind all slower waves; the same across is its only equal"
    constant = space.cut(torch.full((1, 3, 16, 16), 0.5))[0]
    assert constant[0, 0] == pytest.approx(8.0) and constant.abs().sum() == pytest.approx(24.0, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PatchLatents(16, 5), "divisor"),
        (lambda: PyramidLatents(24, 4), "power of two"),
        (lambda: PyramidLatents(16, 0), "power of two"),
        (lambda: FrequencyLatents(16, 24), "divisor"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PriorError, match=message):
        make()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    words = ["prepare", "--source", "scenes", "--num", "40", "--size", "16", "--val-fraction", "0.25", "--workers", "1"]
    assert data_main([*words, "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("word", SPACES)
def test_a_command_writes_latents_and_an_export(word: str, shards: Path, tmp_path: Path) -> None:
    extra = {"patches": ["--patch_size", "4"], "pyramid": [], "frequencies": ["--num_latents", "32"]}[word]
    assert main([word, "--run_dir", str(tmp_path), "--data", str(shards), "--image_size", "16", *extra]) == 0
    space = load_space(tmp_path / "tokenizer")
    data = LatentDataModule(str(tmp_path / "latents"))
    assert data.latent_info["tokenizer_fingerprint"] == space.fingerprint
    held = data.arrays("val")
    assert held["latents"].shape[1:] == SPACES[word][1] and not held["latents_std"].any()
    assert space.decode(held["latents"]).shape[1:] == (3, 16, 16)
    config = json.loads((tmp_path / "tokenizer" / "config.json").read_text())
    assert config["class_path"] == f"stage2_prior.{type(space).__name__}"


def test_what_a_command_writes_fits_a_grid_and_its_errors_are_sentences(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["patches", "--run_dir", str(tmp_path), "--data", str(shards), "--image_size", "16", "--patch_size"]
    assert main([*words, "4"]) == 0
    assert len(SpiralOrder(4, 4).positions(load_space(tmp_path / "tokenizer").num_latents)) == 16
    with pytest.raises(SystemExit):
        main([*words, "5"])
    assert "divisor" in capsys.readouterr().err
    (tmp_path / "tokenizer" / "config.json").write_text(
        json.dumps({"format": 1, "class_path": "stage2_prior.Euler", "init_args": {}})
    )
    with pytest.raises(ValueError, match="export|wanted a tokenizer"):
        load_space(tmp_path / "tokenizer")
