"""The encoder reads its lesson from a finished prior: the slow half of two models that teach each other in turns.

    tokenizer -> latents -> prior, trained as always
    tokenizer, started from itself, with the frozen prior's loss of its lines beside the pixels'   (here)
    its latents written anew -> the prior, started from itself (`model.init_from`), goes on

and so on, round by round. `stage1_tokenizer.LatentPredictor` is the quick half: a small model, trained along. What the
prior is asked here is what it was trained on: a line in the units of its own tokenizer's statistics, which stay as
they were while the encoder moves, so that an encoder cannot gain by a change of scale that the next statistics undo.

Letters: B batch, K latents, C latent channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stage1_tokenizer.predictor import Predictor
from stage1_tokenizer.tokenizer import Tokenizer
from stage2_prior.base import Prior
from stage2_prior.latent_space import PriorError, load_space


class FrozenPrior(Predictor):
    """The loss of a trained prior, without captions, as a loss on the encoder; no weight of the prior's moves.

    Args:
        num_latents, latent_dim: K and C of the tokenizer; a prior of the first few of its latents judges those.
        prior_dir: exported prior.
        tokenizer_dir: the exported tokenizer that this prior belongs to, whose statistics it reads lines in.
        weight: factor of the prior's mean loss, beside a mean squared error of pixels in [-1, 1].
    Raises ValueError for a weight that is not above 0; PriorError (in `prepare`) for a prior of other latents, and for
    a tokenizer of symbols, which no gradient moves.
    """

    def __init__(
        self,
        num_latents: int = 16,
        latent_dim: int = 16,
        prior_dir: str = "runs/demo/prior",
        tokenizer_dir: str = "runs/demo/tokenizer",
        weight: float = 0.001,
    ):
        super().__init__()
        if not weight > 0:
            raise ValueError(f"got weight {weight}, wanted one above 0; leave the predictor out for none.")
        self.num_latents, self.latent_dim, self.weight = num_latents, latent_dim, weight
        self.prior_dir, self.tokenizer_dir = prior_dir, tokenizer_dir
        self._teacher: list[nn.Module] = []  # prior, tokenizer; a list: neither trained nor in a checkpoint

    def prepare(self) -> None:
        with torch.random.fork_rng(devices=[]):  # first weights are drawn before they are replaced
            prior, tokenizer = Prior.from_pretrained(self.prior_dir), load_space(self.tokenizer_dir)
        prior.check(tokenizer)
        if not isinstance(tokenizer, Tokenizer) or tokenizer.bottleneck.rounds:
            raise PriorError(
                f"{self.tokenizer_dir} holds no tokenizer of continuous latents, wanted one, whose encoder can learn."
            )
        if (tokenizer.num_latents, tokenizer.latent_dim) != (self.num_latents, self.latent_dim):
            raise PriorError(
                f"got a line of {self.num_latents} x {self.latent_dim}, but the tokenizer in {self.tokenizer_dir} has"
                f" {tokenizer.num_latents} x {tokenizer.latent_dim}; make the sizes equal."
            )
        self._teacher = [part.eval().requires_grad_(False) for part in (prior, tokenizer)]

    def losses(self, z: Tensor, pixels: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """z (B,K,C) -> `predictor`, to be minimised; `prior_loss`: the prior's mean loss itself, to log."""
        if not self._teacher:
            self.prepare()
        prior, own = (part.to(z.device) for part in self._teacher)
        assert isinstance(prior, Prior) and isinstance(own, Tokenizer), "prepare saw to it"
        line = ((z.float() - own.latent_mean) / own.latent_scale)[:, : prior.num_latents]
        loss = prior.losses(line, prior.nothing(len(z))).mean()
        return {"predictor": self.weight * loss, "prior_loss": loss.detach()}
