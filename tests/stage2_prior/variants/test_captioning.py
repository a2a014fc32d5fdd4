"""A prior that also reads captions out, and a solver distilled for it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.reading.latents import LatentShardWriter, write_latent_manifest
from stage1_tokenizer.text.vocabulary import CaptionVocabulary
from stage1_tokenizer.training.optim import MuonAdamW, parameter_groups, warmup_flat_cosine
from stage2_prior import Prior
from stage2_prior.backbone import Backbone
from stage2_prior.evaluation.captioning_report import captioning_report
from stage2_prior.heads.amed import AMED, fit_amed
from stage2_prior.heads.base import HeadError
from stage2_prior.heads.flow import FlowHead
from stage2_prior.heads.nets import HoistedNet
from stage2_prior.heads.solvers import Midpoint
from stage2_prior.orders import LearnedOrder, RandomOrder
from stage2_prior.prior import CausalPrior, PriorError
from stage2_prior.training.distil import main as distil_main
from stage2_prior.variants.captioning import CaptioningPrior
from tests.warm import command

K, C, D = 4, 2, 32
CAPTIONS = ["a red circle", "a large blue square", "a cross above a small green star", "a yellow star"]


def captioning_prior(
    caption_weight: float = 1.0, latent_weight: float = 1.0, order: LearnedOrder | None = None
) -> CaptioningPrior:
    torch.manual_seed(0)
    vocabulary = CaptionVocabulary(rows=32, context_length=12)
    vocabulary.fit(CAPTIONS)
    head = FlowHead(HoistedNet(C, D, 32, 2), rows_per_time=K)
    return CaptioningPrior(
        K,
        C,
        vocabulary,
        Backbone(D, 2, 2, max_tokens=40),
        head,
        order=order,
        caption_weight=caption_weight,
        caption_share=1.0,
        latent_weight=latent_weight,
    )


def codes() -> Tensor:
    """The line that stands for each caption, (4,K,C)."""
    return torch.randn(len(CAPTIONS), K, C, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def taught() -> CaptioningPrior:
    """A few seconds on lines that are their caption's code plus noise."""
    prior = captioning_prior().train()
    text = prior.encode_text(CAPTIONS * 16)
    optimizer = MuonAdamW(parameter_groups(prior), lr=3e-3, matrix_lr=0.02)
    for step in range(220):
        for group in optimizer.param_groups:
            group["lr"] = (0.02 if group["group"] == "matrix" else 3e-3) * warmup_flat_cosine(step, 220)
        z = codes().repeat(16, 1, 1) + 0.2 * torch.randn(64, K, C)
        loss = torch.stack(list(prior.objective(z, text).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prior.eval()
    return prior


@pytest.mark.slow
def test_a_taught_prior_reads_lines_out(taught: CaptioningPrior) -> None:
    z = codes() + 0.2 * torch.randn(4, K, C, generator=torch.Generator().manual_seed(1))
    assert taught.caption(z) == CAPTIONS
    assert taught.caption(z.flip(0)) == CAPTIONS[::-1]
    right = taught.caption_losses(z, taught.encode_text(CAPTIONS))
    wrong = taught.caption_losses(z.roll(1, 0), taught.encode_text(CAPTIONS))
    assert right.max() < 0.3 and wrong.min() > 0.6 and wrong.mean() > 1.0  # control
    found = captioning_report(taught, z, [["red", caption] for caption in CAPTIONS], batch_size=3)
    assert (found["lines"], found["right"], found["right_of_the_next_line"]) == (4, 1.0, 0.0)
    assert found["nats_per_token"] == pytest.approx(right.mean().item(), abs=0.05) and found["examples"] == CAPTIONS
    plain = CausalPrior(K, C, taught.vocabulary, Backbone(D, 1, 2, max_tokens=40), FlowHead(HoistedNet(C, D)))
    half = captioning_report(taught, z, [[CAPTIONS[0]], [CAPTIONS[1]], [CAPTIONS[0]], []])
    assert half["right"] == 0.5 and captioning_report(plain, z, [[]] * 4) == {}


@pytest.mark.slow
def test_a_taught_prior_draws_what_captions_say_and_classifies_by_likelihood(taught: CaptioningPrior) -> None:
    z = taught.sample(CAPTIONS * 25, 1.0, generator=torch.Generator().manual_seed(1))
    nearest = torch.cdist(z.flatten(1), codes().flatten(1)).argmin(1)
    assert (nearest == torch.arange(4).repeat(25)).float().mean() > 0.95
    real = codes() + 0.2 * torch.randn(4, K, C, generator=torch.Generator().manual_seed(2))
    found = torch.stack([taught.log_prob(real, [caption] * 4, 16).sum(1) for caption in CAPTIONS], 1)
    assert found.shape == (4, 4) and found.argmax(1).tolist() == [0, 1, 2, 3]
    exact = -K * C * (0.5 + torch.log(torch.tensor(0.2)) + 0.919)  # nats of a Gaussian of spread 0.2
    assert abs(found.diagonal().mean() - exact) < 6  # a few seconds of training: near, not there


def test_latents_do_not_see_the_caption_after_them_and_words_do_not_see_later_words() -> None:
    prior = captioning_prior().eval()
    for parameter in prior.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    z, text = codes(), prior.encode_text(CAPTIONS)
    x, positions, mask = prior.sequence(z, text.ids)
    before = prior.backbone(x, positions, mask)
    ids = text.ids.clone()
    ids[:, 3] = 3  # a word that no caption has
    after = prior.backbone(*prior.sequence(z, ids))
    at = 2 + K + 3  # null, start, line, then the words
    torch.testing.assert_close(after[:, :at], before[:, :at], rtol=0, atol=1e-5)
    assert (after[:, at:] - before[:, at:]).abs().amax(-1).min() > 1e-4


def test_a_prior_of_random_order_is_told_which_latent_it_reads() -> None:
    """Its mask and positions say when a latent came, not which it is."""
    prior = captioning_prior(order=RandomOrder()).eval()
    for parameter in prior.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    z = codes()
    swapped = z[:, [1, 0, 2, 3]]

    def tokens(line: Tensor) -> Tensor:
        ids = prior.encode_text(CAPTIONS).ids
        x, _, _ = prior.sequence(line, ids, torch.Generator().manual_seed(1))
        return x[:, 2 : 2 + K].sum(1)

    assert (tokens(z) - tokens(swapped)).abs().amax() < 1e-4  # the sum alone does not tell: control
    one, other = (
        prior.sequence(x, torch.ones(4, 1, dtype=torch.long), torch.Generator().manual_seed(1))[0] for x in (z, swapped)
    )
    distance = torch.cdist(one[:, 2 : 2 + K], other[:, 2 : 2 + K]).amin(-1)  # to the nearest token of the swapped line
    assert ((distance > 1e-3).sum(1) == 2).all()


def test_a_line_without_a_caption_has_no_caption_loss() -> None:
    prior = captioning_prior().eval()
    torch.nn.init.normal_(prior.next_word.weight, std=0.2)
    text = prior.encode_text(CAPTIONS)
    dropped = prior.without_caption(text, torch.tensor([False, True, False, False]))
    whole, found = prior.caption_losses(codes(), text), prior.caption_losses(codes(), dropped)
    assert found[1] == 0 < whole[1]
    assert torch.equal(found[[0, 2, 3]], whole[[0, 2, 3]])


def test_captioning_options_are_checked() -> None:
    vocabulary = CaptionVocabulary(rows=32, context_length=12)
    with pytest.raises(PriorError, match="at both ends"):
        CaptioningPrior(K, C, vocabulary, Backbone(D, 1, 2, max_tokens=20), FlowHead(HoistedNet(C, D)))
    with pytest.raises(PriorError, match="caption_share"):
        CaptioningPrior(
            K, C, vocabulary, Backbone(D, 1, 2, max_tokens=40), FlowHead(HoistedNet(C, D)), caption_share=0.0
        )
    with pytest.raises(PriorError, match="not both 0"):
        captioning_prior(caption_weight=0.0, latent_weight=0.0)


def test_a_prior_that_only_reads_gives_its_head_no_gradient() -> None:
    prior = captioning_prior(latent_weight=0.0).train()
    parts = prior.objective(codes(), prior.encode_text(CAPTIONS))
    assert list(parts) == ["caption"]
    parts["caption"].backward()
    assert all(p.grad is None for p in prior.head.parameters()) and prior.latent_in.weight.grad is not None
    found = []
    for prior in (captioning_prior(), captioning_prior(latent_weight=0.5)):
        torch.manual_seed(1)
        found.append(prior.train().objective(codes(), prior.encode_text(CAPTIONS))["latents"])
    torch.testing.assert_close(found[0], 2 * found[1])


# -- AMED -------------------------------------------------------------------------------------------------------------


def ends(
    head: FlowHead, cond: Tensor, solver: Midpoint | AMED, uncond: Tensor | None = None, guidance: float = 1.0
) -> Tensor:
    head.solver = solver
    return head.sample(cond, uncond, guidance, generator=torch.Generator().manual_seed(3))


@pytest.mark.slow
def test_a_distilled_solver_ends_nearer_to_many_steps_than_midpoint(taught: CaptioningPrior, tmp_path: Path) -> None:
    """On held-out noise, at the same cost; through the command, from an exported prior and latents."""
    taught.bind(K, C, "0123456789abcdef")
    taught.save_pretrained(tmp_path / "prior")
    with LatentShardWriter(tmp_path / "latents", "val") as writer:
        for i in range(40):
            writer.write(f"{i:02d}", codes()[i % 4] + 0.2 * torch.randn(K, C), torch.zeros(K, C), [CAPTIONS[i % 4]], {})
    write_latent_manifest(tmp_path / "latents", K, C, "fedcba9876543210")
    with pytest.raises(PriorError, match="other weights or statistics"):
        distil_main(["--run_dir", str(tmp_path)])
    write_latent_manifest(tmp_path / "latents", K, C, "0123456789abcdef")
    options = ["--run_dir", str(tmp_path), "--steps", "4", "--guidances", "1", "2"]
    done = command("stage2_prior.training.distil", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = Prior.from_pretrained(tmp_path / "prior_amed")
    assert isinstance(loaded, CaptioningPrior) and isinstance(loaded.head, FlowHead)
    amed = loaded.head.solver
    assert isinstance(amed, AMED) and amed.num_evaluations == loaded.num_evaluations() == 4
    assert loaded.sample(CAPTIONS).shape == (4, K, C)
    text = loaded.encode_text(CAPTIONS)
    nobody = loaded.without_caption(text, torch.ones(len(CAPTIONS), dtype=torch.bool))
    with torch.no_grad():
        cond, uncond = (loaded.conditions(codes(), said).flatten(0, 1).repeat(40, 1) for said in (text, nobody))
        for guidance in (1.0, 2.0):
            exact = ends(loaded.head, cond, Midpoint(steps=64), uncond, guidance)
            ours, midpoint = (ends(loaded.head, cond, s, uncond, guidance) for s in (amed, Midpoint(steps=2)))
            assert (ours - exact).square().mean() < 0.6 * (midpoint - exact).square().mean()
    with pytest.raises(HeadError, match="without unconditional rows"):
        fit_amed(loaded.head, cond, guidances=[2.0], steps=1, iterations=1, rows=16)
    with pytest.raises(HeadError, match="was distilled for"):
        loaded.sample(CAPTIONS, steps=8) if loaded.head.solver is amed else amed.with_evaluations(8)


def test_an_untaught_amed_is_midpoint() -> None:
    torch.manual_seed(0)
    head = FlowHead(HoistedNet(C, D))
    for parameter in head.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    cond = torch.randn(5, D)
    torch.testing.assert_close(ends(head, cond, AMED(steps=3)), ends(head, cond, Midpoint(steps=3)))
    assert isinstance(fit_amed(head, cond, steps=1, iterations=2, rows=16, batch=8), AMED)
