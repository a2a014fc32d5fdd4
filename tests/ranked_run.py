"""Runs that are the same on any number of ranks: random draws made for the global batch; a rank takes its own.

What is drawn in a step belongs to samples, and ranks draw apart from each other. To compare a fit of two processes with
one of a single process, both draw here what the global batch needs, from a seed that the step gives, and a rank takes
what is its samples' (`data.reading.order`: rank r has samples r, r + W, ...).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.overrides import TorchFunctionMode

from data.reading.datamodule import ImageDataModule
from stage1_tokenizer.text.captioner import PrefixCaptioner
from stage1_tokenizer.text.contrast import MaxOverQueries, SigmoidContrast, SoftmaxContrast
from stage1_tokenizer.text.memory import CaptionMemory
from stage1_tokenizer.text.ranks import Rows, sum_over_ranks, world_size
from stage1_tokenizer.training import optim
from stage1_tokenizer.training.cli import run_cli
from stage1_tokenizer.training.latent_writer import LatentWriter
from stage1_tokenizer.training.lit_tokenizer import LitTokenizer
from stage2_prior.training.latent_data import PriorDataModule
from stage2_prior.training.lit_prior import LitPrior
from tests.tiny import CAPTIONS, C, K, prefix_text, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"


class SharedDraws(TorchFunctionMode):
    """Inside, draws of `rows` samples are the own rows of draws of all ranks' samples; None leaves draws alone."""

    rows: int | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, world = kwargs or {}, world_size()
        if self.rows is None or func not in (torch.rand, torch.randn, torch.randn_like, torch.multinomial):
            return func(*args, **kwargs)
        if func is torch.multinomial:
            weights, count = args
            return self.own(func(weights, count * world, **kwargs), 0)
        if func is torch.randn_like:  # it draws in the order of memory, which is not that of samples
            func, args = torch.randn, args[0].shape
        shape = args[0] if args and isinstance(args[0], (tuple, list, torch.Size)) else args
        at = next((i for i, n in enumerate(shape) if n % self.rows == 0), 0)
        return self.own(func(*(n * world if i == at else n for i, n in enumerate(shape)), **kwargs), at)

    def own(self, whole: Tensor, at: int) -> Tensor:
        """The rows of this rank along dimension `at`, in which each sample has equally many."""
        assert self.rows is not None
        world = world_size()
        rank = torch.distributed.get_rank() if world > 1 else 0
        samples = self.rows * world if whole.shape[at] % (self.rows * world) == 0 else whole.shape[at]
        parted = whole.unflatten(at, (samples, -1)).movedim(at, 0)[rank::world]
        return parted.movedim(0, at).flatten(at, at + 1).contiguous()


class SameSteps(pl.Callback):
    """Seeds every step by its number and notes the keys of this rank's batches, and figures of validation."""

    def __init__(self, draws: SharedDraws) -> None:
        self.draws = draws
        self.keys: list[list[str]] = []
        self.figures: dict[str, float] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(1000 + trainer.global_step)
        self.draws.rows = len(batch["keys"])
        self.keys.append(batch["keys"])

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.draws.rows = None

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.figures = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")}


def same_run(stage: str, *words: str, exact: bool = True) -> dict[str, Any]:
    """One command of a stage in this process, one rank of however many -> keys of its batches, figures of validation.

    Also how many pictures it read by their numbers, as reports do.

    exact: Muon's products in float32: bfloat16 makes of a difference in the last bit one of half a percent.
    """
    module, data = (LitTokenizer, ImageDataModule) if stage == "stage1" else (LitPrior, PriorDataModule)
    product, samples, read = optim.matmul_dtype, ImageDataModule.samples, [0]

    def counted(self: ImageDataModule, split: str, rows: list[int]) -> dict[str, Any]:
        read[0] += len(rows)
        return samples(self, split, rows)

    if exact:
        optim.matmul_dtype = lambda device: torch.float32
    try:
        with SharedDraws() as draws, mock.patch.object(ImageDataModule, "samples", counted):
            steps = SameSteps(draws)
            callbacks = [LatentWriter(), steps] if stage == "stage1" else [steps]
            run_cli(stage, module, data, stage, [*words, "--precision=32-true"], callbacks)  # type: ignore[arg-type]
    finally:
        optim.matmul_dtype = product
    return {"keys": steps.keys, "figures": steps.figures, "read": read[0]}


def words_of(stage: str, run: Path, data: Path, world: int, *more: str) -> list[str]:
    """Options of the demo's configs for a few steps of 12 samples on `world` ranks."""
    own = ["accelerator=cpu", f"devices={world}", "enable_progress_bar=false", "use_distributed_sampler=false"]
    own += ["val_check_interval=1000000", "limit_val_batches=1.0"]
    read = [f"batch_size={12 // world}", "drop_last=true", "val_batch_size=8"]
    read += [f"data_dir={data if stage == 'stage1' else run / 'latents'}"]
    words = [f"--trainer.{word}" for word in own] + [f"--data.{word}" for word in read]
    words += ["--ema.decay=0.5", "--live.every_n_steps=0", *more]
    if stage == "stage1":
        words = ["--model.passes.statistics_images=48", *words]
    return [f"--config={CONFIGS / stage / 'demo.yaml'}", f"--run_dir={run}", *words]


