"""What exact likelihood makes of held-out lines: nats per latent, and how much each latent says about its caption.

Classification by likelihood: a line is scored under its own caption and under those of other pictures; the caption with
the highest log p(z | caption) is the answer. Since log p is a sum over positions, the first k positions classify the
prefix of k latents (where a prior models them first), and the difference of each position, own caption minus the mean
of the others, is in nats how much that latent adds. No sample is drawn and no classifier is asked.
"""

from typing import Any

import torch
from torch import Tensor

from data.reading.order import spread_rows
from stage2_prior.base import Prior
from stage2_prior.latent_space import PriorError

CHOICES = 10  # captions that a line is scored under, its own among them
STEPS = 8  # of the solver; twice as many for the figure in nats, whose error is the difference
CHOICE_STEPS = 4  # captions differ by whole nats, the solver errs by tenths


def likelihood_report(prior: Prior, z: Tensor, captions: list[str]) -> dict[str, Any]:
    """Nats per latent of z (N,K,C), samples of the posterior, with solver steps doubled and not.

    A prior without a density gives {"skipped": why}.
    """
    try:
        coarse, fine = (prior.log_prob(z, captions, steps).cpu() for steps in (STEPS, 2 * STEPS))
    except PriorError as error:
        return {"skipped": str(error)}
    return {
        "lines": len(z),
        "nats_per_latent": -fine.mean().item(),
        "by_position": (-fine.mean(0)).tolist(),
        "solver_error": (fine - coarse).abs().mean().item(),
    }


def classification_report(
    prior: Prior, z: Tensor, captions: list[str], lines: int, labels: Tensor | None = None, seed: int = 0
) -> dict[str, Any]:
    """Accuracy by likelihood of `lines` of z (N,K,C), spread over it, by prefix length, beside chance.

    labels: (N,) where captions name classes; other captions are then of other classes. Ties count as a share.
    A prior without a density, and captions that are all the same, give {"skipped": why}.
    """
    kinds = captions if labels is None or int(labels.min()) < 0 else labels.tolist()
    named = dict(zip(kinds, captions, strict=True))  # one caption of each kind
    choices = min(CHOICES, len(named))
    if choices < 2:
        return {"skipped": "all captions are the same, so there is nothing to choose between."}
    generator = torch.Generator().manual_seed(seed)
    asked: list[str] = []
    rows = spread_rows(len(captions), lines)
    for row in rows:
        others = [c for k, c in named.items() if k != kinds[row]]
        drawn = torch.randperm(len(others), generator=generator)[: choices - 1].tolist()
        asked += [captions[row], *(others[i] for i in drawn)]
    try:
        log_p = prior.log_prob(z[rows].repeat_interleave(choices, 0), asked, CHOICE_STEPS).cpu()
    except PriorError as error:
        return {"skipped": str(error)}
    by_prefix = log_p.double().cumsum(1).unflatten(0, (-1, choices))  # (n, choices, K); the own caption is the first
    best = (by_prefix == by_prefix.amax(1, keepdim=True)).double()
    right = (best[:, 0] / best.sum(1)).mean(0)  # (K,)
    each = log_p.unflatten(0, (-1, choices))
    return {
        "lines": len(each),
        "captions_per_line": choices,
        "chance": 1 / choices,
        "accuracy": right[-1].item(),
        "accuracy_by_prefix": right.tolist(),
        "nats_by_position": (each[:, 0] - each[:, 1:].mean(1)).mean(0).tolist(),
    }
