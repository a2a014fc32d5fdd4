"""A released KL autoencoder as a latent space: the grid of latents that latent diffusion and MAR are trained on.

    images (B,3,S,S) --AutoencoderKL--> mean, std (B,c,h,w) --cells row by row--> (B,K,C) --statistics--> z

An `AutoencoderKL` of `diffusers` is read from its folder once, weights from safetensors only; the export holds its
config and weights, so that priors need the folder no more. The grid has no order of its own: use a MaskedPrior (Li et
al. 2024), or raster, spiral or zigzag. A prefix decodes with the missing cells at their mean.

    python -m stage2_prior autoencoder --run_dir runs/kl16 --data runs/NAME/data --image_size 256 --folder KL16

Letters: B batch, K = h w cells, C = c p^2 channels of p x p cells, S side of the picture.
"""

import argparse
import json
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.latent_space import PriorError
from stage2_prior.variants.fixed_latents import FixedLatents, arguments, run, with_weights

KIND = "AutoencoderKL"


class AutoencoderLatents(FixedLatents):
    """Latents of an AutoencoderKL.

    Args:
        image_size: S.
        folder: of the autoencoder, config.json and *.safetensors; not recorded.
        config: what config.json holds, in place of a folder; the weights are then those of an export.
        cells: p: so many cells a side make one latent.

    Raises:
        PriorError: a folder of another kind of model or without safetensors, a size that does not fit.
    """

    unrecorded: ClassVar[dict[str, Any]] = {"folder": None}

    def __init__(
        self, image_size: int = 256, folder: str | None = None, config: dict[str, Any] | None = None, cells: int = 1
    ):
        if (folder is None) == (config is None):
            raise PriorError("got folder and config of an autoencoder, or neither; give the folder that it is in.")
        config = read_config(Path(folder)) if folder is not None else dict(config or {})
        factor = 2 ** (len(config.get("block_out_channels", [1])) - 1)
        if cells < 1 or image_size % (factor * cells):
            raise PriorError(
                f"got pictures of {image_size} for an autoencoder that halves them to 1/{factor} and latents of"
                f" {cells} x {cells} cells; wanted a multiple of {factor * max(cells, 1)}."
            )
        self.side, channels = image_size // factor // cells, config.get("latent_channels", 4) * cells**2
        super().__init__(image_size, self.side**2, channels, f"autoencoder {image_size} {cells}")
        self.cells = cells
        self.spec["init_args"]["config"] = config
        self.autoencoder = load_autoencoder(config, folder).requires_grad_(False)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.autoencoder.encode(images).latent_dist
        return self.line(posterior.mean), self.line(posterior.std)

    def cut(self, images: Tensor) -> Tensor:
        return self.moments(images)[0]

    def line(self, grid: Tensor) -> Tensor:
        """(B,c,h,w) -> (B,K,C)."""
        return F.pixel_unshuffle(grid.float(), self.cells).flatten(2).transpose(1, 2)

    def join(self, latents: Tensor) -> Tensor:
        grid = latents.transpose(1, 2).unflatten(2, (self.side, self.side))
        return self.autoencoder.decode(F.pixel_shuffle(grid, self.cells)).sample.float()

    @property
    def fingerprint(self) -> str:
        """Statistics and weights."""
        return with_weights(super().fingerprint, self.autoencoder)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of the autoencoder in `folder`, without notes of the library. Raises PriorError for another kind."""
    if not (folder / "config.json").is_file():
        raise PriorError(f"no config.json in {folder}; wanted the folder of an {KIND}, as diffusers saves it.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise PriorError(f"{folder}/config.json is no JSON ({error}); download it again.") from None
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind != KIND:
        raise PriorError(f"{folder} holds a {kind}, wanted an {KIND}: name the `vae` folder of a model.")
    return {name: value for name, value in config.items() if not name.startswith("_")}


def load_autoencoder(config: dict[str, Any], folder: str | None) -> Any:
    """The AutoencoderKL of a folder, or one of `config` whose weights are not there yet."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise PriorError("an AutoencoderKL needs `pip install unspool[autoencoder]`.") from None
    if folder is None:
        return AutoencoderKL.from_config(config)
    if not any(Path(folder).glob("*.safetensors")):
        raise PriorError(f"no *.safetensors in {folder}; other files of weights are not read, since they can run code.")
    return AutoencoderKL.from_pretrained(folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32)


def main(words: list[str] | None = None) -> int:
    parser = arguments("autoencoder", "Latents of a KL autoencoder, a grid row by row.")
    parser.add_argument("--folder", required=True, help="config.json and safetensors of an AutoencoderKL")
    parser.add_argument("--cells", type=int, default=1, help="cells a side that make one latent")

    def build(options: argparse.Namespace) -> FixedLatents:
        return AutoencoderLatents(options.image_size, options.folder, cells=options.cells)

    return run(parser, words, build)
