"""One transformer over words and pictures, without a head: the forerunner of Transfusion (Su 2024; Zhou et al. 2024).

    caption 1 | picture 1 | picture 2 | caption 2 | ...          a line of segments, in any order
    words answer with the next word; a picture's latents are given with noise and answer with the original

The latents of a picture see each other, in no order, and all segments before; words see earlier words and segments.
What comes later must not meet noise, so that every picture is there twice: clean, for all that follows, and noisy, seen
by itself alone. The clean one is a noisy one at t = 0, by the same weights.

The loss of a picture is on the original, weighted by the signal-to-noise ratio ((1 - t) / t)^2 held between 1 and `cap`
(Salimans & Ho 2022, section 4; Hang et al. 2023); larger pictures are trained at more noise (Hoogeboom et al. 2023). A
picture is drawn as a whole, by a flow solver or by DDIM and DDPM, whose schedule is met by scaling x_t. Text to picture
and picture to text are the same weights: in training a share of the pairs has its picture first.

Letters: B lines, N pairs of caption and picture in a line, K latents of a picture, C latent channels, L caption tokens,
D width, V rows of the vocabulary, R rows of a batch with unconditional twins.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.flow import interpolate, logit_normal_times, v_from_x
from stage1_tokenizer.layers import decayed, embedding
from stage1_tokenizer.text.vocabulary import END, PAD, START, CaptionVocabulary
from stage2_prior.backbone import Backbone, Cache, recorded
from stage2_prior.base import Prior
from stage2_prior.conditions import WORD_STD, CaptionWords, TrainingData
from stage2_prior.heads.base import refuse_symbols
from stage2_prior.heads.ddpm import alpha_sigma_at
from stage2_prior.heads.flow import LEAST_TIME
from stage2_prior.heads.nets import TIME_FEATURES, time_features
from stage2_prior.heads.solvers import Field, Midpoint, Solver
from stage2_prior.latent_space import PriorError
from stage2_prior.orders import causal_mask
from stage2_prior.request import Request, States, Text

REFERENCE_SIZE = 32  # side of pictures whose training times are not shifted


class JointPrior(Prior):
    """Words and pictures in one line.

    Args:
        num_latents, latent_dim, vocabulary, caption_dropout: as `Prior`.
        backbone: transformer with room for `pairs` captions and pictures.
        pairs: so many consecutive samples of a batch make up one line in training.
        picture_first: share of the pairs whose picture comes before its caption, which is then read from it.
        caption_weight: factor of the words' cross-entropy (nats per token).
        cap: largest weight of a picture's loss; 1 weights all times alike.
        image_size: side of the pictures that the latents stand for: log(side / 32) is added to logit(t) in training.
        solver: of `sample` (None: midpoint x 4).
    """

    stops_early = False

    def __init__(
        self,
        num_latents: int,
        latent_dim: int,
        vocabulary: CaptionVocabulary,
        backbone: Backbone,
        caption_dropout: float = 0.1,
        pairs: int = 1,
        picture_first: float = 0.25,
        caption_weight: float = 0.1,
        cap: float = 5.0,
        image_size: int = REFERENCE_SIZE,
        solver: Solver | None = None,
    ):
        super().__init__(num_latents, latent_dim, vocabulary, caption_dropout)
        self.vocabulary: CaptionVocabulary
        self.pair_length = vocabulary.context_length + num_latents
        if pairs < 1 or backbone.max_tokens < pairs * self.pair_length:
            raise PriorError(
                f"got pairs={pairs}, each with a caption of {vocabulary.context_length} tokens and a picture of"
                f" {num_latents} latents, and backbone.max_tokens={backbone.max_tokens}; wanted at least 1 pair and"
                f" {max(pairs, 1) * self.pair_length} tokens."
            )
        if not 0 <= picture_first <= 1 or caption_weight < 0 or cap < 1 or image_size < 1:
            raise PriorError(
                f"got picture_first={picture_first}, caption_weight={caption_weight}, cap={cap}, image_size="
                f"{image_size}; wanted a share, a weight of at least 0, a cap of at least 1 and a side in pixels."
            )
        self.backbone, self.pairs, self.picture_first = backbone, pairs, picture_first
        self.caption_weight, self.cap, self.time_mean = caption_weight, cap, math.log(image_size / REFERENCE_SIZE)
        self.solver: Solver = Midpoint() if solver is None else solver
        width = backbone.width
        self.words: CaptionWords = CaptionWords(vocabulary, width)
        self.latent_in = decayed(nn.Linear(latent_dim, width))
        self.kind = embedding(width, std=WORD_STD)  # says that a token is a picture's
        self.time_in, self.time_out = decayed(nn.Linear(TIME_FEATURES, width)), decayed(nn.Linear(width, width))
        self.out = decayed(nn.Linear(width, latent_dim))
        self.next_word = decayed(nn.Linear(width, vocabulary.rows))
        for layer in (self.out, self.next_word):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    # -- the line -----------------------------------------------------------------------------------------------------

    def picture_tokens(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t (..., K, C) at times t (...) -> tokens (..., K, D)."""
        time = self.time_out(F.silu(self.time_in(time_features(t))))[..., None, :]
        return (self.latent_in(x_t.float()) + time).to(self.kind.dtype) + self.kind

    def run(self, text: Text, z: Tensor, x_t: Tensor, t: Tensor, picture_first: Tensor) -> tuple[Tensor, Tensor]:
        """Lines of N pairs, all at once: ids and text_mask (B,N,L), z and x_t (B,N,K,C), t and picture_first (B,N).

        Returns the words' hidden rows (B,N,L,D) and the expected originals (B,N,K,C) of the noisy pictures.
        """
        (n, length), k = text.ids.shape[1:], self.num_latents
        words = self.words(text.ids.flatten(1))  # (B,N L,D)
        clean, noisy = self.picture_tokens(z, torch.zeros_like(t)), self.picture_tokens(x_t, t)  # (B,N,K,D)
        x = torch.cat([words, clean.flatten(1, 2), noisy.flatten(1, 2)], dim=1)  # (B,N (L + 2 K),D)
        h = self.backbone(x, self.positions(n, length, x.device), line_mask(text.text_mask, k, picture_first))
        of_words, _, of_noisy = h.split([n * length, n * k, n * k], dim=1)
        return of_words.unflatten(1, (n, length)), self.out(of_noisy).float().unflatten(1, (n, k))

    def positions(self, n: int, length: int, device: torch.device) -> Tensor:
        """(N (L + 2 K),) of words, clean and noisy latents: a pair has its own stretch, whichever comes first in it."""
        pair = torch.arange(n, device=device)[:, None] * self.pair_length
        words = pair + torch.arange(length, device=device)
        latents = pair + self.vocabulary.context_length + torch.arange(self.num_latents, device=device)
        return torch.cat([words.flatten(), latents.flatten(), latents.flatten()])

    # -- training -----------------------------------------------------------------------------------------------------

    def line_losses(
        self, text: Text, z: Tensor, picture_first: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of lines as `run` takes them: losses of latents (B,N,K), and of captions (B,N) in nats per token."""
        size = len(z), z.shape[1]
        t = logit_normal_times(*size, device=z.device, mean=self.time_mean, generator=generator).T  # (B,N)
        noise = torch.randn(z.shape, generator=generator, device=z.device)
        x_t = interpolate(z.float(), noise, t[..., None, None])
        hidden, x = self.run(text, z, x_t, t, picture_first)
        weight = ((1 - t) / t).square().clamp(1.0, self.cap)
        pictures = weight[..., None] * (x - z.float()).square().mean(-1)  # (B,N,K)
        logits = self.next_word(hidden[:, :, :-1]).float()  # (B,N,L-1,V)
        target = text.ids[:, :, 1:]
        target = target.masked_fill(target == self.null, PAD)  # a dropped caption has nothing to say
        nats = F.cross_entropy(logits.flatten(0, 2), target.flatten(), ignore_index=PAD, reduction="none")
        return pictures, nats.view(target.shape).sum(-1) / (target != PAD).sum(-1).clamp(min=1)

    def losses(self, z: Tensor, text: Text, generator: torch.Generator | None = None) -> Tensor:
        """(B,K), of pictures behind their captions."""
        return self.single(z, self.drop_captions(text, generator), False, generator)[0]

    def figures(self, z: Tensor, text: Text) -> dict[str, Tensor]:
        """`caption`: cross-entropy in nats per token of captions behind their pictures."""
        return {"caption": self.single(z, text, True)[1]}

    def single(
        self, z: Tensor, text: Text, picture_first: bool, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses of B lines of one pair each: (B,K) and (B,)."""
        first = torch.full((len(z), 1), picture_first, device=z.device)
        lines = Text(text.ids[:, None], text.text_mask[:, None])
        pictures, captions = self.line_losses(lines, self.check_latents(z)[:, None], first, generator)
        return pictures[:, 0], captions[:, 0]

    def objective(
        self, z: Tensor, text: Text, generator: torch.Generator | None = None, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """As `Prior.objective`; a rest of the batch that makes up no line is left out."""
        z, n = self.check_latents(z), min(self.pairs, len(z))
        rows = len(z) // n * n
        ids, seen = (part[:rows].unflatten(0, (-1, n)) for part in self.drop_captions(text, generator))
        first = torch.rand(rows // n, n, generator=generator, device=z.device) < self.picture_first
        pictures, captions = self.line_losses(Text(ids, seen), z[:rows].unflatten(0, (-1, n)), first, generator)
        latents = (pictures if weights is None else pictures * weights).mean()
        return {"latents": latents, "caption": self.caption_weight * captions.mean()}

    # -- text to picture ----------------------------------------------------------------------------------------------

    def draw(self, request: Request) -> Tensor:
        """The whole picture at once; there is no prefix of one. The scale of guidance is the mean over positions."""
        if request.prefix.shape[1] or request.num_latents < self.num_latents:
            raise PriorError("got a prefix or num_latents for a JointPrior, which draws whole pictures; leave it out.")
        solver, m, rows = self.chosen(request.steps, request.solver), request.captions, len(request.text.ids)
        n_words, device = request.text.ids.shape[1], request.text.ids.device
        scale, at = (
            sum(request.scales) / len(request.scales),
            self.positions(1, n_words, device)[: n_words + self.num_latents],
        )
        mask = causal_mask(request.text.text_mask, self.num_latents)
        mask[..., n_words:, n_words:] = True
        cache = self.backbone.new_cache(rows, n_words + self.num_latents)
        self.backbone(self.words(request.text.ids), at[:n_words], word_mask(request.text.text_mask), cache)

        def original(x_t: Tensor, t: float, asked: float) -> Tensor:
            """The original as expected from x_t (B,K,C) on the linear path; `asked`: the solver's time."""
            guided = rows > m and scale != 1 and request.interval[0] <= asked <= request.interval[1]
            active = rows if guided else m
            tokens = self.picture_tokens(x_t, torch.full((m,), t, device=device)).repeat(active // m, 1, 1)
            h = self.backbone(tokens, at[n_words:], mask[:active, :, n_words:], cache.keep_rows(active))
            x = self.out(h).float()  # the picture's keys stay behind the cache's length and are overwritten
            return torch.lerp(x[m:], x[:m], scale) if guided else x

        shape = (m, self.num_latents, self.latent_dim)
        noise = torch.randn(shape, generator=request.generator, device=device) * request.temperature
        return solver(field_for(solver, original), noise, request.generator, request.temperature)

    def chosen(self, steps: int | None, solver: Solver | None) -> Solver:
        chosen = self.solver if solver is None else solver
        return chosen if steps is None else chosen.with_evaluations(steps)

    def num_evaluations(self, steps: int | None = None, solver: Solver | None = None) -> int:
        """Evaluations of the whole transformer per picture."""
        return self.chosen(steps, solver).num_evaluations

    # -- picture to text ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def caption(self, z: Tensor) -> list[str]:
        """z (B,K,C) standardised -> the most likely caption of each picture, word by word."""
        with self.autocast():
            return self.read_out(self.check_latents(z))

    @torch.no_grad()
    def states(self, z: Tensor) -> States:
        at = self.positions(1, 0, z.device)[: self.num_latents]
        with self.autocast(), recorded(self.backbone) as stream:
            self.backbone(self.picture_tokens(self.check_latents(z), z.new_zeros(len(z))), at)
        return States(torch.stack(stream), z, [self.num_latents] * self.num_latents)

    def read_out(self, z: Tensor) -> list[str]:
        length, k = self.vocabulary.context_length, self.num_latents
        at = self.positions(1, length, z.device)
        cache: Cache = self.backbone.new_cache(len(z), k + length)
        self.backbone(self.picture_tokens(z, z.new_zeros(len(z))), at[length : length + k], None, cache)
        ids = torch.full((len(z), 1), START, device=z.device)
        for i in range(length - 1):
            hidden = self.backbone(self.words(ids[:, -1:]), at[i : i + 1], None, cache)[:, -1]
            ids = torch.cat([ids, self.next_word(hidden).argmax(dim=-1, keepdim=True)], dim=1)
            if bool((ids == END).any(dim=1).all()):
                break
        return self.vocabulary.decode(ids)

    def prepare(self, data: TrainingData, tokenizer: Callable[[], nn.Module]) -> str:
        refuse_symbols(type(self).__name__, data, tokenizer)
        return super().prepare(data, tokenizer)


def word_mask(text_mask: Tensor) -> Tensor:
    """(B,1,L,L): words see real words up to themselves."""
    at = torch.arange(text_mask.shape[1], device=text_mask.device)
    return ((at[:, None] >= at) & text_mask[:, None])[:, None]


def line_mask(text_mask: Tensor, num_latents: int, picture_first: Tensor) -> Tensor:
    """(B,1,n,n), n = N (L + 2 K): who sees whom among [words | clean pictures | noisy pictures] of N pairs.

    All see real words and clean latents of earlier segments. Words see earlier ones of their caption, clean latents all
    of their own picture; noisy ones see all of their own noisy picture, and not the clean one.
    """
    n, length = text_mask.shape[1:]
    pair, later = torch.arange(n, device=text_mask.device), picture_first.long()
    of_words = (2 * pair + later).repeat_interleave(length, dim=1)  # (B,N L) which segment of the line a token is in
    of_latents = (2 * pair + 1 - later).repeat_interleave(num_latents, dim=1)  # (B,N K)
    place = torch.cat([of_words, of_latents, of_latents], dim=1)  # (B,n)
    at = torch.arange(place.shape[1], device=place.device)
    is_word, is_noisy = at < n * length, at >= n * (length + num_latents)
    is_clean = ~(is_word | is_noisy)
    real = F.pad(text_mask.flatten(1), (0, 2 * n * num_latents), value=True) & ~is_noisy  # (B,n) what others may see
    own = place[:, :, None] == place[:, None]
    alike = (is_word[:, None] & is_word & (at[:, None] >= at)) | (is_clean[:, None] & is_clean)
    earlier = (place[:, :, None] > place[:, None]) | (own & alike)
    return ((earlier & real[:, None]) | (own & is_noisy[:, None] & is_noisy))[:, None]


def field_for(solver: Solver, original: Callable[[Tensor, float, float], Tensor]) -> Field:
    """What `solver` asks for, from the original as expected on the linear path: velocities or, for a diffusion, data.

    A diffusion's x_t = alpha x + sigma noise is the linear path's point at time sigma / (alpha + sigma), times alpha +
    sigma.
    """

    def velocity(x_t: Tensor, t: float) -> Tensor:
        return v_from_x(x_t, original(x_t, t, t), t, floor=LEAST_TIME)

    def data(x_t: Tensor, t: float) -> Tensor:
        alpha, sigma = alpha_sigma_at(t)
        return original(x_t / (alpha + sigma), sigma / (alpha + sigma), t)

    return {"velocity": velocity, "data": data}[solver.asks]
