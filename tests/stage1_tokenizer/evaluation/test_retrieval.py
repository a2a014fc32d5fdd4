"""Retrieval of captions: copies, ties, several vectors of a picture, chance, and bits against closed forms."""

import pytest
import torch

from stage1_tokenizer.evaluation.retrieval import retrieval


def test_retrieval_counts_identical_captions_as_hits() -> None:
    captions = ["a", "b", "b", "c"]
    eye = torch.eye(4)
    swapped = eye[[0, 2, 1, 3]]  # the two pictures of "b" find each other's caption
    result = retrieval(eye, swapped, captions, captions)
    assert result.recall == {1: 1.0, 5: 1.0}
    assert result.chance[1] == pytest.approx((1 + 2 + 2 + 1) / 16)


def test_copies_of_a_wrong_caption_take_one_rank() -> None:
    captions = ["a"] * 5 + ["b"] * 5 + ["c"]
    candidates = torch.eye(3).repeat_interleave(torch.tensor([5, 5, 1]), dim=0)
    query = torch.tensor([[0.9, 0.8, 0.1], [0.1, 0.8, 0.9]])  # right ones: second of "a", third of "c"
    result = retrieval(query, candidates, ["b", "a"], captions, ranks=(1, 2, 3))
    assert result.recall == {1: 0.0, 2: 0.5, 3: 1.0}


def test_retrieval_of_wrong_and_constant_embeddings() -> None:
    captions = [str(i) for i in range(10)]
    eye = torch.eye(10)
    assert retrieval(eye, eye.roll(1, 0), captions, captions, ranks=(1,)).recall[1] == 0
    constant = torch.ones(10, 3)
    result = retrieval(constant, constant, captions, captions)
    assert result.recall == {1: 0.0, 5: 0.0}, "ties must not count as hits"
    assert result.chance[5] == pytest.approx(0.5)


def test_retrieval_ranks() -> None:
    candidates = torch.eye(3)
    queries = torch.tensor([[0.9, 0.5, 0.1], [0.5, 0.4, 0.1], [0.1, 0.9, 0.5]])  # ranks of the right one: 1, 2, 2
    result = retrieval(queries, candidates, ["a", "b", "c"], ["a", "b", "c"], ranks=(1, 2))
    assert result.recall[1] == pytest.approx(1 / 3) and result.recall[2] == 1.0


def test_pictures_are_found_by_captions_too() -> None:
    """A caption that all pictures are nearest to is found by one of them; every picture is found by its caption."""
    captions, eye = [str(i) for i in range(5)], torch.eye(5)
    pictures = torch.nn.functional.normalize(eye + 2 * eye[:1], dim=1)
    result = retrieval(pictures, eye, captions, captions, ranks=(1, 2))
    assert result.recall == {1: pytest.approx(0.2), 2: 1.0} and result.reverse == {1: 1.0, 2: 1.0}
    other = retrieval(eye, pictures, captions, captions, ranks=(1, 2))
    assert other.recall == result.reverse and other.reverse == result.recall
    broken = retrieval(pictures.clone().index_fill_(0, torch.tensor([3]), float("nan")), eye, captions, captions)
    assert broken.reverse[1] == pytest.approx(0.8)


def test_embeddings_that_are_not_numbers_have_no_hit() -> None:
    captions, eye = [str(i) for i in range(8)], torch.eye(8)
    broken = eye.clone()
    broken[0], broken[1, 3] = float("nan"), float("inf")
    one, all_of_them = (
        retrieval(broken, eye, captions, captions),
        retrieval(eye * float("nan"), eye, captions, captions),
    )
    assert one.recall == {1: 0.75, 5: 0.75} and all_of_them.recall == {1: 0.0, 5: 0.0}
    assert one.bits == pytest.approx(0.75 * 3, abs=0.01) and all_of_them.bits == 0, "the others still count"
    few = retrieval(eye[:2] * float("nan"), eye[:2], captions[:2], captions[:2])
    assert few.recall == {1: 0.0, 5: 0.0}, "nor among fewer candidates than are looked at"


def test_the_best_of_several_vectors_of_a_query_counts() -> None:
    captions, eye = [str(i) for i in range(6)], torch.eye(6)
    wrong = eye.roll(1, 0)
    queries = torch.stack([0.5 * wrong, eye], dim=1)  # (Q, 2, E)
    assert retrieval(queries, eye, captions, captions).recall[1] == 1.0
    assert retrieval(queries[:, :1], eye, captions, captions).recall[1] == 0.0


def test_caption_bits_of_perfect_useless_and_grouped_embeddings() -> None:
    captions = [str(i) for i in range(64)]
    perfect = retrieval(torch.eye(64), torch.eye(64), captions, captions)
    assert perfect.bits == pytest.approx(6, abs=0.01) and perfect.most_bits == pytest.approx(6)
    constant = torch.ones(64, 2) / 2**0.5
    assert retrieval(constant, constant, captions, captions).bits == pytest.approx(0, abs=1e-6)
    assert retrieval(torch.eye(64), torch.eye(64).roll(1, 0), captions, captions).bits == 0, "wrong is not negative"
    groups = torch.eye(8).repeat_interleave(8, dim=0)  # the group of eight is known, the one in it is not: 3 bits
    assert retrieval(groups, groups, captions, captions).bits == pytest.approx(3, abs=0.01)
    shared = [str(i // 8) for i in range(64)]
    result = retrieval(groups, groups, shared, shared)
    assert result.bits == pytest.approx(3, abs=0.01) and result.most_bits == pytest.approx(3)


def test_retrieval_chance_is_what_random_embeddings_reach() -> None:
    generator = torch.Generator().manual_seed(0)
    captions = [str(i % 40) for i in range(400)]
    a, b = (torch.randn(400, 8, generator=generator) for _ in range(2))
    result = retrieval(a, b, captions, captions, ranks=(5,))
    assert result.recall[5] == pytest.approx(result.chance[5], abs=0.05)
    assert 0.1 < result.chance[5] < 0.13
