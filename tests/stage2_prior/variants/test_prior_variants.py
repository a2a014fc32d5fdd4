"""The priors beside the causal one: who sees whom, what they sample, what they keep of the contract."""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.flow import logit_normal_times
from stage1_tokenizer.training.optim import MuonAdamW, parameter_groups, warmup_flat_cosine
from stage2_prior import Prior
from stage2_prior.backbone import Backbone
from stage2_prior.guidance import Guidance, RisingGuidance
from stage2_prior.heads.flow import CleanOutput, FlowHead, NextLevelOutput, Output, VelocityOutput
from stage2_prior.heads.nets import HoistedNet
from stage2_prior.heads.solvers import Midpoint
from stage2_prior.orders import (
    gather_line,
    noise_extended_blocks,
    noise_extended_mask,
)
from stage2_prior.prior import PriorError
from stage2_prior.variants.masked import MaskedPrior
from stage2_prior.variants.noise_extended import NoiseExtendedPrior
from tests.small_priors import CAPTIONS, C, D, K, awake, parts


def noise_extended(output: Output | None = None) -> NoiseExtendedPrior:
    vocabulary, backbone, _ = parts()
    prior = awake(NoiseExtendedPrior(K, C, vocabulary, backbone, output=output))
    assert isinstance(prior, NoiseExtendedPrior)
    return prior


# -- noise-extended ---------------------------------------------------------------------------------------------------


