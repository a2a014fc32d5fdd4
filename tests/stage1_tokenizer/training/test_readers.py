"""Readers taught on latents: they learn to read, and nothing else of the tokenizer moves."""

from pathlib import Path

import pytest
import torch

from data.__main__ import main as data_main
from stage1_tokenizer.tokenizer import Tokenizer
from stage1_tokenizer.training.readers import main, teach_readers
from tests.tiny import CAPTIONS, C, K, tiny_tokenizer


def test_readers_learn_which_latents_go_with_which_caption() -> None:
    torch.manual_seed(0)
    text = tiny_tokenizer().text_part()
    mean = 2 * torch.randn(4, 1, K, C) + torch.tensor([0.0, 0.1])[None, :, None, None]  # (N,V,K,C)
    std = torch.full_like(mean, 0.1)
    given = [[caption, f"there is {caption}"] for caption in CAPTIONS]
    teach_readers(text, mean, std, given, steps=40, seed=0)
    assert not text.training
    with torch.no_grad():
        near = text.embed(mean[:, 1, :2]) @ text.embed_text(CAPTIONS).T
    assert near.argmax(1).tolist() == [0, 1, 2, 3]


def test_the_command_leaves_latents_and_pictures_as_they_were(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = ["--source", "scenes", "--num", "20", "--val-fraction", "0.3", "--workers", "1", "--size", "16"]
    assert not data_main(["prepare", *scenes, "--out", str(tmp_path / "data")])
    before = tiny_tokenizer()
    before.save_pretrained(tmp_path / "tokenizer")
    own = ["--tokenizer", str(tmp_path / "tokenizer"), "--data", str(tmp_path / "data"), "--steps", "2", "--mirror"]
    assert main([*own, "--out", str(tmp_path / "taught")]) == 0
    after = Tokenizer.from_pretrained(tmp_path / "taught")
    assert after.fingerprint == before.fingerprint and "loss" in capsys.readouterr().out
    changed = {n for n, t in after.state_dict().items() if not torch.equal(t, before.state_dict()[n])}
    assert changed and all(name.startswith("text.") for name in changed)
    assert {name.split(".")[1] for name in changed} >= {"tower", "reader"}

    tiny_tokenizer(text=False).save_pretrained(tmp_path / "mute")
    with pytest.raises(SystemExit) as stopped:
        main(["--tokenizer", str(tmp_path / "mute"), *own[2:]])
    assert stopped.value.code == 1 and "built without text supervision" in capsys.readouterr().err
