"""Latents as a prior draws them: true up to a place, then its own from the true past; only the decoder sees them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.training.lit_tokenizer import LitTokenizer
from stage1_tokenizer.training.options import OptionError, StartOptions
from stage2_prior import CausalPrior, PriorDraws
from stage2_prior.heads.mse import MSEHead
from stage2_prior.latent_space import PriorError
from tests.small_priors import awake, parts
from tests.tiny import C, K, pictures, tiny_tokenizer


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A prior of the first K - 1 latents whose draws are its means, of the tiny tokenizer."""
    tokenizer = tiny_tokenizer()
    vocabulary, backbone, _ = parts(K - 1, C)
    prior = awake(CausalPrior(K - 1, C, vocabulary, backbone, MSEHead(C, 32)))
    prior.bind(K, C, tokenizer.fingerprint)
    prior.save_pretrained(tmp_path / "prior")
    return tmp_path / "prior"


def batch(n: int) -> dict[str, Any]:
    return {"captions": [["a red circle"]] * (n - 1) + [[]], "labels": torch.full((n,), -1)}


def drawn(exported: Path, z: Tensor, share: float = 1.0, seed: int = 0) -> Tensor:
    redraw = PriorDraws(str(exported), share)
    redraw.prepare(tiny_tokenizer())
    torch.manual_seed(seed)
    return redraw(z, batch(len(z)))


def test_true_up_to_a_place_and_the_priors_own_behind_it(exported: Path) -> None:
    z = torch.randn(64, K, C)
    got = drawn(exported, z)
    prior = CausalPrior.from_pretrained(exported)
    assert isinstance(prior, CausalPrior)
    own = torch.full((64,), -1)
    text = prior.encode_samples([said[0] if said else "" for said in batch(64)["captions"]], own)
    means = prior.head.sample(prior.conditions(z[:, : K - 1], text).flatten(0, 1)).view(64, K - 1, C)
    same = (got[:, : K - 1] == z[:, : K - 1]).all(-1)
    assert torch.allclose(torch.where(same[..., None], means, got[:, : K - 1]), means, atol=1e-5)
    kept = same.sum(1)
    assert (same == (torch.arange(K - 1) < kept[:, None])).all(), "a prefix"
    assert set(kept.tolist()) == set(range(K - 1)), "of every length but the whole"
    assert torch.equal(got[:, K - 1 :], z[:, K - 1 :]), "what this prior does not model stays"


def test_a_draw_sees_the_past_alone_and_a_share_of_the_pictures_is_left_alone(exported: Path) -> None:
    z = torch.randn(8, K, C)
    other = z.clone()
    other[:, 3] += 1.0
    a, b = drawn(exported, z, share=0.5), drawn(exported, other, share=0.5)
    assert torch.equal(a[:, :3], b[:, :3]) and not torch.equal(a[:4, 4], b[:4, 4])
    assert torch.equal(a[4:], z[4:]) and not torch.equal(a[:4], z[:4])


def test_only_the_decoder_reads_them(exported: Path) -> None:
    tokenizer, images = tiny_tokenizer().eval(), pictures()
    instead = torch.randn(len(images), K, C)
    _, picture = tokenizer.losses(images, redraw=lambda z: instead)
    assert torch.allclose(picture.clamp(-1, 1), tokenizer.decode(instead), atol=1e-5)
    seen: list[Tensor] = []
    tokenizer.losses(images, redraw=lambda z: seen.append(z) or z)  # type: ignore[func-returns-value]
    mean, std = tokenizer.posterior(images)
    assert ((seen[0] - mean).abs() < 6 * std).all(), "standardised, as a prior has them"


def test_what_does_not_fit_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(PriorError, match=r"within \(0, 1\]"):
        PriorDraws(str(exported), 0.0)
    with pytest.raises(PriorError, match="`prepare`"):
        PriorDraws(str(exported))(torch.randn(2, K, C), batch(2))
    with pytest.raises(PriorError, match="other weights"):
        PriorDraws(str(exported)).prepare(tiny_tokenizer(seed=1))
    with pytest.raises(OptionError, match="freeze_encoder"):
        LitTokenizer(tiny_tokenizer(), redraw=PriorDraws(str(exported)))
    LitTokenizer(tiny_tokenizer(), start=StartOptions("x", True), redraw=PriorDraws(str(exported)))
