"""The judge of captions: it learns what features show, says how well, and refuses what it cannot judge."""

from pathlib import Path

import pytest
import torch

from data.__main__ import main as data_main
from stage1_tokenizer.evaluation.judge import FEATURES, CaptionJudge, fit_judge, load_judge, main
from stage1_tokenizer.export import save_module
from stage1_tokenizer.text.vocabulary import CaptionVocabulary
from stage1_tokenizer.text.words import WordTower

COLOURS = ("red", "green", "blue", "white", "black", "yellow", "brown", "grey")
THINGS = ("dog", "cat", "boat", "ball", "tree", "horse", "bird", "child")


def untrained() -> CaptionJudge:
    torch.manual_seed(0)
    return CaptionJudge(WordTower(CaptionVocabulary(64, 12), 32, 16, drop=0.1), drop=0.1)


@pytest.fixture(scope="module")
def pairs() -> tuple[torch.Tensor, list[list[str]]]:
    """Features that are the sum of a colour's and a thing's direction, far from zero; two captions each."""
    generator = torch.Generator().manual_seed(0)
    colour, thing = torch.randn(2, 8, FEATURES, generator=generator)
    features = (colour[:, None] + thing[None]).flatten(0, 1) + 5 + 0.1 * torch.randn(64, FEATURES, generator=generator)
    return features, [[f"a {c} {t}", f"one {t} that is {c}"] for c in COLOURS for t in THINGS]


def test_a_judge_tells_combinations_that_it_has_not_seen(pairs: tuple[torch.Tensor, list[list[str]]]) -> None:
    features, captions = pairs
    held = list(range(0, 64, 9))  # each colour and each thing once
    rows = [i for i in range(64) if i not in held]
    judge = untrained()
    fit_judge(judge, features[rows], [captions[i] for i in rows], steps=60, seed=0)
    asked = [captions[i][0] for i in held]
    sets = {"real": features[held], "grey": features.mean(0).expand(8, -1), "next": features[held].roll(1, 0)}
    verdicts = judge.verdicts(sets, asked)
    assert verdicts["n"] == 8 and verdicts["chance"] == pytest.approx(1 / 8)
    for found in (verdicts["caption_of_picture"], verdicts["picture_of_caption"]):
        assert found["real"] > 0.8 and found["grey"] <= 0.2 and found["next"] <= 0.2
    assert not judge.training


def test_words_are_dropped_in_training_only() -> None:
    tower = untrained().tower
    tower.vocabulary.fit(["a red dog with one brown ball"])
    ids = tower.vocabulary.encode(["a red dog with one brown ball"] * 2)[0]
    with torch.no_grad():
        assert not torch.equal(*tower.train()(ids)) and torch.equal(*tower.eval()(ids))
        moved = ids[:, [0, 3, 2, 1, *range(4, ids.shape[1])]]
        torch.testing.assert_close(tower(moved), tower(ids))  # the order of words is not read
        short = tower.vocabulary.encode(["dog", ""])[0]
        assert tower(short).isfinite().all() and (tower(short)[0] - tower(ids)[0]).norm() > 0.1
        assert tower.tokens(ids).shape == (2, ids.shape[1], 32)
    with pytest.raises(ValueError, match="got drop 1.0, wanted a share"):
        WordTower(CaptionVocabulary(64, 12), drop=1.0)


def test_an_export_is_the_same_judge(pairs: tuple[torch.Tensor, list[list[str]]], tmp_path: Path) -> None:
    features, captions = pairs
    judge = untrained()
    fit_judge(judge, features, captions, steps=1, seed=0)
    save_module(judge, tmp_path)
    loaded = load_judge(tmp_path)
    assert torch.equal(loaded(features), judge(features))
    assert loaded.ask(features, [c[0] for c in captions]) == judge.ask(features, [c[0] for c in captions])
    torch.testing.assert_close(loaded(features).norm(dim=1), torch.ones(64))


def test_the_command_says_what_the_judge_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes = ["--source", "scenes", "--num", "24", "--val-fraction", "0.4", "--workers", "1", "--size", "16"]
    assert not data_main(["prepare", *scenes, "--out", str(tmp_path / "data")])
    own = ["--data", str(tmp_path / "data"), "--image_size", "16", "--out", str(tmp_path / "judge")]
    assert main([*own, "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "R@1 among" in said and said.split("R@1")[1].split("\n")[0] in (tmp_path / "judge/README.md").read_text()
    assert load_judge(tmp_path / "judge").project.weight.shape == (256, FEATURES)
    with pytest.raises(SystemExit) as stopped:
        main([*own, "--weights", str(tmp_path / "nowhere")])
    assert stopped.value.code == 1 and "error: there is no file at" in capsys.readouterr().err
