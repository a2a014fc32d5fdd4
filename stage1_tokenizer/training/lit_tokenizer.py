"""Lightning side of stage 1: what a step minimises, the schedule, report and export; the maths is in tokenizer.py.

    fit       trains a `Tokenizer` on image shards, then exports it, with latent statistics of the averaged weights
    validate  PSNR by prefix length
    test      the reconstruction report
    predict   the posterior of every picture; `latent_writer` makes latent shards of it

Against a discriminator: `lit_adversarial`.

Letters: B pictures, L caption tokens.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from stage1_tokenizer.evaluation.picture_data import draw_training
from stage1_tokenizer.evaluation.provenance import attribution
from stage1_tokenizer.similarity import psnr
from stage1_tokenizer.text.ranks import world_size
from stage1_tokenizer.tokenizer import Tokenizer
from stage1_tokenizer.training.card import tokenizer_card
from stage1_tokenizer.training.live import Look, card_picture
from stage1_tokenizer.training.losses import ImageLoss
from stage1_tokenizer.training.means import Means
from stage1_tokenizer.training.optim import MuonAdamW, planned_steps
from stage1_tokenizer.training.options import (
    OptimizerOptions,
    PassOptions,
    ReportOptions,
    ScheduleOptions,
    StartOptions,
)


class LitTokenizer(pl.LightningModule):
    """Trains, tests and applies a `Tokenizer`.

    Args:
        tokenizer: the model.
        optimizer, schedule: rates and their course.
        start: weights to start from, and whether only the decoder is trained.
        passes: how many training images are read before and after the steps.
        report: what `test` measures.
        long_captions: probability that the text loss uses a picture's longest caption, else any of its captions.
        image_losses: losses between full-length reconstructions and pictures, besides the decoder's own.
    """

    accumulate = 1  # batches whose gradients make one step, where the module steps by hand

    def __init__(
        self,
        tokenizer: Tokenizer,
        optimizer: OptimizerOptions = OptimizerOptions(),  # noqa: B008  (frozen)
        schedule: ScheduleOptions = ScheduleOptions(),  # noqa: B008
        start: StartOptions = StartOptions(),  # noqa: B008
        passes: PassOptions = PassOptions(),  # noqa: B008
        report: ReportOptions = ReportOptions(),  # noqa: B008
        long_captions: float = 0.75,
        image_losses: list[ImageLoss] | None = None,
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self.optimizer_options, self.schedule, self.start = optimizer, schedule, start
        self.passes, self.report, self.long_captions = passes, report, long_captions
        self.image_losses = nn.ModuleList(image_losses or [])
        if start.freeze_encoder:
            tokenizer.requires_grad_(False)
            tokenizer.decoder.requires_grad_(True)
        self.means = Means()
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
        self.train()  # Lightning does not call it, and `train` below is what puts frozen parts into eval mode
        for loss in self.image_losses:
            assert isinstance(loss, ImageLoss)
            loss.prepare()
        if self.tokenizer.alignment is not None:
            self.tokenizer.alignment.prepare()
        if self.tokenizer.predictor is not None:
            self.tokenizer.predictor.prepare()
        if self.start.init_from is not None:
            self.tokenizer.start_from(Tokenizer.from_pretrained(self.start.init_from))
            return
        if self.tokenizer.text is not None:
            left_out = self.tokenizer.text.prepare(c for captions in self.data.captions("train") for c in captions)
            if left_out:
                print(f"vocabulary: {left_out} rare tokens share the unknown row; raise `rows` to keep them")
        if self.tokenizer.linear_path is not None:
            images = draw_training(self.data, self.passes.linear_path_images, seed=0)["images"]
            self.tokenizer.linear_path.fit(images)
            self.tokenizer.bottleneck.start_beside(self.tokenizer.linear_path.variances, images[0].numel())

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
        return self.optimizer_options.build(self.tokenizer)

    def configure_optimizers(self) -> Any:
        optimizer = self.tokenizer_optimizer()
        schedule = self.schedule.build(optimizer, planned_steps(self.trainer, self.accumulate))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def step_losses(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """(what a step minimises, its parts by name, full-length reconstructions (B,3,H,W)) of one batch."""
        images = batch["images"]
        parts, reconstruction = self.tokenizer.losses(images, self.caption_ids(batch), self.global_step)
        extras = [extra(reconstruction, images).mean() for extra in self.image_losses]
        loss = self.tokenizer.total(parts) + sum(extras)
        names = numbered([type(extra).__name__ for extra in self.image_losses])
        return loss, parts | dict(zip(names, extras, strict=True)), reconstruction

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        loss, parts, _ = self.step_losses(batch)
        return {"loss": loss, **self.logged(loss, parts)}  # parts: for the NaN guard

    def logged(self, loss: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Log the loss and its parts; returns the parts without their graphs."""
        parts = {name: part.detach() for name, part in parts.items()}
        self.log_dict({f"train/{name}": part for name, part in parts.items()} | {"train/loss": loss.detach()})
        return parts

    def caption_ids(self, batch: dict[str, Any]) -> Tensor | None:
        """(B,L) ids of one caption per picture; None without text or captions, and in steps without a text loss.

        A picture without a caption gets an empty one, which the text losses leave out.
        """
        if self.tokenizer.text is None or self.global_step % self.tokenizer.text.every:
            return None
        given = [[caption for caption in captions if caption.strip()] for captions in batch["captions"]]
        if not any(given) and world_size() == 1:  # of several ranks all take part in the text losses
            return None
        u = torch.rand(len(given), 2).tolist()
        chosen = [
            max(captions, key=len) if a < self.long_captions else captions[int(b * len(captions))]
            for captions, (a, b) in zip([captions or [""] for captions in given], u, strict=True)
        ]
        return self.tokenizer.vocabulary.encode(chosen)[0].to(self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        images = batch["images"]
        z = self.tokenizer.encode(images)
        for k in self.prefixes:
            self.means.add(f"val/psnr_{k}", psnr(self.tokenizer.decode(z[:, :k]), images))

    def on_validation_epoch_end(self) -> None:
        self.means.log(self)

    def look(self, pictures: int) -> Look:
        """Prefixes of held-out pictures, and their PSNR."""
        images = self.data.arrays("val", pictures)["images"].to(self.device)
        z, noise = self.tokenizer.encode(images), torch.Generator(self.device)
        decoded = {k: self.tokenizer.decode(z[:, :k], noise.manual_seed(0)) for k in self.prefixes}
        figures = {f"k = {k}": psnr(x, images).mean().item() for k, x in decoded.items()}
        return Look({"held out": images, **{f"k = {k}": x for k, x in decoded.items()}}, figures, "PSNR, dB")

    # -- export -------------------------------------------------------------------------------------------------------

    def export(self, folder: Path) -> None:
        """Fit the latent statistics on the training split and write `folder/tokenizer`."""
        if not self.start.freeze_encoder:
            with torch.autocast(self.device.type, torch.bfloat16, enabled="bf16" in str(self.trainer.precision)):
                self.tokenizer.fit_statistics(self.training_images(self.passes.statistics_images))
        figures = {k: float(v) for k, v in self.trainer.callback_metrics.items() if k.startswith("val/")}
        credit = attribution(getattr(self.trainer.datamodule, "data_dir", folder))  # type: ignore[attr-defined]
        folder /= "tokenizer"
        picture = card_picture(self, credit, folder)
        self.tokenizer.save_pretrained(folder, tokenizer_card(self.tokenizer, figures, credit, picture))

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
        from stage1_tokenizer.evaluation.reconstruction import reconstruction_report  # plotting: only for this command

        options = self.report
        reconstruction_report(  # it reads splits by itself, every rank its share
            self.tokenizer,
            self.data,
            self.run_dir / "reconstruction",
            self.run_dir,
            limit=options.images,
            lpips_trunk=options.lpips_trunk,
            lpips_weights=options.lpips_weights,
            inception_weights=options.inception_weights,
            imagenet_weights=options.imagenet_weights,
        )

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> tuple[Tensor, Tensor]:
        """(mean, std) of the posterior, each (B,K,C)."""
        return self.tokenizer.posterior(batch["images"])


def numbered(names: list[str]) -> list[str]:
    """The names, those that occur more than once with their place in the list: [A, B, A] -> [A_0, B, A_2]."""
    return [f"{name}_{place}" if names.count(name) > 1 else name for place, name in enumerate(names)]
