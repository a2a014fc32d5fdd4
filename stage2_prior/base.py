"""The contract of all priors: caption -> a line of latents, and what they share whatever their transformer does.

A prior belongs to one latent space. It keeps the tokenizer's fingerprint, and refuses latents or a tokenizer of another
shape or with other statistics. What a caption becomes in front of the line is up to a `Condition` (words of the prior's
own by default); its null row stands for "no caption", which is what an unconditional sample is asked with and what a
share of the training captions is replaced by.

Letters: B batch, K latents, C latent channels, L caption tokens.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from stage1_tokenizer.export import load_module, push_module, save_module
from stage1_tokenizer.spec import Spec
from stage1_tokenizer.text.vocabulary import CaptionVocabulary
from stage2_prior.conditions import Condition, TrainingData
from stage2_prior.guidance import ALWAYS, Guidance

FINGERPRINT_LENGTH = 16


class PriorError(ValueError):
    """Latents, captions or options that this prior cannot work with."""


@runtime_checkable
class LatentSpace(Protocol):
    """What a prior and its report ask of a tokenizer: identity, pictures to latents and back."""

    num_latents: int
    latent_dim: int
    image_size: int

    @property
    def fingerprint(self) -> str: ...

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]: ...

    def decode(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor: ...


def load_space(path: str | Path, device: torch.device | str = "cpu") -> LatentSpace:
    """The exported tokenizer in a folder, learned or of raw patches. Errors as `Tokenizer.from_pretrained`."""
    module = load_module(nn.Module, path).to(device)
    if not isinstance(module, LatentSpace):
        raise PriorError(f"{path} holds a {type(module).__name__}, wanted a tokenizer; name the folder that it is in.")
    return module


class Text(NamedTuple):
    """Captions as the prior reads them: ids (B,L) long of its condition, text_mask (B,L) bool, True = a real token."""

    ids: Tensor
    text_mask: Tensor


class Prior(Spec, nn.Module):
    """Contract of all priors, and what they share: captions, identity of the latent space, files, checks.

    Args:
        num_latents, latent_dim: K and C of the tokenizer.
        vocabulary: caption tokens, whose rows `prepare` sets, of a prior that learns its own words; else None.
        caption_dropout: share of captions replaced by the null word in training (guidance needs it), in [0, 1].
    """

    fingerprint_bytes: Tensor
    words: Condition  # what captions become; set by every prior, of the width of its transformer

    def __init__(self, num_latents: int, latent_dim: int, vocabulary: CaptionVocabulary | None, caption_dropout: float):
        super().__init__()
        if not 0 <= caption_dropout <= 1:
            raise PriorError(f"got caption_dropout={caption_dropout}, wanted a share from 0 to 1.")
        self.num_latents, self.latent_dim = num_latents, latent_dim
        self.vocabulary, self.caption_dropout = vocabulary, caption_dropout
        self.register_buffer("fingerprint_bytes", torch.zeros(FINGERPRINT_LENGTH, dtype=torch.uint8))

    # -- the contract -------------------------------------------------------------------------------------------------

    def losses(self, z: Tensor, text: Text, generator: torch.Generator | None = None) -> Tensor:
        """z (B,K,C) standardised, text of B captions -> (B,K) loss of each latent."""
        raise NotImplementedError

    def objective(
        self, z: Tensor, text: Text, generator: torch.Generator | None = None, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Parts of the training loss by name; their sum is minimised. weights (K,): of the latents, by position."""
        losses = self.losses(z, text, generator)  # (B,K)
        return {"latents": (losses if weights is None else losses * weights).mean()}

    def sample(
        self,
        captions: list[str],
        guidance: float | Guidance = 2.0,
        steps: int | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Captions -> z (B,K,C) float32, standardised.

        guidance: 1 is conditional, 0 unconditional, 1.5 to 3 usual; or a schedule over positions and times.
        steps: network evaluations of the head per latent (None: the head's default solver).
        temperature: factor on every normal draw, from 0 (no chance at all) upwards; 1 samples the model.
        generator: on the prior's device; the same state gives the same sample.
        Raises PriorError (a ValueError) for captions that are not strings, or options out of range.
        """
        raise NotImplementedError

    def evaluations(self, steps: int | None = None) -> int:
        """Network evaluations of the head per latent that `sample` would spend."""
        raise NotImplementedError

    def log_prob(self, z: Tensor, captions: list[str], steps: int = 32) -> Tensor:
        """z (B,K,C), captions -> (B,K) nats per latent, log p(z_i | earlier latents, caption).

        steps: of the ODE solver, whose error `likelihood` describes. Raises PriorError where a prior has no density.
        """
        raise NotImplementedError

    # -- the latent space ---------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the tokenizer whose latents this prior models; empty before `bind`."""
        return bytes(self.fingerprint_bytes.tolist()).decode("ascii").strip("\0")

    def bind(self, num_latents: int, latent_dim: int, fingerprint: str) -> None:
        """Tie this prior to a latent space. Raises PriorError for another shape, no identity, or another space."""
        if not fingerprint:
            raise PriorError(
                "these latents carry no tokenizer fingerprint, so their statistics are unknown; write them with"
                " `python -m stage1_tokenizer predict`."
            )
        self.check_space(num_latents, latent_dim, fingerprint)
        code = fingerprint.encode("ascii")[:FINGERPRINT_LENGTH].ljust(FINGERPRINT_LENGTH, b"\0")
        self.fingerprint_bytes.copy_(torch.tensor(list(code), dtype=torch.uint8))

    def check(self, tokenizer: LatentSpace) -> None:
        """Raises PriorError unless `tokenizer` is the one whose latents this prior was trained on."""
        self.check_space(tokenizer.num_latents, tokenizer.latent_dim, tokenizer.fingerprint)

    def check_space(self, num_latents: int, latent_dim: int, fingerprint: str) -> None:
        if (num_latents, latent_dim) != (self.num_latents, self.latent_dim):
            raise PriorError(
                f"got latents of {num_latents} x {latent_dim}, wanted {self.num_latents} x {self.latent_dim};"
                " set num_latents and latent_dim of the prior to the tokenizer's."
            )
        if self.fingerprint and self.fingerprint != fingerprint[:FINGERPRINT_LENGTH]:
            raise PriorError(
                f"got latents of tokenizer {fingerprint}, wanted {self.fingerprint}: same shape, but other weights or"
                " statistics; encode with the tokenizer that this prior was trained on, or train a new prior."
            )

    def check_latents(self, z: Tensor) -> Tensor:
        if z.ndim != 3 or z.shape[1:] != (self.num_latents, self.latent_dim):
            wanted = f"(B, {self.num_latents}, {self.latent_dim})"
            raise PriorError(f"got latents of shape {tuple(z.shape)}, wanted {wanted}.")
        return z

    def check_pairs(self, z: Tensor, captions: list[str]) -> tuple[Tensor, Text]:
        """Lines and their captions, as `log_prob` takes them. Raises PriorError unless there are as many of each."""
        if len(z) != len(captions):
            raise PriorError(f"got {len(z)} lines of latents and {len(captions)} captions, wanted as many of each.")
        return self.check_latents(z), self.encode_text(captions)

    # -- captions -----------------------------------------------------------------------------------------------------

    @property
    def null(self) -> int:
        """The id of "no caption"."""
        return self.words.null

    def prepare(self, data: TrainingData, tokenizer: Callable[[], nn.Module]) -> str:
        """As `Condition.prepare`: learn what captions become, before the first step."""
        return self.words.prepare(data, tokenizer)

    def encode_text(self, captions: list[str]) -> Text:
        """Captions -> ids and mask on the prior's device. Raises PriorError for what is no string or empty."""
        if isinstance(captions, str) or not captions:
            raise PriorError(f"got {captions!r:.40}, wanted a list of at least one caption.")
        for caption in captions:
            if not isinstance(caption, str) or not caption.strip():
                raise PriorError(f"got the caption {caption!r:.40}, wanted a string with at least one word in it.")
        return self.trim(Text(*self.words.encode(captions)))

    def encode_samples(self, captions: list[str], labels: Tensor) -> Text:
        """Captions of B training samples ("": none) and their labels (B,) (-1: none), null where they say nothing."""
        *text, silent = self.words.encode_samples(captions, labels)
        if text[0].is_cuda and not silent.is_cuda:
            silent = silent.pin_memory()  # so that the step does not wait for it
        return self.without_caption(self.trim(Text(*text)), silent.to(text[0].device, non_blocking=True))

    @staticmethod
    def trim(text: Text) -> Text:
        """Cut columns that are padding in every row. On an accelerator, where that would wait for it, keep them."""
        if text.ids.device.type != "cpu":
            return text
        longest = int(text.text_mask.sum(1).max())
        return Text(text.ids[:, :longest], text.text_mask[:, :longest])

    def without_caption(self, text: Text, drop: Tensor) -> Text:
        """Replace the captions of rows where `drop` (B,) is True by the null word."""
        first = torch.zeros_like(text.text_mask)
        first[:, 0] = True
        ids = torch.where(drop[:, None], torch.full_like(text.ids, self.null), text.ids)
        return Text(ids, torch.where(drop[:, None], first, text.text_mask))

    def drop_captions(self, text: Text, generator: torch.Generator | None) -> Text:
        """In training, a random `caption_dropout` of the rows loses its caption."""
        if not self.training or self.caption_dropout == 0:
            return text
        u = torch.rand(len(text.ids), generator=generator, device=text.ids.device)
        return self.without_caption(text, u < self.caption_dropout)

    def guided_text(
        self, captions: list[str], guidance: float | Guidance, temperature: float
    ) -> tuple[Text, list[float], tuple[float, float]]:
        """What a sampler asks with: text rows, the scale of every position, and the times at which guidance acts.

        Rows beyond the captions' own are their unconditional twins; there are none if no scale differs from 1, or if
        all are 0 at all times or the condition is constant (then the null word takes the caption's place). Raises
        PriorError for a temperature out of range.
        """
        if not 0 <= temperature < float("inf"):
            raise PriorError(f"got temperature={temperature}, wanted a finite number of at least 0.")
        schedule = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
        scales, text = schedule.scales(self.num_latents), self.encode_text(captions)
        nobody = self.without_caption(text, torch.ones(len(captions), dtype=torch.bool, device=text.ids.device))
        if (not any(scales) and schedule.interval == ALWAYS) or self.words.constant:
            return self.trim(nobody), [1.0] * self.num_latents, schedule.interval
        if any(w != 1 for w in scales):
            text = Text(torch.cat([text.ids, nobody.ids]), torch.cat([text.text_mask, nobody.text_mask]))
        return text, scales, schedule.interval

    # -- files --------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, card: str | None = None) -> Path:
        """Write config.json, model.safetensors and README.md to `folder`."""
        return save_module(self, folder, card)

    def push_to_hub(self, repo_id: str, card: str | None = None, **create: Any) -> str:
        """Export and upload to the Hub as `repo_id`; keyword arguments go to `HfApi.create_repo`."""
        return push_module(self, repo_id, card, **create)

    @classmethod
    def from_pretrained(cls, path: str | Path, revision: str | None = None) -> "Prior":
        """Load an exported folder, or a Hub repository by id; in eval mode. Errors as `Tokenizer.from_pretrained`."""
        return load_module(cls, path, revision)
