"""What the playground shows, as functions of pictures, captions and numbers: tensors in, tensors out, no page.

    studio = Studio(tokenizer, prior, captions)
    picture = studio.read(content, "photo.jpg")              # bytes of a file -> its latents
    studio.unspool(picture, 4)                               # what the first four bring back
    for z in studio.draw("a red circle", Drawing()): ...     # a line that grows by one latent

Letters: K latents, C latent channels, k prefix length, S side of the pictures.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stage1_tokenizer import Tokenizer
from stage1_tokenizer.evaluation.latent_use import code_bits
from stage1_tokenizer.evaluation.reconstruct import read_picture
from stage1_tokenizer.similarity import psnr
from stage2_prior.base import Prior
from stage2_prior.heads.ddpm import DDIM, DDPM
from stage2_prior.heads.solvers import (
    AdamsBashforth,
    DPMSolver2M,
    Euler,
    EulerMaruyama,
    Heun,
    Midpoint,
    Solver,
)

LONGEST_CAPTION = 500  # characters
MOST_STEPS = 100  # evaluations per latent
NEAREST = 5  # captions that are shown
SOLVERS: tuple[type[Solver], ...] = (Euler, Midpoint, Heun, AdamsBashforth, DPMSolver2M, EulerMaruyama, DDIM, DDPM)
FORWARD_MODE = threading.Lock()  # torch has one level of forward-mode derivatives for all threads


class PlayError(ValueError):
    """Something that was asked for on the page and cannot be done."""


@dataclass(frozen=True, eq=False)  # two are the same only if they are one: tensors have no truth value
class Picture:
    """A picture and its line: image (1, 3, S, S) in [-1, 1], z (1, K, C), bits of its first 1, 2, ..., K latents."""

    image: Tensor
    z: Tensor
    bits: list[float]


@dataclass(frozen=True)
class Prefix:
    """What the first k latents of a picture bring back."""

    image: Tensor  # (1, 3, S, S) in [-1, 1]
    change: Tensor  # (1, 3, S, S): what latent k changed, in [-2, 2]
    psnr: float  # dB
    bits: float  # an upper bound; inf for a code without noise
    captions: list[tuple[str, float]]  # the nearest, with their cosine


@dataclass(frozen=True)
class Drawing:
    """How a line is drawn: the arguments of `Prior.sample` that the page offers.

    steps: network evaluations per latent, 0: those of the solver. solver: a name of `Studio.solvers`, "": the head's.
    """

    guidance: float = 2.0
    steps: int = 0
    solver: str = ""
    temperature: float = 1.0
    seed: int = 0
    negative: str = ""


class Studio:
    """A tokenizer, perhaps its prior, and captions to look for. Raises PriorError for a prior of another tokenizer.

    absent: what to answer where the prior is needed and there is none.
    """

    def __init__(
        self, tokenizer: Tokenizer, prior: Prior | None = None, captions: Sequence[str] = (), absent: str = ""
    ):
        if prior is not None:
            prior.check(tokenizer)
        self.tokenizer, self.maybe_prior = tokenizer.eval(), prior
        self.absent = absent or "there is no prior here; start the page with --prior"
        self.captions = list(captions) if tokenizer.text is not None else []
        self.device = tokenizer.latent_mean.device
        with torch.no_grad():
            parts = [tokenizer.embed_text(self.captions[i : i + 250]) for i in range(0, len(self.captions), 250)]
        self.embedded = torch.cat(parts) if parts else torch.zeros(0, 1, device=self.device)  # (N, E)

    @property
    def prior(self) -> Prior:
        """Raises PlayError where there is none."""
        if self.maybe_prior is None:
            raise PlayError(self.absent)
        return self.maybe_prior

    # -- pictures -----------------------------------------------------------------------------------------------------

    def read(self, content: bytes, name: str) -> Picture:
        """The picture in the bytes of a file. Raises ReconstructError for what is none."""
        return self.encode(read_picture(content, name, self.tokenizer.image_size)[None])

    @torch.no_grad()
    def encode(self, image: Tensor) -> Picture:
        """image (1, 3, S, S) in [-1, 1]."""
        image = image.to(self.device)
        return Picture(image, self.tokenizer.encode(image), code_bits(self.tokenizer, image))

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """z (B, k, C) -> (B, 3, S, S); a stochastic decoder draws the same noise every time."""
        return self.tokenizer.decode(z, generator=self.generator(0))

    @torch.no_grad()
    def unspool(self, picture: Picture, k: int) -> Prefix:
        """The first k latents of a picture; latent 1 changes a grey ground. Raises ValueError for k out of 1 to K."""
        self.tokenizer.check_length(k)
        image = self.decode(picture.z[:, :k])
        before = self.decode(picture.z[:, : k - 1]) if k > 1 else torch.zeros_like(image)
        decibels = psnr(image, picture.image).item()
        return Prefix(image, image - before, decibels, picture.bits[k - 1], self.nearest(picture.z[:, :k]))

    @torch.no_grad()
    def nearest(self, z: Tensor) -> list[tuple[str, float]]:
        """Captions nearest to a prefix z (1, k, C), best first, with their cosine; none without text supervision."""
        if not self.captions:
            return []
        cosine = (self.tokenizer.embed_latents(z) @ self.embedded.T)[0]  # (N,)
        values, rows = cosine.topk(min(NEAREST, len(cosine)))
        return [(self.captions[i], value) for i, value in zip(rows.tolist(), values.tolist(), strict=True)]

    # -- editing ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def swap(self, a: Picture, b: Picture, k: int) -> Tensor:
        """(2, 3, S, S): the first k latents of a with the rest of b, and the other way round."""
        self.tokenizer.check_length(k)
        z = torch.cat([torch.cat([a.z[:, :k], b.z[:, k:]], 1), torch.cat([b.z[:, :k], a.z[:, k:]], 1)])
        return self.decode(z)

    @torch.no_grad()
    def interpolate(self, a: Picture, b: Picture, n: int = 7) -> Tensor:
        """(n, 3, S, S): from a to b along the straight line between their latents, ends included."""
        weights = torch.linspace(0, 1, n, device=self.device)[:, None, None]
        return self.decode(torch.lerp(a.z, b.z, weights))

    # -- drawing ------------------------------------------------------------------------------------------------------

    def solvers(self) -> dict[str, Solver]:
        """Solvers that the prior's head can be solved by, by name; none for a head that is not solved."""
        fitting: dict[str, Solver] = {}
        for kind in SOLVERS if self.maybe_prior is not None else ():
            solver = kind()  # type: ignore[call-arg]  # every one of these has defaults
            try:
                self.prior.num_evaluations(solver=solver)
            except ValueError:
                continue
            fitting[kind.__name__] = solver
        return fitting

    def draw(self, caption: str, how: Drawing, prefix: Tensor | None = None) -> Iterator[Tensor]:
        """Yields z (1, k, C) as it grows by one latent to (1, K, C), from `prefix` (1, p, C) on, which is kept.

        What it ends with is what `Prior.sample` draws at once, for priors that draw one latent after another. Raises
        PlayError and PriorError for what cannot be drawn, at the first step.
        """
        prior, negative = self.prior, how.negative.strip() or None
        for words in (caption, how.negative):
            self.check_caption(words)
        if not 0 <= how.steps <= MOST_STEPS:
            raise PlayError(f"got {how.steps} evaluations per latent, wanted 0 (the solver's own) to {MOST_STEPS}")
        solver = self.solvers()[how.solver] if how.solver else None
        generator = self.generator(how.seed)
        z = torch.zeros(1, 0, prior.latent_dim, device=self.device) if prefix is None else prefix
        while z.shape[1] < prior.num_latents:
            z = prior.sample(
                [caption],
                how.guidance,
                how.steps or None,
                how.temperature,
                generator,
                solver,
                prefix=z,
                num_latents=z.shape[1] + 1,
                negative=negative,
            )
            yield z

    def check_caption(self, caption: str) -> None:
        """Raises PlayError for a caption that is too long to be one."""
        if len(caption) > LONGEST_CAPTION:
            raise PlayError(f"the caption has {len(caption)} characters, wanted at most {LONGEST_CAPTION}; shorten it")

    # -- reading ------------------------------------------------------------------------------------------------------

    def caption(self, picture: Picture) -> str:
        """What the prior writes below a picture. Raises PriorError for one that only draws."""
        return self.prior.caption(picture.z)[0]

    def nats(self, picture: Picture, caption: str, steps: int = 16) -> list[float]:
        """log p(z_i | earlier latents, caption) of every latent, in nats. Raises PriorError without a density."""
        self.check_caption(caption)
        with FORWARD_MODE:
            nats: list[float] = self.prior.log_prob(picture.z, [caption], steps)[0].tolist()
        return nats

    def generator(self, seed: int) -> torch.Generator:
        """Raises PlayError for a seed that is no whole number from 0 to 2^63 - 1."""
        if not 0 <= seed < 2**63:
            raise PlayError(f"got the seed {seed}, wanted a whole number from 0")
        return torch.Generator(self.device).manual_seed(seed)
