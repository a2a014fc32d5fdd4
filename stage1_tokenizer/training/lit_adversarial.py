"""A tokenizer trained against a discriminator: two optimisers take turns, stepped by hand.

What is minimised is `LitTokenizer`'s loss and, from the discriminator's `start_step` on, what the discriminator makes
of the reconstruction; the discriminator is trained on the same batch right after. Only the tokenizer's step goes
through Lightning's wrapper: `global_step` counts wrapped steps, and so counts it once. Both optimisers are in the
checkpoint; both clip the norm of their gradients.
"""

from typing import Any

import torch
from torch import Tensor, nn

from stage1_tokenizer.tokenizer import Tokenizer
from stage1_tokenizer.training.adversarial import AdversarialLoss
from stage1_tokenizer.training.lit_tokenizer import LitTokenizer
from stage1_tokenizer.training.losses import ImageLoss
from stage1_tokenizer.training.optim import planned_steps
from stage1_tokenizer.training.options import (
    OptimizerOptions,
    OptionError,
    PassOptions,
    ReportOptions,
    ScheduleOptions,
    StartOptions,
)


class LitAdversarial(LitTokenizer):
    """`LitTokenizer` with a discriminator.

    Args:
        adversarial: the discriminator and its weights.
        accumulate: batches whose gradients make one step; Lightning's accumulate_grad_batches does not reach steps
            that are taken by hand.
        tokenizer, optimizer, schedule, start, passes, report, long_captions, image_losses: as in `LitTokenizer`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        adversarial: AdversarialLoss,
        accumulate: int = 1,
        optimizer: OptimizerOptions = OptimizerOptions(),  # noqa: B008  (frozen)
        schedule: ScheduleOptions = ScheduleOptions(),  # noqa: B008
        start: StartOptions = StartOptions(),  # noqa: B008
        passes: PassOptions = PassOptions(),  # noqa: B008
        report: ReportOptions = ReportOptions(),  # noqa: B008
        long_captions: float = 0.75,
        image_losses: list[ImageLoss] | None = None,
    ):
        super().__init__(tokenizer, optimizer, schedule, start, passes, report, long_captions, image_losses)
        if accumulate < 1:
            raise OptionError(f"got accumulate {accumulate}; wanted at least 1 batch a step.")
        self.adversarial, self.accumulate = adversarial, accumulate
        self.added = 0  # batches whose gradients wait for the next step
        self.automatic_optimization = False

    def setup(self, stage: str) -> None:
        self.added = 0
        super().setup(stage)

    def configure_optimizers(self) -> Any:
        optimizer = self.tokenizer_optimizer()
        schedule = self.schedule.build(optimizer, planned_steps(self.trainer, self.accumulate))
        rate = self.optimizer_options.lr
        critic = torch.optim.AdamW(self.adversarial.discriminator.parameters(), lr=rate, betas=(0.5, 0.9))
        return [optimizer, critic], [schedule]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        loss, parts, reconstruction = self.step_losses(batch)
        parts |= self.take_turns(loss, batch["images"], reconstruction, self.last_of_window(batch_idx))
        return {"loss": loss.detach(), **self.logged(loss, parts)}

    def last_of_window(self, batch_idx: int) -> bool:
        """True if a step is due after this batch: `accumulate` batches are together, or the epoch ends."""
        last_batch = self.trainer.is_last_batch or batch_idx + 1 == self.trainer.num_training_batches
        return self.added + 1 >= self.accumulate or last_batch

    def take_turns(self, loss: Tensor, images: Tensor, reconstruction: Tensor, last: bool) -> dict[str, Tensor]:
        """One batch of the tokenizer and of the discriminator; both step after the `last` one of a window.

        A step takes the mean over the batches of its window, of which the end of an epoch may leave fewer.
        """
        critic_loss, step = self.adversarial, self.global_step
        optimizer, critic = self.optimizers()  # type: ignore[misc]
        if self.added == 0:
            optimizer.zero_grad()
            critic.zero_grad()
        self.added += 1
        parts = {}
        if critic_loss.active(step):
            parts["generator"] = critic_loss.generator(reconstruction, loss, self.tokenizer.decoder.last_weight)
            loss = loss + parts["generator"]
        self.manual_backward(loss)
        if last:
            divide_gradients(optimizer.optimizer, self.added)
            optimizer.step()
            self.lr_schedulers().step()  # type: ignore[union-attr]
        if critic_loss.active(step):
            parts["discriminator"], means = critic_loss.discriminate(images, reconstruction)
            self.manual_backward(parts["discriminator"])
            if last:
                divide_gradients(critic.optimizer, self.added)
                nn.utils.clip_grad_norm_(critic_loss.discriminator.parameters(), 1.0)
                critic.optimizer.step()
            critic_loss.track(means)
            parts |= means
        self.added = 0 if last else self.added
        return parts


def divide_gradients(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Make the sums of the gradients of `count` batches their mean, in place."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if count > 1:
        torch._foreach_div_([parameter.grad for parameter in parameters if parameter.grad is not None], count)
