"""LightningModule of stage 2: optimiser, logging, files. What a prior computes is in `prior`, what a report says in
`generation`; there are no formulas here.

    fit       trains on latents (mean + std * noise, the posterior sampled anew in every step), exports prior/
    validate  the loss on the val split, with the same noise every time
    test      the generation report: generation/report.html, metrics.json, pictures
    predict   captions -> images/NAME.png and images/captions.json

Latents come from latent shards, or, with a data module of pictures, from the frozen exported tokenizer in every step.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from PIL import Image
from torch import Tensor, nn

from data.reading.datamodule import ImageDataModule
from stage1_tokenizer.evaluation.provenance import attribution
from stage1_tokenizer.export import PICTURE
from stage1_tokenizer.tokenizer import Tokenizer
from stage1_tokenizer.training.live import Look, card_picture
from stage1_tokenizer.training.means import Means
from stage1_tokenizer.training.optim import planned_steps
from stage1_tokenizer.training.options import OptimizerOptions, ScheduleOptions
from stage2_prior.base import Prior
from stage2_prior.captions import longest
from stage2_prior.evaluation.generation import GenerationReport
from stage2_prior.guidance import Guidance
from stage2_prior.heads.solvers import Solver
from stage2_prior.latent_space import LatentSpace, PriorError, load_space
from stage2_prior.request import Text
from stage2_prior.training.card import prior_card
from stage2_prior.training.latent_data import CaptionSource


@dataclass(frozen=True)
class SamplingOptions:
    """Arguments of `Prior.sample`, which says what they mean."""

    guidance: float | Guidance = 2.0
    steps: int | None = None
    temperature: float = 1.0
    solver: Solver | None = None
    num_latents: int | None = None  # None: as many as the report found best, or all where there is no report


class LitPrior(pl.LightningModule):
    """Trains and uses a prior.

    Args:
        prior: the network.
        optimizer, schedule: rates and their course.
        position_decay: the loss of latent i = 1..K counts i^-decay (of mean 1); 0 counts all alike. In an ordered line
            the first latents hold the picture and the last little but noise, whose gradients drown the others'.
        long_captions: share of training samples that use their longest caption; the others draw one of all.
        sampling: of `predict`.
        tokenizer_dir: exported tokenizer, for test and predict, and for training on pictures or with its text tower;
            None: `tokenizer/` of the run.
        report: what `test` measures.
        init_from: exported prior to start from, of the same classes and captions; None: from random weights.
    """

    def __init__(
        self,
        prior: Prior,
        optimizer: OptimizerOptions = OptimizerOptions(lr=2e-3, matrix_lr=0.02),  # noqa: B008  (frozen)
        schedule: ScheduleOptions = ScheduleOptions(),  # noqa: B008
        position_decay: float = 0.0,
        long_captions: float = 0.75,
        sampling: SamplingOptions = SamplingOptions(),
        tokenizer_dir: str | None = None,
        report: GenerationReport | None = None,
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        if not (0 <= long_captions <= 1 and 0 <= position_decay < float("inf")):
            got = f"got long_captions={long_captions}, position_decay={position_decay}"
            raise PriorError(f"{got}; wanted a share from 0 to 1 and an exponent of at least 0.")
        self.prior = prior
        self.optimizer_options, self.schedule, self.long_captions = optimizer, schedule, long_captions
        weights = position_weights(prior.num_latents, position_decay) if position_decay else None
        self.register_buffer("position_weights", weights, persistent=False)
        self.position_weights: Tensor | None
        self.sampling, self.tokenizer_dir, self.report = sampling, tokenizer_dir, report or GenerationReport()
        self.means, self.init_from = Means(), init_from
        self.run_dir, self.stage_dir = Path("."), Path(".")  # given by the command line
        self.frozen: tuple[LatentSpace, ...] = ()  # the tokenizer; a tuple is no submodule: no checkpoint holds it

    @property
    def tokenizer(self) -> LatentSpace:
        return self.frozen[0]

    @property
    def networks(self) -> nn.Module:
        return self.prior

    # -- files --------------------------------------------------------------------------------------------------------

    def export(self, folder: Path) -> None:
        """Write `folder`/prior."""
        folder /= "prior"
        if self.tokenizer_folder.is_dir():  # without it there is nothing to see, and still a prior to keep
            card_picture(self, attribution(self.run_dir / "data"), folder)
        self.prior.save_pretrained(folder, self.card(folder))

    def load_export(self, run_dir: Path) -> None:
        """Replace the network by the exported one of a run."""
        self.prior = Prior.from_pretrained(run_dir / "prior")

    def card(self, folder: Path, figures: list[dict[str, Any]] | None = None) -> str:
        """The model card, with the headlines of a report and the picture that lies in `folder`."""
        credit = attribution(self.run_dir / "data")
        return prior_card(self.prior, figures or [], credit, (folder / PICTURE).is_file())

    @property
    def tokenizer_folder(self) -> Path:
        return Path(self.tokenizer_dir or self.run_dir / "tokenizer")

    def load_tokenizer(self) -> nn.Module:
        """The exported tokenizer, on the CPU; loaded once."""
        if not self.frozen:
            with torch.random.fork_rng(devices=[]):  # its first weights are drawn before they are replaced
                self.frozen = (load_space(self.tokenizer_folder),)
        module = self.frozen[0]
        assert isinstance(module, nn.Module), "load_space saw to it"
        return module.requires_grad_(False)

    # -- training -----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Load the tokenizer where it is needed; tie the prior to the latents at hand (all but predict)."""
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        from_pictures = isinstance(datamodule, ImageDataModule)
        if stage in ("test", "predict") or from_pictures:
            self.load_tokenizer()
        if from_pictures and stage != "predict":
            space = self.tokenizer
            if datamodule.image_size != space.image_size:
                raise PriorError(
                    f"data.image_size is {datamodule.image_size}, but the tokenizer takes pictures of"
                    f" {space.image_size} pixels; set data.image_size to that."
                )
            self.prior.bind(space.num_latents, space.latent_dim, space.fingerprint)
            if isinstance(space, Tokenizer):
                space.checks_pixels = stage != "fit"  # what the data module decodes is in range
        elif stage != "predict":
            info = datamodule.latent_info
            self.prior.bind(info["num_latents"], info["latent_dim"], info["tokenizer_fingerprint"])
        if stage == "fit":
            note = self.prior.prepare(datamodule, self.load_tokenizer)
            if note:
                print(note)
            if self.init_from is not None:
                self.prior.start_from(Prior.from_pretrained(self.init_from))
        if stage in ("test", "predict"):
            self.prior.check(self.tokenizer)

    def on_fit_start(self) -> None:
        self.move_tokenizer()

    def on_validation_start(self) -> None:
        self.move_tokenizer()

    def on_test_start(self) -> None:
        self.move_tokenizer()

    def on_predict_start(self) -> None:
        """Also remove the pictures of an earlier `predict`, as far as its listings know them."""
        self.move_tokenizer()
        folder = self.run_dir / "images"
        if self.trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            for listing in (*folder.glob("captions.json"), *folder.glob("captions.rank*.json")):
                for name in json.loads(listing.read_text(encoding="utf-8")):
                    (folder / Path(name).name).unlink(missing_ok=True)  # never outside, whatever the listing says
                listing.unlink()
        self.trainer.strategy.barrier("pictures removed")

    def move_tokenizer(self) -> None:
        """It is no submodule, so Lightning leaves it where it is."""
        if self.frozen:
            self.load_tokenizer().to(self.device)

    def posterior(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B,K,C) each, standardised: those of the shards, or of the batch's pictures.

        Of as many latents as the prior models: the first of the line, where the tokenizer has more.
        """
        k = self.prior.num_latents
        if "latents" in batch:
            return batch["latents"][:, :k], batch["latents_std"][:, :k]
        with torch.no_grad():
            mean, std = (x[:, :k] for x in self.tokenizer.posterior(batch["images"]))
        return mean.float().contiguous(), std.float().contiguous()  # noise is drawn in the order of memory

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_options.build(self.prior)
        schedule = self.schedule.build(optimizer, planned_steps(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        mean, std = self.posterior(batch)
        z = mean + std * torch.randn_like(mean)  # (B,K,C)
        parts = self.prior.objective(z, self.text(batch, self.long_captions), weights=self.position_weights)
        loss = torch.stack(list(parts.values())).sum()
        self.log("train/loss", loss.detach(), prog_bar=True)
        if len(parts) > 1:
            self.log_dict({f"train/{name}": part.detach() for name, part in parts.items()})
        return {"loss": loss}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        generator = torch.Generator(device=self.device).manual_seed(batch_idx)
        mean, std = self.posterior(batch)
        z = mean + std * torch.randn(mean.shape, generator=generator, device=mean.device)
        text = self.text(batch, longest_share=1.0)
        loss = self.prior.losses(z, text, generator)  # (B,K)
        figures = {"loss": loss, "loss_first": loss[:, :1], "loss_last": loss[:, -1:], **self.prior.figures(z, text)}
        for name, values in figures.items():
            self.means.add(f"val/{name}", values.flatten(1).mean(1) if values.ndim > 1 else values)

    def on_validation_epoch_end(self) -> None:
        self.means.log(self)

    def text(self, batch: dict[str, Any], longest_share: float) -> Text:
        """One caption per sample, or its label; a sample that has none is trained without (the null word)."""
        picks = torch.rand(len(batch["captions"]), 2).tolist()
        chosen = []
        for captions, (share, which) in zip(batch["captions"], picks, strict=True):
            words = [c for c in captions if c.strip()] or [""]
            chosen.append(longest(words) if share < longest_share else words[int(which * len(words))])
        return self.prior.encode_samples(chosen, batch["labels"])

    def look(self, pictures: int) -> Look:
        """What is drawn for held-out captions, by prefix, and the last training loss."""
        self.load_tokenizer().to(self.device)
        held = self.trainer.datamodule.arrays("val", pictures)  # type: ignore[attr-defined]
        labels = held["labels"].tolist()
        asked = [self.prior.words.ask(*sample) for sample in zip(held["captions"], labels, strict=True)]
        s, generator = self.sampling, torch.Generator(self.device).manual_seed(0)
        z = self.prior.sample([a for a in asked if a], s.guidance, s.steps, s.temperature, generator, s.solver)
        lengths = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < z.shape[1]] + [z.shape[1]]
        strips = {f"k = {k}": self.tokenizer.decode(z[:, :k], generator.manual_seed(0)) for k in lengths}
        loss = self.trainer.callback_metrics.get("train/loss")
        return Look(strips, {} if loss is None else {"training loss": float(loss)}, "loss")

    # -- use ----------------------------------------------------------------------------------------------------------

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Nothing: the report takes the whole split at once, in `on_test_end`."""

    def on_test_end(self) -> None:
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(datamodule, CaptionSource), "it has the captions that `fit` asked for"
        page = self.report.write(self.prior, self.tokenizer, datamodule, self.run_dir)
        if self.trainer.is_global_zero:
            figures = json.loads((page.parent / "metrics.json").read_text(encoding="utf-8"))["figures"]
            folder = self.run_dir / "prior"
            self.prior.save_pretrained(folder, self.card(folder, figures))  # with the best length, too

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        captions = [c[0] for c in batch["captions"]]
        place = batch_idx * self.trainer.world_size + self.trainer.global_rank  # no two batches share their noise
        generator = torch.Generator(device=self.device).manual_seed(torch.initial_seed() + place)
        s, folder = self.sampling, self.run_dir / "images"
        k = self.prior.best_length if s.num_latents is None else s.num_latents
        z = self.prior.sample(captions, s.guidance, s.steps, s.temperature, generator, s.solver, num_latents=k)
        pixels = ((self.tokenizer.decode(z, generator) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
        for key, picture in zip(batch["keys"], pixels.numpy(), strict=True):
            Image.fromarray(picture).save(folder / f"{key}.png")
        named = {f"{key}.png": caption for key, caption in zip(batch["keys"], captions, strict=True)}
        # After every batch, so that the next `predict` knows what a broken one left behind.
        write_listing(folder / f"captions.rank{self.trainer.global_rank}.json", named)

    def on_predict_end(self) -> None:
        """The listings of all ranks become one."""
        self.trainer.strategy.barrier("pictures written")
        if self.trainer.is_global_zero:
            folder = self.run_dir / "images"
            for listing in sorted(folder.glob("captions.rank*.json")):
                write_listing(folder / "captions.json", json.loads(listing.read_text(encoding="utf-8")))
                listing.unlink()
            print(f"pictures: {self.run_dir / 'images'}, with their captions in captions.json", flush=True)


def position_weights(num_latents: int, decay: float) -> Tensor:
    """(K,) i^-decay for i = 1..K, of mean 1."""
    weights = torch.arange(1, num_latents + 1, dtype=torch.float32) ** -decay
    return weights / weights.mean()


def write_listing(path: Path, named: dict[str, str]) -> None:
    """Add pictures and their captions to a listing, sorted by name."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    lines = dict(sorted((known | named).items()))
    path.write_text(json.dumps(lines, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
