"""Words and pictures in one line: who sees whom, what is asked for, what is drawn and read."""

import math

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.text.vocabulary import CaptionVocabulary
from stage1_tokenizer.training.optim import MuonAdamW, parameter_groups, warmup_flat_cosine
from stage2_prior import DDIM, DDPM, Prior
from stage2_prior.backbone import Backbone
from stage2_prior.guidance import Guidance
from stage2_prior.heads.ddpm import alpha_sigma_at
from stage2_prior.heads.solvers import Midpoint, Solver
from stage2_prior.prior import PriorError
from stage2_prior.request import Text
from stage2_prior.variants.joint import JointPrior, field_for, line_mask
from tests.small_priors import CAPTIONS, awake

K, C, D, L = 4, 3, 32, 12


def joint(pairs: int = 1, rows: int = 64, **options: float) -> JointPrior:
    torch.manual_seed(0)
    vocabulary = CaptionVocabulary(rows, L)
    vocabulary.fit(CAPTIONS)
    prior = awake(JointPrior(K, C, vocabulary, Backbone(D, 2, 2, pairs * (L + K)), pairs=pairs, **options))  # type: ignore[arg-type]
    assert isinstance(prior, JointPrior)
    return prior


def test_mask_is_as_drawn() -> None:
    """Two pairs of two words (the second of pair 1 padding) and one latent; pair 1 has its picture first."""
    text_mask = torch.tensor([[[True, True], [True, False]]])
    mask = line_mask(text_mask, 1, torch.tensor([[False, True]]))[0, 0].int()
    assert mask.tolist() == [
        # pair: a  a  b  pad cA cB nA nB   the line: words a, picture A, picture B, word b
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 1, 1, 0, 0],  # word b: behind both pictures
        [1, 1, 1, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],  # clean A
        [1, 1, 0, 0, 1, 1, 0, 0],  # clean B: not yet its caption
        [1, 1, 0, 0, 0, 0, 1, 0],  # noisy A: not the clean one
        [1, 1, 0, 0, 1, 0, 0, 1],
    ]
    of_three = line_mask(text_mask, 3, torch.tensor([[False, True]]))[0, 0]
    for at in (4, 7, 10, 13):  # the latents of a picture see each other, clean or noisy
        assert of_three[at : at + 3, at : at + 3].all()


def test_words_never_see_noise_and_a_pictures_noise_changes_no_other() -> None:
    """By derivatives of a line of three pairs, the second with its picture first."""
    prior, n = joint(3), 3
    first = torch.tensor([[False, True, False]])
    ids, mask = prior.vocabulary.encode(CAPTIONS)
    z, x_t = torch.randn(1, n, K, C, requires_grad=True), torch.randn(1, n, K, C, requires_grad=True)
    words, x = prior.run(Text(ids[None], mask[None]), z, x_t, torch.rand(1, n), first)
    place_w, place_p = [0, 3, 4], [1, 2, 5]  # of each caption and picture in the line
    for i in range(n):
        by_clean, by_noisy = torch.autograd.grad(words[0, i].sum(), (z, x_t), retain_graph=True, allow_unused=True)
        assert by_noisy is None or not by_noisy.any()
        seen = by_clean[0].abs().amax((1, 2)) > 0
        assert seen.tolist() == [place_p[j] < place_w[i] for j in range(n)]
        for latent in range(K):
            by_clean, by_noisy = torch.autograd.grad(x[0, i, latent].sum(), (z, x_t), retain_graph=True)
            assert (by_clean[0].abs().amax((1, 2)) > 0).tolist() == [place_p[j] < place_p[i] for j in range(n)]
            reached = by_noisy[0].abs().amax(-1) > 0  # (N,K)
            assert reached[i].all() and reached.sum() == K  # all of its own noisy picture


