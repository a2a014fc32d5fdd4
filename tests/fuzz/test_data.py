"""Hostile pictures, captions, tars, parquet files and data directories."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image

from data.__main__ import main
from data.pictures.decode import SOURCE_FORMATS, decode
from data.prepare.finalize import finalize
from data.prepare.members import Made, make_members
from data.prepare.options import PrepareConfig
from data.prepare.quality import Filters
from data.prepare.stats import describe
from data.prepare.verify import verify
from data.reading.datamodule import ImageDataModule, LatentDataModule
from data.reading.datasets import decode_image
from data.reading.latents import LatentShardWriter, write_latent_manifest
from data.reading.streaming import StreamDataModule
from data.schema import Drop, Sample
from data.sources.captions import read_captions
from data.sources.open import SourceConfig, open_source
from data.sources.parquet import Parquet
from data.sources.tars import Tars
from tests.data_samples import encoded, flickr_folder, photo, prepared
from tests.fuzz.damage import PICKLE, damaged, damaged_json, text_of, values
from tests.fuzz.guard import budget, case, place

TURNED = Image.Exif()
TURNED[0x0112] = 6
PICTURES = [
    encoded(photo(0), quality=90),
    encoded(photo(1, 16, 16), exif=TURNED),
    encoded(photo(2, 33, 9), "JPEG", progressive=True),
    encoded(photo(3, 20, 20).convert("CMYK")),
    encoded(photo(4, 16, 16), "PNG"),
    encoded(photo(5, 16, 16).convert("P"), "PNG", transparency=3),
    encoded(photo(6, 12, 12).convert("RGBA"), "PNG"),
    encoded(Image.fromarray(np.full((8, 8), 900, np.uint16)), "PNG"),
    encoded(photo(7, 16, 16), "WEBP"),
    encoded(photo(8, 16, 16), "GIF"),
    encoded(photo(9, 16, 16), "BMP"),
    encoded(photo(10, 16, 16), "TIFF", compression="tiff_lzw"),
    encoded(photo(11, 16, 16), "PPM"),
]
FORMATS = [("png", "center_crop"), ("jpg", "keep_ratio"), ("webp", "budget"), ("png", "no"), ("keep", "no")]


@budget(600)
@given(content=damaged(PICTURES), form=st.sampled_from(FORMATS))
def test_pictures(content: bytes, form: tuple[str, str]) -> None:
    with place() as folder:
        with case(folder):
            assert decode(content, SOURCE_FORMATS).mode == "RGB"
        with case(folder):
            assert decode_image("key", content, 16).shape == (3, 16, 16)
        with case(folder):
            config = PrepareConfig(SourceConfig("folder"), 16, form[1], form[0], filters=Filters(near_duplicates=2))
            assert isinstance(make_members(Sample("key", ["a"], content), ["a"], config), (Made, Drop))


CSV = b'image,caption,split\na.jpg,"a dog, running",train\nb.jpg,a cat\nb.jpg,"two\nlines",val\n'
TOKEN = b"a.jpg#0\tA dog .\na.jpg#1\tA brown dog .\nb.jpg#0\tA cat .\n"
KARPATHY = {"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "a dog"}, {"raw": "b"}]}]}
COCO = {
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
    "annotations": [{"image_id": 1, "caption": "a dog"}, {"image_id": 2, "caption": "a cat"}],
}
LISTED = [{"file_name": "a.jpg", "caption": ["a dog", "b"]}, {"image": "b.jpg", "text": "a cat", "split": "val"}]
LINES = b"".join(text_of(entry) + b"\n" for entry in LISTED)
MAPPED = {"a.jpg": ["a dog"], "b.jpg": "a cat"}
TABLES = [("c.csv", CSV), ("c.tsv", CSV.replace(b",", b"\t")), ("c.token.txt", TOKEN), ("c.jsonl", LINES)]
TABLES += [("c.json", text_of(document)) for document in (COCO, KARPATHY, LISTED, MAPPED)]


@st.composite
def captions_files(draw: Any) -> tuple[str, bytes]:
    if draw(st.booleans()):
        name, content = draw(st.sampled_from(TABLES))
        return name, draw(damaged([content]))
    return "c.json", text_of(draw(damaged_json(draw(st.sampled_from([COCO, KARPATHY, LISTED, MAPPED])))))


@budget(400)
@given(named=captions_files())
def test_captions_files(named: tuple[str, bytes]) -> None:
    with place() as folder:
        path = folder / named[0]
        path.write_bytes(named[1])
        with case(folder):
            filters, counts = Filters(), Counter[str]()
            for item in read_captions(path):
                assert isinstance(item.name, str) and item.split in (None, "train", "val")
                filters.choose_captions(item.name, item.captions, counts)


@budget(60)
@given(named=captions_files(), picture=damaged(PICTURES), near=st.booleans())
def test_prepare(named: tuple[str, bytes], picture: bytes, near: bool) -> None:
    with place() as folder:
        (folder / "Images").mkdir()
        (folder / "captions.").with_suffix(Path(named[0]).suffix).write_bytes(named[1])
        for name, content in (("a.jpg", PICTURES[0]), ("b.jpg", picture)):
            (folder / "Images" / name).write_bytes(content)
        words = ["prepare", "--path", str(folder), "--out", str(folder / "out"), "--size", "16", "--workers", "1"]
        with case(folder):
            if main([*words, *(["--near-duplicates", "2"] if near else [])]) == 0:
                assert list(verify(folder / "out")) == []


RECORD: dict[str, Any] = {
    "key": "a",
    "caption": "a dog",
    "captions": ["a dog", "b"],
    "label": 3,
    "label_name": "dog",
    "attributes": {"objects": [{"shape": "circle"}]},
    "width": 16,
    "height": 16,
}


def tar(members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def members_of(record: bytes, picture: bytes = PICTURES[4]) -> list[tuple[str, bytes]]:
    more = [("b.png", PICTURES[4]), ("b.txt", b"a cat"), ("b.cls", b"2"), ("b.pkl", PICKLE), ("b.pth", PICKLE)]
    return [("a.png", picture), ("a.json", record), ("a.txt", b"a dog"), *more]


PLAIN = members_of(text_of(RECORD))
TARS = [
    tar(PLAIN),
    tar([("x" * 150 + name, content) for name, content in PLAIN], tarfile.GNU_FORMAT),
    tar([("\xe9" * 90 + name, content) for name, content in PLAIN], tarfile.PAX_FORMAT),
    tar([(f"../{name}", content) for name, content in PLAIN]),
]


@st.composite
def tars(draw: Any) -> bytes:
    if draw(st.booleans()):
        return bytes(draw(damaged(TARS)))
    record = text_of(draw(damaged_json(RECORD)))
    picture = draw(st.sampled_from([PICTURES[4], PICTURES[0], PICTURES[0][:90], b"", PICKLE]))
    return tar(members_of(draw(st.just(record) | damaged([record])), picture))


@budget(300)
@given(content=tars())
def test_tars(content: bytes) -> None:
    with place() as folder:
        (folder / "0.tar").write_bytes(content)
        with case(folder):
            for sample in Tars((str(folder),)).read(0, 1):
                assert isinstance(sample, (Sample, Drop)) and sample.key
        for in_memory in (True, False):
            with case(folder):
                read_all(ImageDataModule(str(folder), 2, image_size=16, in_memory=in_memory, val_fraction=0.0))
        with case(folder):
            data = StreamDataModule([str(folder / "*.tar")], None, 2, 16, 2, 2, most_errors=6)
            list(data.captions("train"))
            for batch in data.train_dataloader():
                assert batch["images"].shape == (2, 3, 16, 16)


def read_all(data: Any) -> None:
    """Everything that a fit reads of a split."""
    data.setup()
    for captions in data.captions("train"):
        assert all(isinstance(caption, str) for caption in captions)
    for batch in data.train_dataloader():
        assert batch["labels"].dtype == torch.int64 and all(isinstance(c, list) for c in batch["captions"])
        assert all(isinstance(entry, dict) for entry in batch["attributes"])
        for name in batch.keys() & {"images", "latents", "latents_std"}:
            assert len(batch[name]) == len(batch["keys"])


COLUMNS: dict[str, Any] = {
    "image": [
        *([{"bytes": PICTURES[0], "path": "a.jpg"}, {"bytes": PICKLE, "path": None}, {"bytes": None, "path": "../x"}]),
        *([PICTURES[0], PICTURES[4]], [["a"], []], [1.5, 2.0], ["a.jpg", "/etc/passwd"], [{"x": 1}, {"x": 2}]),
    ],
    "caption": [
        ["a dog", "a cat"],
        [["a", "b"], []],
        [None, None],
        [{"raw": "a"}, {"raw": "b"}],
        [1, 2],
        [b"\xff", b""],
    ],
    "label": [[0, 1], [-1, 10**12], ["dog", "\0"], [None, 2], [True, False], [0.5, 1.0], [[0], [1]]],
    "split": [["train", "val"], [1, 2], [None, "test"], [["train"], []]],
}
TEMPLATES = ("a {label}", "{x}", "{label.__class__}", "{", "{label:>99999999999}")
HUB = {"info": {"features": {"label": {"names": ["dog", "cat"]}}}}


@st.composite
def parquets(draw: Any) -> bytes:
    names = draw(st.lists(st.sampled_from(list(COLUMNS)), unique=True)) if draw(st.booleans()) else list(COLUMNS)
    columns = {}
    for name in names:
        value = draw(st.sampled_from(COLUMNS[name]))
        columns[name] = [value, COLUMNS["image"][0]] if isinstance(value, dict) else value
    table = pa.table(columns)
    metadata = draw(st.sampled_from([HUB, None]) | damaged_json(HUB))
    table = table.replace_schema_metadata({"huggingface": text_of(metadata)})
    if draw(st.booleans()) and "caption" in columns and columns["caption"] == [b"\xff", b""]:
        place = table.schema.get_field_index("caption")  # a string that is no UTF-8
        text = pa.Array.from_buffers(pa.string(), 2, table.column(place).combine_chunks().buffers())
        table = table.set_column(place, "caption", text)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression=draw(st.sampled_from(["none", "snappy", "gzip"])))
    content = buffer.getvalue()
    return draw(damaged([content])) if draw(st.booleans()) else content


@budget(250)
@given(
    content=parquets(), template=st.sampled_from(["a {label}", "{x}", "{label.__class__}", "{", "{label:>99999999999}"])
)
def test_parquet(content: bytes, template: str) -> None:
    with place() as folder:
        (folder / "0.parquet").write_bytes(content)
        with case(folder):
            config = SourceConfig("parquet", (str(folder),), templates=("a {label}", template))
            source = open_source(config)
            assert isinstance(source, Parquet)
            for sample in source.read(0, sum(source.rows)):
                assert isinstance(sample, (Sample, Drop))


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Files of a directory of pictures and of one of latents, by relative name."""
    root = tmp_path_factory.mktemp("directories")
    source = SourceConfig("folder", (str(flickr_folder(root / "flickr", 8, 2)),))
    prepared(source, root / "images")
    origin = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("val", 2)):
        with LatentShardWriter(root / "latents", split, 4) as writer:
            for number in range(count):
                mean = torch.randn(3, 2, generator=origin)
                writer.write(f"{split}{number}", mean, mean.exp(), ["a dog"], {"a": 1}, number)
    write_latent_manifest(root / "latents", 3, 2, "0123456789abcdef")
    return {
        kind: {str(p.relative_to(root / kind)): p.read_bytes() for p in (root / kind).rglob("*") if p.is_file()}
        for kind in ("images", "latents")
    }


