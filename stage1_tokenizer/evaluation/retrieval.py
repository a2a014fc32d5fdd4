"""Retrieval of captions by pictures: how often the right one comes first, and how many bits a picture gives about it.

Recall at R says what a user sees, and saturates: once every picture finds its caption, a better embedding shows no
more. Bits do not: they are a lower bound of the mutual information between a picture's embedding and its caption, from
the likelihood of the right one among the candidates. Both stand beside what chance gives, since captions that several
pictures share make chance larger than 1 / M.

Letters: Q queries, M candidates, D different captions, P vectors of one picture, E width of an embedding.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Retrieval:
    """How well queries retrieve their captions, beside what chance gives."""

    recall: dict[int, float]  # R -> share of queries with a hit among the first R candidates, in [0, 1]
    reverse: dict[int, float]  # R -> share of candidates with a hit among the first R queries
    chance: dict[int, float]  # R -> the same for candidates in random order
    bits: float  # information of a query about its caption, a lower bound
    most_bits: float  # the entropy of the captions, an upper bound of `bits`
    num_queries: int
    num_candidates: int


def retrieval(
    queries: Tensor,
    candidates: Tensor,
    query_captions: Sequence[str],
    candidate_captions: Sequence[str],
    ranks: Sequence[int] = (1, 5),
) -> Retrieval:
    """Recall at R of captions by pictures, and reverse: queries (Q, E) or (Q, P, E), candidates (M, E), unit vectors.

    Of a query's P vectors the best one counts (`similarities`). A query with a similarity that is not finite has no
    hit and gives no bits.

    A candidate is a hit if its words equal the query's caption: different pictures may share a caption word by word,
    and then either copy is right. Copies take one rank together. Ties in similarity count against the query (a constant
    embedding scores like the worst order, not like the best). Chance is exact for R of the M candidates drawn at
    random, copies among them: 1 - C(M - h, R) / C(M, R) for a query with h hits.

    `bits` is the likelihood of the captions: with p = softmax(similarity / T) over the candidates, the mean over
    queries of log2 of p(hits) against the share of hits, a lower bound of the mutual information (van den Oord et al.
    2018, equation 9). The one temperature T is the best of a grid; T = infinity is on it, so bits are not negative.

    Raises ValueError unless there is one caption for each query and each candidate.
    """
    if len(query_captions) != len(queries) or len(candidate_captions) != len(candidates):
        raise ValueError(
            f"got {len(query_captions)} and {len(candidate_captions)} captions for {len(queries)} queries and "
            f"{len(candidates)} candidates, wanted one caption for each; leave out what has none"
        )
    ids = {caption: index for index, caption in enumerate(dict.fromkeys([*candidate_captions, *query_captions]))}
    candidate_ids = torch.tensor([ids[caption] for caption in candidate_captions])
    query_ids = torch.tensor([ids[caption] for caption in query_captions])
    hits = query_ids[:, None] == candidate_ids[None]  # (Q, M)
    similarity = similarities(queries.float().cpu(), candidates.float().cpu())  # (Q, M)
    finite = similarity.isfinite().all(dim=1)[:, None]  # NaN >= NaN is false: nothing would be ahead of the right one
    ranked = similarity.where(finite, -math.inf)
    recall, reverse = _recall(ranked, hits, candidate_ids, ranks), _recall(ranked.T, hits.T, query_ids, ranks)
    bits = _information(similarity.where(finite, 0.0), hits)
    chance = _chance(hits.sum(dim=1), len(candidates), ranks)
    return Retrieval(recall, reverse, chance, *bits, len(queries), len(candidates))


def _recall(similarity: Tensor, hits: Tensor, groups: Tensor, ranks: Sequence[int]) -> dict[int, float]:
    """Share of rows with a hit among the first R; similarity and hits (Q, M), groups (M,): columns that take one rank.

    A row whose hits are all at minus infinity has none.
    """
    best_hit = similarity.masked_fill(~hits, -math.inf).amax(dim=1, keepdim=True)
    distinct = similarity.new_full((len(similarity), int(groups.max()) + 1), -math.inf)  # (Q, D)
    distinct = distinct.scatter_reduce(1, groups.expand(len(similarity), -1), similarity, "amax")
    ahead = (distinct >= best_hit).sum(dim=1) - 1  # (Q,) wrong ones that come first; - 1 is the right one itself
    ahead = ahead.masked_fill(best_hit[:, 0].isneginf(), 2**31)  # beyond every rank
    return {rank: (ahead < rank).float().mean().item() for rank in ranks}


def similarities(pictures: Tensor, texts: Tensor) -> Tensor:
    """Scalar products (N, M) of pictures (N, E) and texts (M, E); of P vectors per picture, (N, P, E), the largest."""
    vectors = (pictures,) if pictures.ndim == 2 else pictures.unbind(dim=1)  # P of (N, E)
    return functools.reduce(torch.maximum, (each @ texts.T for each in vectors))


def _information(similarity: Tensor, hits: Tensor) -> tuple[float, float]:
    """Bits of queries about their captions at the best temperature, and the entropy of these captions; (Q, M) both.

    Queries without a hit have no likelihood to take and are left out.
    """
    has_hit = hits.any(dim=1)
    if not has_hit.any():
        return 0.0, 0.0
    similarity, hits = similarity[has_hit].double(), hits[has_hit]
    prior = hits.double().mean(dim=1).log2()  # (Q,)
    best = 0.0
    for scale in torch.logspace(-1, 2.5, 36).tolist():  # 1 / T
        log_p = (scale * similarity).log_softmax(dim=1)
        bits = log_p.masked_fill(~hits, -math.inf).logsumexp(dim=1) / math.log(2) - prior
        best = max(best, bits.mean().item())
    return best, -prior.mean().item()


def _chance(hits_per_query: Tensor, num_candidates: int, ranks: Sequence[int]) -> dict[int, float]:
    """Mean over queries of the chance to draw at least one hit in R draws without replacement."""
    chance = {}
    for rank in ranks:
        miss = torch.ones(len(hits_per_query), dtype=torch.float64)
        for drawn in range(min(rank, num_candidates)):
            miss *= ((num_candidates - hits_per_query - drawn).clamp_min(0) / (num_candidates - drawn)).double()
        chance[rank] = 1 - miss.mean().item()
    return chance
