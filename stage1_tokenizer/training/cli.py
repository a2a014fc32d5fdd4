"""The command line of both stages: Lightning's CLI with one fixed run folder and no silent surprises.

    python -m stage1_tokenizer fit --config configs/stage1/demo.yaml [--config overlay.yaml] [--model.x=1 ...]

What differs from Lightning's own, each for a reason:

* `run_dir` fixes where everything lies (see run_folder.py); there are no numbered versions.
* `resume` (auto or a path) replaces `ckpt_path`: it fails where there is nothing to resume, and what the config and the
  command line say holds on a resumed run (Lightning would put back the checkpoint's hyper-parameters).
* validate, test and predict load the exported folder, never a checkpoint: what is measured is what is handed on.
* `precision: auto` picks bfloat16 where the hardware multiplies it, and says so; float16 is refused, with the reason.
* `compile: true` compiles in place, so that the names of weights stay as they are.
* `model` and `data` may name another class (class_path, init_args) and otherwise are the stage's own; a variant that
  trains or reads differently is an overlay that changes the class and keeps the arguments. Options: --model.help.
* A wrong key or value is answered with two lines, not with a page of usage.

A lit module for this command line has: `networks` (nn.Module, what EMA averages), `export(folder)` (write the export
below `folder`) and `load_export(run_dir)` (load it from there). It is given `run_dir` and `stage_dir` (Path) first.
"""

import json
import os
import sys
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from stage1_tokenizer.spec import public_path
from stage1_tokenizer.training.callbacks import ConfiguredRates, NaNGuard, SharedCores
from stage1_tokenizer.training.checkpoint import ExportAtEnd, RandomStates, RunCheckpoint
from stage1_tokenizer.training.checkpoint_file import WholeFiles
from stage1_tokenizer.training.config_files import with_files
from stage1_tokenizer.training.ema import EMAWeights
from stage1_tokenizer.training.launch import (
    Precision,
    UsageError,
    check_strategy,
    compile_networks,
    keep_freed_memory,
    launched_by_another_rank,
    quieten_lightning,
    resolve_precision,
    several_ranks,
)
from stage1_tokenizer.training.live import LivePage
from stage1_tokenizer.training.loss_watch import CollapseWatch, SpikeSkip
from stage1_tokenizer.training.metrics_file import MetricsFile
from stage1_tokenizer.training.parser import ShortErrorParser
from stage1_tokenizer.training.progress import StatusLine
from stage1_tokenizer.training.run_folder import RunFolder
from stage1_tokenizer.training.sizes import link_sizes
from stage1_tokenizer.training.throughput import Throughput
from stage1_tokenizer.training.user_errors import constructor_error, reason_of, sentence_of, while_restoring

TRAINER_OPTIONS = (  # of Lightning's trainer; --help lists these, --help=all the others too
    *("accelerator", "devices", "num_nodes", "strategy", "max_steps", "max_epochs", "max_time", "val_check_interval"),
    *("limit_val_batches", "log_every_n_steps", "accumulate_grad_batches", "gradient_clip_val", "logger", "callbacks"),
)
RANK_OPTIONS = ("trainer.devices", "trainer.num_nodes", "trainer.accelerator")


