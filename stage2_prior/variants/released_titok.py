"""A released TiTok or TA-TiTok as a latent space: 32 to 128 continuous latents of 256 pixels, trained on millions.

    images (B,3,S,S) --ViT over [class, patches, latent queries]--> mean, std (B,K,C) --statistics--> z
    z (B,k,C) --ViT over [class, mask tokens, latents, text]--> patches --3 x 3 convolution--> images

The KL models of Yu et al. 2024 (arXiv 2406.07550) and Kim et al. 2025 (arXiv 2501.07730, "text-aware": their decoder
reads a caption as well) are read from their folders once, config.json and safetensors; the export holds sizes and
weights, so that priors need the folder no more. These latents were not trained in any order: causal priors take them as
numbered, `RandomOrder` and `MaskedPrior` ask for none. A prefix decodes with the missing latents at their mean. The
decoder of a text-aware model reads one caption for all pictures, given when the folder is read.

    python -m stage2_prior titok --run_dir runs/titok --data runs/imagenet256/data --image_size 256 --folder TITOK

Letters: B batch, K latents, C channels, N patches, D width, L tokens of text, S side of the picture.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stage1_tokenizer.agreement import is_count
from stage1_tokenizer.text.towers import OpenClipTower, WholeVocabulary, token_features
from stage2_prior.latent_space import PriorError
from stage2_prior.variants.fixed_latents import FixedLatents, arguments, run, with_weights

SIZES = {"small": [512, 8, 8], "base": [768, 12, 12], "large": [1024, 24, 16]}  # width, depth, heads
COUNTS = ("image_size", "num_latents", "latent_dim", "patch_size")
TEXT_MODEL = "ViT-L-14-336-quickgelu"  # text-aware decoders were trained with its tokens
RENAMED = (  # what a name in the released files begins with or contains, and what it is here
    ("latent_tokens", "queries"),
    ("encoder.patch_embed.", "patches."),
    ("encoder.conv_out.", "moment."),
    ("decoder.decoder_embed.", "inputs."),
    ("decoder.mask_token", "mask_token"),
    ("decoder.ffn.0.", "pixels."),
    ("decoder.conv_out.", "smooth."),
    ("decoder.text_guidance_proj.", "text."),
    ("decoder.text_guidance_positional_embedding", "text_position"),
    (".transformer.", ".layers."),
    (".attn.", ".self_attn."),
    (".mlp.c_fc.", ".linear1."),
    (".mlp.c_proj.", ".linear2."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
)
OWN = ("latent_mean", "latent_scale", "text_tokens")  # not in the released files


class ReleasedTiTok(FixedLatents):
    """Latents of a released TiTok or TA-TiTok with a KL bottleneck.

    Args:
        image_size: S, the model's own.
        folder: of the model, config.json and model.safetensors; not recorded.
        config: what `read_folder` makes of config.json, in place of a folder; the weights are then those of an export.
        clip: file with weights of open_clip's ViT-L-14-336, for text-aware models; not recorded.
        caption: what a text-aware decoder reads, for every picture.

    Raises:
        PriorError: a folder of another kind of model or without safetensors, weights that do not fit, another size, a
            text-aware model without `clip`. FileNotFoundError: no file at `clip`.
    """

    unrecorded: ClassVar[dict[str, Any]] = {"folder": None, "clip": None}

    def __init__(
        self,
        image_size: int = 256,
        folder: str | None = None,
        config: dict[str, Any] | None = None,
        clip: str | None = None,
        caption: str = "A photo.",
    ):
        if (folder is None) == (config is None):
            raise PriorError("got folder and config of a TiTok, or neither; give the folder that it is in.")
        weights: dict[str, Tensor] = {}
        if folder is not None:
            config, weights = read_folder(Path(folder))
        self.config = dict(config or {})
        size, k, c, p = (self.config[name] for name in COUNTS)
        if image_size != size:
            raise PriorError(f"got pictures of {image_size} for a TiTok of {size}; set image_size to {size}.")
        super().__init__(size, k, c, f"titok {size} {k} {c}")
        self.spec["init_args"]["config"] = self.config
        self.encoder = Transformer(self.config["encoder"], (size // p) ** 2, k)
        self.decoder = Transformer(self.config["decoder"], (size // p) ** 2, k)
        width = self.decoder.width
        self.patches = nn.Conv2d(3, self.encoder.width, p, stride=p)
        self.queries = nn.Parameter(torch.zeros(k, self.encoder.width))
        self.moment = nn.Linear(self.encoder.width, 2 * c)
        self.inputs = nn.Linear(c, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pixels = nn.Linear(width, 3 * p * p)
        self.smooth = nn.Conv2d(3, 3, 3, padding=1)
        self.text: nn.Linear | None = None
        if self.config["text"]:
            length, features = self.config["text"]
            self.text, self.text_position = nn.Linear(features, width), nn.Parameter(torch.zeros(length, width))
            self.register_buffer("text_tokens", torch.zeros(length, features))
            self.text_tokens: Tensor
        if folder is not None:
            self.take(weights, folder)
            if self.text is not None:
                self.text_tokens.copy_(read_caption(caption, clip, self.text_tokens.shape))
        self.requires_grad_(False)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.patches((images + 1) / 2).flatten(2).transpose(1, 2)  # (B,N,D) of pixels in [0,1]
        latents = self.encoder(patches, self.queries.expand(len(images), -1, -1))[:, patches.shape[1] :]  # (B,K,D)
        mean, log_variance = self.moment(latents).chunk(2, -1)
        return mean, (log_variance.clamp(-30, 20) / 2).exp()

    def cut(self, images: Tensor) -> Tensor:
        return self.moments(images)[0]

    def join(self, latents: Tensor) -> Tensor:
        p = self.config["patch_size"]
        side = self.image_size // p
        text = None if self.text is None else self.text(self.text_tokens) + self.text_position  # (L,D)
        x = self.decoder(self.mask_token.expand(len(latents), side * side, -1), self.inputs(latents), text)
        x = self.pixels(x[:, : side * side]).unflatten(2, (p * p, 3))  # (B,N,pp,3)
        x = x.transpose(2, 3).flatten(2).transpose(1, 2).unflatten(2, (side, side))  # (B,3pp,S/p,S/p)
        return self.smooth(F.pixel_shuffle(x, p)) * 2 - 1

    def take(self, weights: dict[str, Tensor], folder: str) -> None:
        """Load a released file's weights. Raises PriorError where names or shapes are not those of the config."""
        state = {renamed(name): tensor for name, tensor in weights.items()}
        for name in {"moment.weight", "pixels.weight"} & set(state):  # 1 x 1 convolutions there
            state[name] = state[name].flatten(1)
        wanted = {name: tensor.shape for name, tensor in self.state_dict().items() if name not in OWN}
        got = {name: tensor.shape for name, tensor in state.items()}
        if got != wanted:
            odd = min(name for name, _ in got.items() ^ wanted.items())
            raise PriorError(f"{folder} has weights that are not those of its config.json ({odd}); download it again.")
        self.load_state_dict(state, strict=False)

    @property
    def fingerprint(self) -> str:
        """Statistics and weights."""
        return with_weights(super().fingerprint, self)


