"""Orders with sets: who sees whom, what tokens carry, one run of the transformer per set."""

import pytest
import torch
from torch import Tensor

from stage2_prior import Prior
from stage2_prior.guidance import RisingGuidance
from stage2_prior.orders import LearnedOrder, OrderError, ScaleOrder, SetOrder
from stage2_prior.prior import CausalPrior
from tests.small_priors import CAPTIONS, C, K, awake, parts

SIZES = [1, 2, 3]


def prior_of(order: LearnedOrder | None, k: int = K, word_sum: bool = False) -> CausalPrior:
    vocabulary, backbone, head = parts(k)
    prior = awake(CausalPrior(k, C, vocabulary, backbone, head, order=order, word_sum=word_sum))
    assert isinstance(prior, CausalPrior)
    return prior


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_sets_of_one_are_the_plain_line_bit_for_bit() -> None:
    plain, single = prior_of(None), prior_of(SetOrder([1] * K))
    single.load_state_dict(plain.state_dict())
    z, text = torch.randn(3, K, C), plain.encode_text(CAPTIONS)
    with torch.no_grad():
        assert torch.equal(plain.losses(z, text, seeded()), single.losses(z, text, seeded()))
    for options in ({}, {"prefix": z[:, :2]}, {"num_latents": 4}):
        draws = [p.sample(CAPTIONS, RisingGuidance(3.0), generator=seeded(), **options) for p in (plain, single)]  # type: ignore[arg-type]
        assert torch.equal(*draws)
    together = prior_of(SetOrder(SIZES))
    together.load_state_dict(plain.state_dict())
    assert (together.sample(CAPTIONS, generator=seeded()) - draws[0][:, :1]).abs().max() > 1e-3  # control


@pytest.mark.parametrize("order", [SetOrder(SIZES), ScaleOrder([1, 2, 3])], ids=["sets", "scales"])
def test_a_condition_sees_the_sets_before_its_own_and_all_of_them(order: SetOrder) -> None:
    k = sum(order.sizes)
    prior, set_of = prior_of(order, k), torch.tensor(order.set_of)
    z, text = torch.randn(3, k, C), prior.encode_text(CAPTIONS)
    with torch.no_grad():
        before = prior.conditions(z, text)
        for j in range(k):
            changed = z.clone()
            changed[:, j] += 2
            moved = (prior.conditions(changed, text) - before).abs().amax(dim=(0, 2))  # (K,)
            later = set_of > set_of[j]
            assert moved[~later].max() == 0
            assert not later.any() or moved[later].min() > 1e-4


def test_every_latent_is_carried_by_a_token_of_the_next_set() -> None:
    for order in (SetOrder([1, 1, 2, 4, 8, 8, 9]), ScaleOrder([1, 2, 4, 8]), ScaleOrder([1, 2, 3, 5])):
        for index in range(1, len(order.sizes)):
            assert set(order.parents(index)) == set(range(order.sizes[index - 1]))
    fine = torch.tensor(ScaleOrder([1, 2, 4]).parents(2)).view(4, 4)
    assert fine.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]  # the cell that lies under it
    latents = torch.arange(5.0).expand(2, -1)
    assert SetOrder([2, 3, 4]).carry(latents).tolist() == [[0, 0, 1, 2, 2, 3, 4]] * 2
    assert SetOrder([2, 3, 4]).carry(latents[:, :2]).tolist() == [[0, 0, 1]] * 2
    assert SetOrder([2, 3, 4]).carry_on(latents[:, 2:], 2).tolist() == [[2, 2, 3, 4]] * 2


@pytest.mark.parametrize("guidance", [1.0, 0.0, 3.0])
@pytest.mark.parametrize(("p", "n"), [(0, K), (1, K), (2, K), (4, 5), (0, 2)])
@pytest.mark.parametrize("word_sum", [False, True])
def test_sampling_sets_with_the_cache_equals_the_parallel_forward(
    guidance: float, p: int, n: int, word_sum: bool
) -> None:
    """One call of the head per set, for the latents of it that are neither given nor beyond the end."""
    prior = prior_of(SetOrder(SIZES), word_sum=word_sum)
    asked: list[tuple[Tensor, Tensor | None, float]] = []
    original = prior.head.sample

    def recording(cond: Tensor, uncond: Tensor | None = None, guidance: float = 1.0, **kw: object) -> Tensor:
        asked.append((cond, uncond, guidance))
        return original(cond, uncond, guidance, **kw)  # type: ignore[arg-type]

    prior.head.sample = recording  # type: ignore[method-assign,assignment]
    given = torch.randn(3, p, C)
    z = prior.sample(CAPTIONS, guidance, generator=seeded(), prefix=given, num_latents=n)
    assert z.shape == (3, n, C) and torch.equal(z[:, :p], given)
    text = prior.encode_text(CAPTIONS)
    free = prior.without_caption(text, torch.ones(3, dtype=torch.bool))
    whole = torch.cat([z, torch.zeros(3, K - n, C)], dim=1)
    wanted = [range(max(a, p), min(b, n)) for a, b in ((0, 1), (1, 3), (3, 6))]
    with torch.no_grad():
        conds, unconds = prior.conditions(whole, free if guidance == 0 else text), prior.conditions(whole, free)
    for (cond, uncond, _), at in zip(asked, [at for at in wanted if len(at)], strict=True):
        torch.testing.assert_close(cond, conds[:, list(at)].flatten(0, 1), rtol=0, atol=1e-5)
        assert (uncond is None) == (guidance != 3)
        if uncond is not None:
            torch.testing.assert_close(uncond, unconds[:, list(at)].flatten(0, 1), rtol=0, atol=1e-5)


def test_a_set_is_guided_by_the_mean_scale_of_its_places() -> None:
    prior, scales = prior_of(SetOrder(SIZES)), []
    original = prior.head.sample

    def recording(cond: Tensor, uncond: Tensor | None = None, guidance: float = 1.0, **kw: object) -> Tensor:
        scales.append(guidance)
        return original(cond, uncond, guidance, **kw)  # type: ignore[arg-type]

    prior.head.sample = recording  # type: ignore[method-assign,assignment]
    prior.sample(CAPTIONS, RisingGuidance(6.0))
    assert scales == pytest.approx([1.0, 2.5, 5.0])  # of 1, 2, 3, 4, 5, 6


def test_density_of_a_line_in_sets_is_that_of_its_conditions(tmp_path) -> None:  # type: ignore[no-untyped-def]
    prior, z = prior_of(SetOrder(SIZES)), torch.randn(3, K, C)
    nats = prior.log_prob(z, CAPTIONS, steps=4)
    with torch.no_grad():
        cond = prior.conditions(z, prior.encode_text(CAPTIONS)).flatten(0, 1)
    torch.testing.assert_close(nats, prior.head.log_prob(cond, z.flatten(0, 1), 4).view(3, K), rtol=0, atol=1e-4)
    prior.save_pretrained(tmp_path)
    assert torch.equal(Prior.from_pretrained(tmp_path).log_prob(z, CAPTIONS, steps=4), nats)


def test_sets_that_do_not_fit_are_refused() -> None:
    for sizes in ([], [0, 1], [1, 4, 2]):
        with pytest.raises(OrderError, match="never shrink"):
            SetOrder(sizes)
    with pytest.raises(OrderError, match=r"SetOrder is for 7 latents in sets of \[1, 2, 4\], but num_latents is 6"):
        prior_of(SetOrder([1, 2, 4]))
    with pytest.raises(OrderError, match="ScaleOrder is for 5"):
        prior_of(ScaleOrder([1, 2]))
