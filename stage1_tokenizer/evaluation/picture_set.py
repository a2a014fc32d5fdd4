"""What a report keeps of a set of pictures that goes by in batches: numbers, and the pixels of the few that are shown.

    pictures = PictureSet(extractors, sample=spread_rows(50_000, 2_000), shown=range(8))
    for images in ...: pictures.add(images)
    frechet_distance(pictures.moments[name], others.moments[name])

Of all pictures: the moments of their features (D + D^2 sums), and what a classifier among the extractors reads in them.
Of a sample: their features, one row each, for what moments do not give (neighbours, subsets). So memory does not grow
with the number of pictures but for the readings, two bytes for each thing that is read.

Letters: N pictures, M of them in the sample, D features, S slots (things that are read).
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from stage1_tokenizer.evaluation.classifier import Classifier
from stage1_tokenizer.evaluation.frechet import FeatureExtractor, ImageNetFeatures, Moments
from stage1_tokenizer.evaluation.inception import InceptionFeatures, InceptionSums
from stage1_tokenizer.text.ranks import of_others

PIXELS = 2**20  # of pictures whose features are taken at once: 1,024 pictures at 32 pixels, 16 at 256


@torch.inference_mode()
def features_of(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) -> features (B, D) on the CPU, a few at a time: maps of large pictures are large."""
    return torch.cat([extractor.features(part).cpu() for part in images.split(parts_of(images))])


def parts_of(images: Tensor) -> int:
    """How many of these pictures go through a network at once."""
    return max(1, PIXELS // (images.shape[-1] * images.shape[-2]))


class PictureSet:
    """Takes in pictures batch by batch.

    Args:
        extractors: of features.
        sample: numbers of the pictures, in the order in which they come, whose features are kept one by one.
        shown: numbers of the pictures whose pixels are kept.
    """

    def __init__(
        self, extractors: Sequence[FeatureExtractor], sample: Collection[int] = (), shown: Collection[int] = ()
    ) -> None:
        self.extractors, self.sample, self.shown, self.n = list(extractors), set(sample), set(shown), 0
        self.inception = InceptionSums()  # of Inception's other features, where it is among the extractors
        self.moments = {
            x.feature_name: self.inception.pooled if isinstance(x, InceptionFeatures) else Moments() for x in extractors
        }
        self._rows: dict[str, dict[int, Tensor]] = {x.feature_name: {} for x in extractors}  # by the first's number
        self._readings: dict[str, dict[int, Tensor]] = {x.feature_name: {} for x in extractors}
        self.pictures: dict[int, Tensor] = {}  # number -> (3, H, W), of those that are shown

    def add(self, images: Tensor, at: int | None = None) -> dict[str, Tensor]:
        """Take in pictures (B, 3, H, W) in [-1, 1]; returns their features (B, D) by extractor.

        at: number of the first, None where they come one after another.
        """
        at = self.n if at is None else at
        sampled = [i for i in range(len(images)) if at + i in self.sample]
        self.pictures |= {at + i: images[i].cpu().clone() for i in range(len(images)) if at + i in self.shown}
        features = {x.feature_name: self.taken_in(x, images, at) for x in self.extractors}
        for x in self.extractors:
            own = features[x.feature_name]
            if sampled:
                self._rows[x.feature_name][at] = own[sampled]
            if isinstance(x, (Classifier, ImageNetFeatures)):
                with torch.inference_mode():
                    device = x.heads.weight.device if isinstance(x, Classifier) else own.device
                    self._readings[x.feature_name][at] = x.read(own.to(device)).cpu().to(torch.int16)
        self.n += len(images)
        return features

    def over_ranks(self) -> None:
        """Take in what the other ranks have taken in; all of them have to call it, each has given its own numbers."""
        own = (self.n, self.moments, self.inception, self._rows, self._readings, self.pictures)
        for n, moments, inception, rows, readings, pictures in of_others(own):
            self.n += n
            self.pictures |= pictures
            self.inception.merge(inception)
            for name, other in moments.items():
                if self.moments[name] is not self.inception.pooled:
                    self.moments[name].merge(other)
                self._rows[name] |= rows[name]
                self._readings[name] |= readings[name]
        self.pictures = dict(sorted(self.pictures.items()))

    def taken_in(self, extractor: FeatureExtractor, images: Tensor, at: int) -> Tensor:
        """Features (B, D), which the moments have then taken in."""
        if isinstance(extractor, InceptionFeatures):
            parts = (extractor.all_features(part) for part in images.split(parts_of(images)))
            pooled, spatial, logits = (torch.cat(x).cpu() for x in zip(*parts, strict=True))
            self.inception.add(pooled, spatial, logits, at)
            return pooled
        features = features_of(extractor, images)
        self.moments[extractor.feature_name].add(features)
        return features

    def rows(self, name: str) -> Tensor:
        """Features (M, D) of the sample."""
        return torch.cat([self._rows[name][at] for at in sorted(self._rows[name])])

    def readings(self, name: str) -> Tensor:
        """What a classifier reads, (N, S) class indices."""
        return torch.cat([self._readings[name][at] for at in sorted(self._readings[name])]).long()