class Transformer(nn.Module):
    """TiTok's vision transformer: everything sees everything, pre-norm blocks between two norms.

    forward(grid (B,N,D), latents (B,K,D), text (L,D) or None) -> what became of [grid, latents] (B,N+K,D).
    size: width, depth and heads.
    """

    def __init__(self, size: Sequence[int], num_patches: int, num_latents: int):
        super().__init__()
        width, depth, heads = size
        self.width = width
        self.class_embedding = nn.Parameter(torch.zeros(1, width))
        self.positional_embedding = nn.Parameter(torch.zeros(num_patches + 1, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.zeros(num_latents, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )

    def forward(self, grid: Tensor, latents: Tensor, text: Tensor | None = None) -> Tensor:
        b, n, k = len(grid), grid.shape[1], latents.shape[1]
        cells = torch.cat([self.class_embedding.expand(b, -1, -1), grid], 1) + self.positional_embedding  # (B,1+N,D)
        x = torch.cat([cells, latents + self.latent_token_positional_embedding], 1)
        if text is not None:
            x = torch.cat([x, text.expand(b, -1, -1)], 1)
        x = self.ln_pre(x)
        for layer in self.layers:
            x = layer(x)
        return self.ln_post(x[:, 1 : 1 + n + k])


def renamed(name: str) -> str:
    """A name in the released files -> its name here."""
    for there, here in RENAMED:
        if name.startswith(there) or there.startswith("."):
            name = name.replace(there, here)
    return name


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, weights): sizes as the constructor wants them, tensors as the file has them. Raises PriorError."""
    path, file = folder / "config.json", folder / "model.safetensors"
    if not path.is_file():
        raise PriorError(f"no config.json in {folder}; wanted the folder of a TiTok, as the Hub has it.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        model, size = found["model"]["vq_model"], found["dataset"]["preprocessing"]["crop_size"]
        config = {
            "image_size": size,
            "num_latents": model["num_latent_tokens"],
            "latent_dim": model["token_size"],
            "patch_size": model["vit_enc_patch_size"],
            "encoder": SIZES[model["vit_enc_model_size"]],
            "decoder": SIZES[model["vit_dec_model_size"]],
        }
        patches_agree = model["vit_dec_patch_size"] == config["patch_size"]
        if not all(is_count(config[name]) and config[name] > 0 for name in COUNTS):
            raise ValueError(f"{', '.join(COUNTS)} are to be whole numbers")
    except (ValueError, LookupError, TypeError) as error:
        raise PriorError(f"{path} is not that of a TiTok ({error!r:.100}); download it again.") from None
    kind = {"quantize_mode": model.get("quantize_mode", "vq"), "is_legacy": model.get("is_legacy", True)}
    if kind != {"quantize_mode": "vae", "is_legacy": False} or not patches_agree:
        raise PriorError(
            f"{folder} holds a TiTok of quantize_mode {kind['quantize_mode']}, wanted one with a KL bottleneck and a"
            " pixel decoder (vae, is_legacy false, one patch size), such as titok_bl128_vae_c16 or tatitok_bl32_vae."
        )
    if not file.is_file():
        raise PriorError(f"no {file.name} in {folder}; other files of weights are not read, since they can run code.")
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise PriorError(f"{file} cannot be read ({error}); download it again.") from None
    place, reader = (weights.get(f"decoder.text_guidance_{name}") for name in ("positional_embedding", "proj.weight"))
    config["text"] = [len(place), reader.shape[1]] if place is not None and reader is not None else None
    return config, weights


@torch.no_grad()
def read_caption(caption: str, clip: str | None, shape: torch.Size) -> Tensor:
    """Features of every token of one caption (L,W), as text-aware decoders read them. Raises PriorError."""
    if clip is None:
        raise PriorError(
            f"this TiTok's decoder reads captions; set clip to a file with open_clip weights of {TEXT_MODEL}."
        )
    tower = OpenClipTower(WholeVocabulary(shape[0]), TEXT_MODEL, clip).eval()
    features = token_features(tower.transformer, tower.clip_ids(tower.vocabulary.encode([caption])[0]))[0]
    if features.shape != shape:
        raise PriorError(f"{TEXT_MODEL} gives text of {tuple(features.shape)}, the decoder reads {tuple(shape)}.")
    return features


def main(words: list[str] | None = None) -> int:
    parser = arguments("titok", "Latents of a released TiTok or TA-TiTok with a KL bottleneck.")
    parser.add_argument("--folder", required=True, help="config.json and model.safetensors, as the Hub has them")
    parser.add_argument("--clip", help=f"open_clip weights of {TEXT_MODEL}, for a text-aware model")
    parser.add_argument("--caption", default="A photo.", help="what a text-aware decoder reads, for every picture")

    def build(options: argparse.Namespace) -> FixedLatents:
        return ReleasedTiTok(options.image_size, options.folder, None, options.clip, options.caption)

    return run(parser, words, build)