@pytest.mark.parametrize("solver", [Midpoint(2), DDIM(3), DDPM(3)])
@pytest.mark.parametrize("guidance", [1.0, 3.0, Guidance(3.0, low=0.2, high=0.6)], ids=["1", "3", "interval"])
def test_drawing_with_the_cache_equals_the_whole_line_at_once(solver: Solver, guidance: float | Guidance) -> None:
    prior = joint()
    asked: list[tuple[Tensor, float, Tensor]] = []

    class Recording(type(solver)):  # type: ignore[misc]
        def forward(self, field, x, generator=None, temperature=1.0):  # type: ignore[no-untyped-def]
            def spy(x: Tensor, t: float) -> Tensor:
                asked.append((x, t, field(x, t)))
                return asked[-1][2]

            return super().forward(spy, x, generator, temperature)

    z = prior.sample(CAPTIONS, guidance, solver=Recording(solver.steps), generator=torch.Generator().manual_seed(1))
    assert z.shape == (3, K, C) and len(asked) == solver.num_evaluations == prior.num_evaluations(solver=solver)
    text = prior.encode_text(CAPTIONS)
    free = prior.without_caption(text, torch.ones(3, dtype=torch.bool))
    first, schedule = (
        torch.zeros(3, 1, dtype=torch.bool),
        guidance if isinstance(guidance, Guidance) else Guidance(guidance),
    )
    for x, time, answer in asked:
        alpha, sigma = alpha_sigma_at(time) if solver.asks == "data" else (1 - time, time)
        t = sigma / (alpha + sigma)
        w = schedule.scale if schedule.interval[0] <= time <= schedule.interval[1] else 1.0
        with torch.no_grad():
            x_c, x_u = (
                prior.run(
                    Text(rows.ids[:, None], rows.text_mask[:, None]),
                    torch.randn(3, 1, K, C),
                    (x / (alpha + sigma))[:, None],
                    torch.full((3, 1), t),
                    first,
                )[1][:, 0]
                for rows in (text, free)
            )
        original = x_u + w * (x_c - x_u)
        wanted = original if solver.asks == "data" else (x - original) / max(time, 1e-3)
        torch.testing.assert_close(answer, wanted, rtol=1e-4, atol=1e-4)


def test_flow_solvers_and_diffusion_samplers_draw_the_same_law_from_one_network() -> None:
    """Exact expectations of Gaussian data on the linear path; without the scaling a diffusion's draw is far off."""
    mu, std = 0.5, 0.3
    e = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def original(x_t: Tensor, t: float, asked: float) -> Tensor:
        alpha, sigma = 1 - t, t
        return mu + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mu)

    for solver in (Midpoint(16), DDIM(150), DDPM(200)):
        z = solver(field_for(solver, original), e, torch.Generator().manual_seed(1))
        assert abs(z.mean() - mu) < 0.01 and abs(z.std() / std - 1) < 0.04, type(solver).__name__
    wrong = DDIM(200)(lambda x, t: original(x, t, t), e)
    assert abs(wrong.std() / std - 1) > 0.1 or abs(wrong.mean() - mu) > 0.05  # control


@pytest.mark.parametrize(("cap", "size"), [(1.0, 32), (5.0, 32), (5.0, 128)])
def test_a_pictures_loss_is_weighted_by_its_signal_and_shifted_by_its_size(cap: float, size: int) -> None:
    """A network that answers 0: the loss of latents that are all 2 is four times the mean weight."""
    prior = joint(cap=cap, image_size=size)
    torch.nn.init.zeros_(prior.out.weight)
    torch.nn.init.zeros_(prior.out.bias)
    z, text = torch.full((4000, K, C), 2.0), prior.encode_text(["a cross"] * 4000)
    with torch.no_grad():
        loss = prior.losses(z, text, torch.Generator().manual_seed(0))
    u = (torch.arange(100_000) + 0.5) / 100_000
    odds = (torch.special.ndtri(u.double()) + math.log(size / 32)).exp()  # t / (1 - t)
    wanted = 4 * (odds**-2).clamp(1, cap).mean().item()
    assert loss.mean().item() == pytest.approx(wanted, rel=0.03)
    assert prior.objective(z[:6], Text(*(p[:6] for p in text)))["latents"] > 0


