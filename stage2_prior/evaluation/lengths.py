"""How many latents to draw: the same samples decoded from their first k latents only.

What a prior cannot place is noise in the picture, and a decoder knows what a prefix usually looks like: with fewer
latents pictures lose detail and gain sense. The distance to real pictures has its least value somewhere along the line;
`prior.sample(captions, num_latents=k)` draws just so many, and takes k / K of the time.

Letters: B samples, K latents, C channels, k length.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stage1_tokenizer.evaluation.frechet import FeatureExtractor, Moments, frechet_distance
from stage1_tokenizer.evaluation.picture_set import features_of
from stage1_tokenizer.evaluation.reconstruction_pass import prefix_lengths
from stage1_tokenizer.text.ranks import of_others
from stage2_prior.evaluation.neighbours import Bank
from stage2_prior.evaluation.sampling import space_device
from stage2_prior.latent_space import LatentSpace

CHANCE = 0.05  # share of a distance that another seed may make of it: detail is not given up for less


class Lengths:
    """Takes in drawn lines batch by batch and decodes them at every length.

    extractor: of the features of `bank`.
    """

    def __init__(self, extractor: FeatureExtractor, bank: Bank, tokenizer: LatentSpace, num_latents: int) -> None:
        self.extractor, self.bank, self.tokenizer, self.n = extractor, bank, tokenizer, 0
        self.moments = {k: Moments() for k in prefix_lengths(num_latents)}
        self.recognised = dict.fromkeys(self.moments, 0)

    def add(self, z: Tensor, names: Sequence[str]) -> None:
        """z (B,K,C), and the shortest caption of each that was asked for."""
        z = z.to(space_device(self.tokenizer))
        for k, moments in self.moments.items():
            features = features_of(self.extractor, self.tokenizer.decode(z[:, :k]))
            moments.add(features)
            self.recognised[k] += self.bank.recognised(features, names)
        self.n += len(z)

    def over_ranks(self) -> None:
        """Take in what the other ranks have taken in; all of them have to call it."""
        for n, moments, recognised in of_others((self.n, self.moments, self.recognised)):
            self.n += n
            for k, own in self.moments.items():
                own.merge(moments[k])
                self.recognised[k] += recognised[k]


def length_report(drawn: dict[str, Lengths], reference: Moments) -> dict[str, Any]:
    """Frechet distance to the held-out pictures, and the share recognised, by k; and the k of the least distance.

    drawn: by guidance. reference: of the features of the held-out pictures.
    """
    out: dict[str, Any] = {"distance": {}, "recognised": {}, "best": {}}
    for guidance, lines in drawn.items():
        distance = {k: frechet_distance(reference, moments) for k, moments in lines.moments.items()}
        out["distance"][guidance] = distance
        out["recognised"][guidance] = {k: count / lines.n for k, count in lines.recognised.items()}
        out["best"][guidance] = min(distance, key=lambda k: distance[k])
    return out


def worthwhile(distance: dict[int, float]) -> int | None:
    """The k of the least Frechet distance, if that is below the whole line's by more than `CHANCE`; else None."""
    best, whole = min(distance, key=lambda k: distance[k]), max(distance)
    return best if distance[best] < (1 - CHANCE) * distance[whole] else None
