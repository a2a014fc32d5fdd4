"""Any timm vision transformer as the patch trunk of an encoder."""

from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from torch import Tensor, nn

from stage1_tokenizer.spec import Spec


class TimmTrunk(Spec, nn.Module):
    """images (B,3,H,W) in [-1,1] -> patches (B,N,D) of a timm vision transformer, class and register tokens left out.

    Args:
        name: timm model name, such as `vit_small_patch16_224` or `vit_base_patch14_reg4_dinov2.lvd142m`.
        image_size: side of the images; position embeddings are resampled to it.
        checkpoint: file with weights (.safetensors, or a .pth of plain tensors); None starts from random weights or,
            with `pretrained`, from timm's own.
        pretrained: take timm's weights for `name` from the Hub or its cache.
        frozen: keep the trunk as it is and train what reads it.
    Raises FileNotFoundError for a missing checkpoint, ValueError for a model that does not give a square patch grid.
    """

    unrecorded: ClassVar[dict[str, Any]] = {"checkpoint": None, "pretrained": False}
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str = "vit_small_patch16_224",
        image_size: int = 224,
        checkpoint: str | None = None,
        pretrained: bool = False,
        frozen: bool = False,
    ):
        super().__init__()
        if checkpoint is not None and not Path(checkpoint).is_file():
            raise FileNotFoundError(f"{checkpoint} does not exist; wanted weights of {name}, or checkpoint: null.")
        self.model = timm.create_model(
            name, pretrained=pretrained, checkpoint_path=checkpoint or "", img_size=image_size, num_classes=0
        )
        self.image_size, self.width, self.frozen = image_size, self.model.num_features, frozen
        with torch.no_grad():
            tokens = self.model.forward_features(torch.zeros(1, 3, image_size, image_size))
        self.prefix = getattr(self.model, "num_prefix_tokens", 0)
        self.num_patches = tokens.shape[1] - self.prefix if tokens.ndim == 3 else 0
        if self.num_patches < 1 or round(self.num_patches**0.5) ** 2 != self.num_patches:
            raise ValueError(f"{name} gives features {tuple(tokens.shape)}; wanted a vision transformer's (1, N, D).")
        config = self.model.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config.get("mean", (0.5, 0.5, 0.5))).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.get("std", (0.5, 0.5, 0.5))).view(3, 1, 1), persistent=False)
        self.requires_grad_(not frozen)

    def forward(self, images: Tensor) -> Tensor:
        x = ((images + 1) / 2 - self.mean) / self.std  # what the model was trained on
        return self.model.forward_features(x)[:, self.prefix :]  # (B,N,D)
