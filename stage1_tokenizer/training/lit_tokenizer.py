"""Lightning side of stage 1: optimiser, logging, report and latent shards; the maths is in tokenizer.py.

fit: trains a `Tokenizer` on image shards, then exports it (with latent statistics of the averaged weights) to
`run_dir/tokenizer`. test: the reconstruction report. predict: latent shards for stage 2.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from data.reading.latents import LatentShardWriter, Origin, begin_latents, finished_shards, write_latent_manifest
from stage1_tokenizer.evaluation.image_metrics import psnr
from stage1_tokenizer.evaluation.picture_data import draw_training
from stage1_tokenizer.text.open_clip_tower import OpenClipTower
from stage1_tokenizer.tokenizer import Tokenizer
from stage1_tokenizer.training.adversarial import AdversarialLoss
from stage1_tokenizer.training.card import tokenizer_card
from stage1_tokenizer.training.losses import ImageLoss
from stage1_tokenizer.training.optim import MuonAdamW, parameter_groups, planned_steps, warmup_flat_cosine


class LitTokenizer(pl.LightningModule):
    """Trains, tests and applies a `Tokenizer`.

    Args:
        tokenizer: the model.
        lr: AdamW's rate, for everything that is not a block matrix.
        matrix_lr: Muon's rate, for block matrices.
        weight_decay: AdamW's, on the parameters marked for it: linear maps and convolutions outside the blocks.
        matrix_weight_decay: Muon's. It bounds a matrix's largest singular value by about its inverse, which residual
            convolutions without normalisation need: those of `configs/stage1/cifar10.yaml` die without, after
            some 3,000 steps.
        warmup_steps: linear warm-up.
        flat_fraction: share of the steps at full rate before the cosine begins.
        long_captions: probability that the text loss uses a picture's longest caption, else any of its captions.
        captions_by_length: above 1, so many captions of each picture, from its shortest to its longest, supervise the
            prefixes from the shortest to the longest (and `long_captions` is not used).
        statistics_images: training images that the latent statistics are computed from.
        linear_path_images: training images that a linear path is computed from.
        report_images: held-out images that `test` reports on.
        image_losses: losses between full-length reconstructions and pictures, besides the decoder's own.
        adversarial: a discriminator to play against; None for none.
        accumulate: batches whose gradients make one step, with `adversarial`; without it the trainer's
            accumulate_grad_batches does the same.
        init_from: exported tokenizer to start from (same encoder, bottleneck and text; a decoder of the same class
            too); None starts from random weights.
        freeze_encoder: train the decoder only, with `init_from`; latents, text and statistics stay as they are.
        lpips_trunk, lpips_weights: LPIPS of the report, and the path of its trunk's weights as torchvision has them;
            None looks in torch's cache.
        inception_weights: path of FID's Inception weights; None leaves that distance out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        lr: float = 2.5e-3,
        matrix_lr: float = 0.012,
        weight_decay: float = 0.0,
        matrix_weight_decay: float = 0.0,
        warmup_steps: int = 30,
        flat_fraction: float = 0.3,
        long_captions: float = 0.75,
        captions_by_length: int = 1,
        statistics_images: int = 20_000,
        linear_path_images: int = 20_000,
        report_images: int = 2_000,
        image_losses: list[ImageLoss] | None = None,
        adversarial: AdversarialLoss | None = None,
        accumulate: int = 1,
        init_from: str | None = None,
        freeze_encoder: bool = False,
        lpips_trunk: str = "alex",
        lpips_weights: str | None = None,
        inception_weights: str | None = None,
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self.lr, self.matrix_lr = lr, matrix_lr
        self.weight_decay, self.matrix_weight_decay = weight_decay, matrix_weight_decay
        self.warmup_steps, self.flat_fraction = warmup_steps, flat_fraction
        self.long_captions, self.statistics_images = long_captions, statistics_images
        self.captions_by_length = captions_by_length
        self.linear_path_images, self.report_images = linear_path_images, report_images
        self.image_losses, self.adversarial = nn.ModuleList(image_losses or []), adversarial
        self.automatic_optimization = adversarial is None  # two optimisers take turns: see training_step
        if accumulate < 1 or (accumulate > 1 and adversarial is None):
            raise ValueError(
                f"got accumulate {accumulate}; wanted at least 1, and without `adversarial` set "
                "trainer.accumulate_grad_batches instead."
            )
        self.accumulate, self.added = accumulate, 0  # added: batches whose gradients wait for the next step
        self.init_from, self.freeze_encoder = init_from, freeze_encoder
        self.lpips_trunk, self.lpips_weights, self.inception_weights = lpips_trunk, lpips_weights, inception_weights
        if freeze_encoder:
            if init_from is None:
                raise ValueError(
                    "freeze_encoder without init_from would freeze random weights; give init_from a folder."
                )
            tokenizer.requires_grad_(False)
            tokenizer.decoder.requires_grad_(True)
        self.run_dir, self.stage_dir = Path("runs"), Path("runs")  # set by the command line
        self.prefixes = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < tokenizer.num_latents] + [
            tokenizer.num_latents
        ]

    @property
    def networks(self) -> nn.Module:
        return self.tokenizer

    @property
    def data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    # -- fit ----------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Learn from the training split what is fixed before the first step: vocabulary and linear path."""
        if stage != "fit":
            return
        if self.adversarial is not None and str(self.trainer.precision) == "16-mixed":
            raise ValueError(
                "got precision 16-mixed with `adversarial`, wanted bf16-mixed or 32-true: the discriminator's own "
                "optimiser step would use gradients that are still multiplied by the loss scale of float16."
            )
        self.added = 0
        self.train()  # Lightning does not call it, and `train` below is what puts frozen parts into eval mode
        if self.init_from is not None:
            self.tokenizer.start_from(Tokenizer.from_pretrained(self.init_from))
            return
        if self.tokenizer.text is not None:
            if isinstance(self.tokenizer.text.tower, OpenClipTower):
                self.tokenizer.text.tower.check_weights()
            left_out = self.tokenizer.vocabulary.fit(c for captions in self.data.captions("train") for c in captions)
            if left_out:
                print(f"vocabulary: {left_out} rare tokens share the unknown row; raise `rows` to keep them")
        if self.tokenizer.linear_path is not None:
            self.tokenizer.linear_path.fit(draw_training(self.data, self.linear_path_images, seed=0)["images"])

    def train(self, mode: bool = True) -> "LitTokenizer":
        """Training mode, but not for parts that are frozen as a whole: nothing masks or drops what they read."""
        super().train(mode)
        for part in self.tokenizer.modules():
            parameters = list(part.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                part.eval()
        return self

    def tokenizer_optimizer(self) -> MuonAdamW:
        """The tokenizer's optimiser at the configured rates, without a schedule."""
        return MuonAdamW(
            parameter_groups(self.tokenizer),
            lr=self.lr,
            matrix_lr=self.matrix_lr,
            weight_decay=self.weight_decay,
            matrix_weight_decay=self.matrix_weight_decay,
        )

    def configure_optimizers(self) -> Any:
        optimizer = self.tokenizer_optimizer()
        total = planned_steps(self.trainer, self.accumulate)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_flat_cosine(step, total, self.warmup_steps, self.flat_fraction)
        )
        if self.adversarial is None:
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        critic = torch.optim.AdamW(self.adversarial.discriminator.parameters(), lr=self.lr, betas=(0.5, 0.9))
        return [optimizer, critic], [schedule]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        step, images = self.global_step, batch["images"]
        parts, reconstruction = self.tokenizer.losses(images, self.caption_ids(batch), step)
        extras = [extra(reconstruction, images).mean() for extra in self.image_losses]
        loss = self.tokenizer.total(parts) + sum(extras)
        parts |= dict(zip(numbered([type(extra).__name__ for extra in self.image_losses]), extras, strict=True))
        if self.adversarial is not None:
            parts |= self.play(self.adversarial, loss, images, reconstruction, step, self.last_of_window(batch_idx))
        parts = {name: part.detach() for name, part in parts.items()}
        self.log_dict({f"train/{name}": part for name, part in parts.items()} | {"train/loss": loss.detach()})
        return {"loss": loss.detach() if self.adversarial is not None else loss, **parts}  # parts: for the NaN guard

    def last_of_window(self, batch_idx: int) -> bool:
        """True if a step is due after this batch: `accumulate` batches are together, or the epoch ends."""
        last_batch = self.trainer.is_last_batch or batch_idx + 1 == self.trainer.num_training_batches
        return self.added + 1 >= self.accumulate or last_batch

    def play(
        self, game: AdversarialLoss, loss: Tensor, images: Tensor, reconstruction: Tensor, step: int, last: bool
    ) -> dict[str, Tensor]:
        """One batch of the tokenizer and of the discriminator, by hand; both step after the `last` one of a window.

        A step takes the mean over the batches of its window, of which the end of an epoch may leave fewer.

        Only the tokenizer's step goes through Lightning's wrapper: `global_step` counts wrapped steps, and so counts
        this one once. Both optimisers are in the checkpoint; both clip the norm of their gradients.
        """
        optimizer, critic = self.optimizers()  # type: ignore[misc]
        if self.added == 0:
            optimizer.zero_grad()
            critic.zero_grad()
        self.added += 1
        parts = {}
        if game.active(step):
            parts["generator"] = game.generator(reconstruction, loss, self.tokenizer.decoder.last_weight)
            loss = loss + parts["generator"]
        self.manual_backward(loss)
        if last:
            divide_gradients(optimizer.optimizer, self.added)
            optimizer.step()
            self.lr_schedulers().step()  # type: ignore[union-attr]
        if game.active(step):
            parts["discriminator"], means = game.discriminate(images, reconstruction)
            self.manual_backward(parts["discriminator"])
            if last:
                divide_gradients(critic.optimizer, self.added)
                nn.utils.clip_grad_norm_(game.discriminator.parameters(), 1.0)
                critic.optimizer.step()
            game.track(means)
            parts |= means
        self.added = 0 if last else self.added
        return parts

    def caption_ids(self, batch: dict[str, Any]) -> Tensor | None:
        """(B,M,L) ids of M captions per picture, see `captions_by_length`; None without text or captions.

        A picture without a caption gets an empty one, which the text losses leave out.
        """
        if self.tokenizer.text is None or self.global_step % self.tokenizer.text.every:
            return None
        said = [[caption for caption in captions if caption.strip()] for captions in batch["captions"]]
        if not any(said):
            return None
        said, count = [captions or [""] for captions in said], self.captions_by_length
        if count > 1:
            ranked = [sorted(captions, key=len) for captions in said]
            chosen = [by_length[i * (len(by_length) - 1) // (count - 1)] for by_length in ranked for i in range(count)]
        else:
            u = torch.rand(len(said), 2).tolist()
            chosen = [
                max(captions, key=len) if a < self.long_captions else captions[int(b * len(captions))]
                for captions, (a, b) in zip(said, u, strict=True)
            ]
        return self.tokenizer.vocabulary.encode(chosen)[0].unflatten(0, (-1, count)).to(self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        images = batch["images"]
        z = self.tokenizer.encode(images)
        for k in self.prefixes:
            value = psnr(self.tokenizer.decode(z[:, :k]), images).mean()
            self.log(f"val/psnr_{k}", value, batch_size=len(images), sync_dist=True)

    # -- export -------------------------------------------------------------------------------------------------------

    def export(self, folder: Path) -> None:
        """Fit the latent statistics on the training split and write `folder/tokenizer`."""
        if not self.freeze_encoder:
            with torch.autocast(self.device.type, torch.bfloat16, enabled="bf16" in str(self.trainer.precision)):
                self.tokenizer.fit_statistics(self.training_images(self.statistics_images))
        figures = {k: float(v) for k, v in self.trainer.callback_metrics.items() if k.startswith("val/")}
        self.tokenizer.save_pretrained(folder / "tokenizer", tokenizer_card(self.tokenizer, figures))

    def training_images(self, limit: int) -> Iterator[Tensor]:
        """Batches (B,3,H,W) of about `limit` training pictures, the same ones wherever a resumed fit began."""
        # A stream has no loader for statistics: its training loader starts anew each time.
        loader = getattr(self.data, "statistics_dataloader", self.data.train_dataloader)()
        for batch in islice(loader, max(1, limit // self.data.batch_size)):
            yield batch["images"].to(self.device)

    def load_export(self, run_dir: Path) -> None:
        self.tokenizer = Tokenizer.from_pretrained(run_dir / "tokenizer")

    # -- test and predict ---------------------------------------------------------------------------------------------

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Nothing: the report reads whole splits, see `on_test_end`."""

    def on_test_end(self) -> None:
        from stage1_tokenizer.evaluation.reconstruction import (
            reconstruction_report,  # plotting: only this command needs it
        )

        if not self.trainer.is_global_zero:  # the report reads whole splits by itself
            return
        folder = self.run_dir / "reconstruction"
        reconstruction_report(
            self.tokenizer,
            self.data,
            folder,
            self.run_dir,
            limit=self.report_images,
            lpips_trunk=self.lpips_trunk,
            lpips_weights=self.lpips_weights,
            inception_weights=self.inception_weights,
        )

    def on_predict_start(self) -> None:
        """Open a writer for every split; shards that an interrupted predict of the same has finished are kept."""
        self.latents_dir = self.run_dir / "latents"
        fingerprint, size = self.tokenizer.fingerprint, self.data.predict_shard_size
        origins, finished = {}, {}
        for split in self.data.splits_to_predict():
            total = len(self.data.split(split))
            origin = Origin(fingerprint, self.data.fingerprint(split), str(self.trainer.precision), total, size)
            origins[split], finished[split] = origin, finished_shards(self.latents_dir, split, origin)
        if self.trainer.is_global_zero:
            kept = sum(sum(counts.values()) for counts in finished.values())
            total = sum(origin.samples for origin in origins.values())
            if kept:
                print(f"latents: kept {kept} of {total} samples, which were encoded before by tokenizer {fingerprint}")
            if kept < total:
                begin_latents(self.latents_dir, list(origins), fingerprint)
        self.trainer.strategy.barrier("latents kept")  # all ranks have looked before any of them writes or removes
        rank, world = self.trainer.global_rank, self.trainer.world_size
        self.writers = {
            split: LatentShardWriter(self.latents_dir, split, size, rank, world, origin, finished[split])
            for split, origin in origins.items()
        }
        for split, numbers in finished.items():
            self.data.finished[split].update(numbers)  # the loaders leave them out

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        writer = list(self.writers.values())[dataloader_idx]
        writer.write_batch(batch, *self.tokenizer.posterior(batch["images"]))

    def on_predict_end(self) -> None:
        for writer in self.writers.values():
            writer.__exit__(None, None, None)
        self.trainer.strategy.barrier("latents")
        if self.trainer.is_global_zero:
            tok = self.tokenizer
            counts = write_latent_manifest(
                self.latents_dir, tok.num_latents, tok.latent_dim, tok.fingerprint, str(self.data.data_dir)
            )
            samples = ", ".join(f"{count} {split}" for split, count in counts.items() if count)
            size = f"{tok.num_latents} x {tok.latent_dim}"
            print(f"latents: {self.latents_dir} ({samples}, {size}, tokenizer {tok.fingerprint})")


def numbered(names: list[str]) -> list[str]:
    """The names, those that occur more than once with their place in the list: [A, B, A] -> [A_0, B, A_2]."""
    return [f"{name}_{place}" if names.count(name) > 1 else name for place, name in enumerate(names)]


def divide_gradients(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Make the sums of the gradients of `count` batches their mean, in place."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if count > 1:
        torch._foreach_div_([parameter.grad for parameter in parameters if parameter.grad is not None], count)
