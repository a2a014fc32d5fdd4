"""Exponential moving average of the networks, and of nothing else.

The average covers the trainable parameters of `pl_module.networks`. Buffers (statistics, counters, codebooks) are never
averaged: they belong to the networks and stay what they are while the averaged weights are swapped in. Losses' own
networks (a discriminator, a perceptual trunk) live outside `networks` and cost nothing here. (Lightning's own
WeightAveraging averages a deep copy of the whole lit module, discriminator included, with buffers all or none.)

The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that the average of a short run forgets its
random start.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn


class EMA:
    """Averaged copy of the trainable parameters of `networks`, on their devices and in their dtypes.

    decay: weight of the past per update, in [0, 1). Raises ValueError outside of it.
    """

    def __init__(self, networks: nn.Module, decay: float = 0.998) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"got EMA decay {decay}; expected at least 0 and below 1")
        self.decay, self.updates = decay, 0
        named = [(name, p) for name, p in networks.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self.averages = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present parameters by one step."""
        if self.parameters:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)
        self.updates += 1

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The networks hold the averaged parameters inside this context, and their own again after it."""
        own = self.swap_in()
        try:
            yield
        finally:
            self.swap_out(own)

    @torch.no_grad()
    def swap_in(self) -> list[Tensor]:
        """Put the averages into the networks; returns copies of what they held, for `swap_out`."""
        own = [p.detach().clone() for p in self.parameters]
        for p, average in zip(self.parameters, self.averages, strict=True):
            p.copy_(average)
        return own

    @torch.no_grad()
    def swap_out(self, own: list[Tensor]) -> None:
        """Put `own`, as returned by `swap_in`, back into the networks."""
        for p, value in zip(self.parameters, own, strict=True):
            p.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and one number: {"updates": int, "averages": {parameter name: tensor}}."""
        return {"updates": self.updates, "averages": dict(zip(self.names, self.averages, strict=True))}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Raises ValueError unless names and shapes are those of the networks."""
        averages = state["averages"]
        found = {name: tuple(average.shape) for name, average in averages.items()}
        wanted = {name: tuple(average.shape) for name, average in zip(self.names, self.averages, strict=True)}
        if found != wanted:
            differ = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
            raise ValueError(
                f"the stored average does not fit the networks: {len(differ)} parameters differ, first '{differ[0]}' "
                f"(stored {found.get(differ[0], 'nothing')}, here {wanted.get(differ[0], 'nothing')}); "
                "resume with the configuration that the checkpoint was trained with"
            )
        self.updates = int(state["updates"])
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(averages[name])


class EMAWeights(pl.Callback):
    """Averages `pl_module.networks` after every optimizer step and validates on the average.

    Checkpoints keep both: the model's own weights as usual, the average in this callback's state. `averaged()` gives
    the networks their averaged weights for an export.

    decay: weight of the past per optimizer step.
    """

    def __init__(self, decay: float = 0.998) -> None:
        self.decay = decay
        self.ema: EMA | None = None
        self._own: list[Tensor] | None = None  # the networks' own weights while the average is swapped in
        self._loaded: dict[str, Any] | None = None  # arrives before the networks are on their device
        self._seen_step = 0

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The networks hold their average inside; does nothing before `fit` began or where it is swapped in already."""
        if self.ema is None or self._own is not None:
            yield
        else:
            with self.ema.averaged():
                yield

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        networks = pl_module.networks
        assert isinstance(networks, nn.Module), "a lit module here has a property `networks`, an nn.Module"
        self.ema = EMA(networks, self.decay)
        self._own = None
        if self._loaded is not None:
            self.ema.load_state_dict(self._loaded)
            self._loaded = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen_step = trainer.global_step  # of the resumed run, which is not known before

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.ema is not None and trainer.global_step != self._seen_step:  # not while gradients accumulate
            self._seen_step = trainer.global_step
            self.ema.update()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.ema is not None and self._own is None:
            self._own = self.ema.swap_in()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        if self.ema is not None and self._own is not None:
            self.ema.swap_out(self._own)
            self._own = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self.ema is None else self.ema.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict or None
