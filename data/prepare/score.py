"""Image-text score of a pair: the cosine between the embeddings of an open_clip model given by path.

Nothing is downloaded: the weights are a file, and the model is one of open_clip's names or a json of its configuration.
The score is a filter of `prepare`, optional, and by far its slowest step. This module imports torch and open_clip.
"""

from __future__ import annotations

from pathlib import Path

import open_clip
import torch

from data.pictures.decode import decode
from data.schema import DataError


class ImageTextScore:
    """Scores pairs with a model loaded once.

    Args:
        model: a name of open_clip ("ViT-B-32"), or the path of a json configuration.
        weights: a file that open_clip loads (.pt or .safetensors).

    Raises:
        DataError: the model is unknown, or the weights are missing or of another model.
    """

    def __init__(self, model: str, weights: str) -> None:
        if not Path(weights).is_file():
            raise DataError(f"no weights at {weights}; --score-weights wants a file that open_clip can load")
        name = model
        if model.endswith(".json"):
            if not Path(model).is_file():
                raise DataError(f"no model configuration at {model}; check --score-model")
            open_clip.add_model_config(model)
            name = Path(model).stem
        if name not in open_clip.list_models():
            raise DataError(f"open_clip knows no model {name!r}; give one of its names or a json configuration")
        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
        except (RuntimeError, ValueError, OSError) as error:
            raise DataError(f"{weights} does not fit {name}: {str(error)[:200]}") from error
        self.tokenize = open_clip.get_tokenizer(name)
        self.model.eval()

    @torch.inference_mode()
    def __call__(self, pictures: list[bytes], captions: list[str]) -> list[float]:
        """Return the score, -1 to 1, of every encoded picture with the caption at the same place."""
        images = torch.stack([self.preprocess(decode(data)) for data in pictures])  # (B, 3, S, S)
        image = self.model.encode_image(images, normalize=True)  # (B, E)
        text = self.model.encode_text(self.tokenize(captions), normalize=True)  # (B, E)
        return [float(value) for value in (image * text).sum(1)]
