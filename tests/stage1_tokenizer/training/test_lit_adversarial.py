"""The training of a `LitTokenizer`: the adversarial game by hand (steps are counted once, gradients add up, both
optimisers are in the checkpoint), image losses, captions that are missing, frozen parts.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from stage1_tokenizer.encoder import PatchTrunk, QFormerEncoder
from stage1_tokenizer.text.captioner import PrefixCaptioner
from stage1_tokenizer.text.contrast import MaxOverQueries, SigmoidContrast, SoftmaxContrast
from stage1_tokenizer.text.supervision import GradientBalance, PrefixText
from stage1_tokenizer.tokenizer import Tokenizer
from stage1_tokenizer.training.adversarial import AdversarialLoss, PatchDiscriminator
from stage1_tokenizer.training.lit_adversarial import LitAdversarial
from stage1_tokenizer.training.lit_tokenizer import LitTokenizer
from stage1_tokenizer.training.losses import PixelLoss
from stage1_tokenizer.training.options import OptimizerOptions, ScheduleOptions, StartOptions
from stage1_tokenizer.variants.normed import NormBottleneck
from tests.tiny import CAPTIONS, SIZE, WIDTH, C, K, pictures, tiny_tokenizer


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


def fit(tmp_path: Path, **options: Any) -> tuple[LitAdversarial, Watch, pl.Trainer]:
    game = AdversarialLoss(PatchDiscriminator(8, 2), start_step=1)
    schedule = ScheduleOptions(warmup_steps=0)
    lit, watch = LitAdversarial(tiny_tokenizer(text=False), game, schedule=schedule, **options), Watch()
    return lit, watch, train(tmp_path, lit, batches_of(4), watch, max_steps=3)


def batches_of(size: int, pictures_in_all: int = 32) -> list[dict[str, Any]]:
    return [{"images": x, "captions": [[]] * len(x)} for x in pictures(pictures_in_all).split(size)]


def train(
    tmp_path: Path, lit: LitTokenizer, batches: Any, *callbacks: pl.Callback, validate: bool = False, **options: Any
) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path,
        **options,
    )  # fmt: skip
    loader: Any = DataLoader(batches, batch_size=None)
    trainer.fit(lit, loader, loader if validate else None)
    return trainer


def test_a_step_counts_once_and_both_optimisers_are_saved(tmp_path: Path) -> None:
    lit, watch, trainer = fit(tmp_path)
    assert watch.moves == [(1, True, False), (2, True, True), (3, True, True)]  # the discriminator starts at step 1
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["global_step"] == 3 and len(stored["optimizer_states"]) == 2
    assert lit.adversarial.real_mean != 0


def test_gradients_of_several_batches_make_one_step(tmp_path: Path) -> None:
    _, watch, _ = fit(tmp_path, accumulate=2)
    steps, tokenizer, discriminator = zip(*watch.moves, strict=True)
    assert steps == (0, 1, 1, 2, 2, 3)
    assert tokenizer == (False, True) * 3
    assert discriminator == (False, False, False, True, False, True)


def test_less_than_one_batch_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="got accumulate 0; wanted at least 1"):
        LitAdversarial(tiny_tokenizer(text=False), AdversarialLoss(PatchDiscriminator(8, 2)), accumulate=0)


class Gradients(pl.Callback):
    """The gradients of each step of the tokenizer, and those of the discriminator that are left at the end."""

    def __init__(self) -> None:
        self.steps: list[list[torch.Tensor]] = []
        self.critic: list[torch.Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.steps.append([p.grad.clone() for p in pl_module.tokenizer.parameters() if p.grad is not None])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.critic = [p.grad.clone() for p in pl_module.adversarial.discriminator.parameters()]


@pytest.mark.parametrize(
    ("options", "in_all", "together"),
    [({"max_epochs": 1}, 12, [8, 4]), ({"max_epochs": 1}, 4, [4]), ({"max_steps": 1}, 8, [8])],
    ids=["a remainder of one", "an epoch shorter than a window", "a whole window"],
)
def test_accumulated_batches_equal_one_big_batch(
    tmp_path: Path, options: dict[str, Any], in_all: int, together: list[int]
) -> None:
    def gradients(batches: Any, accumulate: int) -> tuple[Gradients, pl.Trainer]:
        torch.manual_seed(0)
        # Without what is not linear in the rows of a batch: noise, the adaptive weight, LeCam's running means.
        game = AdversarialLoss(PatchDiscriminator(8, 2), weight=0.0, start_step=0, lecam_weight=0.0)
        tokenizer, seen = tiny_tokenizer(text=False), Gradients()
        tokenizer.lengths, tokenizer.bottleneck = None, NormBottleneck(WIDTH, K, C)
        # A rate that leaves the weights as they are, so that the second step compares gradients of the same weights.
        still = OptimizerOptions(lr=1e-30, matrix_lr=1e-30)
        lit = LitAdversarial(tokenizer, game, accumulate, still)
        return seen, train(tmp_path, lit, batches, seen, **options)

    small, trainer = gradients(batches_of(4, in_all), accumulate=2)
    big, _ = gradients([{"images": x, "captions": []} for x in pictures(in_all).split(together)], accumulate=1)
    assert trainer.global_step == len(small.steps) == len(together)
    for some, whole in zip(small.steps, big.steps, strict=True):
        assert len(some) > 20
        torch.testing.assert_close(some, whole, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(small.critic, big.critic, atol=1e-7, rtol=1e-4)


def test_the_schedule_knows_how_many_steps_accumulation_leaves(tmp_path: Path) -> None:
    game = AdversarialLoss(PatchDiscriminator(8, 2), start_step=99)
    rate, schedule = OptimizerOptions(lr=1e-3), ScheduleOptions(warmup_steps=0)
    lit = LitAdversarial(tiny_tokenizer(text=False), game, 3, rate, schedule)
    trainer = train(tmp_path, lit, batches_of(4), max_epochs=2)  # 8 batches an epoch: 3 + 3 + 2
    assert trainer.global_step == 6
    rates = {group["group"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert rates["plain"] == pytest.approx(1e-3 * 0.01)  # the end of the cosine


def test_a_fit_that_only_time_ends_keeps_its_rate(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 6

    lit = LitTokenizer(tiny_tokenizer(text=False), OptimizerOptions(lr=1e-3), ScheduleOptions(warmup_steps=2))
    trainer = train(tmp_path, lit, batches_of(4), Stop(), max_time="00:01:00:00")
    assert trainer.global_step == 6
    rates = {group["group"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert rates["plain"] == 1e-3


def test_image_losses_of_one_class_all_count(tmp_path: Path) -> None:
    batch = batches_of(4)[:1]

    def logged(*losses: PixelLoss) -> dict[str, float]:
        torch.manual_seed(0)
        lit = LitTokenizer(tiny_tokenizer(text=False), image_losses=list(losses))
        metrics = train(tmp_path, lit, batch, max_steps=1).callback_metrics
        return {name.removeprefix("train/"): value.item() for name, value in metrics.items()}

    none, one, two = logged(), logged(PixelLoss(1.0)), logged(PixelLoss(1.0), PixelLoss(2.0, weight=3.0))
    assert two["PixelLoss_0"] == one["PixelLoss"] and two["PixelLoss_1"] != two["PixelLoss_0"]
    assert one["loss"] == pytest.approx(none["loss"] + one["PixelLoss"])
    assert two["loss"] == pytest.approx(none["loss"] + two["PixelLoss_0"] + two["PixelLoss_1"])


@pytest.mark.parametrize("contrast", [SoftmaxContrast, SigmoidContrast, MaxOverQueries])
def test_pictures_without_captions_are_left_out_of_the_text_losses(contrast: type[nn.Module]) -> None:
    tokenizer = tiny_tokenizer()
    text = tokenizer.text_part()
    assert isinstance(text, PrefixText)
    text.contrast = contrast()  # type: ignore[assignment]
    text.lengths, text.weights = [2], torch.ones(1)  # one length: the captioner's draw is then the same for any batch
    text.captioner = PrefixCaptioner(64, 12, K, C, WIDTH, 1, 2)
    lit = LitTokenizer(tokenizer, long_captions=1.0)
    captions = [[CAPTIONS[0]], [], [CAPTIONS[1], ""], [" "], [CAPTIONS[0]], []]
    rows, z = [0, 2, 4], torch.randn(6, K, C, requires_grad=True)
    ids, fewer = (lit.caption_ids({"captions": c}) for c in (captions, [captions[i] for i in rows]))
    assert ids is not None and fewer is not None and ids.shape == (6, 12)

    found, expected = text.losses(z, ids), text.losses(z[rows], fewer)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found["text"] + found["caption"], z)
    assert gradient[rows].abs().amax((1, 2)).min() > 0 and not gradient[[1, 3, 5]].any()

    nothing = text.losses(z, tokenizer.vocabulary.encode([""] * 6)[0])
    assert nothing["text"] == 0 and nothing["caption"] == 0
    assert lit.caption_ids({"captions": [[], [" "]]}) is None


def test_an_overflow_leaves_the_gradient_balance_as_it_was() -> None:
    balance = GradientBalance(share=0.2).train()

    def backward(factor: float) -> None:
        first, second = balance(torch.ones(4, requires_grad=True))
        (first.sum() + factor * second.sum()).backward()

    backward(2.0)
    before = balance.norms.clone()
    for broken in (float("inf"), float("nan")):
        backward(broken)
        assert balance.norms[1] == before[1] and balance.norms.isfinite().all()
    backward(4.0)
    assert balance.norms[1] > before[1]


def test_frozen_parts_stay_in_eval_mode(tmp_path: Path) -> None:
    tiny, trunk = tiny_tokenizer(text=False), PatchTrunk(SIZE, 4, WIDTH, 1, 2, stem_width=8, mask_ratio=0.9)
    tokenizer = Tokenizer(SIZE, QFormerEncoder(trunk, K, 2, 2), tiny.bottleneck, tiny.decoder, tiny.lengths)
    tokenizer.save_pretrained(tmp_path / "exported")
    lit = LitTokenizer(tokenizer.train(), start=StartOptions(str(tmp_path / "exported"), freeze_encoder=True))
    modes: list[tuple[bool, ...]] = []
    parts: list[nn.Module] = [trunk, trunk.blocks[0], tokenizer.bottleneck, tokenizer.decoder, lit]

    class Look(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            modes.append(tuple(part.training for part in parts))

    train(tmp_path, lit, batches_of(4)[:2], Look(), validate=True, max_epochs=2)
    assert modes == [(False, False, False, True, True)] * 4  # also after a validation
