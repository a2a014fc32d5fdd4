"""What goes into shards comes out of the datamodules, and other programs read them too."""

from __future__ import annotations

import functools
import hashlib
import io
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from data.pictures.decode import open_picture, plain_jpeg_size
from data.pictures.resize import pixels_of, resize
from data.pictures.transforms import to_pixels, to_unit_range
from data.prepare.verify import verify
from data.reading.datamodule import ImageDataModule, LatentDataModule
from data.reading.datasets import decode_image
from data.reading.latents import LatentShardWriter, write_latent_manifest
from data.reading.shards import ShardReader, ShardWriter
from data.reading.tar_index import index_tar, member_places
from data.schema import DataError, clean_key
from data.sources.open import SourceConfig
from data.sources.scenes import Scenes
from tests.data_samples import encoded, flickr_folder, foreign, photo, prepared, records_in, tar_of


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    prepared(SourceConfig("scenes", num=80, size=16, seed=4), out, shard_size=15)
    return out


def module(path: Path, **options: Any) -> ImageDataModule:
    return ImageDataModule(str(path), **{"batch_size": 8, "image_size": 16, **options})


@pytest.mark.parametrize("in_memory", [True, False])
def test_scenes_come_out_as_they_were_drawn(scenes: Path, in_memory: bool) -> None:
    attributes, pixels = Scenes(80, seed=4, size=16).draw(np.arange(80))
    seen = 0
    for split in ("train", "val"):
        batch = module(scenes, in_memory=in_memory).arrays(split)
        for i, key in enumerate(batch["keys"]):
            assert np.array_equal(to_pixels(batch["images"][i]).permute(1, 2, 0).numpy(), pixels[int(key)])
            assert batch["attributes"][i] == attributes[int(key)]
            assert len(batch["captions"][i]) == 3 and batch["labels"][i] == -1
            seen += 1
    assert seen == 80


def test_batches_keep_the_contract(scenes: Path) -> None:
    data = module(scenes)
    batch = next(iter(data.train_dataloader()))
    assert batch["images"].shape == (8, 3, 16, 16) and batch["images"].dtype == torch.float32
    assert -1 <= batch["images"].min() < batch["images"].max() <= 1
    assert batch["labels"].dtype == torch.int64 and batch["labels"].shape == (8,)
    assert [len(batch[name]) for name in ("captions", "keys", "attributes")] == [8, 8, 8]
    assert [c for b in data.val_dataloader() for c in b["captions"]] == list(data.captions("val"))
    assert len(data.arrays("train", limit=5)["keys"]) == 5
    counts = data.manifest()["counts"]
    assert [sum(len(b["keys"]) for b in loader) for loader in data.predict_dataloader()] == list(counts.values())


def test_range_changes_and_back_lose_nothing() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_unit_range(pixels)), pixels)
    assert to_unit_range(pixels)[[0, -1]].tolist() == [-1.0, 1.0]


def test_batches_that_are_held_stay_as_they_were(scenes: Path) -> None:
    loader = module(scenes, in_memory=False).train_dataloader()
    held = list(loader)
    copies = [batch["images"].clone() for batch in held]
    assert len(held) > 6 and all(batch["images"].is_contiguous() for batch in loader)
    assert all(torch.equal(batch["images"], copy) for batch, copy in zip(held, copies, strict=True))


def test_plain_jpegs_decode_as_any_and_others_are_left_to_pil() -> None:
    whole, grey = encoded(photo(1)), encoded(photo(1).convert("L"))
    for data in (whole, grey, encoded(photo(1), progressive=True)):
        assert plain_jpeg_size(data) == (60, 40)
        wanted = resize(pixels_of(data, open_picture(data), 40, "center_crop"), 40).numpy()
        assert np.array_equal(decode_image("", data, 40), wanted)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(photo(1), exif=exif)
    for data in (turned, encoded(photo(1).convert("CMYK")), encoded(photo(1), "PNG"), whole[:-9], whole[:30], b""):
        assert plain_jpeg_size(data) is None
    upright = np.asarray(photo(1).rotate(-90, expand=True).crop((0, 10, 40, 50)), np.int16)
    assert np.abs(decode_image("", turned, 40).transpose(1, 2, 0) - upright).mean() < 6
    at = whole.index(b"\xff\xc0")
    claims = whole[: at + 5] + (1000).to_bytes(2, "big") + b"\xff\xff" + whole[at + 9 :]  # 65,535 x 1,000
    assert plain_jpeg_size(claims) == (65535, 1000)
    with pytest.raises(DataError, match="over 64000000 pixels"):
        decode_image("", claims, 300)


