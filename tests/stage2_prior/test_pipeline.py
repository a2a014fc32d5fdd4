"""Captions to pictures in one call, with as many latents as the report found best."""

import json
from pathlib import Path

import pytest
import torch

from stage2_prior import Pipeline, Prior
from stage2_prior.evaluation.lengths import worthwhile
from stage2_prior.latent_space import PriorError
from stage2_prior.prior import CausalPrior
from tests.small_priors import CAPTIONS, awake, parts
from tests.tiny import tiny_tokenizer


def models() -> tuple[Prior, torch.nn.Module]:
    tokenizer = tiny_tokenizer().eval()
    k, c = tokenizer.num_latents, tokenizer.latent_dim
    prior = awake(CausalPrior(k, c, *parts(k, c)))
    prior.bind(k, c, tokenizer.fingerprint)
    return prior, tokenizer


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@torch.no_grad()
def test_it_is_sample_and_decode(tmp_path: Path) -> None:
    prior, tokenizer = models()
    prior.save_pretrained(tmp_path / "prior")
    tokenizer.save_pretrained(tmp_path / "tokenizer")  # type: ignore[operator]
    wanted = tokenizer.decode(prior.sample(CAPTIONS, generator=seeded(), steps=2))  # type: ignore[operator]
    for pipeline in (
        Pipeline.from_pretrained(tmp_path),
        Pipeline.from_pretrained(tmp_path / "prior", tmp_path / "tokenizer"),
    ):
        assert torch.equal(pipeline.generate(CAPTIONS, generator=seeded(), steps=2), wanted)


@torch.no_grad()
def test_the_best_length_travels_with_the_export_and_is_the_default(tmp_path: Path) -> None:
    prior, tokenizer = models()
    prior.best_length = 2
    loaded = Prior.from_pretrained(prior.save_pretrained(tmp_path))
    assert loaded.best_length == 2
    pipeline = Pipeline(loaded, tokenizer)  # type: ignore[arg-type]
    z = prior.sample(CAPTIONS, generator=seeded(), steps=2)
    drawn = {k: pipeline.generate(CAPTIONS, k, seeded(), steps=2) for k in (None, 2, prior.num_latents)}
    assert torch.equal(drawn[2], drawn[None]) and not torch.equal(drawn[prior.num_latents], drawn[None])
    assert torch.equal(drawn[prior.num_latents], tokenizer.decode(z))  # type: ignore[operator]
    assert loaded.sample(CAPTIONS, steps=2).shape[1] == prior.num_latents, "sample draws all, as ever"
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong in (0, prior.num_latents + 1, True, "2"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"best_length": wrong}))
        with pytest.raises(PriorError, match="best_length"):
            Prior.from_pretrained(tmp_path)


def test_stopping_early_has_to_be_worth_it() -> None:
    assert worthwhile({1: 50.0, 4: 30.0, 16: 40.0}) == 4
    assert worthwhile({1: 50.0, 4: 39.5, 16: 40.0}) is None, "a hundredth is chance"
    assert worthwhile({1: 50.0, 4: 40.0, 16: 30.0}) is None


def test_models_that_do_not_belong_together_are_refused() -> None:
    prior, _ = models()
    other = tiny_tokenizer()
    other.latent_mean += 1
    with pytest.raises(PriorError, match="encode with the tokenizer"):
        Pipeline(prior, other)
