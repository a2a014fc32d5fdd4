"""A finished prior as the encoder's teacher: what it says, whom it moves, what it refuses; and the prior going on."""

from pathlib import Path

import pytest
import torch

from stage1_tokenizer import Tokenizer
from stage1_tokenizer.text.vocabulary import CaptionVocabulary
from stage1_tokenizer.variants.quantised import FSQBottleneck
from stage2_prior import CausalPrior, FrozenPrior, Prior
from stage2_prior.backbone import Backbone
from stage2_prior.heads.flow import FlowHead
from stage2_prior.heads.nets import HoistedNet
from stage2_prior.latent_space import PriorError
from tests.tiny import CAPTIONS, WIDTH, C, K, awaken, pictures, tiny_tokenizer


def tiny_prior(n: int = K, width: int = 24, captions: list[str] = CAPTIONS) -> CausalPrior:
    torch.manual_seed(0)
    vocabulary = CaptionVocabulary(rows=64, context_length=12)
    vocabulary.fit(captions)
    head = FlowHead(HoistedNet(C, width, 24, 1))
    return CausalPrior(n, C, vocabulary, Backbone(width, 1, 2, max_tokens=32), head, caption_dropout=0.5)


def moved_tokenizer() -> Tokenizer:
    """With statistics that are not those of a unit normal."""
    tokenizer = tiny_tokenizer()
    tokenizer.latent_mean.normal_()
    tokenizer.latent_scale.uniform_(0.5, 2.0)
    return tokenizer


def exported(folder: Path, tokenizer: Tokenizer, prior: CausalPrior) -> tuple[str, str]:
    prior.bind(K, C, tokenizer.fingerprint)
    prior.save_pretrained(folder / "prior")
    tokenizer.save_pretrained(folder / "tokenizer")
    return str(folder / "prior"), str(folder / "tokenizer")


@pytest.mark.parametrize("n", [K, K - 2])
def test_it_says_what_the_prior_says_of_a_line_in_the_units_of_its_tokenizer(n: int, tmp_path: Path) -> None:
    tokenizer, prior = moved_tokenizer(), tiny_prior(n)
    awaken(prior)
    teacher = FrozenPrior(K, C, *exported(tmp_path, tokenizer, prior), weight=0.5)
    line = torch.randn(5, K, C)
    raw = line * tokenizer.latent_scale + tokenizer.latent_mean
    torch.manual_seed(3)
    parts = teacher.losses(raw, torch.mean)
    torch.manual_seed(3)
    wanted = prior.eval().losses(line[:, :n], prior.nothing(5)).mean()
    torch.testing.assert_close(parts["prior_loss"], wanted.detach())
    torch.testing.assert_close(parts["predictor"], 0.5 * wanted)
    torch.manual_seed(3)  # control: the same latents without the statistics are another line
    assert abs(prior.losses(raw[:, :n], prior.nothing(5)).mean() - wanted) > 0.01


def test_it_moves_the_encoder_and_nothing_else_and_leaves_no_trace(tmp_path: Path) -> None:
    tokenizer, prior = moved_tokenizer(), tiny_prior()
    awaken(prior)
    teacher = FrozenPrior(K, C, *exported(tmp_path, tokenizer, prior), weight=0.01)
    teacher.prepare()
    tokenizer.predictor = teacher
    tokenizer.train()
    assert not list(teacher.parameters()) and not teacher.state_dict()
    parts, _ = tokenizer.losses(pictures())
    parts["predictor"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.encoder.parameters())
    assert all(p.grad is None for p in tokenizer.decoder.parameters())
    frozen = [p for part in teacher._teacher for p in part.parameters()]
    assert frozen and all(p.grad is None and not p.requires_grad for p in frozen)
    assert not any(part.training for part in teacher._teacher), "no caption is dropped, no context made noisy"
    tokenizer.predictor = None
    assert tokenizer.spec == tiny_tokenizer().spec


def test_an_encoder_that_listens_makes_lines_that_its_prior_finds_likelier(tmp_path: Path) -> None:
    """The control hears of pixels alone, as long."""
    tokenizer, prior = tiny_tokenizer(text=False), tiny_prior()
    images = pictures(32)
    with torch.no_grad():
        tokenizer.fit_statistics([images])
        lines = tokenizer.encode(images)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=5e-3)
    for _ in range(40):
        optimizer.zero_grad()
        prior.losses(lines, prior.nothing(32)).mean().backward()
        optimizer.step()
    folders = exported(tmp_path, tokenizer, prior)
    left = {}
    for name, weight in (("listens", 1.0), ("control", 1e-9)):
        learner = Tokenizer.from_pretrained(folders[1]).train()
        learner.predictor = FrozenPrior(K, C, *folders, weight=weight)
        optimizer = torch.optim.AdamW(learner.encoder.parameters(), lr=1e-3)
        torch.manual_seed(0)
        for _ in range(30):
            parts, _ = learner.losses(images)
            optimizer.zero_grad()
            learner.total(parts).backward()
            optimizer.step()
        torch.manual_seed(1)
        left[name] = torch.stack([learner.losses(images)[0]["prior_loss"] for _ in range(8)]).mean().item()
    assert left["listens"] < 0.95 * left["control"]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    tokenizer, prior = moved_tokenizer(), tiny_prior()
    folders = exported(tmp_path, tokenizer, prior)
    with pytest.raises(ValueError, match="weight 0"):
        FrozenPrior(K, C, weight=0.0)
    with pytest.raises(PriorError, match=f"a line of 9 x {C}"):
        FrozenPrior(9, C, *folders).prepare()
    other = tiny_tokenizer(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(PriorError, match="other weights"):
        FrozenPrior(K, C, folders[0], str(other)).prepare()
    plain = tiny_tokenizer(text=False)
    symbols = Tokenizer(
        plain.image_size, plain.encoder, FSQBottleneck(WIDTH, K, (5,) * C), plain.decoder, plain.lengths
    ).eval()
    with pytest.raises(PriorError, match="no tokenizer of continuous latents"):
        FrozenPrior(K, C, *exported(tmp_path / "symbols", symbols, tiny_prior())).prepare()


def test_a_prior_goes_on_over_the_latents_of_another_tokenizer(tmp_path: Path) -> None:
    old, new = tiny_prior(), tiny_prior()
    awaken(old)
    old.bind(K, C, "a" * 16)
    new.bind(K, C, "b" * 16)
    old.save_pretrained(tmp_path)
    new.start_from(Prior.from_pretrained(tmp_path))
    assert new.fingerprint == "b" * 16
    assert all(torch.equal(p, dict(old.named_parameters())[n]) for n, p in new.named_parameters())
    line = torch.randn(3, K, C)
    torch.testing.assert_close(new.conditions(line, new.nothing(3)), old.conditions(line, old.nothing(3)))
    with pytest.raises(PriorError, match="same classes and sizes"):
        tiny_prior(width=32).start_from(old)
    with pytest.raises(PriorError, match="row_of differs"):
        tiny_prior(captions=["other words entirely"]).start_from(old)
