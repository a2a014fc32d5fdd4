"""Exports of earlier versions load and compute what they did: files move, public names stay."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import stage1_tokenizer
import stage2_prior
from stage1_tokenizer import Tokenizer
from stage1_tokenizer.spec import find_class, public_path
from stage2_prior import Prior

OLD = Path(__file__).resolve().parents[1] / "exports_0_1"  # of 2026-11-26, before files moved to floors


def test_a_tokenizer_exported_before_the_move_computes_the_same() -> None:
    expected, tokenizer = load_file(OLD / "expected.safetensors"), Tokenizer.from_pretrained(OLD / "tokenizer")
    with torch.no_grad():
        z = tokenizer.encode(expected["images"])
        torch.testing.assert_close(z, expected["z"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tokenizer.decode(expected["z"][:, :2]), expected["x"], rtol=1e-4, atol=1e-4)


def test_a_prior_exported_before_the_move_draws_the_same() -> None:
    expected, prior = load_file(OLD / "expected.safetensors"), Prior.from_pretrained(OLD / "prior")
    prior.check(Tokenizer.from_pretrained(OLD / "tokenizer"))
    drawn = prior.sample(["a red circle"], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, expected["sample"], rtol=1e-3, atol=1e-3)


def test_a_new_export_records_public_names_and_keeps_the_identity(tmp_path: Path) -> None:
    old = Tokenizer.from_pretrained(OLD / "tokenizer")
    old.save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).fingerprint == old.fingerprint
    spec = json.loads((tmp_path / "config.json").read_text())["init_args"]
    assert spec["bottleneck"]["class_path"] == "stage1_tokenizer.KLBottleneck"
    assert "stage1_tokenizer.encoder" not in json.dumps(spec)


@pytest.mark.parametrize("package", [stage1_tokenizer, stage2_prior], ids=lambda p: p.__name__)
def test_every_public_name_can_be_imported_and_is_recorded_as_such(package: object) -> None:
    names = package.__all__  # type: ignore[attr-defined]
    assert len(names) == len(set(names)) > 20
    for name in names:
        cls = getattr(package, name)
        path = f"{cls.__module__.split('.')[0]}.{name}"
        assert public_path(cls) == path and find_class(path) is cls


def test_an_old_path_is_read_by_its_last_name_and_an_unknown_one_is_refused() -> None:
    assert find_class("stage1_tokenizer.discrete.FSQBottleneck") is stage1_tokenizer.FSQBottleneck
    with pytest.raises((ImportError, AttributeError)):
        find_class("stage1_tokenizer.discrete.Nothing")
