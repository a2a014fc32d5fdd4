"""Caption loss on prefixes: a small autoregressive text decoder that reads the first k latents (after CapPa, CoCa).

    ids (B,L) -> words (B,L,D); blocks: causal self-attention, cross-attention to the visible latents, MLP -> next word

The captions are targets: what the decoder cannot predict from earlier words it must find in the prefix, so gradients
predict the caption from the prefix. `log_likelihood` is for reports, `generate` captions a prefix.

Letters: B batch, K latents, C latent channels, L text tokens, V vocabulary rows, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.layers import Block, LayerNorm, Linears, causal_mask, decayed, embedding
from stage1_tokenizer.spec import Spec
from stage1_tokenizer.text.vocabulary import END, PAD, START


class PrefixCaptioner(Spec, nn.Module):
    """Text decoder over the rows of a `CaptionVocabulary`.

    Args:
        rows, context_length: those of the vocabulary.
        num_latents, latent_dim: K and C.
        width, depth, heads: of the decoder.
    forward(z (B,K,C), keep_mask (B,K) True = visible, ids (B,L)) -> (B,L-1) nats of each next token, 0 at padding.
    """

    def __init__(
        self,
        rows: int = 4096,
        context_length: int = 32,
        num_latents: int = 16,
        latent_dim: int = 16,
        width: int = 128,
        depth: int = 1,
        heads: int = 2,
    ):
        super().__init__()
        self.rows, self.context_length, self.num_latents = rows, context_length, num_latents
        self.words = nn.Embedding(rows, width)
        nn.init.normal_(self.words.weight, std=0.7)
        self.position = embedding(context_length, width, std=0.7)
        self.latent = Linears(num_latents, latent_dim, width)
        self.latent_position = embedding(num_latents, width, std=0.7)
        self.nothing = embedding(1, width)  # always visible, so that an empty prefix has something to attend to
        self.blocks = nn.ModuleList(Block(width, heads, cross=True) for _ in range(depth))
        self.norm = LayerNorm(width)
        self.out = decayed(nn.Linear(width, rows))
        self.register_buffer("causal", causal_mask(context_length), persistent=False)
        self.causal: Tensor

    def logits(self, z: Tensor, keep_mask: Tensor, ids: Tensor) -> Tensor:
        n = ids.shape[1]
        x = self.words(ids) + self.position[:n]  # (B,n,D)
        latents = self.latent(z) + self.latent_position[: z.shape[1]]  # (B,K,D)
        context = torch.cat([self.nothing.to(latents.dtype).expand(len(z), 1, -1), latents], 1)  # (B,1+K,D)
        visible = F.pad(keep_mask, (1, 0), value=True)[:, None, None]  # (B,1,1,1+K)
        for block in self.blocks:
            x = block(x, context, self_mask=self.causal[:n, :n], cross_mask=visible)
        return self.out(self.norm(x))  # (B,n,V)

    def forward(self, z: Tensor, keep_mask: Tensor, ids: Tensor) -> Tensor:
        logits = self.logits(z, keep_mask, ids[:, :-1]).float()  # (B,L-1,V)
        return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], ignore_index=PAD, reduction="none")

    def log_likelihood(self, z: Tensor, keep_mask: Tensor, ids: Tensor) -> Tensor:
        """(B,) log p(caption | prefix) in nats."""
        return -self(z, keep_mask, ids).sum(-1)

    @torch.no_grad()
    def generate(self, z: Tensor, keep_mask: Tensor) -> Tensor:
        """(B,L) ids of the greedy caption of each prefix, padded behind its end."""
        ids = torch.full((len(z), self.context_length), PAD, dtype=torch.long, device=z.device)
        ids[:, 0] = START
        ended = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        for i in range(1, self.context_length):
            best = self.logits(z, keep_mask, ids[:, :i])[:, -1].float()
            best[:, [PAD, START]] = -torch.inf
            ids[:, i] = torch.where(ended, PAD, best.argmax(-1))
            ended |= ids[:, i] == END
        return ids
