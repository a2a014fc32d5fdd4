"""What `python -m tests.benchmarks` measures: tokenizers against TiTok's design, the demo's prior against MAR's ways.

The networks are built at random and not trained: speed does not depend on the weights. Products are in the format that
the device multiplies fast, on all sides; the same optimiser trains all sides.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from stage1_tokenizer.precision import hold_weights
from stage1_tokenizer.tokenizer import Tokenizer
from stage2_prior.prior import Prior
from tests.benchmarks.bench_data import photographs, prepare_loops
from tests.benchmarks.designs import SIZES, Size, millions, our_design, pictures, titok_design
from tests.benchmarks.machine import Machine
from tests.benchmarks.measure import Contender, Row, compete
from tests.same_numbers import build

CAPTION = "a small red circle above a large blue star on a white background"
TITOK, OURS = "TiTok's design", "ours"
MAR = "MAR-style head, 100 steps"
Contests = Iterator[tuple[str, dict[str, Contender]]]


class Bench(Machine):
    """Builds contests for one device; `compiled` adds ours through torch.compile (graphs are captured on a GPU)."""

    def __init__(self, device: torch.device, compiled: bool = False):
        super().__init__(device)
        self.compiled = compiled

    def tokenizers(self, name: str, batch: int) -> Contests:
        """encode, decode and training step of the designs at a size of `designs.SIZES`."""
        return self.designs(name, SIZES[name], batch)

    def designs(self, name: str, size: Size, batch: int) -> Contests:
        made = {TITOK: titok_design(size), OURS: our_design(size)}
        made = {who: tokenizer.to(self.device) for who, tokenizer in made.items()}
        whose = ", ".join(f"{who} {millions(t):.0f} M" for who, t in made.items())
        x = pictures(batch, size.image_size, self.device)
        z = torch.randn(batch, size.num_latents, size.latent_dim, device=self.device)
        uses = {who: tokenizer.eval() for who, tokenizer in made.items()}
        uses[f"{OURS}, weights held in {str(self.dtype)[6:]}"] = held(made[OURS], self.dtype)
        for verb, data in (("encode", x), ("decode", z)):
            contenders = {
                who: Contender(self.used(getattr(tokenizer, verb), data), batch) for who, tokenizer in uses.items()
            }
            if verb == "encode":
                short = max(1, size.num_latents // 8)
                contenders[f"{OURS}, {short} latents"] = Contender(self.used(made[OURS].encode, x, short), batch)
            for who in list(uses)[::2] if self.compiled else []:
                part = copy.deepcopy(uses[who])
                compile_parts(part, self.compile)
                contenders[f"{who}, compiled"] = Contender(self.used(getattr(part, verb), data), batch)
            yield f"{verb}, {name}, {size.image_size} pixels ({whose})", contenders
        del uses
        made = {TITOK: made[TITOK], f"{OURS}, one length": our_design(size, False).to(self.device), OURS: made[OURS]}
        for who, design in ((TITOK, titok_design), (OURS, our_design)) if self.compiled else ():
            made[f"{who}, compiled"] = design(size).to(self.device)  # a copy's parameters forget their optimiser group
            compile_parts(made[f"{who}, compiled"], self.compile)

        def loss(tokenizer: Tokenizer) -> Callable[[], torch.Tensor]:
            return lambda: tokenizer.total(tokenizer.losses(x)[0])

        steps = {who: Contender(self.trained(t.train(), loss(t)), batch) for who, t in made.items()}
        yield f"training step, {name}, {size.image_size} pixels", steps

    def priors(self, batch: int, train_batch: int) -> Contests:
        """Guided sampling without decoding, and the training step, of the demo's prior and MAR's ways at its size."""
        made: dict[str, Any] = {}
        overlays = {MAR: ["prior_diffusion_head"], "MAR-style masked prior": ["prior_masked", "prior_diffusion_head"]}
        for who, names in (overlays | {OURS: []}).items():
            files = ["stage2/demo", *(f"variants/{name}" for name in names)]
            made[who] = build("stage2", files, []).prior.to(self.device)
            made[who].vocabulary.fit([CAPTION])
        captions = [CAPTION] * batch
        uses = {who: Contender(self.used(sampler(prior.eval(), captions)), batch) for who, prior in made.items()}
        held_prior = copy.deepcopy(made[OURS]).hold(self.dtype)
        uses[f"{OURS}, weights held"] = Contender(self.used(sampler(held_prior, captions)), batch)
        yield "sample, demo's prior, guidance 2", uses
        z = torch.randn(train_batch, made[OURS].num_latents, made[OURS].latent_dim, device=self.device)

        def loss(prior: Any) -> Callable[[], torch.Tensor]:
            words = prior.encode_text([CAPTION] * train_batch)
            return lambda: prior.losses(z, words).mean()

        steps = {who: Contender(self.trained(prior.train(), loss(prior)), train_batch) for who, prior in made.items()}
        yield "training step, demo's prior", steps


def sampler(prior: Prior, captions: list[str]) -> Callable[[], Any]:
    return lambda: prior.sample(captions, 2.0)


def held(tokenizer: Tokenizer, dtype: torch.dtype) -> Tokenizer:
    """A copy with its weights in `dtype`, as `Tokenizer.from_pretrained(dtype=...)` leaves one."""
    copied = copy.deepcopy(tokenizer)
    hold_weights(copied, dtype)
    copied.held = dtype
    return copied


def compile_parts(tokenizer: Tokenizer, compiler: Callable[..., Any]) -> None:
    """Encoder and decoder in place; what checks and draws around them stays as it is."""
    for part in (tokenizer.encoder, tokenizer.decoder):
        part.forward = compiler(part.forward)  # type: ignore[method-assign]


def data_rows(device: torch.device, turns: int) -> list[Row]:
    """`prepare` against the loop over PIL that a script would have; no products, so no share of a peak."""
    made = photographs(40)
    with tempfile.TemporaryDirectory() as folder:
        loops = {name: Contender(loop, len(made)) for name, loop in prepare_loops(made, Path(folder)).items()}
        return compete("prepare, photographs to 256 pixels", loops, torch.float32, device, turns)
