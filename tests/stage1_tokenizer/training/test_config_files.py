"""Configs are found by name from any folder; a file of that name goes first; a misspelt name suggests the right one."""

from pathlib import Path

import pytest

from stage1_tokenizer.training.config_files import ConfigError, find_config, shipped, with_files


def test_a_name_is_that_of_the_stage_and_overlays_have_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known = shipped()
    assert find_config("demo", "stage1") == str(known["stage1/demo"])
    assert find_config("demo", "stage2") == str(known["stage2/demo"])
    assert find_config("configs/stage1/demo.yaml", "stage2") == str(known["stage1/demo"])
    assert (
        find_config("no_text", "stage1") == find_config("variants/no_text", "stage2") == str(known["variants/no_text"])
    )
    Path("demo").write_text("run_dir: here\n")
    assert find_config("demo", "stage1") == "demo", "a file of one's own goes first"


def test_only_the_values_of_config_are_looked_up() -> None:
    words = ["fit", "--config", "demo", "--config=variants/no_text", "--run_dir", "demo"]
    found = with_files(words, "stage1")
    assert found[0] == "fit" and found[-2:] == ["--run_dir", "demo"]
    assert found[2].endswith("stage1/demo.yaml") and found[3].endswith("variants/no_text.yaml")


def test_a_misspelt_name_suggests_the_right_one() -> None:
    with pytest.raises(ConfigError, match="did you mean .*demo"):
        find_config("dmeo", "stage1")