@pytest.mark.parametrize("side", [16, 300])
def test_the_range_changes_alike_in_any_layout_and_block(side: int) -> None:
    pixels = torch.randint(0, 256, (3, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    images = to_unit_range(pixels)
    assert images.is_contiguous() and torch.equal(images, pixels.float() * (1 / 127.5) - 1)


def test_pictures_of_another_size_are_fitted(tmp_path: Path) -> None:
    folder = flickr_folder(tmp_path / "flickr", count=6)
    prepared(SourceConfig("folder", (str(folder),)), tmp_path / "out", resize="no", val_fraction=0.0)
    batch = module(tmp_path / "out", image_size=24).arrays("train")
    assert batch["images"].shape == (6, 3, 24, 24)
    wanted = photo(2).resize((24, 24), Image.Resampling.BICUBIC, box=(10, 0, 50, 40))
    row = batch["keys"].index("002_ab")
    assert np.abs(to_pixels(batch["images"][row]).permute(1, 2, 0).numpy() - np.asarray(wanted, np.int16)).mean() < 6


def test_flips_mirror_about_their_share_anew_in_every_epoch(scenes: Path) -> None:
    plain, flipped = module(scenes), module(scenes, flip=0.5)
    reference = {k: x for b in plain.train_dataloader() for k, x in zip(b["keys"], b["images"], strict=True)}
    order = flipped.train_dataloader()
    mirrored = []
    for epoch in (0, 1):
        order.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        found = set()
        for batch in order:
            for key, image in zip(batch["keys"], batch["images"], strict=True):
                assert torch.equal(image, reference[key]) or torch.equal(image, reference[key].flip(-1))
                if not torch.equal(image, reference[key]):
                    found.add(key)
        mirrored.append(found)
    assert mirrored[0] != mirrored[1] and all(10 < len(found) < 50 for found in mirrored)
    assert torch.equal(flipped.arrays("val")["images"], plain.arrays("val")["images"])


def test_a_reader_goes_through_pickle_and_reads_on(scenes: Path) -> None:
    reader = ShardReader(sorted((scenes / "train").glob("*.tar")))
    first = reader.read(3, "json")
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.read(3, "json") == first and copy.read(3, "nothing") is None


def test_the_index_of_a_tar_equals_that_of_tarfile(tmp_path: Path) -> None:
    """Also with names of over a hundred letters, folders, and what GNU and POSIX tars put between the members."""
    import tarfile

    members = [(f"{'deep/' * n}{'x' * 40}{n}.jpg", bytes(n)) for n in range(30)]
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{kind}.tar"
        with tarfile.open(path, "w", format=kind) as tar:
            folder = tarfile.TarInfo("deep")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        with tarfile.open(path) as tar:
            wanted = [(info.name, info.offset_data, info.size) for info in tar if info.isfile()]
        assert [(name, place.offset, place.size) for name, place in member_places(path)] == wanted


@pytest.mark.parametrize("cut", [100, 700, 1100, -1024, -9000])
def test_a_truncated_tar_gets_a_sentence(tmp_path: Path, cut: int) -> None:
    path = tar_of(tmp_path / "a.tar", [(f"{i}.jpg", encoded(photo(i))) for i in range(3)])
    content = path.read_bytes().rstrip(b"\0") + b"\0" * 1024
    path.write_bytes(content[:cut])
    with pytest.raises(DataError, match=r"truncated|not a readable tar"):
        index_tar(path)


def test_keys_that_come_back_are_refused(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3")])
    with pytest.raises(DataError, match="in two places"):
        index_tar(path)
    path = tar_of(tmp_path / "b.tar", [("a.jpg", b"1"), ("a.jpg", b"2")])
    with pytest.raises(DataError, match="twice"):
        index_tar(path)
    writer = ShardWriter(tmp_path / "c.tar")
    writer.write("a", {"txt": b""})
    with pytest.raises(AssertionError, match="key a comes twice"):
        writer.write("a", {"txt": b""})
    writer.__exit__(AssertionError, None, None)
    assert not list(tmp_path.glob("c.tar*"))


def test_a_shard_has_the_bytes_that_webdataset_writes(tmp_path: Path) -> None:
    names = ("a", clean_key("b" * 200), "c" * 30)
    samples = [(name, {"jpg": bytes(700 * i), "json": b"{}", "safetensors": b"x"}) for i, name in enumerate(names)]
    theirs = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "encoder": False}
    with ShardWriter(tmp_path / "a.tar") as ours, webdataset.TarWriter(str(tmp_path / "b.tar"), **theirs) as other:
        for key, members in samples:
            ours.write(key, members)
            other.write({"__key__": key, **members})
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert ours.sha256 == hashlib.sha256((tmp_path / "b.tar").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda p: (p / "manifest.json").unlink(), "no manifest.json"),
        (lambda p: (p / "manifest.json").write_text('{"sch'), "not valid JSON"),
        (lambda p: (p / "manifest.json").write_text('{"schema": 99}'), "schema 99"),
        (lambda p: (p / "train" / "00000.tar").unlink(), "are gone"),
    ],
)
def test_a_directory_that_is_not_whole_gets_a_sentence(tmp_path: Path, spoil: Any, sentence: str) -> None:
    prepared(SourceConfig("scenes", num=20, size=16), tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=sentence):
        module(tmp_path).split("train")