class UnspoolCLI(LightningCLI):
    """See the module's docstring. `stage` names the subfolder of the run folder that fit writes to."""

    def __init__(
        self,
        stage: str,
        model_class: type[pl.LightningModule],
        datamodule_class: type[pl.LightningDataModule],
        prog: str,
        args: list[str] | None = None,
        callbacks: Sequence[pl.Callback] = (),
        purposes: Mapping[str, str] | None = None,
    ) -> None:
        self.purposes = purposes or {}
        self.stage, self.default_classes = stage, {"model": model_class, "data": datamodule_class}
        self.callbacks = callbacks
        args = with_files(sys.argv[1:] if args is None else args, stage)
        self.short_help = "--help=all" not in args and not {"-h", "--help"}.isdisjoint(args)
        args = ["--help" if word == "--help=all" else word for word in args]
        self.word = next(iter(args), "")
        ShortErrorParser.begin(f"{prog} {self.word}" if self.word in self.subcommands() else prog)
        super().__init__(
            model_class,
            pl.LightningDataModule,
            save_config_callback=None,  # config.yaml is written by `fit` alone
            # `test` reads its split by itself, when Lightning has seen the one batch that it insists on
            trainer_defaults={"num_sanity_val_steps": 0, "enable_model_summary": False, "limit_test_batches": 1},
            seed_everything_default=0,
            parser_kwargs={"prog": prog},
            parser_class=ShortErrorParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            auto_configure_optimizers=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # called through the object only
        """The commands, with the arguments that are ours to give; where one was typed, its parser is the only one."""
        skip = {"model", "datamodule", "dataloaders", "ckpt_path", "weights_only", "verbose"}
        commands = {
            "fit": skip | {"train_dataloaders", "val_dataloaders"},
            "validate": skip,
            "test": skip,
            "predict": skip | {"return_predictions"},
        }
        return {self.word: commands[self.word]} if self.word in commands else commands

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """As Lightning has it, but a command says what it does here, and not what its trainer's method is called."""
        for command, purpose in self.purposes.items():
            kwargs.setdefault(command, {})["description"] = purpose
        super()._add_subcommands(parser, **kwargs)
        for only in self._subcommand_parsers.values():
            ShortErrorParser.options = frozenset(a.dest for a in only._actions if not a.dest.endswith(".help"))

    def _dump_config(self) -> None:
        """Plain values for a module that calls `save_hyperparameters`; Lightning's dump is a tenth of a start."""
        self.config_dump = json.loads(json.dumps(self.config[self.subcommand].as_dict(), default=str))

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_core_arguments_to_parser(parser)
        if self.short_help:
            parser.epilog = "More options of Lightning's trainer: --help=all"
            for action in parser._actions:
                if action.dest.startswith("trainer") and action.dest.split(".")[-1] not in TRAINER_OPTIONS:
                    action.help = SUPPRESS
        for name, cls in self.default_classes.items():
            parser.set_defaults({name: {"class_path": public_path(cls)}})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, required=True, help="Folder of this run, such as runs/demo.")
        parser.add_argument(
            "--resume",
            type=str | None,
            default=None,
            help="Checkpoint to continue a fit from: a path, or auto for the last one of run_dir (an error if none).",
        )
        parser.add_argument("--overwrite", type=bool, default=False, help="Start a fit over, deleting the earlier one.")
        parser.add_argument(
            "--precision",
            type=Precision,
            default="auto",
            help="auto: bf16-mixed where the hardware multiplies bfloat16.",
        )
        parser.add_argument(
            "--compile", type=bool, default=False, help="Compile the networks in place (torch.compile)."
        )
        link_sizes(parser, self.stage)
        parser.add_lightning_class_args(EMAWeights, "ema")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(NaNGuard, "nan_guard")
        parser.add_lightning_class_args(SpikeSkip, "spike")
        parser.add_lightning_class_args(LivePage, "live")
        parser.add_lightning_class_args(Throughput, "throughput")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would lay the checkpoint's hyper-parameters over the config and the command line."""

    def option(self, name: str) -> Any:
        """An option of the running subcommand."""
        return self._get(self.config, name)

    def before_instantiate_classes(self) -> None:
        if self.option("trainer.precision") is not None:
            raise UsageError("got trainer.precision; set the top-level option precision instead (default: auto)")
        self.folder = RunFolder(self.option("run_dir"), self.stage)
        self.resume_path: Path | None = None
        if self.subcommand == "fit" and not launched_by_another_rank():
            self.resume_path = self.folder.checkpoint_to_resume(self.option("resume"), self.option("overwrite"))
        elif self.subcommand == "fit" and self.option("resume") is not None:
            self.resume_path = self.folder.checkpoint_to_resume(self.option("resume"), overwrite=False)

    def instantiate_classes(self) -> None:
        """As Lightning's; an error of a constructor comes without what jsonargparse wraps around it."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise constructor_error(error)  # noqa: B904

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        self.precision = resolve_precision(self.option("precision"), self.option("trainer.accelerator"))
        settings = {"precision": self.precision, "default_root_dir": str(self.folder.run_dir), **kwargs}
        strategy, several = self.option("trainer.strategy"), several_ranks(*map(self.option, RANK_OPTIONS))
        check_strategy(strategy)
        if strategy == "ddp" or (strategy == "auto" and several):
            # text losses and discriminators run on some steps only and leave parameters unused on the others
            settings["strategy"] = "ddp_find_unused_parameters_true"
        settings["logger"] = self.loggers()
        settings["plugins"] = [*(self._get(self.config_init, "trainer.plugins") or []), WholeFiles()]
        trainer = super().instantiate_trainer(**settings)
        for callback in trainer.callbacks:
            if isinstance(callback, RunCheckpoint):
                callback.folder = self.folder
        return trainer

    def loggers(self) -> list[Any] | bool:
        """The metrics file of the run and the loggers that were asked for; none with `--trainer.logger false`."""
        asked = self._get(self.config_init, "trainer.logger")
        if self.subcommand not in ("fit", "validate") or asked is False:
            return False
        others = asked if isinstance(asked, list) else [asked]
        return [MetricsFile(self.folder.metrics_file), *(logger for logger in others if logger not in (None, True))]

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[pl.Callback]) -> pl.Trainer:
        always = [RandomStates(), ConfiguredRates(), SharedCores(), CollapseWatch(), ExportAtEnd()]
        always += self.callbacks
        if config["enable_progress_bar"] is not False:
            always.append(StatusLine())
        return super()._instantiate_trainer(config, callbacks + always)

    def after_instantiate_classes(self) -> None:
        model: Any = self.model
        model.run_dir, model.stage_dir = self.folder.run_dir, self.folder.stage_dir

    def fit(self, model: pl.LightningModule, datamodule: pl.LightningDataModule, **kwargs: Any) -> None:
        if not self.trainer.fast_dev_run:
            config = self.config["fit"].clone()
            config["resume"], config["overwrite"] = None, False  # they belong to one command, not to the run
            text = self._parser("fit").dump(config, skip_none=False)
            self.folder.begin_fit(text, self.option("seed_everything"), self.resume_path, self.option("overwrite"))
        if self.trainer.num_devices > 1 and self.trainer.strategy.root_device.type == "cpu":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.trainer.num_devices))
        if self.option("compile"):
            compile_networks(model.networks)  # type: ignore[arg-type]
        self._announce(model)
        try:
            self.trainer.fit(model, datamodule=datamodule, ckpt_path=self.resume_path, weights_only=True, **kwargs)
        except Exception as error:
            if self.resume_path is None or sentence_of(error) is not None or not while_restoring(error):
                raise
            raise UsageError(
                f"checkpoint {self.resume_path} does not fit this configuration: {reason_of(error)} Resume with the "
                f"configuration that it was trained with ({self.folder.config_file}), or start over with "
                "--overwrite true"
            ) from error

    def validate(self, model: pl.LightningModule, datamodule: pl.LightningDataModule, **kwargs: Any) -> None:
        self._load_export(model)
        self.trainer.validate(model, datamodule=datamodule, **kwargs)

    def test(self, model: pl.LightningModule, datamodule: pl.LightningDataModule, **kwargs: Any) -> None:
        self._load_export(model)
        self.trainer.test(model, datamodule=datamodule, verbose=False, **kwargs)

    def predict(self, model: pl.LightningModule, datamodule: pl.LightningDataModule, **kwargs: Any) -> None:
        self._load_export(model)
        self.trainer.predict(model, datamodule=datamodule, return_predictions=False, **kwargs)

    def _load_export(self, model: Any) -> None:
        model.load_export(self.folder.run_dir)

    def _announce(self, model: pl.LightningModule) -> None:
        if self.trainer.is_global_zero:
            networks: Any = model.networks
            millions = sum(p.numel() for p in networks.parameters()) / 1e6
            device = self.trainer.strategy.root_device.type
            threads = f" ({torch.get_num_threads()} threads)" if device == "cpu" else ""
            start = f"resuming {self.resume_path}" if self.resume_path else "from scratch"
            print(
                f"{self.stage} fit: {millions:.2f} M parameters, {self.precision} on {device}{threads}, "
                f"{start}, into {self.folder.stage_dir}",
                flush=True,
            )


def run_cli(
    stage: str,
    model_class: type[pl.LightningModule],
    datamodule_class: type[pl.LightningDataModule],
    prog: str,
    args: list[str] | None = None,
    callbacks: Sequence[pl.Callback] = (),
    purposes: Mapping[str, str] | None = None,
) -> UnspoolCLI:
    """Run one command of a stage; returns the CLI object, for programs and tests that look at its trainer or model.

    stage: "stage1" or "stage2". prog: the command as the user types it. args: words of the command line; None takes
    them from the process. callbacks: of the stage's own, in addition to those of every run. Wrong usage exits with
    status 2; an error that this project raised to its user (a ValueError or OSError) is printed as one sentence and
    exits with status 1. With UNSPOOL_TRACEBACK=1 it keeps its traceback.
    """
    quieten_lightning()
    keep_freed_memory()
    try:
        return UnspoolCLI(stage, model_class, datamodule_class, prog, args, callbacks, purposes)
    except Exception as error:
        sentence = sentence_of(error)
        if os.environ.get("UNSPOOL_TRACEBACK") or sentence is None:
            raise
        sys.stderr.write(f"error: {sentence}\n")
        raise SystemExit(1) from error
