"""What the fuzz suite found, each by its name; every one of these ended in a traceback, or did not end."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import save

from data.__main__ import main as data_main
from data.prepare.finalize import finalize, read_plan
from data.prepare.records import read_record
from data.reading.datamodule import ImageDataModule, LatentDataModule
from data.reading.datasets import captions_of, label_of
from data.reading.streaming import StreamDataModule
from data.schema import DataError, Drop, key_hash, read_manifest
from data.sources.captions import read_captions, texts
from data.sources.parquet import Parquet
from stage1_tokenizer import Tokenizer
from stage1_tokenizer.spec import SpecError, build
from stage1_tokenizer.training.cli import run_cli
from stage1_tokenizer.training.lit_tokenizer import LitTokenizer
from tests.data_samples import tar_of
from tests.fuzz.damage import Program
from tests.fuzz.guard import BYTES, status
from tests.fuzz.test_models import PRIOR, TOKENIZER
from tests.tiny import CAPTIONS, C, K, pictures
from tests.tiny_run import checkpoint, fresh, run

__all__ = ["fresh"]
DEEP = b"[" * 5000


def test_a_stream_of_tars_without_a_sample_ends(tmp_path: Path) -> None:
    tar_of(tmp_path / "0.tar", [("a.pkl", b"x")])
    data = StreamDataModule([str(tmp_path / "0.tar")], batch_size=1, image_size=16, most_errors=3)
    with pytest.raises(DataError, match="holds no sample"):
        next(iter(data.train_dataloader()))
    with pytest.raises(DataError, match="holds no sample"):
        next(data.captions("train"))


def test_json_nested_too_deeply_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(DEEP)
    with pytest.raises(DataError, match="nested too deeply"):
        list(read_captions(tmp_path / "c.json"))
    nested: Any = "a"
    for _ in range(400):
        nested = [nested]
    assert texts(nested) == [] and texts([[{"raw": "a"}]]) == ["a"]
    (tmp_path / "manifest.json").write_bytes(DEEP)
    with pytest.raises(DataError, match="nested too deeply"):
        read_manifest(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(DEEP)
    with pytest.raises(ValueError, match="nested too deeply"):
        Tokenizer.from_pretrained(tmp_path)


def test_fields_of_a_record_that_are_of_another_kind_are_none() -> None:
    assert captions_of({"captions": True}, b"text") == [] == captions_of({"captions": 5}, None)
    assert captions_of({"captions": ["a", 5, None]}, None) == ["a"] and captions_of({"caption": "b"}, None) == ["b"]
    assert captions_of({"captions": ["\ud800"]}, None) == ["?"]
    odd: list[Any] = [float("inf"), 10**30, [], "x", float("nan"), -7]
    for label in odd:
        assert label_of({"label": label}, None) == -1
    assert len(key_hash("\udc84")) == 8


def test_a_manifest_of_another_form_is_a_sentence(tmp_path: Path) -> None:
    good = {"schema": 1, "kind": "images", "counts": {"train": 1}, "shards": {}}
    shard = {"count": 1, "bytes": 1, "sha256": "0"}
    (tmp_path / "manifest.json").write_text(json.dumps(good))
    assert read_manifest(tmp_path) == good
    wrong: list[Any] = [None, [], {**good, "kind": 3}, {**good, "counts": {"train": "1"}}, {**good, "shards": []}]
    wrong += [{**good, "shards": {"train/../../x.tar": shard}}, {**good, "shards": {"/etc/passwd": shard}}]
    wrong += [{**good, "shards": {"train/0.tar": {"count": 1}}}, {**good, "kind": "latents"}, {**good, "dropped": [1]}]
    for content in wrong:
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=r"is not as it was written|has schema None"):
            read_manifest(tmp_path)


def test_a_plan_or_a_record_that_names_a_file_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chunks").mkdir()
    for name in ("../x.tar", "train/../../x.tar", "x"):
        plan = {"fingerprint": "f", "config": {}, "chunks": [[0, 1, {name: "train/0.tar"}]]}
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        with pytest.raises(DataError, match="not as it was written"):
            read_plan(tmp_path)
        shard = {"count": 0, "bytes": 0, "sha256": "", "keys": "", "hashes": ""}
        bins: dict[str, Any] = {"captions": {}, "caption_length": {}, "short_side": {}}
        record = {"fingerprint": "f", "source": [0, 1], "shards": {name: shard}, "dropped": [], **bins}
        (tmp_path / "chunks" / "00000.json").write_text(json.dumps(record))
        assert read_record(tmp_path, 0, "f") is None
        (tmp_path / "chunks" / "00000.json").write_text(json.dumps({**record, "shards": {"train/0.tar": shard}}))
        assert read_record(tmp_path, 0, "f") is not None
    assert data_main(["finalize", str(tmp_path)]) == 1


def test_half_of_a_surrogate_pair_in_a_plan_is_a_sentence(tmp_path: Path) -> None:
    scenes = ["--source", "scenes", "--num", "8", "--workers", "1", "--out", str(tmp_path)]
    assert not data_main(["prepare", *scenes])
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["config"]["source"]["path"] = ["\ud800"]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(DataError, match=r"cannot hold \\ud800"):
        finalize(tmp_path)
    assert read_manifest(tmp_path)["counts"]  # what was there stays


def test_latents_of_different_shapes_are_named(tmp_path: Path) -> None:
    tensors = [{name: np.zeros(shape, np.float32) for name in ("mean", "std")} for shape in ((3, 2), (4, 2))]
    tar = tar_of(tmp_path / "train" / "0.tar", [(f"{i}.safetensors", save(t)) for i, t in enumerate(tensors)])
    latents = {"num_latents": 3, "latent_dim": 2, "tokenizer_fingerprint": "f"}
    shards = {"train/0.tar": {"count": 2, "bytes": tar.stat().st_size, "sha256": ""}}
    manifest = {"schema": 1, "kind": "latents", "counts": {"train": 2}, "latents": latents, "shards": shards}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"latents of sample 1 have shape \(4, 2\)"):
        LatentDataModule(str(tmp_path)).split("train")


def test_text_of_a_parquet_row_that_is_no_utf8_is_a_drop_and_errors_are_one_line(tmp_path: Path) -> None:
    binary = pa.array([b"\xff", b"a cat"])
    text = pa.Array.from_buffers(pa.string(), 2, binary.buffers())
    pq.write_table(pa.table({"image": pa.array([b"x", b"y"]), "caption": text}), tmp_path / "a.parquet")
    bad, good = Parquet((str(tmp_path),), (), ()).read(0, 2)
    assert isinstance(bad, Drop) and bad.reason == "unreadable" and not isinstance(good, Drop)
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: len(content) // 2] + b"\xff" * 9 + content[len(content) // 2 :])
    with pytest.raises(DataError, match=r"^[^\n]+$"):
        list(Parquet((str(tmp_path),), (), ()).read(0, 2))


def test_a_picture_whose_name_is_no_text_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"images": [{"id": 1, "file_name": {}}], "annotations": []}))
    with pytest.raises(DataError, match="COCO"):
        list(read_captions(tmp_path / "c.json"))


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return TOKENIZER.save_pretrained(tmp_path / "tokenizer")


def changed(folder: Path, **entries: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return folder


def test_an_export_of_any_stated_size_is_refused_before_anything_is_allocated(export: Path) -> None:
    config = json.loads((export / "config.json").read_text())
    before = status("VmRSS")
    for name, value in (("width", 2**20), ("depth", 10**9), ("num_latents", 2**40)):
        encoder = {**config["init_args"]["encoder"]}
        trunk = {**encoder["init_args"]["trunk"]}
        (trunk if name != "num_latents" else encoder)["init_args"] = {
            **(trunk if name != "num_latents" else encoder)["init_args"],
            name: value,
        }
        encoder["init_args"] = {**encoder["init_args"], "trunk": trunk}
        with pytest.raises(ValueError, match=r"far larger than its weights|make them equal|for stage1_tokenizer"):
            Tokenizer.from_pretrained(changed(export, init_args={**config["init_args"], "encoder": encoder}))
    assert status("VmRSS") - before < BYTES / 8


def test_a_damaged_export_is_a_sentence(export: Path) -> None:
    weights = (export / "model.safetensors").read_bytes()
    for content in (b"", weights[:100], struct.pack("<Q", 2**60) + weights[8:], weights[:-9]):
        (export / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged \([^\n]+$"):
            Tokenizer.from_pretrained(export)
    (export / "model.safetensors").write_bytes(weights)
    wrong: list[dict[str, Any]] = [{"format": "x"}, {"class_path": 3}, {"init_args": []}, {"init_args": {"encoder": 3}}]
    for entries in wrong:
        with pytest.raises(ValueError, match=r"config|wanted|for stage1_tokenizer"):
            Tokenizer.from_pretrained(changed(export, **{"format": 1, **entries}))
    (export / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="no config of an export"):
        Tokenizer.from_pretrained(export)


def test_an_export_cannot_ask_for_a_file_or_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    asked: list[Any] = []

    def create(*_: Any, pretrained: bool, **__: Any) -> None:
        asked.append(pretrained)
        raise KeyError("no such model")

    monkeypatch.setattr(timm, "create_model", create)
    arguments = {"name": "vit_tiny_patch16_224", "image_size": 32, "pretrained": True, "checkpoint": "/etc/passwd"}
    with pytest.raises(SpecError, match=r"for stage1_tokenizer\.TimmTrunk"):
        build({"class_path": "stage1_tokenizer.TimmTrunk", "init_args": arguments})
    assert asked == [False]


def test_arguments_of_calls_that_are_of_another_kind_are_sentences() -> None:
    images, z = pictures(2), torch.zeros(2, K, C)
    assert torch.equal(TOKENIZER.encode(images.double()), TOKENIZER.encode(images.double().float()))
    bad: list[Any] = [images[:0], images[0, 0, 0, 0], "x", None]
    for value in bad:
        with pytest.raises(ValueError, match="got"):
            TOKENIZER.encode(value)
    bad = [z[:0], z[0], z.long(), "x"]
    for value in bad:
        for call in (TOKENIZER.decode, TOKENIZER.embed_latents, lambda v: PRIOR.log_prob(v, CAPTIONS[:2])):
            with pytest.raises(ValueError, match="got"):
                call(value)
    odd: Any = {"k": "2"}
    with pytest.raises(ValueError, match="got 2 latents"):
        TOKENIZER.encode(images, **odd)
    for odd in ({"temperature": "1"}, {"temperature": 1e308}, {"guidance": {}}, {"num_latents": 1.5}, {"negative": 7}):
        with pytest.raises(ValueError, match="got"):
            PRIOR.sample(CAPTIONS[:1], **odd)
    for captions in (7, [], [" "], None):
        odd = captions
        for ask in (PRIOR.sample, TOKENIZER.embed_text):
            if odd != [" "] or ask == PRIOR.sample:
                with pytest.raises(ValueError, match="got"):
                    ask(odd)


@pytest.mark.parametrize("what", ["object", "shape", "schedule", "missing"])
def test_a_checkpoint_of_other_content_is_a_sentence(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "--trainer.max_steps=2")
    content = checkpoint(tmp_path)
    if what == "object":
        content["state_dict"] = Program()
    elif what == "shape":
        state = content["optimizer_states"][0]["state"]
        state[next(iter(state))]["exp_avg"] = torch.zeros(77)
    elif what == "schedule":
        content["lr_schedulers"][0]["last_epoch"] = "x"
    else:
        del content["loops"]
    torch.save(content, tmp_path / "stage1" / "checkpoints" / "last.ckpt")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "--trainer.max_steps=3", "--resume=auto")
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and "does not fit this configuration" in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    ("overlay", "sentence"),
    [
        (b"data: {flip: 3}", "error: flip is 3.0, it is a probability from 0 to 1"),
        (b"model: {start: {freeze_encoder: true}}", "freeze_encoder without init_from"),
        (b"model: {optimizer: 5}", "this configuration cannot be built"),
        (b"data: {seed: \xff}", "is not UTF-8 text"),
    ],
)
def test_a_value_that_a_constructor_refuses_is_one_sentence(
    tmp_path: Path, overlay: bytes, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "o.yaml").write_bytes(overlay)
    words = ["fit", "--config=demo", f"--config={tmp_path / 'o.yaml'}", f"--run_dir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as stopped:
        run_cli("stage1", LitTokenizer, ImageDataModule, "stage1", words)
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and sentence in error and error.count("\n") == 1, error