def test_a_picture_that_does_not_decode_is_named(tmp_path: Path) -> None:
    tar_of(tmp_path / "0.tar", [("good.jpg", encoded(photo(0))), ("bad.jpg", encoded(photo(1))[:900])])
    with pytest.raises(DataError, match="sample bad: "):
        module(tmp_path, val_fraction=0.0).arrays("train")


def test_missing_and_wrong_directories_get_a_sentence(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data directory"):
        module(tmp_path / "nowhere").setup()
    with pytest.raises(DataError, match="holds images, wanted latents"):
        LatentDataModule(str(scenes)).setup()
    with pytest.raises(DataError, match="split 'test' is unknown"):
        module(scenes).arrays("test")
    with pytest.raises(DataError, match="flip is 2"):
        module(scenes, flip=2.0)


# ---- latents


def test_latents_come_back_with_their_texts(scenes: Path, tmp_path: Path) -> None:
    data = module(scenes)
    K, C = 4, 3
    for split, loader in zip(("train", "val"), data.predict_dataloader(), strict=True):
        for rank in range(2):  # two ranks, each with every second batch
            with LatentShardWriter(tmp_path, split, shard_size=9, rank=rank, world=2) as writer:
                for i, batch in enumerate(loader):
                    if i % 2 == rank:
                        mean = batch["images"].flatten(1)[:, : K * C].reshape(-1, K, C)
                        writer.write_batch(batch, mean, mean.abs())
    write_latent_manifest(tmp_path, K, C, "abc")
    latents = LatentDataModule(str(tmp_path), batch_size=8)
    assert latents.latent_info["num_latents"] == K and latents.latent_info["tokenizer_fingerprint"] == "abc"
    for split in ("train", "val"):
        wanted, got = data.arrays(split), latents.arrays(split)
        rows = [got["keys"].index(key) for key in wanted["keys"]]
        assert len(rows) == len(got["keys"])
        mean = wanted["images"].flatten(1)[:, : K * C].reshape(-1, K, C)
        assert torch.equal(got["latents"][rows], mean) and torch.equal(got["latents_std"][rows], mean.abs())
        assert [got["captions"][r] for r in rows] == wanted["captions"]
        assert [got["attributes"][r] for r in rows] == wanted["attributes"]
    on_demand = LatentDataModule(str(tmp_path), batch_size=8, in_memory=False)
    for a, b in zip(latents.train_dataloader(), on_demand.train_dataloader(), strict=True):
        assert a["keys"] == b["keys"] and torch.equal(a["latents"], b["latents"])


def test_latents_written_again_leave_no_old_shards(tmp_path: Path) -> None:
    for count in (10, 3):
        with LatentShardWriter(tmp_path, "train", shard_size=2) as writer:
            for i in range(count):
                writer.write(f"{i}", torch.zeros(2, 2), torch.ones(2, 2), ["x"], {})
        write_latent_manifest(tmp_path, 2, 2, "abc")
    assert LatentDataModule(str(tmp_path)).arrays("train")["keys"] == ["0", "1", "2"]


def test_verify_reads_latents_down_to_their_values(tmp_path: Path) -> None:
    bad = torch.tensor([[1.0, 2.0], [3.0, float("nan")]])
    means = {"good": torch.ones(2, 2), "wide": torch.ones(2, 3), "nan": bad}
    with LatentShardWriter(tmp_path, "train") as writer:
        for key, mean in means.items():
            writer.write(key, mean, torch.ones(2, 2), ["x"], {})
    write_latent_manifest(tmp_path, 2, 2, "abc")
    assert list(verify(tmp_path)) == [
        "train/00000.tar: wide.safetensors: mean is (2, 3), the manifest says (2, 2)",
        "train/00000.tar: nan.safetensors: mean has values that are not finite",
    ]
    path = tmp_path / "train" / "00000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:512] + bytes(8) + whole[520:])  # the length of the first member's header
    problems = list(verify(tmp_path))
    assert "another sha256" in problems[0] and "good.safetensors: not a safetensors file" in problems[1]


# ---- other programs


def test_plain_webdataset_reads_our_shards(scenes: Path) -> None:
    urls = sorted(map(str, (scenes / "train").glob("*.tar")))
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8").to_tuple("png", "txt", "json")
    )
    records = {key: r for key, r in records_in(scenes).items() if r["split"] == "train"}
    seen = 0
    for picture, text, record in dataset:
        assert picture.shape == (16, 16, 3) and text == record["caption"] == records[record["key"]]["caption"]
        seen += 1
    assert seen == len(records)


