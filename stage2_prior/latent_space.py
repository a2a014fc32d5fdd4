"""The latent space that a prior belongs to: what it asks of a tokenizer, and the fingerprint that ties it to one.

A prior over latents of another tokenizer draws noise, and nothing in their shape says so. `SpaceBound` keeps the
fingerprint of the tokenizer whose latents it was trained on in a buffer, so that it travels with every export, and
refuses latents or a tokenizer of another shape or with other statistics.

Letters: B batch, K latents, C latent channels.
"""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from stage1_tokenizer.agreement import is_count
from stage1_tokenizer.export import load_module

FINGERPRINT_LENGTH = 16


class PriorError(ValueError):
    """Latents, captions or options that this prior cannot work with."""


def check_steps(steps: int) -> int:
    """steps, if a solver can take so many. Raises PriorError."""
    if not is_count(steps) or steps < 1:
        raise PriorError(f"got steps={steps!r:.40}, wanted a whole number of at least 1.")
    return steps


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
    """The exported tokenizer in a folder, learned or fixed. Errors as `Tokenizer.from_pretrained`."""
    module = load_module(nn.Module, path).to(device)
    if not isinstance(module, LatentSpace):
        raise PriorError(f"{path} holds a {type(module).__name__}, wanted a tokenizer; name the folder that it is in.")
    return module


class SpaceBound(nn.Module):
    """What is tied to a latent space: to its first num_latents latents of latent_dim floats (K x C)."""

    fingerprint_bytes: Tensor
    best_length: int | None = None  # latents that are worth drawing, where a report has found fewer than all
    stops_early = True  # the first latents can be drawn without the others

    def __init__(self, num_latents: int, latent_dim: int):
        super().__init__()
        self.num_latents, self.latent_dim = num_latents, latent_dim
        self.register_buffer("fingerprint_bytes", torch.zeros(FINGERPRINT_LENGTH, dtype=torch.uint8))

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

    def start_from(self, other: nn.Module) -> None:
        """Take the weights of `other`, whose latents may be those of another tokenizer; the space stays this one's.

        Raises PriorError for weights of other shapes, and where tables that were read off the captions differ.
        """
        mine, theirs = dict(self.named_parameters()), dict(other.named_parameters())
        if {n: p.shape for n, p in mine.items()} != {n: p.shape for n, p in theirs.items()}:
            raise PriorError(
                "the prior of this config differs from that to start from; give the same classes and sizes."
            )
        of_space, state = ("fingerprint_bytes", "head."), other.state_dict()
        tables = {n: t for n, t in self.state_dict().items() if n not in mine}
        for name, table in tables.items():
            if not name.startswith(of_space) and not torch.equal(table.cpu(), state[name].cpu()):
                raise PriorError(f"{name} differs from that of the prior to start from; give it the same captions.")
        self.load_state_dict(state | tables)

    def export_facts(self) -> dict[str, Any]:
        """Besides the spec: `best_length`."""
        return {} if self.best_length is None else {"best_length": self.best_length}

    def loaded_from(self, config: dict[str, Any]) -> None:
        """Read `best_length` from an export's config.json. Raises PriorError for one that cannot be."""
        best = config.get("best_length")
        if best is not None and not (type(best) is int and 1 <= best <= self.num_latents):
            raise PriorError(
                f"got best_length {best!r:.20} of an export, wanted 1 to {self.num_latents}; export again."
            )
        self.best_length = best

    def check(self, tokenizer: LatentSpace) -> None:
        """Raises PriorError unless `tokenizer` is the one whose latents this prior was trained on."""
        self.check_space(tokenizer.num_latents, tokenizer.latent_dim, tokenizer.fingerprint)

    def check_space(self, num_latents: int, latent_dim: int, fingerprint: str) -> None:
        if num_latents < self.num_latents or latent_dim != self.latent_dim:
            raise PriorError(
                f"got latents of {num_latents} x {latent_dim}, wanted {self.num_latents} x {self.latent_dim} or more of"
                " them; set latent_dim of the prior to the tokenizer's, and num_latents to its or fewer."
            )
        if self.fingerprint and self.fingerprint != fingerprint[:FINGERPRINT_LENGTH]:
            raise PriorError(
                f"got latents of tokenizer {fingerprint}, wanted {self.fingerprint}: same shape, but other weights or"
                " statistics; encode with the tokenizer that this prior was trained on, or train a new prior."
            )

    def check_latents(self, z: Tensor) -> Tensor:
        """z in float32, if its shape is (B,K,C). Raises PriorError for another, and for no float."""
        wanted = f"(B, {self.num_latents}, {self.latent_dim})"
        if not isinstance(z, Tensor) or not z.is_floating_point():
            raise PriorError(
                f"got {getattr(z, 'dtype', type(z).__name__)} for latents, wanted a float tensor {wanted}."
            )
        if z.ndim != 3 or z.shape[1:] != (self.num_latents, self.latent_dim) or len(z) == 0:
            raise PriorError(f"got latents of shape {tuple(z.shape)}, wanted {wanted}.")
        return z.float()
