"""Orders, and the priors beside the causal one: who sees whom, what they sample, what they refuse."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.optim import MuonAdamW, parameter_groups, warmup_flat_cosine
from stage1_tokenizer.vocabulary import CaptionVocabulary
from stage2_prior import Prior
from stage2_prior.backbone import Backbone
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


def test_context_noise_is_for_training_and_only_for_the_context() -> None:
    vocabulary, backbone, head = parts()
    prior = awake(CausalPrior(K, C, vocabulary, backbone, head, caption_dropout=0.0, context_noise=0.5))
    z, text = torch.randn(3, K, C), prior.encode_text(CAPTIONS)

    def condition(seed: int) -> Tensor:
        assert isinstance(prior, CausalPrior)
        order = torch.arange(K).expand(3, -1)
        return prior.line_conditions(z, text, order, torch.Generator().manual_seed(seed))

    assert torch.equal(condition(1), condition(2))
    prior.train()
    moved = (condition(1) - condition(2)).abs().amax(dim=(0, 2))
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


def test_noise_extended_sampling_with_the_cache_equals_the_parallel_forward() -> None:
    """The velocities that the solver was given, against those of the finished line at once."""
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
    z = prior.sample(CAPTIONS, 1.0, generator=torch.Generator().manual_seed(1))
    calls = prior.solver.evaluations
    x_t = torch.stack([x for x, _, _ in asked], 1).unflatten(1, (K, calls)).transpose(1, 2)  # (B,S,K,C)
    t = torch.tensor([t for _, t, _ in asked]).view(K, calls).T.expand(3, -1, -1)
    with torch.no_grad():
        v = prior.velocities(z, x_t, t, prior.encode_text(CAPTIONS))
    found = torch.stack([v for _, _, v in asked], 1).unflatten(1, (K, calls)).transpose(1, 2)
    torch.testing.assert_close(found, v, rtol=0, atol=1e-5)


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
    prior, z = masked(), torch.randn(3, K, C)
    loss = prior.losses(z, prior.encode_text(CAPTIONS), torch.Generator().manual_seed(3))
    hidden = (loss > 0).sum(1)
    assert loss.shape == (3, K) and hidden.unique().numel() == 1 and 1 <= hidden[0] <= K


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