def test_the_training_loader_of_open_clip_reads_our_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(SourceConfig("scenes", num=64, size=16), tmp_path, shard_size=16, val_fraction=0.0)
    import open_clip_train.data as open_clip_data

    # It is written for webdataset 0.2.86, where shards ended without the marker that 1.0 yields and it trips over.
    without_marker = functools.partial(open_clip_data.tar_file_expander, eof_value=None)
    monkeypatch.setattr(open_clip_data, "tar_file_expander", without_marker)

    arguments = Namespace(
        train_data=str(tmp_path / "train" / "{00000..00003}.tar"),
        train_num_samples=None,  # it must find sizes.json
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=8,
        workers=0,
        world_size=1,
    )
    found = open_clip_data.get_wds_dataset(
        arguments,
        lambda image: torch.from_numpy(np.array(image)),
        True,
        tokenizer=lambda text: [torch.tensor([len(text)])],
    )
    assert found.dataloader.num_samples == 64 and found.dataloader.num_batches == 8
    images, texts = next(iter(found.dataloader))
    assert images.shape == (8, 16, 16, 3) and texts.shape == (8, 1)


def test_tars_of_img2dataset_are_read_in_place(tmp_path: Path) -> None:
    data = module(foreign(tmp_path), val_fraction=0.2)
    data.setup()
    train, val = data.arrays("train"), data.arrays("val")
    assert len(train["keys"]) + len(val["keys"]) == 40 and not set(train["keys"]) & set(val["keys"])
    assert all(captions == [f"text {key}"] for key, captions in zip(train["keys"], train["captions"], strict=True))
    assert train["images"].shape[1:] == (3, 16, 16)