def test_noise_extended_mask_is_as_drawn() -> None:
    mask = noise_extended_mask(torch.tensor([[True, False]]), num_latents=2, copies=2)[0, 0].int()
    assert mask.tolist() == [
        # w  pad z1 z2 a1 a2 b1 b2
        [1, 0, 0, 0, 0, 0, 0, 0],  # a word
        [1, 0, 0, 0, 0, 0, 0, 0],  # padding asks, nobody asks it
        [1, 0, 1, 0, 0, 0, 0, 0],  # clean 1
        [1, 0, 1, 1, 0, 0, 0, 0],  # clean 2
        [1, 0, 0, 0, 1, 0, 0, 0],  # first copy of 1: not the clean 1
        [1, 0, 1, 0, 0, 1, 0, 0],  # first copy of 2
        [1, 0, 0, 0, 0, 0, 1, 0],
        [1, 0, 1, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize(("num_latents", "copies", "words"), [(6, 2, [3, 1]), (70, 3, [5, 2])])
def test_the_blocks_of_flex_attention_hold_the_pairs_of_the_dense_mask(
    num_latents: int, copies: int, words: list[int]
) -> None:
    text_mask = torch.arange(max(words)) < torch.tensor(words)[:, None]
    dense = noise_extended_mask(text_mask, num_latents, copies)
    blocks = noise_extended_blocks(text_mask, num_latents, copies)
    at = torch.arange(dense.shape[-1])
    for b in range(len(words)):
        assert torch.equal(blocks.mask_mod(torch.tensor(b), torch.tensor(0), at[:, None], at), dense[b, 0])
    side = blocks.BLOCK_SIZE[0]
    padded = torch.nn.functional.pad(dense, (0, -len(at) % side, 0, -len(at) % side))
    seen = padded.unflatten(-1, (-1, side)).unflatten(-3, (-1, side)).any(-1).any(-2)  # (B,1,block,block)
    assert torch.equal(blocks.to_dense().bool(), seen)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_the_velocities_of_the_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its unfused CPU form; what CUDA compiles is the same function of the same mask."""
    prior = noise_extended()
    z, x_t, t = torch.randn(3, K, C), torch.randn(3, 2, K, C), torch.rand(3, 2, K)
    with torch.no_grad():
        text = prior.encode_text(CAPTIONS)
        dense = prior.velocities(z, x_t, t, text)
        monkeypatch.setattr("stage2_prior.variants.noise_extended.noise_extended_mask", noise_extended_blocks)
        torch.testing.assert_close(prior.velocities(z, x_t, t, text), dense, rtol=0, atol=1e-5)
        silent = prior.without_caption(text, torch.ones(3, dtype=torch.bool))
        assert (prior.velocities(z, x_t, t, silent) - dense).abs().max() > 1e-3  # control


def test_a_copy_sees_earlier_clean_latents_and_itself_and_nothing_else() -> None:
    """By derivatives: which inputs move which velocities."""
    prior = noise_extended()
    z, x_t = torch.randn(1, K, C, requires_grad=True), torch.randn(1, 2, K, C, requires_grad=True)
    t, text = torch.rand(1, 2, K), prior.encode_text(CAPTIONS[:1])
    v = prior.velocities(z, x_t, t, text)
    for copy in range(2):
        for i in range(K):
            by_clean, by_copy = torch.autograd.grad(v[0, copy, i].sum(), (z, x_t), retain_graph=True)
            reached = by_clean[0].abs().amax(-1) > 0  # (K,)
            assert reached.tolist() == [j < i for j in range(K)]
            own = torch.zeros(2, K, dtype=torch.bool)
            own[copy, i] = True
            assert torch.equal(by_copy[0].abs().amax(-1) > 0, own)


@pytest.mark.parametrize(
    ("guidance", "output"),
    [
        (1.0, None),
        (3.0, None),
        (RisingGuidance(3.0), None),
        (Guidance(3.0, low=0.2, high=0.6), None),
        (3.0, CleanOutput()),
        (3.0, NextLevelOutput(4)),
    ],
    ids=["1", "3", "rising", "interval", "clean", "next level"],
)
def test_noise_extended_sampling_with_the_cache_equals_the_parallel_forward(
    guidance: float | Guidance, output: Output | None
) -> None:
    """The velocities that the solver was given, against those of the finished line at once.

    The unconditional ones are of the same line: twins share every sampled latent.
    """
    prior = noise_extended(output)
    asked: list[tuple[Tensor, float, Tensor]] = []

    class Recording(Midpoint):
        def forward(self, field, x, generator=None, temperature=1.0):  # type: ignore[no-untyped-def]
            def spy(x: Tensor, t: float) -> Tensor:
                v = field(x, t)
                asked.append((x, t, v))
                return v

            return super().forward(spy, x, generator, temperature)

    prior.solver = Recording(steps=2)
    z = prior.sample(CAPTIONS, guidance, generator=torch.Generator().manual_seed(1))
    calls = prior.solver.num_evaluations
    x_t = torch.stack([x for x, _, _ in asked], 1).unflatten(1, (K, calls)).transpose(1, 2)  # (B,S,K,C)
    t = torch.tensor([t for _, t, _ in asked]).view(K, calls).T.expand(3, -1, -1)  # (B,S,K)
    text = prior.encode_text(CAPTIONS)
    with torch.no_grad():
        v_c = prior.velocities(z, x_t, t, text)
        v_u = prior.velocities(z, x_t, t, prior.without_caption(text, torch.ones(3, dtype=torch.bool)))
    schedule = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    low, high = schedule.interval
    w = torch.where((t >= low) & (t <= high), torch.tensor(schedule.scales(K)), 1.0)[..., None]
    found = torch.stack([v for _, _, v in asked], 1).unflatten(1, (K, calls)).transpose(1, 2)
    torch.testing.assert_close(found, v_u + w * (v_c - v_u), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("output", [VelocityOutput(), NextLevelOutput(4)])
def test_the_loss_of_a_copy_is_that_of_its_output(output: Output) -> None:
    """A transformer that answers with zeros: what is left is the target's own size, known for latents of one value."""
    prior = noise_extended(output)
    torch.nn.init.zeros_(prior.out.weight)
    z, text = torch.full((64, K, C), 2.0), prior.encode_text(CAPTIONS[:1] * 64)
    with torch.no_grad():
        loss = prior.losses(z, text, torch.Generator().manual_seed(1)).mean().item()
    t = logit_normal_times(100_000, 1, device=z.device, generator=torch.Generator().manual_seed(2))[0]
    at = NextLevelOutput(4).step(t)
    wanted = {
        VelocityOutput: 5.0,  # (noise - 2)^2
        NextLevelOutput: (2 * (at.data + at.noisy * (1 - t))).square().mean()
        + ((at.noisy * t).square() + at.variance).mean(),
    }
    assert loss == pytest.approx(float(wanted[type(output)]), rel=0.05)


def test_noisy_copies_stay_float32_under_autocast() -> None:
    """x_t in training and the solver's state in sampling: most of their numbers do not exist in bfloat16."""
    prior, seen = noise_extended(), []
    prior.noisy_in.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].detach()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = prior.losses(torch.randn(3, K, C), prior.encode_text(CAPTIONS))
        z = prior.sample(CAPTIONS)
    assert len(seen) == 1 + 8 * K and loss.dtype == torch.float32
    assert all(x.dtype == torch.float32 and (x != x.bfloat16()).float().mean() > 0.7 for x in [*seen, z])


# -- masked -----------------------------------------------------------------------------------------------------------


def masked(sets: int = 3) -> MaskedPrior:
    vocabulary, backbone, head = parts()
    prior = awake(MaskedPrior(K, C, vocabulary, backbone, head, sets=sets))
    assert isinstance(prior, MaskedPrior)
    return prior


@pytest.mark.parametrize("sets", range(1, K + 1))
def test_sets_cover_the_line_and_grow(sets: int) -> None:
    sizes = masked(sets).set_sizes()
    assert len(sizes) == sets and sum(sizes) == K and min(sizes) >= 1
    for step in range(1, sets + 1):
        cosine = K * (1 - math.cos(math.pi / 2 * step / sets))  # latents known after that many steps
        assert sum(sizes[:step]) == max(step, math.ceil(cosine - 1e-9))
    assert sizes[0] == min(sizes)


def test_sets_of_a_long_line_grow_as_the_cosine_does() -> None:
    vocabulary, backbone, head = parts(32)
    assert MaskedPrior(32, C, vocabulary, backbone, head, sets=8).set_sizes() == [1, 2, 3, 4, 5, 5, 6, 6]
    assert MaskedPrior(32, C, vocabulary, backbone, head, sets=3).set_sizes() == [5, 11, 16]


def test_hidden_latents_are_hidden() -> None:
    prior, z = masked(), torch.randn(3, K, C)
    text, known = prior.encode_text(CAPTIONS), torch.tensor([True, False, True, False, False, True]).expand(3, -1)
    before = prior.conditions(z, known, text)
    changed = z.clone()
    changed[:, [1, 3, 4]] += 2
    assert torch.equal(prior.conditions(changed, known, text), before)
    changed[:, 0] += 2
    assert (prior.conditions(changed, known, text) - before).abs().amax(-1).min() > 1e-4  # control


def test_only_hidden_latents_have_a_loss_and_the_mean_is_theirs() -> None:
    prior, z, counts = masked(), torch.randn(3, K, C), set()
    text, original = prior.encode_text(CAPTIONS), prior.head.loss
    asked: list[tuple[Tensor, Tensor]] = []

    def recording(cond: Tensor, target: Tensor, generator: torch.Generator | None = None) -> Tensor:
        asked.append((target, original(cond, target, generator)))
        return asked[-1][1]

    prior.head.loss = recording  # type: ignore[method-assign]
    for seed in range(8):
        loss = prior.losses(z, text, torch.Generator().manual_seed(seed))
        hidden = loss > 0  # (B,K)
        target, each = asked[-1]
        n = len(target) // 3
        assert loss.shape == (3, K) and hidden.sum(1).tolist() == [n] * 3 and 1 <= n <= K
        torch.testing.assert_close(loss.mean(), each.mean())
        ours, theirs = loss[hidden] * n / K, {tuple(x.tolist()): e for x, e in zip(target, each, strict=True)}
        torch.testing.assert_close(ours, torch.stack([theirs[tuple(x.tolist())] for x in z[hidden]]))  # each its own
        counts.add(n)
    assert len(counts) >= 3 and min(counts) < K


def test_the_share_hidden_in_training_is_cos_of_a_uniform_angle() -> None:
    """P(at most n of 32 are hidden) = 1 - 2/pi asin(n/32); a uniform share, the control, is far from that."""
    vocabulary, _, head = parts(32)
    prior = MaskedPrior(32, C, vocabulary, Backbone(D, 1, 2, 44), head)
    counts: list[int] = []

    def loss(cond: Tensor, target: Tensor, generator: torch.Generator | None = None) -> Tensor:
        counts.append(len(target))
        return target.sum(-1)

    prior.head.loss = loss  # type: ignore[method-assign,assignment]
    z, text, g = torch.zeros(1, 32, C), prior.encode_text(CAPTIONS[:1]), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(800):
            prior.losses(z, text, g)
    n = torch.arange(1, 33)
    below = (torch.tensor(counts)[:, None] <= n).double().mean(0)
    cosine = 2 / math.pi * (n / 32).double().asin()
    critical = 1.95 / 800**0.5  # Kolmogorov's, 0.1%
    assert (below - cosine).abs().max() < critical < (n / 32 - cosine).abs().max() / 2


class Asked(NamedTuple):
    """One call of `Head.sample`."""

    cond: Tensor
    uncond: Tensor | None
    guidance: float
    interval: tuple[float, float]


def record_calls(prior: MaskedPrior) -> list[Asked]:
    calls: list[Asked] = []
    original = prior.head.sample

    def recording(cond: Tensor, uncond: Tensor | None = None, guidance: float = 1.0, **kw: Any) -> Tensor:
        calls.append(Asked(cond, uncond, guidance, kw["interval"]))
        return original(cond, uncond, guidance, **kw)

    prior.head.sample = recording  # type: ignore[method-assign,assignment]
    return calls


def test_masked_sampling_asks_with_what_the_finished_line_shows_and_twins_share_it() -> None:
    prior = masked()
    calls = record_calls(prior)
    z = prior.sample(CAPTIONS, 3.0, generator=torch.Generator().manual_seed(1))
    order = prior.order.permutation(3, K, torch.device("cpu"), torch.Generator().manual_seed(1))
    text = prior.encode_text(CAPTIONS)
    free = prior.without_caption(text, torch.ones(3, dtype=torch.bool))
    done = 0
    for call, n in zip(calls, prior.set_sizes(), strict=True):
        known = torch.zeros(3, K, dtype=torch.bool).scatter(1, order[:, :done], True)
        for rows, said in ((call.cond, text), (call.uncond, free)):
            with torch.no_grad():
                expected = gather_line(prior.conditions(z, known, said), order[:, done : done + n]).flatten(0, 1)
            assert rows is not None
            torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)
        done += n


