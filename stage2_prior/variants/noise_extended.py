"""The noise-extended prior: the diffusion of every latent inside the one transformer, without a head.

Each latent is followed, in its own place, by copies of itself at random noise levels, and the transformer answers every
copy with its velocity, or with what `output` makes one of. A copy of latent i sees caption, the clean latents before
i, and itself; clean latents see clean ones only (orders.noise_extended_mask). So the clean stream is an ordinary causal
transformer, whose cache serves all copies, and later text or latents never meet noise.

Most of that mask is empty, so that training on CUDA runs FlexAttention, which skips empty blocks. Elsewhere the mask is
dense: FlexAttention has no backward on a CPU, and no forward mode, which the likelihood asks for.

It is the most direct reading of "extend each patch by a chain of noisier copies", and the most expensive: a sample asks
the whole transformer once per solver step instead of a small head, so it is kept for comparison and not for serving.

Letters: B batch, K latents, C latent channels, L caption tokens, D width, S copies of each latent.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.flow import interpolate, logit_normal_times
from stage1_tokenizer.layers import decayed, embedding
from stage1_tokenizer.text.vocabulary import CaptionVocabulary
from stage2_prior.backbone import Backbone
from stage2_prior.base import Prior
from stage2_prior.conditions import WORD_STD, Condition, TrainingData, words_of
from stage2_prior.heads.base import refuse_symbols
from stage2_prior.heads.flow import Output, VelocityOutput
from stage2_prior.heads.nets import TIME_FEATURES, time_features
from stage2_prior.heads.solvers import Midpoint, Solver, check_solver
from stage2_prior.latent_space import PriorError
from stage2_prior.likelihood import half_step_times, ode_log_prob
from stage2_prior.orders import noise_extended_blocks, noise_extended_mask
from stage2_prior.prior import token_positions
from stage2_prior.request import Request, Text


class NoiseExtendedPrior(Prior):
    """Noisy copies inside the transformer.

    Args:
        num_latents, latent_dim, vocabulary, caption_dropout: as `Prior`.
        condition: as `CausalPrior`.
        backbone: transformer with room for the caption's tokens and the K latents (a copy has its latent's position).
        copies: noise levels per latent and training step.
        solver: of `sample` (None: midpoint x 4).
        output: what the answer to a copy means, and with it the loss (None: its velocity): `CleanOutput`, the original;
            `NextLevelOutput`, the next copy of a chain.
    """

    def __init__(
        self,
        num_latents: int,
        latent_dim: int,
        vocabulary: CaptionVocabulary | None,
        backbone: Backbone,
        caption_dropout: float = 0.1,
        copies: int = 2,
        solver: Solver | None = None,
        condition: Condition | None = None,
        output: Output | None = None,
    ):
        super().__init__(num_latents, latent_dim, vocabulary, caption_dropout)
        if copies < 1:
            raise PriorError(f"got copies={copies}, wanted at least 1 noisy copy of each latent.")
        words = words_of(vocabulary, condition, backbone.width)
        if backbone.max_tokens < words.context_length + num_latents:
            raise PriorError(
                f"backbone.max_tokens is {backbone.max_tokens}, but caption and line can have"
                f" {words.context_length + num_latents} tokens; raise it."
            )
        self.backbone, self.copies = backbone, copies
        self.solver: Solver = Midpoint() if solver is None else solver
        check_solver(self.solver, "velocity", type(self).__name__)
        self.output: Output = VelocityOutput() if output is None else output
        width = backbone.width
        self.words = words
        self.latent_in = decayed(nn.Linear(latent_dim, width))
        self.noisy_in = decayed(nn.Linear(latent_dim, width))
        self.kind = embedding(width, std=WORD_STD)  # says that a token is a noisy copy
        self.time_in, self.time_out = decayed(nn.Linear(TIME_FEATURES, width)), decayed(nn.Linear(width, width))
        self.out = decayed(nn.Linear(width, latent_dim))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def copy_tokens(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t (..., C) at times t (...) -> tokens (..., D)."""
        time = self.time_out(F.silu(self.time_in(time_features(t))))
        return self.noisy_in(x_t) + time + self.kind

    def velocities(self, z: Tensor, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        """Velocity of copies x_t (B,S,K,C) at t (B,S,K), all at once, given the clean line z (B,K,C) -> (B,S,K,C)."""
        return self.output(x_t, self.answers(z, x_t, t, text), t[..., None])

    def answers(self, z: Tensor, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        """What `output` makes a velocity of; arguments and shape as `velocities`."""
        copies, n_words, k = x_t.shape[1], text.ids.shape[1], self.num_latents
        noisy = self.copy_tokens(x_t, t).flatten(1, 2)  # (B,S K,D)
        x = torch.cat([self.words(text.ids), self.latent_in(z.float()), noisy], dim=1)  # (B,L+K+S K,D)
        at = token_positions(n_words, self.words.context_length, k, z.device)
        positions = torch.cat([at, at[n_words:].repeat(copies)])
        build = noise_extended_blocks if x.is_cuda and torch.is_grad_enabled() else noise_extended_mask
        h = self.backbone(x, positions, build(text.text_mask, k, copies))
        return self.out(h[:, n_words + k :]).float().unflatten(1, (copies, k))  # (B,S,K,C)

    def losses(self, z: Tensor, text: Text, generator: torch.Generator | None = None) -> Tensor:
        z, s, k = self.check_latents(z).float(), self.copies, self.num_latents
        t = logit_normal_times(len(z) * k, s, device=z.device, generator=generator)  # (S,B K)
        t = t.unflatten(1, (len(z), k)).transpose(0, 1)  # (B,S,K)
        noise = torch.randn(len(z), s, k, self.latent_dim, generator=generator, device=z.device)
        x_t = interpolate(z[:, None], noise, t[..., None])  # (B,S,K,C)
        answer = self.answers(z, x_t, t, self.drop_captions(text, generator))
        return self.output.error(z[:, None], noise, answer, t[..., None], generator).mean(dim=(1, -1))  # (B,K)

    def draw(self, request: Request) -> Tensor:
        solver = self.chosen(request.steps, request.solver)
        m, rows, n_words, device = (
            request.captions,
            len(request.text.ids),
            request.text.ids.shape[1],
            request.text.ids.device,
        )
        p, scales = request.prefix.shape[1], request.scales
        positions = token_positions(n_words, self.words.context_length, self.num_latents, device)
        # The first L+K rows and columns are the clean tokens'.
        mask = noise_extended_mask(request.text.text_mask, self.num_latents, 1)
        cache = self.backbone.new_cache(rows, n_words + self.num_latents + 1)

        def read(tokens: Tensor) -> None:
            """Words or clean latents (R,n,D), behind those already there."""
            start, end = cache.length, cache.length + tokens.shape[1]
            self.backbone(tokens, positions[start:end], mask[:, :, start:end, :end], cache)

        def clean(z: Tensor) -> Tensor:
            return self.latent_in(z).to(self.kind.dtype).repeat(rows // m, 1, 1)  # (R,n,D)

        read(self.words(request.text.ids))
        line = list(request.prefix.unbind(1))
        if p:
            read(clean(request.prefix))
        for i in range(p, request.num_latents):
            at = n_words + i
            sees_clean = mask[:, :, at : at + 1, : at + 1]  # words, clean latents before i, and the token itself

            def field(x: Tensor, t: float, i: int = i, at: int = at, sees: Tensor = sees_clean) -> Tensor:
                guided = rows > m and scales[i] != 1 and request.interval[0] <= t <= request.interval[1]
                active = rows if guided else m
                token = self.copy_tokens(x, torch.full((m,), t, device=device)).repeat(active // m, 1)[:, None]
                h = self.backbone(token, positions[at : at + 1], sees[:active], cache.keep_rows(active))[:, 0]
                answer = self.out(h).float()  # the copy's keys stay behind the cache's length and are overwritten
                answer = torch.lerp(answer[m:], answer[:m], scales[i]) if guided else answer
                return self.output(x, answer, t)

            noise = torch.randn(m, self.latent_dim, generator=request.generator, device=device) * request.temperature
            line.append(solver(field, noise, request.generator, request.temperature))
            read(clean(line[-1][:, None]))
        return torch.stack(line, dim=1)  # (B,n,C)

    def score(self, z: Tensor, text: Text, steps: int) -> Tensor:
        """A copy's velocity depends on no other copy: all latents go through the ODE at once."""
        times = half_step_times(steps)

        def field(x: Tensor, i: int) -> Tensor:
            t = torch.full((len(z), 1, self.num_latents), times[i], device=z.device)
            return self.velocities(z, x[:, None], t, text)[:, 0]  # (B,K,C)

        return ode_log_prob(field, z.float(), steps)  # (B,K)

    def chosen(self, steps: int | None, solver: Solver | None) -> Solver:
        """The solver of a sample. Raises SamplerError for one of a diffusion, or steps that it cannot take."""
        chosen = self.solver if solver is None else solver
        check_solver(chosen, "velocity", type(self).__name__)
        return chosen if steps is None else chosen.with_evaluations(steps)

    def prepare(self, data: TrainingData, tokenizer: Callable[[], nn.Module]) -> str:
        refuse_symbols(type(self).__name__, data, tokenizer)
        return super().prepare(data, tokenizer)

    def num_evaluations(self, steps: int | None = None, solver: Solver | None = None) -> int:
        """Evaluations of the whole transformer per latent, without the run that reads the drawn one, as elsewhere."""
        return self.chosen(steps, solver).num_evaluations
