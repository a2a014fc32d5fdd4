"""The contract of all priors: caption -> a line of latents, and what they share whatever their transformer does.

A prior belongs to one latent space (`latent_space`). What a caption becomes in front of the line is up to a `Condition`
(words of the prior's own by default); its null row stands for "no caption", which is what an unconditional sample is
asked with and what a share of the training captions is replaced by.

`sample` and `log_prob` check what they are given, once for all priors; how a line is drawn or scored is the business of
`draw` and `score`, which each member writes.

Letters: B batch, K latents, C latent channels, L caption tokens, R rows of a batch with unconditional twins.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stage1_tokenizer.agreement import is_count, is_number
from stage1_tokenizer.export import load_module, push_module, save_module
from stage1_tokenizer.precision import held_autocast, hold_weights
from stage1_tokenizer.spec import Spec
from stage1_tokenizer.text.vocabulary import CaptionVocabulary
from stage2_prior.conditions import Condition, TrainingData
from stage2_prior.guidance import ALWAYS, Guidance
from stage2_prior.heads.solvers import Solver
from stage2_prior.latent_space import LatentSpace, PriorError, SpaceBound, check_steps, load_space
from stage2_prior.request import Request, States, Text

__all__ = ["LatentSpace", "Prior", "PriorError", "Request", "Text", "load_space"]


class Prior(Spec, SpaceBound):
    """Contract of all priors, and what they share: captions, identity of the latent space, files, checks.

    Args:
        num_latents, latent_dim: K and C of the tokenizer.
        vocabulary: caption tokens, whose rows `prepare` sets, of a prior that learns its own words; else None.
        caption_dropout: share of captions replaced by the null word in training (guidance needs it), in [0, 1].
    """

    held = torch.float32  # dtype of the linear layers' weights: see `hold`
    words: Condition  # what captions become; set by every prior, of the width of its transformer

    def __init__(self, num_latents: int, latent_dim: int, vocabulary: CaptionVocabulary | None, caption_dropout: float):
        super().__init__(num_latents, latent_dim)
        if not 0 <= caption_dropout <= 1:
            raise PriorError(f"got caption_dropout={caption_dropout}, wanted a share from 0 to 1.")
        self.vocabulary, self.caption_dropout = vocabulary, caption_dropout

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

    def figures(self, z: Tensor, text: Text) -> dict[str, Tensor]:
        """What this prior can say of lines z (B,K,C) and their captions besides its loss, by name, each (B,)."""
        return {}

    @torch.no_grad()
    def sample(
        self,
        captions: list[str],
        guidance: float | Guidance = 2.0,
        steps: int | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        solver: Solver | None = None,
        prefix: Tensor | None = None,
        num_latents: int | None = None,
        negative: str | list[str] | None = None,
    ) -> Tensor:
        """B captions -> z (B,K,C) float32, standardised.

        guidance: 1 is conditional, 0 unconditional, 1.5 to 3 usual; or a schedule over positions and times.
        steps: network evaluations of the head per latent (None: those of the solver).
        temperature: factor on every normal draw, from 0 (no chance at all) to 100; 1 samples the model.
        generator: on the prior's device; the same state gives the same sample.
        solver: of a head that is solved, in place of its own (None); see the table in `heads.solvers`.
        prefix: (B,p,C) the first p latents, kept bit for bit; the rest is drawn given these and the captions.
        num_latents: draw the first so many latents only, prefix included -> (B,num_latents,C).
        negative: what guidance leads away from, in place of "no caption": one caption for all, or one for each.
        Raises PriorError (a ValueError) for captions that are not strings, or options out of range.
        """
        request = self.request(captions, guidance, temperature, prefix, num_latents, negative=negative)
        request.steps, request.solver, request.generator = steps, solver, generator
        with self.autocast():
            return self.draw(request)

    def draw(self, request: Request) -> Tensor:
        """The checked request of `sample` -> z (B,n,C) float32."""
        raise NotImplementedError

    def num_evaluations(self, steps: int | None = None, solver: Solver | None = None) -> int:
        """Network evaluations of the head per latent that `sample` would spend."""
        raise NotImplementedError

    @torch.no_grad()
    def log_prob(self, z: Tensor, captions: list[str], steps: int = 32) -> Tensor:
        """z (B,K,C), captions -> (B,K) nats per latent, log p(z_i | earlier latents, caption).

        steps: of the ODE solver, whose error `likelihood` describes. Raises PriorError where a prior has no density.
        """
        z, text = self.check_latents(z), self.encode_text(captions)
        if len(z) != len(captions):
            raise PriorError(f"got {len(z)} lines of latents and {len(captions)} captions, wanted as many of each.")
        with self.autocast():
            return self.score(z, text, check_steps(steps))

    def score(self, z: Tensor, text: Text, steps: int) -> Tensor:
        """`log_prob` of checked lines (B,K,C) -> (B,K)."""
        raise PriorError(f"got a {type(self).__name__}, which has no density, for log_prob; use another prior.")

    def caption(self, z: Tensor) -> list[str]:
        """z (B,K,C) standardised -> a caption of each line. Raises PriorError for a prior that only draws."""
        raise PriorError(f"got a {type(self).__name__}, which does not read lines out; use a CaptioningPrior.")

    def states(self, z: Tensor) -> States:
        """What the transformer makes of lines z (B,K,C) that it reads without a caption. Raises PriorError for a prior
        that does not read a line in one run."""
        raise PriorError(f"got a {type(self).__name__}, which does not read a line in one run; use a CausalPrior.")

    def nothing(self, rows: int) -> Text:
        """The text of `rows` lines without a caption."""
        ids = torch.full((rows, 1), self.null, device=self.fingerprint_bytes.device)
        return Text(ids, torch.ones_like(ids, dtype=torch.bool))

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
        if not isinstance(captions, (list, tuple)) or not captions:
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

    def request(
        self,
        captions: list[str],
        guidance: float | Guidance = 1.0,
        temperature: float = 1.0,
        prefix: Tensor | None = None,
        num_latents: int | None = None,
        known: Tensor | None = None,
        negative: str | list[str] | None = None,
    ) -> Request:
        """What `sample` is asked for, as `draw` takes it. Arguments and errors as `sample`.

        known: (B,p) bool, which latents of the prefix are given; None: all.
        """
        text, scales, interval = self.guided_text(captions, guidance, temperature, negative)
        b, c = len(captions), self.latent_dim
        n = self.num_latents if num_latents is None else num_latents
        if not is_count(n) or not 1 <= n <= self.num_latents:
            raise PriorError(f"got num_latents={n!r:.40}, wanted 1 to {self.num_latents}.")
        given = torch.zeros(b, 0, c) if prefix is None else prefix
        if given.ndim != 3 or given.shape[::2] != (b, c) or given.shape[1] > n:
            raise PriorError(f"got a prefix of shape {tuple(given.shape)}, wanted ({b}, up to {n}, {c}).")
        known = torch.ones(given.shape[:2], dtype=torch.bool) if known is None else known
        if known.shape != given.shape[:2] or known.dtype != torch.bool:
            raise PriorError(
                f"got known of shape {tuple(known.shape)} and {known.dtype}, wanted {tuple(given.shape[:2])} and bool:"
                " one entry for each latent of the prefix."
            )
        device = text.ids.device
        given, known = given.to(device, torch.float32), known.to(device)
        return Request(text, given, known, n, scales, interval, temperature, twins_alike=not isinstance(negative, list))

    def guided_text(
        self,
        captions: list[str],
        guidance: float | Guidance,
        temperature: float,
        negative: str | list[str] | None = None,
    ) -> tuple[Text, list[float], tuple[float, float]]:
        """What a sampler asks with: text rows, the scale of every position, and the times at which guidance acts.

        Rows beyond the captions' own are their unconditional twins; there are none if no scale differs from 1, or if
        all are 0 at all times or the condition is constant (then the null word takes the caption's place). A negative
        caption takes the place of the null word. Raises PriorError for a temperature out of range, and for a negative
        caption that nothing would look at.
        """
        if not is_number(temperature) or not 0 <= temperature <= 100:
            raise PriorError(f"got temperature={temperature!r:.40}, wanted a number from 0 to 100.")
        schedule = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
        scales, text = schedule.scales(self.num_latents), self.encode_text(captions)
        if negative is None:
            everyone = torch.ones(len(captions), dtype=torch.bool, device=text.ids.device)
            unconditional = self.without_caption(text, everyone)
        else:
            text, unconditional = self.negative_text(captions, negative, scales)
        if (not any(scales) and schedule.interval == ALWAYS) or self.words.constant:
            return self.trim(unconditional), [1.0] * self.num_latents, schedule.interval
        if any(w != 1 for w in scales):
            text = Text(torch.cat([text.ids, unconditional.ids]), torch.cat([text.text_mask, unconditional.text_mask]))
        return text, scales, schedule.interval

    def negative_text(self, captions: list[str], negative: str | list[str], scales: list[float]) -> tuple[Text, Text]:
        """Captions and negative ones as rows of one length, (B,L) each. Raises PriorError as `guided_text`."""
        others = [negative] * len(captions) if isinstance(negative, str) else negative
        count = len(others) if isinstance(others, (list, tuple)) else repr(others)
        if count != len(captions):
            raise PriorError(f"got {count} negative captions for {len(captions)}, wanted one, or one for each.")
        if self.words.constant:
            raise PriorError(f"got negative={negative!r:.40} for a prior that reads no captions; leave it out.")
        if all(w == 1 for w in scales):
            raise PriorError("got a negative caption with guidance 1, which never looks at it; raise guidance above 1.")
        text = self.encode_text([*captions, *others])
        mine, theirs = (Text(*rows) for rows in zip(text.ids.chunk(2), text.text_mask.chunk(2), strict=True))
        return mine, theirs

    # -- files --------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, card: str | None = None) -> Path:
        """Write config.json, model.safetensors and README.md to `folder`."""
        return save_module(self, folder, card)

    def push_to_hub(self, repo_id: str, card: str | None = None, **create: Any) -> str:
        """Export and upload to the Hub as `repo_id`; keyword arguments go to `HfApi.create_repo`."""
        return push_module(self, repo_id, card, **create)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        trust: Sequence[str] = (),
    ) -> "Prior":
        """Load an exported folder, or a Hub repository by id; in eval mode. Errors as `Tokenizer.from_pretrained`.

        dtype: as `hold`; None keeps float32. trust: packages of yours whose classes the export may name.
        """
        module = load_module(cls, path, revision, trust)
        module = module if device is None else module.to(device)
        return module if dtype is None else module.hold(dtype)

    def hold(self, dtype: torch.dtype) -> "Prior":
        """Keep the weights of all linear layers in `dtype` from now on, for sampling and scoring; returns self.

        See `precision.hold_weights`; the path and the solver stay float32. Training wants float32 weights.
        """
        hold_weights(self, dtype)
        self.held = dtype
        return self

    def autocast(self) -> AbstractContextManager[Any]:
        """Products in the dtype that weights are held in; where that is float32, whatever the caller has set up."""
        return held_autocast(self.held, self.fingerprint_bytes.device)
