"""Vocabulary, prefix reader, contrastive losses, gradient balance."""

import pytest
import torch

from stage1_tokenizer.captioner import PrefixCaptioner
from stage1_tokenizer.order import keep_mask
from stage1_tokenizer.text import (
    GradientBalance,
    MaxOverQueries,
    PrefixReader,
    QueryReader,
    SigmoidContrast,
    SoftmaxContrast,
)
from stage1_tokenizer.vocabulary import END, START, UNKNOWN, CaptionVocabulary
from tests.tiny import CAPTIONS, awaken, tiny_tokenizer


def fitted(rows: int = 64, length: int = 12) -> CaptionVocabulary:
    vocabulary = CaptionVocabulary(rows, length)
    vocabulary.fit(CAPTIONS)
    return vocabulary


def test_captions_survive_the_round_trip() -> None:
    vocabulary = fitted()
    ids, mask = vocabulary.encode(CAPTIONS)
    assert ids.shape == mask.shape == (4, 12) and ids.max() < vocabulary.size <= vocabulary.rows
    assert (ids[:, 0] == START).all() and ((ids == END).sum(1) == 1).all()
    assert vocabulary.decode(ids) == CAPTIONS


def test_rare_tokens_share_the_unknown_row_and_are_counted() -> None:
    vocabulary = CaptionVocabulary(7, 12)
    assert vocabulary.fit(CAPTIONS) > 0
    ids, _ = vocabulary.encode(["a red zebra"])
    assert UNKNOWN in ids and vocabulary.decode(ids)[0].endswith("<unk>")
    assert vocabulary.size == 7


def test_long_empty_and_wrong_captions() -> None:
    vocabulary = fitted()
    ids, mask = vocabulary.encode(["red " * 2500, ""])
    assert mask[0].all() and ids[0, -1] == END and vocabulary.truncated == 1
    assert ids[1].tolist()[:3] == [START, END, 0]
    with pytest.raises(ValueError, match=r"wanted list\[str\]"):
        vocabulary.encode([3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="no rows yet"):
        CaptionVocabulary(64, 12).encode(["a"])


def test_a_loaded_vocabulary_replaces_the_table_in_use() -> None:
    one, two = fitted(), CaptionVocabulary(64, 12)
    two.fit(["green ideas sleep"])
    assert two.encode(["a red circle"])[0].tolist() != one.encode(["a red circle"])[0].tolist()
    two.load_state_dict(one.state_dict())
    assert two.encode(["a red circle"])[0].tolist() == one.encode(["a red circle"])[0].tolist()


def test_reader_gives_every_prefix_at_once_and_none_sees_later_latents() -> None:
    torch.manual_seed(0)
    reader = PrefixReader(6, 4, 32, 16)
    z = torch.randn(3, 6, 4)
    together = reader(z, [1, 3, 6])
    for i, k in enumerate((1, 3, 6)):
        torch.testing.assert_close(together[:, i], reader(z[:, :k], [k])[:, 0])


@pytest.mark.parametrize("contrast", [SoftmaxContrast(), SigmoidContrast()])
def test_contrast_prefers_the_right_pairing_and_pairs_repeated_captions(
    contrast: SoftmaxContrast | SigmoidContrast,
) -> None:
    torch.manual_seed(0)
    text = torch.nn.functional.normalize(torch.randn(6, 1, 16), dim=-1)
    same = torch.eye(6, dtype=torch.bool)[None]
    right, wrong = contrast(text, text, same), contrast(text.roll(1, 0), text, same)
    assert right.shape == (1,) and right < wrong
    text[1] = text[0]
    repeated = same.clone()
    repeated[0, 0, 1] = repeated[0, 1, 0] = True
    image = text + 0.1 * torch.randn(6, 1, 16)
    assert contrast(image, text, repeated) <= contrast(image, text, same) + 1e-5, "an identical caption is no negative"


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_balance_bounds_the_second_gradient_whatever_its_loss_weight(scale: float) -> None:
    torch.manual_seed(0)
    balance = GradientBalance(share=0.2, momentum=0.0).train()
    z = torch.randn(4, 3, requires_grad=True)
    direction = torch.randn(4, 3)
    for _ in range(2):  # the norms in use are those of the step before
        first, second = balance(z)
        grads = torch.autograd.grad((first * direction).sum() + scale * (second**3).sum(), z)[0]
    text = grads - direction
    torch.testing.assert_close(text.norm(), 0.2 * direction.norm(), rtol=1e-4, atol=0)


def test_captioner_is_causal_and_sees_visible_latents_only() -> None:
    torch.manual_seed(0)
    captioner = PrefixCaptioner(32, 8, 6, 4, 32, 2, 2)
    awaken(captioner)
    z, ids = torch.randn(3, 6, 4), torch.randint(4, 32, (3, 8))
    keep = keep_mask(torch.tensor([2, 2, 2]), 6)
    before = captioner.logits(z, keep, ids)
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] - 3) % 28 + 4
    torch.testing.assert_close(captioner.logits(z, keep, changed)[:, :5], before[:, :5], atol=1e-5, rtol=0)
    hidden, seen = z.clone(), z.clone()
    hidden[:, 2:] += 3
    seen[:, 1] += 3
    torch.testing.assert_close(captioner.logits(hidden, keep, ids), before, atol=1e-5, rtol=0)
    assert (captioner.logits(seen, keep, ids) - before).abs().max() > 1e-3
    assert captioner(z, keep_mask(torch.zeros(3, dtype=torch.long), 6), ids).isfinite().all(), "an empty prefix too"