@pytest.mark.parametrize("sets", [1, 3, K])
def test_a_set_is_guided_by_the_mean_scale_of_its_places(sets: int) -> None:
    prior = masked(sets)
    calls = record_calls(prior)
    prior.sample(CAPTIONS, RisingGuidance(3.0, low=0.1, high=0.7), generator=torch.Generator().manual_seed(1))
    scales = torch.tensor(RisingGuidance(3.0).scales(K)).split(prior.set_sizes())
    assert [call.guidance for call in calls] == pytest.approx([s.mean().item() for s in scales])
    assert {call.interval for call in calls} == {(0.1, 0.7)}


def test_a_rising_scale_guides_a_line_drawn_at_once() -> None:
    prior = masked(sets=1)

    def draw(guidance: float | Guidance) -> Tensor:
        return prior.sample(CAPTIONS, guidance, generator=torch.Generator().manual_seed(1))

    assert (draw(RisingGuidance(3.0)) - draw(1.0)).abs().max() > 1e-2
    torch.testing.assert_close(draw(RisingGuidance(3.0)), draw(2.0))


@pytest.mark.slow
def test_what_depends_within_a_set_is_lost_and_one_by_one_it_is_kept() -> None:
    """Two latents that are almost copies of each other: drawn together they part, drawn in turn they do not."""
    torch.manual_seed(0)
    vocabulary, _, _ = parts()
    prior = MaskedPrior(2, 1, vocabulary, Backbone(32, 1, 2, 14), FlowHead(HoistedNet(1, 32, 32, 2)), 0.0, sets=1)
    optimizer = MuonAdamW(parameter_groups(prior), lr=3e-3, matrix_lr=0.02)
    text = prior.encode_text(["a cross"] * 128)
    for step in range(250):
        for group in optimizer.param_groups:
            group["lr"] = (0.02 if group["group"] == "matrix" else 3e-3) * warmup_flat_cosine(step, 250)
        shared = torch.randn(128, 1, 1)
        loss = prior.losses(shared + 0.1 * torch.randn(128, 2, 1), text).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prior.eval()
    correlation = {}
    for sets in (1, 2):
        prior.sets = sets
        z = prior.sample(["a cross"] * 600, 1.0, generator=torch.Generator().manual_seed(1))[..., 0]
        correlation[sets] = torch.corrcoef(z.T)[0, 1].item()
        assert ((z.std(0) - 1).abs() < 0.25).all()
    assert abs(correlation[1]) < 0.15 and correlation[2] > 0.8