def ranked(world: int, folder: Path, commands: list[list[str]]) -> list[list[dict[str, Any]]]:
    """Commands (a stage and its words each) one after another on `world` processes -> their results, by rank."""
    (folder / "commands.json").write_text(json.dumps(commands))
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(world), "-m", "tests.ranked_run"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,  # where ranks do not agree, one waits for the other for half an hour
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


def interleaved(ranks: list[list[list[str]]]) -> list[list[str]]:
    """Keys of the global batches, step by step, from those of the ranks."""
    return [[key for keys in zip(*step, strict=True) for key in keys] for step in zip(*ranks, strict=True)]


def distance(one: dict[str, Tensor], two: dict[str, Tensor], but: str = "\n") -> tuple[float, float, str]:
    """Relative distance of two sets of weights: of all, and of the tensor that differs most, and its name.

    but: tensors with this in their names count in the first figure only.
    """
    assert one.keys() == two.keys()
    floats = {n: (one[n].double(), two[n].double()) for n in one if one[n].is_floating_point()}
    square = {n: ((a - b).square().sum().item(), a.square().sum().item()) for n, (a, b) in floats.items()}
    whole = (sum(d for d, _ in square.values()) / sum(s for _, s in square.values())) ** 0.5
    return whole, *max(((d / max(s, 1e-30)) ** 0.5, n) for n, (d, s) in square.items() if but not in n)


# -- text losses ------------------------------------------------------------------------------------------------------

CONTRASTS = {"softmax": SoftmaxContrast, "sigmoid": SigmoidContrast, "max over queries": MaxOverQueries}
READ = [*CAPTIONS, "", "a red circle", "three green triangles"]  # one is missing, one comes twice


def text_gradients(count: int, kind: str) -> dict[str, Tensor]:
    """Text losses of the first `count` of seven pictures on whatever ranks there are: values and gradients of the mean.

    Gradients of the latents are those of all ranks' rows, in the order of one process.
    """
    tokenizer = tiny_tokenizer().train()
    text = prefix_text(tokenizer)
    text.contrast = CONTRASTS[kind]()
    text.memory = CaptionMemory(9, 16, 12)
    text.captioner = PrefixCaptioner(64, 12, K, C, 16)
    torch.manual_seed(5)
    line, world = torch.randn(count, K, C), world_size()
    ids = text.vocabulary.encode(READ[:count])[0]
    rank = torch.distributed.get_rank() if world > 1 else 0
    z = line[rank::world].clone().requires_grad_()
    monitor: dict[str, Tensor] = {}
    for step in range(2):  # the second compares with the memory of the first
        torch.manual_seed(6 + step)
        drawn = torch.multinomial(text.weights, count, replacement=True)[rank::world]
        with mock.patch.object(torch, "multinomial", lambda *a, drawn=drawn, **k: drawn):
            parts = text.losses(z, ids[rank::world])
        (parts["text"] + parts["caption"]).backward()
        monitor |= {f"text {step}": parts["text"].detach()}
    grads = {n: sum_over_ranks(p.grad) / world for n, p in text.named_parameters() if p.grad is not None}
    assert z.grad is not None and text.memory is not None
    whole = torch.zeros(count, K, C)
    whole[rank::world] = z.grad / world
    return {**monitor, **grads, "z": sum_over_ranks(whole), "memory": text.memory.embedded}


def reference_gradients(kind: str) -> dict[str, Tensor]:
    """Loss and gradients of ours and of open_clip's, with six pictures and as many captions shared by the ranks."""
    world = world_size()
    rank = torch.distributed.get_rank() if world > 1 else 0
    torch.manual_seed(7)
    image, text = (F.normalize(torch.randn(6, 16), dim=-1)[rank::world].requires_grad_() for _ in range(2))
    rows = Rows(len(image), image.device)
    ours = CONTRASTS[kind]()
    i, t = rows.of_all(image), rows.of_all(text)
    value = ours(i[:, None], t[:, None], torch.eye(len(i), dtype=torch.bool)[None]).sum()
    gradients = torch.autograd.grad(value, (image, text))
    scale = ours.log_scale.exp().detach()
    if kind == "softmax":
        theirs = ClipLoss(gather_with_grad=True, rank=rank, world_size=world)(image, text, scale)
    else:
        theirs = SigLipLoss(rank=rank, world_size=world, dist_impl="gather")(image, text, scale, ours.bias.detach())
    wanted = torch.autograd.grad(theirs, (image, text))
    return {"ours": value.detach(), "theirs": theirs.detach()} | {
        f"{whose} {name}": g
        for whose, of in (("ours", gradients), ("theirs", wanted))
        for name, g in zip("it", of, strict=True)
    }


if __name__ == "__main__":  # a rank that `ranked` started
    folder = Path(sys.argv[1])
    results: list[Any] = []
    torch.distributed.init_process_group("gloo")
    for what, *words in json.loads((folder / "commands.json").read_text()):
        if what == "gradients":
            results.append(text_gradients(int(words[0]), words[1]))
        elif what == "reference":
            results.append(reference_gradients(words[0]))
        else:
            results.append(same_run(what, *words))
    torch.save(results, folder / f"rank{os.environ['RANK']}.pt")
