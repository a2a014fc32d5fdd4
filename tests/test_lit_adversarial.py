"""Adversarial training by hand: steps are counted once, gradients add up, both optimisers are in the checkpoint."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from stage1_tokenizer.adversarial import AdversarialLoss, PatchDiscriminator
from stage1_tokenizer.lit_tokenizer import LitTokenizer
from tests.tiny import pictures, tiny_tokenizer


class Watch(pl.Callback):
    """Which weights moved in each batch: (global step after it, tokenizer moved, discriminator moved)."""

    def __init__(self) -> None:
        self.moves: list[tuple[int, bool, bool]] = []
        self.before: list[torch.Tensor] = []

    def weights(self, lit: Any) -> list[torch.Tensor]:
        return [lit.tokenizer.encoder.queries.clone(), lit.adversarial.discriminator.net[0].weight.clone()]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.before = self.weights(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        moved = [not torch.equal(a, b) for a, b in zip(self.before, self.weights(pl_module), strict=True)]
        self.moves.append((trainer.global_step, *moved))


def fit(tmp_path: Path, **options: Any) -> tuple[LitTokenizer, Watch, pl.Trainer]:
    game = AdversarialLoss(PatchDiscriminator(8, 2), start_step=1)
    lit, watch = LitTokenizer(tiny_tokenizer(text=False), adversarial=game, warmup_steps=0, **options), Watch()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=3, callbacks=[watch], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    batches: Any = [{"images": x, "captions": [[]] * 4} for x in pictures(32).split(4)]
    trainer.fit(lit, DataLoader(batches, batch_size=None))
    return lit, watch, trainer


def test_a_step_counts_once_and_both_optimisers_are_saved(tmp_path: Path) -> None:
    lit, watch, trainer = fit(tmp_path)
    assert watch.moves == [(1, True, False), (2, True, True), (3, True, True)]  # the discriminator starts at step 1
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["global_step"] == 3 and len(stored["optimizer_states"]) == 2
    assert lit.adversarial is not None and lit.adversarial.real_mean != 0


def test_gradients_of_several_batches_make_one_step(tmp_path: Path) -> None:
    _, watch, _ = fit(tmp_path, accumulate=2)
    steps, tokenizer, discriminator = zip(*watch.moves, strict=True)
    assert steps == (0, 1, 1, 2, 2, 3)
    assert tokenizer == (False, True) * 3
    assert discriminator == (False, False, False, True, False, True)


def test_accumulation_without_a_discriminator_is_the_trainers() -> None:
    with pytest.raises(ValueError, match="accumulate_grad_batches"):
        LitTokenizer(tiny_tokenizer(text=False), accumulate=2)
