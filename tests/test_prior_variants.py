"""Orders, and the priors beside the causal one: who sees whom, what they sample, what they refuse."""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.optim import MuonAdamW, parameter_groups, warmup_flat_cosine
from stage1_tokenizer.vocabulary import CaptionVocabulary
from stage2_prior import Prior
from stage2_prior.backbone import Backbone
from stage2_prior.guidance import Guidance, RisingGuidance
from stage2_prior.head_nets import HoistedNet
from stage2_prior.heads import FlowHead, Head
from stage2_prior.masked import MaskedPrior
from stage2_prior.noise_extended import NoiseExtendedPrior
from stage2_prior.orders import (
    LearnedOrder,
    OrderError,
    RandomOrder,
    RasterOrder,
    ReversedOrder,
    SpiralOrder,
    ZigzagOrder,
    gather_line,
    noise_extended_blocks,
    noise_extended_mask,
    scatter_line,
)
from stage2_prior.prior import CausalPrior, PriorError
from stage2_prior.samplers import Midpoint

K, C, D = 6, 4, 32
CAPTIONS = ["a red circle", "a large blue square above a small green star", "a cross"]


def parts(k: int = K, c: int = C, width: int = D, depth: int = 2) -> tuple[CaptionVocabulary, Backbone, Head]:
    torch.manual_seed(0)
    vocabulary = CaptionVocabulary(rows=64, context_length=12)
    vocabulary.fit(CAPTIONS)
    return vocabulary, Backbone(width, depth, heads=2, max_tokens=12 + k), FlowHead(HoistedNet(c, width, 24, 2))


def awake(prior: Prior) -> Prior:
    for parameter in prior.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return prior.eval()


def noise_extended() -> NoiseExtendedPrior:
    vocabulary, backbone, _ = parts()
    prior = awake(NoiseExtendedPrior(K, C, vocabulary, backbone))
    assert isinstance(prior, NoiseExtendedPrior)
    return prior


# -- orders -----------------------------------------------------------------------------------------------------------


