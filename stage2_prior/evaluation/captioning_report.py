"""How well a prior reads lines out as captions, for a prior that does (`Prior.caption`).

A reading is right if it is word for word one of the line's captions, as the vocabulary writes them; beside it stands,
as chance, how often it is one of the next line's.

Letters: N lines, K latents, C latent channels.
"""

from typing import Any

import torch
from torch import Tensor

from stage2_prior.base import Prior
from stage2_prior.captions import longest

EXAMPLES = 10  # readings that a report shows


@torch.no_grad()
def captioning_report(prior: Prior, z: Tensor, captions: list[list[str]], batch_size: int = 250) -> dict[str, Any]:
    """Figures of reading lines z (N,K,C) out, each with its captions; {} for a prior that does not read.

    lines: N. right, right_of_the_next_line: shares in [0, 1]. nats_per_token: cross-entropy of the longest caption.
    """
    nats = []
    for at in range(0, len(z), batch_size):
        asked = [longest(c) for c in captions[at : at + batch_size]]
        text = prior.encode_samples(asked, torch.full((len(asked),), -1))
        figures = prior.figures(z[at : at + batch_size], text)
        if "caption" not in figures:
            return {}
        nats.append(figures["caption"].cpu())
    vocabulary = prior.vocabulary
    assert vocabulary is not None, "a prior that reads out has words of its own"
    read = [caption for lines in z.split(batch_size) for caption in prior.caption(lines)]
    own = [set(vocabulary.decode(vocabulary.encode(c or [""])[0])) - {""} for c in captions]
    right = [caption in c for caption, c in zip(read, own, strict=True)]
    by_chance = [caption in c for caption, c in zip(read, own[1:] + own[:1], strict=True)]
    return {
        "lines": len(read),
        "right": sum(right) / len(right),
        "right_of_the_next_line": sum(by_chance) / len(by_chance),
        "nats_per_token": torch.cat(nats).mean().item(),
        "examples": read[:EXAMPLES],
    }
