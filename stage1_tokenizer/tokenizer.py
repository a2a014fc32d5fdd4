"""Tokenizer: images <-> an ordered line of continuous latents.

    images (B,3,H,W) in [-1,1] --encoder--> h (B,K,D) --bottleneck--> raw latents (B,K,C)
    --latent statistics--> z (B,K,C), standardised --keep the first k--> decoder --> images (B,3,H,W) in [-1,1]

`encode`/`decode` are the contract that other programs call; `losses` is the training objective. Statistics are those of
posterior *samples* per position and channel (noise included), so that what a prior is trained on, `mean + std * eps`,
has zero mean and unit variance even where a channel carries little; the posterior mean that `encode` returns is at most
that wide. An exported folder holds config.json (class paths and plain arguments), model.safetensors and a model card.

Letters: B batch, K latents, C latent channels, k prefix length, E embedding width.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.agreement import check_images, check_latents, check_sizes, describe, fingerprint_of, is_count
from stage1_tokenizer.bottleneck import Bottleneck
from stage1_tokenizer.decoder import Decoder
from stage1_tokenizer.encoder import Encoder
from stage1_tokenizer.export import load_module, push_module, save_module
from stage1_tokenizer.layers import training_only
from stage1_tokenizer.linear_path import LinearPath
from stage1_tokenizer.precision import held_autocast, hold_weights
from stage1_tokenizer.predictor import Predictor
from stage1_tokenizer.prefixes import PrefixLengths, keep_mask
from stage1_tokenizer.spec import Spec
from stage1_tokenizer.supervision import PictureSupervision, Supervision


class Tokenizer(Spec, nn.Module):
    """Ordered continuous 1-D image tokenizer.

    Args:
        image_size: side of the square images in pixels.
        encoder: images -> h (B,K,D).
        bottleneck: h -> latents (B,K,C) and its losses.
        decoder: latents and a mask of the visible ones -> images.
        lengths: which prefixes a training step decodes besides the full length; None decodes the full length only.
        text: text supervision of prefixes; None for a tokenizer that knows no captions.
        linear_path: fixed principal components beside the encoder and decoder (photographs); None for none.
        predictor: a model of the line, trained along or frozen, whose error is a loss on the encoder; None for none.
        alignment: supervision of prefixes by the pictures themselves, in training; None for none.
    """

    latent_mean: Tensor
    latent_scale: Tensor
    training_state = ("text.memory.", "predictor.", "alignment.")  # in checkpoints, not in exports
    objective = ("pixel", "prefix", "kl", "commit", "text", "caption", "alignment", "predictor", "predicted")
    held = torch.float32  # dtype of the linear layers' weights
    identity = ""  # the fingerprint, where weights are held rounded
    checks_pixels = True  # of `encode`: False where who decoded them vouches for it, since a look waits for a GPU

    def __init__(
        self,
        image_size: int,
        encoder: Encoder,
        bottleneck: Bottleneck,
        decoder: Decoder,
        lengths: PrefixLengths | None = None,
        text: Supervision | None = None,
        linear_path: LinearPath | None = None,
        predictor: Predictor | None = None,
        alignment: PictureSupervision | None = None,
    ):
        super().__init__()
        training_only(self, "predictor", "alignment")
        parts: dict[str, Any] = {"bottleneck": bottleneck, "decoder": decoder, "lengths": lengths}
        parts |= {"linear_path": linear_path, "predictor": predictor, "alignment": alignment}
        parts |= {f"text.{name}": part for name, part in (text.sized() if text is not None else {}).items()}
        check_sizes(encoder, bottleneck, parts)
        self.image_size, self.num_latents, self.latent_dim = image_size, encoder.num_latents, bottleneck.latent_dim
        self.encoder, self.bottleneck, self.decoder = encoder, bottleneck, decoder
        self.lengths, self.text, self.linear_path = lengths, text, linear_path
        self.predictor, self.alignment = predictor, alignment
        self.described = describe(encoder.spec, bottleneck.spec)
        if linear_path is not None:
            bottleneck.start_silent()
        self.register_buffer("latent_mean", torch.zeros(self.num_latents, self.latent_dim))
        self.register_buffer("latent_scale", torch.ones(self.num_latents, self.latent_dim))

    # -- the contract -------------------------------------------------------------------------------------------------

    def encode(self, images: Tensor, k: int | None = None) -> Tensor:
        """images (B,3,H,W) float in [-1,1] -> z (B,K,C): the posterior mean, standardised; deterministic.

        With `k`, only the first k latents are computed; they equal `encode(images)[:, :k]`.
        Raises ValueError for another size, dtype, channel count or range, or for non-finite pixels.
        """
        return self.posterior(images, k)[0]

    def posterior(self, images: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
        """(mean, std) of the posterior, standardised, each (B,k,C). Arguments and errors as `encode`."""
        images = check_images(images, self.image_size, look=self.checks_pixels and not self.training)
        k = self.check_length(self.num_latents if k is None else k)
        n = self.num_latents if self.bottleneck.rounds else k  # a shorter product is not the same to the last bit
        shift = self.linear_path.encode(images, n) if self.linear_path is not None else None
        with held_autocast(self.held, images.device):
            mean, std = (x[:, :k] for x in self.bottleneck.posterior(self.encoder(images, n), shift))  # (B,k,C) each
        return (mean - self.latent_mean[:k]) / self.latent_scale[:k], std / self.latent_scale[:k]

    def decode(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """z (B,k,C) standardised, any 1 <= k <= K -> images (B,3,H,W) in [-1,1].

        `generator` draws the noise of a stochastic decoder. Raises ValueError for another shape.
        """
        z = check_latents(z, self.latent_dim)
        k = self.check_length(z.shape[1])
        raw = F.pad(self.unstandardised(z), (0, 0, 0, self.num_latents - k))  # (B,K,C)
        keep = keep_mask(torch.full((len(z),), k, device=z.device), self.num_latents)
        base = self.base(raw, keep)
        with held_autocast(self.held, z.device):
            return self.decoder.decode(raw, keep, base, generator=generator).float().clamp(-1, 1)

    def embed_text(self, captions: list[str]) -> Tensor:
        """list[str] -> (B,E) unit vectors. Raises ValueError without text supervision."""
        with held_autocast(self.held, self.latent_mean.device):
            return self.text_part().embed_text(captions)

    def embed_latents(self, z: Tensor) -> Tensor:
        """z (B,k,C) standardised, any 1 <= k <= K -> (B,E) unit vectors in the space of `embed_text`.

        Text is trained on the prefixes in `text.lengths`: the longest of them within k is what is read, or the shortest
        of them, with the latents that are there, if k is below it (`Supervision.embed`).
        """
        z = check_latents(z, self.latent_dim)
        self.check_length(z.shape[1])
        with held_autocast(self.held, z.device):
            return self.text_part().embed(self.unstandardised(z))

    def embed_images(self, images: Tensor, k: int | None = None) -> Tensor:
        """images (B,3,H,W) in [-1,1] -> (B,E) unit vectors of their first k latents (None: K), as `embed_latents`."""
        return self.embed_latents(self.encode(images, k))

    def unstandardised(self, z: Tensor) -> Tensor:
        """z (B,k,C) standardised -> as bottleneck, decoder and supervision have it (B,k,C)."""
        k = z.shape[1]
        return self.bottleneck.snap(z * self.latent_scale[:k] + self.latent_mean[:k])

    def base(self, z: Tensor, keep: Tensor) -> Tensor | None:
        """What the linear path makes of latents z (B,K,C) before standardisation: (B,3,H,W), None without one."""
        return None if self.linear_path is None else self.linear_path.decode(self.bottleneck.linear(z), keep)

    @property
    def vocabulary(self) -> Any:
        return self.text_part().vocabulary

    def text_part(self) -> Supervision:
        if self.text is None:
            raise ValueError("this tokenizer was built without text supervision (text: null); use one that has it.")
        return self.text

    def check_length(self, k: int) -> int:
        if not is_count(k) or not 1 <= k <= self.num_latents:
            raise ValueError(f"got {k} latents, wanted a prefix of 1 to {self.num_latents}.")
        return k

    # -- training -----------------------------------------------------------------------------------------------------

    def losses(self, images: Tensor, ids: Tensor | None = None, step: int = 0) -> tuple[dict[str, Tensor], Tensor]:
        """(loss parts of one batch, full-length reconstructions (B,3,H,W) with their graph).

        The sum of the parts named in `objective` is minimised, the others are logged. images (B,3,H,W); ids (B,L)
        caption tokens for the text part, None without; `step` counts optimiser steps.
        """
        shift = self.linear_path.encode(images, self.num_latents) if self.linear_path is not None else None
        z, parts = self.bottleneck(self.encoder(images), shift)  # (B,K,C)
        text_step = self.text is not None and ids is not None and step % self.text.every == 0
        z_pixels, z_text = self.text.balance(z, self.text.factor(step)) if text_step and self.text else (z, z)
        if self.alignment is not None and step % self.alignment.every == 0:
            z_pixels, z_aligned = self.alignment.balance(z_pixels)
            parts |= self.alignment.losses(z_aligned, images)
        pixel_parts, reconstruction = self.pixel_losses(z_pixels, images, step)
        parts |= pixel_parts
        if text_step and self.text is not None and ids is not None:
            parts |= self.text.losses(z_text, ids)
        if self.predictor is not None:
            parts |= self.predictor.losses(z, lambda guess: self.full_error(guess, images))
        return parts, reconstruction

    def pixel_losses(self, z: Tensor, images: Tensor, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """Full length for every image and, in the same decoder call, one random shorter prefix for a share of them."""
        batch = len(z)
        second = self.lengths is not None and step >= self.lengths.start
        extra = self.lengths.sample(batch) if second and self.lengths is not None else z.new_zeros(0, dtype=torch.long)
        z, target = torch.cat([z, z[: len(extra)]]), torch.cat([images, images[: len(extra)]])
        k = torch.cat([extra.new_full((batch,), self.num_latents), extra])
        keep = keep_mask(k, self.num_latents)
        base = self.base(z, keep)
        x, error = self.decoder.losses(z, keep, target, base)  # (B+b,3,H,W), (B+b,)
        parts = {"pixel": error[:batch].mean()}
        if len(extra) and self.lengths is not None:
            parts["prefix"] = self.lengths.weight * error[batch:].mean()
        return parts, x[:batch]

    def full_error(self, z: Tensor, images: Tensor) -> Tensor:
        keep = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
        return self.decoder.losses(z, keep, images, self.base(z, keep))[1].mean()

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """The sum of the parts in `objective`. Raises ValueError for another part that has a gradient: a loss that is
        computed is minimised, or detached and so only a figure."""
        unlisted = [name for name, part in parts.items() if part.requires_grad and name not in self.objective]
        if unlisted:
            raise ValueError(
                f"got the loss {unlisted[0]!r}, wanted one of {', '.join(self.objective)}: detach a figure, or add "
                "it to Tokenizer.objective."
            )
        return torch.stack([parts[name] for name in self.objective if name in parts]).sum()

    @torch.no_grad()
    def fit_statistics(self, batches: Iterable[Tensor]) -> int:
        """Set the latent statistics from training images; returns how many were read.

        Mean and standard deviation of posterior samples per position and channel (per channel where symbols are, see
        below), in float64, with the noise's variance added in closed form.
        """
        n, total, square = 0, torch.zeros(()), torch.zeros(())
        self.latent_mean.zero_()
        self.latent_scale.fill_(1.0)
        for images in batches:
            mean, std = (x.double() for x in self.posterior(images))
            n += len(images)
            total = total.to(mean) + mean.sum(0)
            square = square.to(mean) + (mean.square() + std.square()).sum(0)
        if n < 2:
            raise ValueError(f"got {n} images for the latent statistics, wanted at least 2; check the training split.")
        mean, square = total / n, square / n
        if self.bottleneck.rounds:  # a symbol has the same value wherever it stands
            mean, square = (x.mean(0).expand_as(x) for x in (mean, square))
        self.latent_mean.copy_(mean)
        self.latent_scale.copy_((square - mean.square()).clamp_min(1e-6).sqrt())
        return n

    # -- files --------------------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """Identity of the latent space: a hash of encoder, bottleneck, linear path and statistics (not the decoder)."""
        return self.identity or fingerprint_of(self.described, self.state_dict())

    def save_pretrained(self, folder: str | Path, card: str | None = None) -> Path:
        """Write config.json, model.safetensors and README.md (the model card) to `folder`."""
        return save_module(self, folder, card)

    def push_to_hub(self, repo_id: str, card: str | None = None, **upload: Any) -> str:
        """Export and upload to the Hub as `repo_id`; keyword arguments go to `HfApi.create_repo`."""
        return push_module(self, repo_id, card, **upload)

    def start_from(self, other: "Tokenizer") -> None:
        """Take the weights of `other`, all but its decoder's if that is of another class or size.

        Raises ValueError where encoder, bottleneck, text or linear path differ.
        """
        for name in ("encoder", "bottleneck", "text", "linear_path"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if (mine and mine.spec) != (theirs and theirs.spec):
                raise ValueError(f"the {name} of this config differs from that of the tokenizer to start from.")
        kept = self.training_state + (() if self.decoder.spec == other.decoder.spec else ("decoder.",))
        state = {n: t for n, t in other.state_dict().items() if not n.startswith(kept)}
        state |= {n: t for n, t in self.state_dict().items() if n.startswith(kept)}
        self.load_state_dict(state, strict=True)
        self.described = other.described

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        trust: Sequence[str] = (),
    ) -> "Tokenizer":
        """Load an exported folder, or a Hub repository by id; in eval mode.

        dtype: of the linear layers' weights and products (`precision.hold_weights`), for use without training; None
        keeps float32. trust: packages of yours whose classes the export may name. Raises FileNotFoundError for a
        missing folder and ValueError for another kind of model, a newer format or weights of another shape.
        """
        tokenizer = load_module(cls, path, revision, trust)
        if dtype is not None:
            tokenizer.identity = tokenizer.fingerprint  # that of the weights before they are rounded
            hold_weights(tokenizer, dtype)
            tokenizer.held = dtype
        return tokenizer if device is None else tokenizer.to(device)

    def export_facts(self) -> dict[str, str]:
        """Besides the spec: the text that the fingerprint begins with, where it is an older one."""
        own = describe(self.encoder.spec, self.bottleneck.spec)
        return {} if self.described == own else {"described": self.described}

    def loaded_from(self, config: dict[str, Any]) -> None:
        """Keep the identity of the export that this was loaded from; `config` is its config.json."""
        parts = config["init_args"]
        self.described = config.get("described") or describe(parts["encoder"], parts["bottleneck"])
