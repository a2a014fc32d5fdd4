"""How many latents to draw: the same samples decoded from their first k latents only.

What a prior cannot place is noise in the picture, and a decoder knows what a prefix usually looks like: with fewer
latents pictures lose detail and gain sense. The distance to real pictures has its least value somewhere along the line;
`prior.sample(captions, num_latents=k)` draws just so many, and takes k / K of the time.

Letters: N samples, K latents, C channels, k length, D features.
"""

from typing import Any

from torch import Tensor

from stage1_tokenizer.evaluation.frechet import frechet_distance
from stage1_tokenizer.evaluation.reconstruction_pass import prefix_lengths
from stage2_prior.evaluation.distances import Features
from stage2_prior.evaluation.neighbours import Bank
from stage2_prior.evaluation.sampling import decode_all
from stage2_prior.latent_space import LatentSpace

CHANCE = 0.05  # share of a distance that another seed may make of it: detail is not given up for less


def length_report(
    features: Features,
    bank: Bank,
    names: list[str],
    tokenizer: LatentSpace,
    latents: dict[str, Tensor],
    batch_size: int = 250,
) -> dict[str, Any]:
    """Frechet distance to the held-out pictures, and the share recognised, by k; and the k of the least distance.

    latents: samples (N,K,C) by guidance. names: the shortest caption of each. bank: of the same features.
    """
    reference = bank.features_of_held_out
    out: dict[str, Any] = {"distance": {}, "recognised": {}, "best": {}}
    for guidance, z in latents.items():
        distance, recognised = {}, {}
        for k in prefix_lengths(z.shape[1]):
            drawn = features(decode_all(tokenizer, z[:, :k], batch_size))
            distance[k] = frechet_distance(reference, drawn)
            recognised[k] = bank.recognised(drawn, names)
        out["distance"][guidance], out["recognised"][guidance] = distance, recognised
        out["best"][guidance] = min(distance, key=lambda k: distance[k])
    return out


def worthwhile(distance: dict[int, float]) -> int | None:
    """The k of the least Frechet distance, if that is below the whole line's by more than `CHANCE`; else None."""
    best, whole = min(distance, key=lambda k: distance[k]), max(distance)
    return best if distance[best] < (1 - CHANCE) * distance[whole] else None
