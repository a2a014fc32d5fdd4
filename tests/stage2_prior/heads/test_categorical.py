"""The categorical head: it draws the softmax that it is, only values that exist, and refuses other alphabets."""

from typing import Any

import pytest
import torch

from stage1_tokenizer import FSQBottleneck, Tokenizer, VQBottleneck
from stage2_prior import CategoricalHead, FlowHead, HoistedNet
from stage2_prior.heads.base import HeadError
from stage2_prior.heads.categorical import draw_ids, keep_likely, standardised_alphabets
from tests.tiny import WIDTH, C, K, awaken, pictures, tiny_tokenizer

LEVELS = (5, 4, 3, 2)


class Shards:
    """Latents without noise, as those of symbols are."""

    def arrays(self, split: str, limit: int | None = None) -> dict[str, Any]:
        return {"latents_std": torch.zeros(8, K, C)}

    def train_captions(self) -> Any:
        return iter(())


def discrete(bottleneck: Any) -> Tokenizer:
    tiny = tiny_tokenizer(text=False)
    tokenizer = Tokenizer(16, tiny.encoder, bottleneck, tiny.decoder, tiny.lengths)
    awaken(tokenizer)
    tokenizer.eval().fit_statistics([pictures(32, seed=seed) for seed in range(3)])
    return tokenizer


@pytest.mark.parametrize(
    ("bottleneck", "sizes"),
    [(FSQBottleneck(WIDTH, K, LEVELS), LEVELS), (VQBottleneck(WIDTH, K, C, codes=24), (24,))],
    ids=["fsq", "vq"],
)
def test_symbols_of_encoded_pictures_are_read_exactly_and_drawn_ones_exist(bottleneck: Any, sizes: Any) -> None:
    tokenizer, head = discrete(bottleneck), CategoricalHead(C, 8, sizes, width=16)
    head.prepare(Shards(), lambda: tokenizer)
    with torch.no_grad():
        z = tokenizer.encode(pictures(6)).flatten(0, 1)  # (6K,C)
        torch.testing.assert_close(head.from_ids(head.ids(z)), z, atol=1e-5, rtol=1e-5)
        drawn = head.sample(torch.randn(500, 8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(head.from_ids(head.ids(drawn)), drawn) and len(drawn.unique(dim=0)) > 20
    raw = drawn * tokenizer.latent_scale[0] + tokenizer.latent_mean[0]
    torch.testing.assert_close(tokenizer.bottleneck.snap(raw), raw, atol=1e-5, rtol=1e-5)


def test_frequencies_are_those_of_the_softmax() -> None:
    n, logits = 60_000, torch.tensor([0.0, 1.0, -1.0, 2.0])
    p, g = logits.softmax(0), torch.Generator().manual_seed(0)
    counts = torch.bincount(draw_ids(logits.expand(n, -1), 1.0, g), minlength=4)
    chi_square = ((counts - n * p).square() / (n * p)).sum()
    assert chi_square < 16.3  # 3 degrees of freedom, one in a thousand
    cooler = torch.bincount(draw_ids(logits.expand(n, -1), 0.5, g), minlength=4)
    assert ((cooler - n * p).square() / (n * p)).sum() > 1000  # control
    assert (draw_ids(logits.expand(9, -1), 0.0, g) == 3).all()


def test_top_k_and_top_p_leave_out_the_unlikely() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert keep_likely(logits, 2, 1.0).isfinite().tolist() == [True, True, False, False]
    assert keep_likely(logits, None, 0.6).isfinite().tolist() == [True, True, False, False]
    assert keep_likely(logits, None, 1.0).isfinite().all()


def test_masses_sum_to_one_over_all_codes() -> None:
    head = CategoricalHead(2, 4, (3, 2), width=8)
    for values, n in zip(head.values, (3, 2), strict=True):
        values[:n, 0] = torch.linspace(-1, 1, n)
    torch.nn.init.normal_(head.out.weight)
    codes = torch.cartesian_prod(torch.arange(3), torch.arange(2))
    with torch.no_grad():
        nats = head.log_prob(torch.ones(len(codes), 4), head.from_ids(codes))
        loss = head.loss(torch.ones(len(codes), 4), head.from_ids(codes))
    assert nats.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(loss, -nats / 2)


def test_latents_of_another_kind_are_refused() -> None:
    continuous = tiny_tokenizer(text=False)
    assert standardised_alphabets(continuous) == []
    with pytest.raises(HeadError, match="got continuous latents of the tokenizer for a CategoricalHead"):
        CategoricalHead(C, 8, LEVELS).learn(continuous)
    symbols = discrete(FSQBottleneck(WIDTH, K, LEVELS))
    with pytest.raises(HeadError, match=r"got symbols of \[5, 4, 3, 2\]"):
        CategoricalHead(C, 8, (2, 2)).learn(symbols)
    with pytest.raises(HeadError, match="got a FlowHead for the latents of a FSQBottleneck, which are symbols"):
        FlowHead(HoistedNet(C, 8)).prepare(Shards(), lambda: symbols)
    with pytest.raises(HeadError, match="no alphabet yet"):
        CategoricalHead(C, 8, LEVELS).ids(torch.zeros(1, C))
