"""Small models that several tests share: real classes, sizes of a few thousand parameters."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stage1_tokenizer.bottleneck import KLBottleneck
from stage1_tokenizer.decoder import ViTDecoder
from stage1_tokenizer.encoder import PatchTrunk, QFormerEncoder
from stage1_tokenizer.linear_path import LinearPath
from stage1_tokenizer.prefixes import PrefixLengths
from stage1_tokenizer.text.contrast import SoftmaxContrast
from stage1_tokenizer.text.readers import PrefixReader
from stage1_tokenizer.text.supervision import PrefixText
from stage1_tokenizer.text.towers import TextTower
from stage1_tokenizer.text.vocabulary import CaptionVocabulary
from stage1_tokenizer.tokenizer import Tokenizer

SIZE, K, C, WIDTH = 16, 6, 4, 32
CAPTIONS = ["a red circle", "a blue square above a green star", "a small red star", "two yellow squares"]


def tiny_tokenizer(text: bool = True, linear_path: bool = False, seed: int = 0) -> Tokenizer:
    """16-pixel tokenizer of 6 x 4 floats in eval mode, all weights away from zero so that every path is alive."""
    torch.manual_seed(seed)
    vocabulary = CaptionVocabulary(64, 12)
    vocabulary.fit(CAPTIONS)
    tokenizer = Tokenizer(
        SIZE,
        QFormerEncoder(PatchTrunk(SIZE, 4, WIDTH, 1, 2, stem_width=8), K, 2, 2),
        KLBottleneck(WIDTH, K, C),
        ViTDecoder(SIZE, 4, K, C, WIDTH, 1, 2, tail_channels=8, tail_depth=1, base=linear_path),
        PrefixLengths(K),
        PrefixText(TextTower(vocabulary, 32, 1, 2, 16), PrefixReader(K, C, 32, 16), SoftmaxContrast(), [1, 2, K])
        if text
        else None,
        LinearPath(SIZE, K, C) if linear_path else None,
    )
    awaken(tokenizer)
    if linear_path:
        with torch.no_grad():
            tokenizer.bottleneck.project.weight[..., :C].normal_(std=WIDTH**-0.5)  # it starts silent
    return tokenizer.eval()


def prefix_text(tokenizer: Tokenizer) -> PrefixText:
    """The tokenizer's text supervision, as the class that it is here."""
    text = tokenizer.text_part()
    assert isinstance(text, PrefixText)
    return text


def awaken(module: torch.nn.Module) -> None:
    """Give zero-initialised matrices small random values: a property that holds only at zero is not one."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim >= 2 and not parameter.any():
                parameter.normal_(std=0.1)


def pictures(n: int = 5, size: int = SIZE, seed: int = 1) -> Tensor:
    """(n,3,size,size) smooth random pictures in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")


TINY_CLIP = "tiny-clip"


def tiny_clip(folder: Path) -> Path:
    """A CLIP model of a million parameters, known to open_clip as `TINY_CLIP`: its weights in a file of `folder`."""
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (folder / f"{TINY_CLIP}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{TINY_CLIP}.json")
    torch.manual_seed(3)
    save_file(open_clip.create_model(TINY_CLIP).state_dict(), folder / "clip.safetensors")
    return folder / "clip.safetensors"


def rows_of(fields: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Some samples of a batch, as a data module's `samples` gives them."""
    return {n: v[rows] if isinstance(v, torch.Tensor) else [v[i] for i in rows] for n, v in fields.items()}


class SmallInception(nn.Module):
    """uint8 pictures -> pooled features and logits, with maps of 4 x 4 where Inception has them of 17 x 17."""

    def __init__(self, *_: object, feature_extractor_weights_path: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.Mixed_6d = nn.ModuleDict({"branch1x1": nn.Conv2d(3, 9, 4, 4)})
        self.pooled, self.fc = nn.Linear(9, 6), nn.Linear(6, 10)
        if feature_extractor_weights_path:
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.dtype == torch.uint8
        x = nn.functional.interpolate(x / 127.5 - 1, (16, 16))
        pooled = self.pooled(self.Mixed_6d["branch1x1"](x).mean((2, 3)))
        return pooled, pooled @ self.fc.weight.T