def test_captioner_learns_to_say_what_the_first_latent_holds() -> None:
    torch.manual_seed(0)
    vocabulary = fitted()
    captioner = PrefixCaptioner(64, 12, 6, 4, 32, 1, 2)
    z, (ids, _) = torch.randn(4, 6, 4), vocabulary.encode(CAPTIONS)
    keep = keep_mask(torch.ones(4, dtype=torch.long), 6)
    optimizer = torch.optim.AdamW(captioner.parameters(), lr=1e-2)
    for _ in range(100):
        loss = captioner(z, keep, ids).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert vocabulary.decode(captioner.generate(z, keep)) == CAPTIONS
    right, wrong = captioner.log_likelihood(z, keep, ids), captioner.log_likelihood(z.roll(1, 0), keep, ids)
    assert right.shape == (4,) and (right > wrong + 1).all()


def test_a_query_reader_reads_one_latent_and_the_best_query_counts() -> None:
    torch.manual_seed(0)
    reader = QueryReader(6, 4, 32, 16)
    z = torch.randn(3, 6, 4)
    changed = z.clone()
    changed[:, :3] += 2
    torch.testing.assert_close(reader(changed, [4]), reader(z, [4]))
    text = torch.nn.functional.normalize(torch.randn(5, 1, 16), dim=-1)
    image = torch.nn.functional.normalize(torch.randn(5, 3, 16), dim=-1)
    image[:, 1] = text[:, 0]
    same, best = torch.eye(5, dtype=torch.bool)[None], MaxOverQueries()
    assert best(image, text, same) < best(image[:, [0, 2]], text, same)


def test_short_captions_are_for_short_prefixes() -> None:
    torch.manual_seed(0)
    text = tiny_tokenizer().text_part()
    z = torch.randn(4, 6, 4)
    short, long = text.vocabulary.encode(["red", "blue", "small", "two"])[0], text.vocabulary.encode(CAPTIONS)[0]
    both, other = torch.stack([short, long], 1), torch.stack([short, long.roll(1, 0)], 1)
    found, changed, alone = text.losses(z, both), text.losses(z, other), text.losses(z, short)
    torch.testing.assert_close(found["text_k1"], alone["text_k1"])
    torch.testing.assert_close(found["text_k1"], changed["text_k1"])
    assert (found["text"] - changed["text"]).abs() > 1e-4, "the long caption reaches the longest prefix"
    assert (found["text"] - alone["text"]).abs() > 1e-4
    torch.testing.assert_close(text.losses(z, short[:, None])["text"], alone["text"])
