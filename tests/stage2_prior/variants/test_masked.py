"""A masked prior: sets that grow, what is hidden, who sees what."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.training.optim import MuonAdamW, parameter_groups, warmup_flat_cosine
from stage2_prior.backbone import Backbone
from stage2_prior.guidance import Guidance, RisingGuidance
from stage2_prior.heads.flow import FlowHead
from stage2_prior.heads.nets import HoistedNet
from stage2_prior.orders import (
    gather_line,
)
from stage2_prior.prior import PriorError
from stage2_prior.variants.masked import MaskedPrior, TruncatedNormalShare
from tests.small_priors import CAPTIONS, C, D, K, awake, parts


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


def test_the_share_of_mar_is_a_normal_between_its_bounds() -> None:
    share = TruncatedNormalShare()
    found = torch.tensor([share((i + 0.5) / 4000) for i in range(4000)]).double()
    assert found.min() >= 0.7 and found.max() <= 1 and share(0.0) == pytest.approx(0.7) and share(1.0) <= 1
    normal = torch.distributions.Normal(1.0, 0.25)
    below, above = (normal.cdf(torch.tensor(x)).item() for x in (0.7, 1.0))
    wanted = (normal.cdf(found.float()) - below) / (above - below)
    assert (wanted - (torch.arange(4000) + 0.5) / 4000).abs().max() < 1e-3
    vocabulary, backbone, head = parts(10)
    prior, counts = MaskedPrior(10, C, vocabulary, backbone, head, share=share), set()
    for seed in range(30):
        with torch.no_grad():
            loss = prior.losses(
                torch.randn(1, 10, C), prior.encode_text(CAPTIONS[:1]), torch.Generator().manual_seed(seed)
            )
        counts.add(int((loss > 0).sum()))
    assert counts <= {7, 8, 9, 10} and len(counts) >= 3
    for options in ({"std": 0.0}, {"low": 0.9, "high": 0.8}, {"high": 1.5}):
        with pytest.raises(PriorError, match=next(iter(options))):
            TruncatedNormalShare(**options)


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
