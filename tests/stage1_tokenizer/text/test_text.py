"""Vocabulary, prefix reader, contrastive losses, gradient balance."""

import math

import pytest
import torch

from stage1_tokenizer.prefixes import keep_mask
from stage1_tokenizer.text.captioner import PrefixCaptioner
from stage1_tokenizer.text.contrast import MaxOverQueries, SigmoidContrast, SoftmaxContrast
from stage1_tokenizer.text.readers import PrefixReader, QueryReader
from stage1_tokenizer.text.supervision import GradientBalance, PrefixText
from stage1_tokenizer.text.towers import TextTower
from stage1_tokenizer.text.vocabulary import END, START, UNKNOWN, CaptionVocabulary
from tests.tiny import CAPTIONS, awaken, prefix_text, tiny_tokenizer


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
    with pytest.raises(ValueError, match="wanted a list of at least one string"):
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


def text_part(reader: PrefixReader | QueryReader, lengths: list[int], best: bool = False) -> PrefixText:
    torch.manual_seed(0)
    tower = TextTower(fitted(), 32, 1, 2, reader.embed_dim)
    text = PrefixText(tower, reader, MaxOverQueries() if best else SoftmaxContrast(), lengths)
    awaken(text)
    return text


@pytest.mark.parametrize("lengths", [[2, 4], [5]])
def test_a_prefix_is_read_at_a_length_that_is_trained(lengths: list[int]) -> None:
    """Rows of the other lengths are as random as they began: nothing that is read may depend on them."""
    text = text_part(PrefixReader(6, 4, 32, 16), lengths)
    z = torch.randn(3, 6, 4)
    before = {k: text.embed(z[:, :k]) for k in range(1, 7)}
    with torch.no_grad():
        for k in set(range(1, 7)) - set(lengths):
            text.get_parameter("reader.length")[k - 1] += 100 * torch.randn(32)
        text.get_parameter("reader.position.weight")[lengths[-1] :] += 100
    for k, found in before.items():
        torch.testing.assert_close(text.embed(z[:, :k]), found)
    for k in lengths:
        torch.testing.assert_close(before[k], text.reader(z[:, :k], [k])[:, 0])
    assert (before[lengths[0]] - before[lengths[0] - 1]).abs().max() > 1e-3, "fewer latents than that say less"
    torch.testing.assert_close(before[6], before[lengths[-1]])


def test_under_the_best_of_all_queries_the_first_k_compete() -> None:
    best = text_part(QueryReader(6, 4, 32, 16), [1, 2, 4], best=True)
    assert [best.competing(k) for k in (1, 3, 6)] == [[1], [1, 2], [1, 2, 4]]
    assert text_part(PrefixReader(6, 4, 32, 16), [2, 4]).competing(3) == [3]


def test_a_step_copies_no_list_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each `torch.tensor(list)` is a copy that the step waits for; the first step may make them, once."""
    tower = TextTower(fitted(), 32, 1, 2, 16)
    captioner = PrefixCaptioner(64, 12, 6, 4, 32, 1, 2)
    text = PrefixText(tower, PrefixReader(6, 4, 32, 16), SoftmaxContrast(), [1, 2, 6], captioner=captioner)
    z, ids = torch.randn(4, 6, 4, requires_grad=True), text.vocabulary.encode(CAPTIONS)[0]
    with torch.inference_mode():
        text.losses(z, ids)
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("a list was copied"))
    parts = text.losses(z, ids)
    (parts["text"] + parts["caption"]).backward()
    assert z.grad is not None and z.grad.any()


@pytest.mark.parametrize(("rows", "length", "said"), [(32, 12, "captioner.rows is 32"), (64, 9, "context_length is 9")])
def test_a_captioner_of_another_vocabulary_is_refused(rows: int, length: int, said: str) -> None:
    tower, reader = TextTower(fitted(), 32, 1, 2, 16), PrefixReader(6, 4, 32, 16)
    with pytest.raises(ValueError, match=f"{said} but the tower's vocabulary has"):
        PrefixText(tower, reader, SoftmaxContrast(), [1], captioner=PrefixCaptioner(rows, length, 6, 4, 32, 1, 2))


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


def test_the_share_of_text_rises_over_its_warmup() -> None:
    """The gradient that text sends into the latents is `factor` times the balanced one; nothing else changes."""
    z = torch.randn(6, 4, 3, requires_grad=True)
    found: list[torch.Tensor] = []
    for factor in (0.0, 0.5, 1.0):
        balance = GradientBalance(0.1).train()
        pixels, text = balance(z, factor)
        z.grad = None
        (5 * pixels.square().sum()).backward(retain_graph=True)
        assert z.grad is not None
        alone: torch.Tensor = z.grad.clone()
        text.sum().backward()
        found.append(z.grad - alone)
    assert not found[0].any() and found[2].norm() == pytest.approx(0.1 * alone.norm().item(), rel=1e-4)
    torch.testing.assert_close(found[1] * 2, found[2])
    text_part = prefix_text(tiny_tokenizer())
    assert [text_part.factor(step) for step in (0, 7, 1000)] == [1.0] * 3
    text_part.warmup = 10
    assert [text_part.factor(step) for step in (0, 5, 10, 1000)] == [0.0, 0.5, 1.0, 1.0]


def test_unknown_words_are_named_once_and_not_in_training(caplog: pytest.LogCaptureFixture) -> None:
    vocabulary = fitted().train()
    vocabulary.encode(["a zeppelin"])
    assert not caplog.records and vocabulary.unknown > 0
    vocabulary.eval().unknown = 0
    for _ in range(2):
        vocabulary.encode(["a red circle", "a red zebra"])
    (record,) = caplog.records
    assert "unknown token: zebra" in record.getMessage() and vocabulary.unknown == 2


def test_short_prefixes_count_more_by_the_logarithm_of_their_length() -> None:
    text = prefix_text(tiny_tokenizer())  # lengths 1, 2, 6
    wanted = torch.tensor([1, 1 / 2, 1 / (1 + math.log2(6))])
    torch.testing.assert_close(text.weights, wanted / wanted.sum())


def test_a_picture_without_a_caption_has_no_caption_loss() -> None:
    text = prefix_text(tiny_tokenizer())
    captioner = PrefixCaptioner(64, 12, 6, 4, 32, 1, 2)
    ids, _ = text.vocabulary.encode(["a red circle", "", "a blue square above a green star", ""])
    z = torch.randn(4, 6, 4)

    def loss(rows: list[int]) -> torch.Tensor:
        text.weights.copy_(torch.tensor([1.0, 0.0, 0.0]))  # one length: no chance
        return text.caption_loss(captioner, z[rows], ids[rows])

    torch.testing.assert_close(loss([0, 1, 2, 3]), loss([0, 2]))
    assert loss([1, 3]) == 0 < loss([0])