@budget(300)
@given(data=st.data(), kind=st.sampled_from(["images", "latents"]))
def test_data_directories(directories: dict[str, dict[str, bytes]], kind: str, data: st.DataObject) -> None:
    files = dict(directories[kind])
    name = data.draw(st.sampled_from(["manifest.json", *sorted(files)]))
    if name.endswith(".json") and data.draw(st.booleans()):
        files[name] = text_of(data.draw(damaged_json(json.loads(files[name]))))
    else:
        files[name] = data.draw(damaged([files[name]]))
    with place() as folder:
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        with case(folder):
            read_all(
                ImageDataModule(str(folder), 2, image_size=16) if kind == "images" else LatentDataModule(str(folder), 2)
            )
        with case(folder):
            describe(folder)
        with case(folder):
            list(verify(folder))
        with case(folder):
            finalize(folder)


TOO_MUCH = (2**31, 10**30, 1e308)  # as many scenes as a user asks for are drawn
OPTIONS: tuple[str, ...] = (
    "num",
    "seed",
    "size",
    "quality",
    "val-fraction",
    "shard-size",
    "min-side",
    "max-aspect",
    "max-pixels",
)
OPTIONS += (
    "min-caption",
    "max-caption",
    "near-duplicates",
    "format",
    "resize",
    "words",
    "max-objects",
    "source",
    "path",
)


@budget(100)
@given(options=st.dictionaries(st.sampled_from(OPTIONS), values().filter(lambda v: v not in TOO_MUCH), max_size=4))
def test_options_of_prepare(options: dict[str, Any]) -> None:
    with place() as folder:
        words = ["prepare", "--source=scenes", "--num=3", "--size=8", "--workers=1", f"--out={folder / 'out'}"]
        words += [f"--{name}={value}" for name, value in options.items()]
        with case(folder, 0, 2):
            assert main(words) in (0, 1, 2)