def test_a_share_of_the_pairs_has_its_picture_first_and_lines_hold_several(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = joint(2, picture_first=0.3)
    seen: list[tuple[Tensor, Text, Tensor]] = []
    original = prior.line_losses

    def spy(text: Text, z: Tensor, first: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        seen.append((z, text, first))
        return original(text, z, first, generator)

    monkeypatch.setattr(prior, "line_losses", spy)
    z, text = torch.randn(7, K, C), prior.encode_text((CAPTIONS * 3)[:7])
    parts = prior.objective(z, text)
    assert set(parts) == {"latents", "caption"} and all(p.isfinite() for p in parts.values())
    lines, ids, _ = seen[0]
    assert torch.equal(lines.flatten(0, 1), z[:6]) and torch.equal(ids.ids.flatten(0, 1), text.ids[:6])
    with torch.no_grad():
        for _ in range(200):
            prior.objective(z, text)
        share = torch.cat([first for _, _, first in seen]).float().mean()
    assert abs(share - 0.3) < 0.06


def test_captions_are_read_greedily_and_without_a_caption_nothing_is_asked() -> None:
    prior, z = joint(rows=12), torch.randn(3, K, C)
    text = prior.encode_text(CAPTIONS)
    dropped = prior.without_caption(text, torch.tensor([False, True, False]))
    whole, some = prior.figures(z, text)["caption"], prior.figures(z, dropped)["caption"]
    assert some[1] == 0 < whole[1] and torch.equal(some[[0, 2]], whole[[0, 2]])
    read, first = prior.caption(z), torch.ones(3, 1, dtype=torch.bool)
    ids = torch.full((3, 1), int(text.ids[0, 0]))
    for _ in range(L - 1):  # the same words one by one, the whole line at once
        with torch.no_grad():
            lines = Text(ids[:, None], torch.ones_like(ids, dtype=torch.bool)[:, None])
            words, _ = prior.run(lines, z[:, None], torch.randn(3, 1, K, C), torch.rand(3, 1), first)
        ids = torch.cat([ids, prior.next_word(words[:, 0, -1]).argmax(-1, keepdim=True)], dim=1)
    assert read == prior.vocabulary.decode(ids) and len(set(read)) > 1


def test_contract_and_files(tmp_path) -> None:  # type: ignore[no-untyped-def]
    prior = joint()
    z = prior.sample(CAPTIONS, generator=torch.Generator().manual_seed(1))
    assert z.dtype == torch.float32 and prior.losses(z, prior.encode_text(CAPTIONS)).shape == (3, K)
    prior.save_pretrained(tmp_path)
    again = Prior.from_pretrained(tmp_path).sample(CAPTIONS, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again, z)
    for options in ({"prefix": z[:, :1]}, {"num_latents": 2}):
        with pytest.raises(PriorError, match="draws whole pictures"):
            prior.sample(CAPTIONS, **options)
    with pytest.raises(PriorError, match="no density"):
        prior.log_prob(z, CAPTIONS)


def test_lines_that_do_not_fit_are_refused() -> None:
    vocabulary = CaptionVocabulary(64, L)
    with pytest.raises(
        PriorError, match=r"pairs=2, each with a caption of 12 tokens and a picture of 4.*max_tokens=16"
    ):
        JointPrior(K, C, vocabulary, Backbone(D, 1, 2, 16), pairs=2)
    for options in ({"picture_first": 1.5}, {"cap": 0.5}, {"caption_weight": -1.0}, {"image_size": 0}):
        with pytest.raises(PriorError, match=next(iter(options))):
            JointPrior(K, C, vocabulary, Backbone(D, 1, 2, 16), **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_one_set_of_weights_draws_and_reads() -> None:
    """Every caption has its code, a picture."""
    prior = joint(caption_weight=1.0, picture_first=0.5).train()
    codes = torch.randn(3, K, C, generator=torch.Generator().manual_seed(5))
    optimizer, g = MuonAdamW(parameter_groups(prior), lr=3e-3, matrix_lr=0.02), torch.Generator().manual_seed(0)
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = (0.02 if group["group"] == "matrix" else 3e-3) * warmup_flat_cosine(step, 150)
        at = torch.randint(3, (32,), generator=g)
        z = codes[at] + 0.05 * torch.randn(32, K, C, generator=g)
        loss = sum(prior.objective(z, prior.encode_text([CAPTIONS[i] for i in at]), g).values(), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prior.eval()
    assert prior.caption(codes) == CAPTIONS
    for solver in (Midpoint(8), DDIM(16)):
        z = prior.sample(CAPTIONS * 8, 1.0, solver=solver, generator=torch.Generator().manual_seed(1))
        near = torch.cdist(z.flatten(1), codes.flatten(1))
        assert (near.argmin(1) == torch.arange(24) % 3).all() and near.amin(1).median() < 1.0