def test_grid_orders_are_what_their_names_say() -> None:
    assert RasterOrder(2, 3).positions(6) == [0, 1, 2, 3, 4, 5]
    assert ZigzagOrder(3, 3).positions(9) == [0, 1, 3, 6, 4, 2, 5, 7, 8]
    assert SpiralOrder(3, 3).positions(9)[0] == 4  # from the centre
    assert set(SpiralOrder(3, 3).positions(9)[1:]) == {0, 1, 2, 3, 5, 6, 7, 8}
    steps = [(a // 4, a % 4) for a in SpiralOrder(4, 4).positions(16)]
    assert all(abs(r - s) + abs(c - d) == 1 for (r, c), (s, d) in pairwise(steps))
    assert ReversedOrder().positions(3) == [2, 1, 0]


@pytest.mark.parametrize(
    "order", [LearnedOrder(), ReversedOrder(), RandomOrder(), SpiralOrder(2, 3), ZigzagOrder(3, 2)]
)
def test_an_order_is_a_permutation_that_can_be_undone(order: LearnedOrder) -> None:
    permutation = order.permutation(5, 6, torch.device("cpu"), torch.Generator().manual_seed(1))
    assert torch.equal(permutation.sort(dim=1).values, torch.arange(6).expand(5, -1))
    z = torch.randn(5, 6, 3)
    assert torch.equal(scatter_line(gather_line(z, permutation), permutation), z)
    assert (permutation[0] != permutation[1]).any() == order.varies


def test_a_reversed_prior_sees_what_comes_later() -> None:
    vocabulary, backbone, head = parts()
    prior = awake(CausalPrior(K, C, vocabulary, backbone, head, order=ReversedOrder()))
    assert isinstance(prior, CausalPrior)
    z, text = torch.randn(3, K, C), prior.encode_text(CAPTIONS)
    before = prior.conditions(z, text)
    changed = z.clone()
    changed[:, 3] += 2
    moved = (prior.conditions(changed, text) - before).abs().amax(dim=(0, 2))  # (K,)
    assert moved[3:].max() < 1e-5 and moved[:3].min() > 1e-4


@pytest.mark.parametrize("order", [ReversedOrder(), RandomOrder()])
def test_sampling_in_another_order_equals_the_parallel_forward(order: LearnedOrder) -> None:
    vocabulary, backbone, head = parts()
    prior = awake(CausalPrior(K, C, vocabulary, backbone, head, order=order))
    assert isinstance(prior, CausalPrior)
    seen: list[Tensor] = []
    original = head.sample

    def recording(cond: Tensor, *args: object, **kw: object) -> Tensor:
        seen.append(cond)
        return original(cond, *args, **kw)  # type: ignore[arg-type]

    head.sample = recording  # type: ignore[method-assign,assignment]
    z = prior.sample(CAPTIONS, 1.0, generator=torch.Generator().manual_seed(4))
    permutation = order.permutation(3, K, torch.device("cpu"), torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = prior.line_conditions(gather_line(z, permutation), prior.encode_text(CAPTIONS), permutation)
    torch.testing.assert_close(torch.stack(seen, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", [ReversedOrder(), RandomOrder(), SpiralOrder(2, 3)])
def test_every_position_gets_its_own_loss_whatever_the_order(order: LearnedOrder) -> None:
    """A head whose loss is the latent's first channel: then the losses are the line itself, in its own order."""
    vocabulary, backbone, head = parts()
    prior = awake(CausalPrior(K, C, vocabulary, backbone, head, order=order))
    head.loss = lambda cond, target, generator=None: target[:, 0]  # type: ignore[method-assign,assignment]
    z = torch.randn(3, K, C)
    losses = prior.losses(z, prior.encode_text(CAPTIONS), torch.Generator().manual_seed(1))
    assert torch.equal(losses, z[..., 0])


def test_a_reversed_prior_is_the_plain_one_on_the_reversed_line() -> None:
    """The same weights and draws: losses are those of the flipped line, flipped back."""
    vocabulary, backbone, head = parts()
    plain, reverse = (
        awake(CausalPrior(K, C, vocabulary, backbone, head, order=order)) for order in (LearnedOrder(), ReversedOrder())
    )
    reverse.load_state_dict(plain.state_dict())
    z, text = torch.randn(3, K, C), plain.encode_text(CAPTIONS)
    found = reverse.losses(z, text, torch.Generator().manual_seed(1))
    expected = plain.losses(z.flip(1), text, torch.Generator().manual_seed(1)).flip(1)
    torch.testing.assert_close(found, expected)
    assert (found - plain.losses(z, text, torch.Generator().manual_seed(1))).abs().max() > 1e-2  # control


def test_in_a_random_order_a_condition_depends_on_which_position_comes_next() -> None:
    vocabulary, backbone, head = parts()
    prior = awake(CausalPrior(K, C, vocabulary, backbone, head, order=RandomOrder()))
    assert isinstance(prior, CausalPrior)
    line, text = torch.randn(3, K, C), prior.encode_text(CAPTIONS)
    orders = [torch.tensor(p).expand(3, -1) for p in ([4, 1, 0, 3, 2, 5], [4, 1, 5, 3, 2, 0])]
    with torch.no_grad():
        rows = [prior.line_conditions(line, text, order) for order in orders]  # the same latents, told other places
        moved = (rows[1] - rows[0]).abs().amax(-1)  # (B,K)
    assert moved[:, :2].max() == 0 and moved[:, 2:].min() > 1e-3
    # In sampling, too: the first latent of a line has seen nothing but its own place.
    first: list[Tensor] = []
    original = head.sample

    def recording(cond: Tensor, *args: object, **kw: object) -> Tensor:
        first.append(cond)
        return original(cond, *args, **kw)  # type: ignore[arg-type]

    head.sample = recording  # type: ignore[method-assign,assignment]
    prior.sample(["a cross"] * 8, 1.0, generator=torch.Generator().manual_seed(4))
    at = prior.order.permutation(8, K, torch.device("cpu"), torch.Generator().manual_seed(4))[:, 0]
    apart = torch.cdist(first[0], first[0]) > 1e-3
    assert torch.equal(apart, at[:, None] != at)


def test_orders_that_make_no_sense_are_refused() -> None:
    vocabulary, backbone, head = parts()
    with pytest.raises(OrderError, match="num_latents is 6"):
        CausalPrior(K, C, vocabulary, backbone, head, order=SpiralOrder(4, 4))
    with pytest.raises(PriorError, match="ReversedOrder for a MaskedPrior"):
        MaskedPrior(K, C, vocabulary, backbone, head, order=ReversedOrder())
    with pytest.raises(PriorError, match="sets=7"):
        MaskedPrior(K, C, vocabulary, backbone, head, sets=7)
    with pytest.raises(OrderError, match="0 x 4"):
        RasterOrder(0, 4)
    with pytest.raises(PriorError, match="copies"):
        NoiseExtendedPrior(K, C, vocabulary, backbone, copies=0)
    with pytest.raises(PriorError, match="context_noise"):
        CausalPrior(K, C, vocabulary, backbone, head, context_noise=-0.1)


class NoisyContext(NamedTuple):
    """What a prior read in one call: the context as it was embedded, and what was added to the embeddings."""

    context: Tensor  # (B,K-1,C)
    added: Tensor  # (B,K-1,D)


def read_context(prior: CausalPrior, z: Tensor, captions: list[str], seed: int = 1) -> NoisyContext:
    """`losses` on z, and what went into the embedding of the latents and into the transformer."""
    seen: dict[str, Tensor] = {}

    def embedded(layer: torch.nn.Module, inputs: tuple[Tensor, ...], tokens: Tensor) -> None:
        seen["context"], seen["tokens"] = inputs[0], tokens

    def entered(layer: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen["line"] = inputs[0][:, 1 - K :]

    hooks = [prior.latent_in.register_forward_hook(embedded), prior.backbone.register_forward_pre_hook(entered)]
    with torch.no_grad():
        prior.losses(z, prior.encode_text(captions), torch.Generator().manual_seed(seed))
    for hook in hooks:
        hook.remove()
    return NoisyContext(seen["context"], seen["line"] - seen["tokens"])


def test_context_noise_is_for_training_and_the_model_is_told_how_much() -> None:
    vocabulary, backbone, head = parts()
    prior = awake(CausalPrior(K, C, vocabulary, backbone, head, caption_dropout=0.0, context_noise=0.5))
    assert isinstance(prior, CausalPrior) and prior.noise_level is not None
    z, captions = torch.randn(300, K, C), ["a cross"] * 300
    plain = read_context(prior, z, captions)
    assert torch.equal(plain.context, z[:, :-1]) and plain.added.abs().max() < 1e-6
    prior.train()
    noisy = read_context(prior, z, captions)
    told = noisy.added @ prior.noise_level.detach() / prior.noise_level.detach().square().sum()  # (B,K-1): sigma
    assert told.std(dim=1).max() < 1e-4, "one sigma for all latents of a line"
    sigma = told[:, 0].sort().values
    uniform = (torch.arange(300) + 0.5) / 300 * 0.5
    assert (sigma - uniform).abs().max() < 0.5 * 1.95 / 300**0.5  # Kolmogorov's bound at 0.1%, times the range
    scaled = (noisy.context - z[:, :-1]) / told[..., None]
    assert abs(scaled.std() - 1) < 0.05 and scaled.abs().max() < 6  # the noise has the size that the model is told
    assert (scaled[::3].std(dim=(1, 2)) - 1).abs().mean() < 0.2  # ... in every line
    again, other = (read_context(prior, z, captions, seed).context for seed in (1, 2))
    assert torch.equal(again, noisy.context) and not torch.equal(other, noisy.context)


def test_context_noise_is_only_for_the_context() -> None:
    """What the head is asked to model carries none, nor does the condition of the first latent."""
    vocabulary, backbone, head = parts()
    prior = awake(CausalPrior(K, C, vocabulary, backbone, head, caption_dropout=0.0, context_noise=0.5)).train()
    asked: list[tuple[Tensor, Tensor]] = []

    def recording(cond: Tensor, target: Tensor, generator: object = None) -> Tensor:
        asked.append((cond.unflatten(0, (3, K)), target.unflatten(0, (3, K))))
        return target.mean(-1)

    head.loss = recording  # type: ignore[method-assign,assignment]
    z, text = torch.randn(3, K, C), prior.encode_text(CAPTIONS)
    with torch.no_grad():
        for seed in (1, 2):
            prior.losses(z, text, torch.Generator().manual_seed(seed))
    assert all(torch.equal(target, z) for _, target in asked)
    moved = (asked[0][0] - asked[1][0]).abs().amax(dim=(0, 2))  # (K,)
    assert moved[0] == 0 and moved[1:].min() > 1e-4


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
        monkeypatch.setattr("stage2_prior.noise_extended.noise_extended_mask", noise_extended_blocks)
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
    "guidance", [1.0, 3.0, RisingGuidance(3.0), Guidance(3.0, low=0.2, high=0.6)], ids=["1", "3", "rising", "interval"]
)
def test_noise_extended_sampling_with_the_cache_equals_the_parallel_forward(guidance: float | Guidance) -> None:
    """The velocities that the solver was given, against those of the finished line at once.

    The unconditional ones are of the same line: twins share every sampled latent.
    """
    prior = noise_extended()
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
    calls = prior.solver.evaluations
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
    torch.testing.assert_close(found, v_u + w * (v_c - v_u), rtol=0, atol=2e-5)


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
    assert prior.evaluations() == 8 and prior.evaluations(4) == 4
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
