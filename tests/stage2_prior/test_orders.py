"""Orders and context noise: what is modelled when, what a position is told, what is refused."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from stage2_prior.heads.base import Head
from stage2_prior.orders import (
    LearnedOrder,
    OrderError,
    RandomOrder,
    RasterOrder,
    ReversedOrder,
    SpiralOrder,
    ZigzagOrder,
    gather_line,
    scatter_line,
)
from stage2_prior.prior import CausalPrior, PriorError
from stage2_prior.variants.masked import MaskedPrior
from stage2_prior.variants.noise_extended import NoiseExtendedPrior
from tests.small_priors import CAPTIONS, C, K, awake, parts


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


def rows_asked(head: Head) -> list[Tensor]:
    """A list that fills with the condition rows (B,D) of every latent that `head` samples."""
    seen: list[Tensor] = []
    original = head.sample

    def recording(cond: Tensor, *args: object, **kw: object) -> Tensor:
        seen.append(cond)
        return original(cond, *args, **kw)  # type: ignore[arg-type]

    head.sample = recording  # type: ignore[method-assign,assignment]
    return seen


@pytest.mark.parametrize("order", [ReversedOrder(), RandomOrder()])
def test_sampling_in_another_order_equals_the_parallel_forward(order: LearnedOrder) -> None:
    vocabulary, backbone, head = parts()
    prior = awake(CausalPrior(K, C, vocabulary, backbone, head, order=order))
    assert isinstance(prior, CausalPrior)
    seen = rows_asked(head)
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
    first = rows_asked(head)
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
