"""Lines that begin as given, and lines that end early: `prefix`, `num_latents` and `known`, of every prior."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stage2_prior import DDIM, Prior
from stage2_prior.heads.solvers import AdamsBashforth, Midpoint, SamplerError
from stage2_prior.orders import LearnedOrder, OrderError, RandomOrder, ReversedOrder, SetOrder
from stage2_prior.prior import CausalPrior, PriorError
from stage2_prior.variants.masked import MaskedPrior
from stage2_prior.variants.noise_extended import NoiseExtendedPrior
from tests.small_priors import CAPTIONS, C, K, awake, parts


def causal(order: LearnedOrder | None = None, word_sum: bool = False) -> Prior:
    vocabulary, backbone, head = parts()
    return awake(CausalPrior(K, C, vocabulary, backbone, head, order=order, word_sum=word_sum))


def masked(sets: int = 3) -> Prior:
    vocabulary, backbone, head = parts()
    return awake(MaskedPrior(K, C, vocabulary, backbone, head, sets=sets))


def noise_extended() -> Prior:
    vocabulary, backbone, _ = parts()
    return awake(NoiseExtendedPrior(K, C, vocabulary, backbone))


MAKERS: dict[str, Callable[[], Prior]] = {
    "causal": causal,
    "causal, word sum": lambda: causal(word_sum=True),
    "causal, random order": lambda: causal(RandomOrder()),
    "causal, sets": lambda: causal(SetOrder([1, 2, 3])),
    "masked": masked,
    "noise-extended": noise_extended,
}
every_prior = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def line(seed: int = 7) -> Tensor:
    return torch.randn(len(CAPTIONS), K, C, generator=seeded(seed))


@every_prior
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_prefix_is_kept_and_the_rest_depends_on_it(make: Callable[[], Prior], guidance: float) -> None:
    prior, given = make(), line()
    for p in range(1, K):
        z = prior.sample(CAPTIONS, guidance, generator=seeded(), prefix=given[:, :p])
        assert z.shape == (3, K, C) and torch.equal(z[:, :p], given[:, :p])
        assert torch.equal(z, prior.sample(CAPTIONS, guidance, generator=seeded(), prefix=given[:, :p]))
        other = prior.sample(CAPTIONS, guidance, generator=seeded(), prefix=given[:, :p] + 1)
        assert (z[:, p:] - other[:, p:]).abs().amax((1, 2)).min() > 1e-4  # the rest is drawn given it
    assert torch.equal(prior.sample(CAPTIONS, guidance, prefix=given), given)


@every_prior
def test_the_first_latents_alone_are_the_first_of_a_line(make: Callable[[], Prior]) -> None:
    prior = make()
    for n in (1, 3, K):
        short = prior.sample(CAPTIONS, generator=seeded(), num_latents=n)
        assert short.shape == (3, n, C) and short.dtype == torch.float32 and bool(short.isfinite().all())
        assert torch.equal(short, prior.sample(CAPTIONS, generator=seeded(), num_latents=n))
        kept = prior.sample(CAPTIONS, generator=seeded(), prefix=short, num_latents=n)
        assert torch.equal(kept, short)


@pytest.mark.parametrize("make", [causal, noise_extended])
def test_stopping_early_changes_nothing_in_what_is_drawn(make: Callable[[], Prior]) -> None:
    prior = make()
    whole = prior.sample(CAPTIONS, generator=seeded())
    for n in (1, 4):
        assert torch.equal(prior.sample(CAPTIONS, generator=seeded(), num_latents=n), whole[:, :n])


@pytest.mark.parametrize("guidance", [1.0, 0.0, 3.0])
@pytest.mark.parametrize("word_sum", [False, True])
def test_a_continuation_is_asked_for_as_the_parallel_forward_says(guidance: float, word_sum: bool) -> None:
    """The rows that the head was asked with behind a prefix, against those of the finished line at once."""
    prior = causal(word_sum=word_sum)
    assert isinstance(prior, CausalPrior)
    seen: list[Tensor] = []
    original = prior.head.sample

    def recording(cond: Tensor, *args: object, **kw: object) -> Tensor:
        seen.append(cond)
        return original(cond, *args, **kw)  # type: ignore[arg-type]

    prior.head.sample = recording  # type: ignore[method-assign,assignment]
    z = prior.sample(CAPTIONS, guidance, generator=seeded(), prefix=line()[:, :2], num_latents=5)
    text = prior.encode_text(CAPTIONS)
    if guidance == 0:
        text = prior.without_caption(text, torch.ones(3, dtype=torch.bool))
    whole = torch.cat([z, torch.zeros(3, 1, C)], dim=1)
    with torch.no_grad():
        expected = prior.conditions(whole, text)[:, 2:5]
    torch.testing.assert_close(torch.stack(seen, 1), expected, rtol=0, atol=1e-5)


def test_any_part_of_a_line_is_filled_in_by_a_masked_prior() -> None:
    prior, given = masked(), line()
    assert isinstance(prior, MaskedPrior)
    known = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 0, 1]], dtype=torch.bool)
    z = prior.sample(CAPTIONS, generator=seeded(), prefix=given, known=known)
    assert torch.equal(z[known], given[known]) and not (z == given).all(-1)[~known].any()
    hidden = torch.where(known[..., None], given, 100.0)  # what is not known is not read
    assert torch.equal(prior.sample(CAPTIONS, generator=seeded(), prefix=hidden, known=known), z)
    moved = torch.where(known[..., None], given + 1, given)
    assert (prior.sample(CAPTIONS, generator=seeded(), prefix=moved, known=known) - z)[~known].abs().max() > 1e-3
    with pytest.raises(PriorError, match="one entry for each latent"):
        prior.sample(CAPTIONS, prefix=given, known=known[:, :3])


def test_orders_that_model_the_end_first_take_no_prefix() -> None:
    prior = causal(ReversedOrder())
    with pytest.raises(OrderError, match="prefix of 2 latents, but ReversedOrder models position 5"):
        prior.sample(CAPTIONS, prefix=line()[:, :2])
    with pytest.raises(OrderError, match="ReversedOrder"):
        prior.sample(CAPTIONS, num_latents=2)
    assert prior.sample(CAPTIONS).shape == (3, K, C)


@every_prior
def test_prefixes_that_do_not_fit_are_refused(make: Callable[[], Prior]) -> None:
    prior = make()
    for prefix, n in ((line()[:2], None), (line()[..., :2], None), (line(), 3), (line()[0], None)):
        with pytest.raises(PriorError, match="got a prefix of shape"):
            prior.sample(CAPTIONS, prefix=prefix, num_latents=n)
    for n in (0, K + 1):
        with pytest.raises(PriorError, match="wanted 1 to 6"):
            prior.sample(CAPTIONS, num_latents=n)


@every_prior
def test_another_solver_for_one_sample(make: Callable[[], Prior]) -> None:
    """As if it were the prior's own, which it does not become."""
    prior = make()
    plain = prior.sample(CAPTIONS, generator=seeded())
    four = prior.sample(CAPTIONS, generator=seeded(), solver=AdamsBashforth(steps=4))
    assert (four - plain).abs().max() > 1e-4 and torch.equal(prior.sample(CAPTIONS, generator=seeded()), plain)
    assert torch.equal(prior.sample(CAPTIONS, generator=seeded(), solver=Midpoint()), plain)
    assert torch.equal(prior.sample(CAPTIONS, generator=seeded(), solver=AdamsBashforth(), steps=4), four)
    assert (prior.num_evaluations(), prior.num_evaluations(solver=AdamsBashforth(5))) == (8, 5)
    with pytest.raises(SamplerError, match="DDIM"):
        prior.sample(CAPTIONS, solver=DDIM())
