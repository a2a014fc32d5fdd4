"""Sizes once: they reach the parts when a config is parsed, and a part that contradicts is one sentence."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.same_numbers import ROOT, build

DECODER = "--model.tokenizer.init_args.decoder.init_args"


def test_one_number_reaches_every_part() -> None:
    tokenizer = build("stage1", ["stage1/demo"], ["--sizes.num_latents=20", "--sizes.latent_dim=3"]).tokenizer
    parts: list[Any] = [tokenizer, tokenizer.encoder, tokenizer.bottleneck, tokenizer.decoder, tokenizer.lengths]
    assert [part.num_latents for part in parts] == [20] * 5
    assert tokenizer.text.reader.num_latents == 20 and tokenizer.latent_dim == 3
    prior = build("stage2", ["stage2/demo"], ["--sizes.latent_dim=3", "--sizes.width=64"]).prior
    assert (prior.latent_dim, prior.head.net.spec["init_args"]["cond_dim"], prior.backbone.width) == (3, 64, 64)


def test_a_part_without_the_argument_is_left_alone() -> None:
    assert build("stage1", ["stage1/demo", "variants/fsq"], []).tokenizer.bottleneck.latent_dim == 16


def test_a_contradiction_is_one_sentence_with_both_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build("stage1", ["stage1/demo"], [f"{DECODER}.num_latents=24"])
    first, *rest = capsys.readouterr().err.strip().splitlines()
    assert "sizes.num_latents is 16, but model.tokenizer.decoder.num_latents is 24" in first
    assert len(rest) == 1 and "Namespace" not in first


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs").glob("stage[12]/*.yaml")), ids=lambda f: f"{f.parent.name}-{f.stem}"
)
def test_a_shipped_config_names_a_size_once(file: Path) -> None:
    def named(node: Any, name: str) -> list[Any]:
        if isinstance(node, dict):
            return [v for k, v in node.items() if k == name] + [x for v in node.values() for x in named(v, name)]
        return [x for v in node for x in named(v, name)] if isinstance(node, list) else []

    content = yaml.safe_load(file.read_text())
    for size in ("image_size", "num_latents", "latent_dim"):
        assert len(named(content, size)) == (size in content["sizes"]), f"{size} in {file.name}"