# -- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [noise_extended, masked])
def test_every_prior_keeps_the_contract(make, tmp_path) -> None:  # type: ignore[no-untyped-def]
    prior = make()

    def draw(captions: list[str], guidance: float, seed: int = 1) -> Tensor:
        return prior.sample(captions, guidance, generator=torch.Generator().manual_seed(seed))

    z = draw(CAPTIONS, 2.0)
    assert z.shape == (3, K, C) and z.dtype == torch.float32
    assert torch.equal(z, draw(CAPTIONS, 2.0)) and not torch.equal(z, draw(CAPTIONS, 2.0, seed=2))
    assert torch.equal(draw(CAPTIONS, 0.0), draw(["a cross"] * 3, 0.0))
    assert not torch.equal(draw(CAPTIONS, 1.0), draw(["a cross"] * 3, 1.0))
    assert prior.losses(z, prior.encode_text(CAPTIONS)).shape == (3, K)
    assert prior.num_evaluations() == 8 and prior.num_evaluations(4) == 4
    prior.save_pretrained(tmp_path)
    loaded = Prior.from_pretrained(tmp_path)
    assert torch.equal(loaded.sample(CAPTIONS, 2.0, generator=torch.Generator().manual_seed(1)), z)
    with pytest.raises(PriorError, match="temperature"):
        prior.sample(CAPTIONS, temperature=-1.0)


@pytest.mark.parametrize(
    "make", [noise_extended, masked, lambda: masked(1)], ids=["noise-extended", "masked", "at-once"]
)
def test_guidance_acts_within_its_interval_and_a_schedule_is_no_constant(make) -> None:  # type: ignore[no-untyped-def]
    prior = make()

    def draw(guidance: float | Guidance) -> Tensor:
        return prior.sample(CAPTIONS, guidance, generator=torch.Generator().manual_seed(1))

    plain, guided = draw(1.0), draw(3.0)
    times = Midpoint().times()
    between = [(a + b) / 2 for a, b in pairwise(sorted(times))]
    torch.testing.assert_close(draw(Guidance(3.0, between[0], between[0] + 1e-3)), plain)  # never asked there
    partly = draw(Guidance(3.0, between[2], between[5]))
    assert min((partly - plain).abs().max(), (partly - guided).abs().max()) > 1e-2
    rising = draw(RisingGuidance(3.0))
    assert min((rising - plain).abs().max(), (rising - guided).abs().max()) > 1e-2
