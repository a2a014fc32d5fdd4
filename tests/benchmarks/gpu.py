"""`python -m tests.benchmarks.gpu`: one CUDA machine in at most 8 minutes: are its paths right, and how fast are they?

    agreement   the CUDA paths (float32, autocast, torch.compile, graph capture, FlexAttention) against the CPU
    machine     matrix products, memory bandwidth, pictures copied from the host
    step        training steps of the B size at 256 pixels: pictures, tokens, share of the measured peak, memory
    sample      latency of a 100 M prior at batch 1 against its floor: the transformer's weights read once a latent

Needs torch, this repository and nothing else. Sections that no longer fit `--minutes` are left out by name; the exit
status is 1 where a path disagrees or fails. `--device cpu --tiny` runs everything small, which is what a test does.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stage1_tokenizer.precision import hold_weights
from stage1_tokenizer.tokenizer import Tokenizer
from stage2_prior.backbone import Backbone, RotaryBackbone
from stage2_prior.conditions import ClassCondition
from stage2_prior.heads.flow import FlowHead
from stage2_prior.heads.nets import AddedConditionNet
from stage2_prior.orders import noise_extended_blocks, noise_extended_mask
from stage2_prior.prior import CausalPrior
from tests.benchmarks.designs import SIZES, our_design, pictures, titok_design
from tests.benchmarks.machine import Machine
from tests.benchmarks.measure import count_flops, matmul_peak, peak_memory, seconds

CLASSES = ["circle", "star"]  # a caption's words would need a library that splits them
Finding = dict[str, Any]


def awake(module: nn.Module) -> nn.Module:
    """Parameters that start at zero, and would hide what is wrong behind them, drawn small."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return module


def distance(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what was wanted."""
    return float((got.float().cpu() - wanted.float().cpu()).norm() / wanted.float().cpu().norm())


class Gpu:
    """The sections; `tiny` makes all of them small enough for one CPU core."""

    def __init__(self, device: torch.device, tiny: bool):
        self.machine, self.device, self.tiny = Machine(device), device, tiny
        self.size = "demo" if tiny else "B"
        self.batch, self.turns = (2, 1) if tiny else (64, 5)
        self.peak = 0.0

    def compile(self, tokenizer: Tokenizer) -> None:
        """Encoder and decoder in place; a tiny run looks at what is traced, and generates no code."""
        for module in (tokenizer.encoder, tokenizer.decoder):
            module.compile(backend="eager" if self.tiny else "inductor")

    # -- agreement ----------------------------------------------------------------------------------------------------

    def agreement(self) -> Iterator[Finding]:
        """One finding per path: its distance to the same on the CPU in float32, and the limit."""
        tokenizer = awake(our_design(SIZES["demo"]))
        assert isinstance(tokenizer, Tokenizer)
        images = pictures(4, 32, torch.device("cpu"))
        wanted = trained_gradient(tokenizer, images)
        moved, at = copy.deepcopy(tokenizer).to(self.device), images.to(self.device)
        yield agrees("encode, decode and gradient, float32", lambda: trained_gradient(moved, at), wanted, 2e-3)

        def autocast() -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16):
                return trained_gradient(moved, at)

        yield agrees("the same under autocast to bfloat16", autocast, wanted, 0.2)

        def compiled() -> Tensor:
            part = copy.deepcopy(moved)
            self.compile(part)
            return trained_gradient(part, at)

        yield agrees("the same compiled", compiled, wanted, 2e-3)
        z = torch.randn(4, 16, 16)
        picture = tokenizer.eval().decode(z).detach()
        far = z.to(self.device)
        if self.device.type == "cuda":
            yield agrees("decode from a captured graph", lambda: captured(moved.eval(), far), picture, 2e-3)
        held = copy.deepcopy(moved).eval()
        hold_weights(held, torch.bfloat16)
        held.held = torch.bfloat16
        yield agrees("decode, weights held in bfloat16", lambda: held.decode(far), picture, 0.1)
        prior = awake(self.prior(small=True))
        assert isinstance(prior, CausalPrior)
        line = prior.eval().sample(CLASSES, 2.0, temperature=0)  # no draw is left
        elsewhere = copy.deepcopy(prior).to(self.device)
        yield agrees("guided line without noise", lambda: elsewhere.sample(CLASSES, 2.0, temperature=0), line, 1e-2)
        yield agrees("FlexAttention against a dense mask", *self.flex(), 2e-3)

    def flex(self) -> tuple[Callable[[], Tensor], Tensor]:
        """A backbone over words, line and noisy copies by FlexAttention (to be called), and under the dense mask."""
        torch.manual_seed(0)
        text_mask = torch.arange(12) < torch.tensor([[12], [5]])
        backbone = awake(Backbone(64, 2, 2, max_tokens=12 + 3 * 16)).to(self.device)
        x, at = torch.randn(2, 12 + 3 * 16, 64, device=self.device), torch.arange(12 + 3 * 16, device=self.device)
        mask = text_mask.to(self.device)
        with torch.no_grad():
            dense: Tensor = backbone(x, at, noise_extended_mask(mask, 16, 2))

        def blocks() -> Tensor:
            with torch.no_grad():
                return backbone(x, at, noise_extended_blocks(mask, 16, 2))  # type: ignore[no-any-return]

        return blocks, dense

    # -- speed --------------------------------------------------------------------------------------------------------

    def median(self, call: Callable[[], Any]) -> float:
        """Seconds of a call, the median of the turns after two that warm up."""
        times = [seconds(call, self.device) for _ in range(self.turns + 2)]
        return statistics.median(times[2:])

    def rates(self) -> Iterator[Finding]:
        """Matrix products, bytes read and written by a copy, pictures from the host."""
        self.peak = matmul_peak(self.machine.dtype, self.device, 3)
        yield {"name": "matrix product", "TFLOP/s": self.peak / 1e12, "format": str(self.machine.dtype)[6:]}
        source = torch.empty(2**20 if self.tiny else 2**30, dtype=torch.uint8, device=self.device)
        yield {"name": "memory", "GB/s": 2 * source.numel() / self.median(source.clone) / 1e9}
        host = torch.zeros(self.batch, 3, 256, 256, dtype=torch.uint8)
        host = host.pin_memory() if self.device.type == "cuda" else host
        copied = self.median(lambda: host.to(self.device, non_blocking=True).float())
        yield {"name": "pictures from pinned memory to float", "pictures/s": self.batch / copied}

    def steps(self) -> Iterator[Finding]:
        """Training steps of both designs, ours also compiled."""
        size = SIZES[self.size]
        tokens = (size.image_size // size.patch_size) ** 2 + size.num_latents
        x = pictures(self.batch, size.image_size, self.device)
        flops = 0.0
        for name in ("TiTok's design", "ours", "ours, compiled"):
            made = (titok_design(size) if name.startswith("TiTok") else our_design(size)).to(self.device).train()
            if name.endswith("compiled"):  # the products are those of the row before
                self.compile(made)
            step = self.machine.trained(made, lambda made=made: made.total(made.losses(x)[0]))  # type: ignore[misc]
            flops = flops if name.endswith("compiled") else count_flops(step)
            taken, memory = self.median(step), peak_memory(step, self.device)
            yield {
                "name": f"{name}, batch {self.batch}",
                "ms": 1e3 * taken,
                "pictures/s": self.batch / taken,
                "tokens/s": self.batch * tokens / taken,
                "share of peak": flops / taken / self.peak if self.peak else float("nan"),
                "GB": memory / 1e9,
            }
            del made, step

    def prior(self, small: bool) -> CausalPrior:
        """100 M parameters over 32 latents, or a small one."""
        torch.manual_seed(0)
        width, depth, head_width, latents = (64, 2, 64, 8) if small else (768, 11, 1024, 32)
        backbone = RotaryBackbone(width, depth, heads=width // 32, max_tokens=1 + latents)
        head = FlowHead(AddedConditionNet(16, width, head_width, 3))
        return CausalPrior(latents, 16, None, backbone, head, condition=ClassCondition(width, CLASSES))

    def samples(self) -> Iterator[Finding]:
        """Latency of one picture's line and what reading the weights alone would take."""
        source = torch.empty(2**20 if self.tiny else 2**30, dtype=torch.uint8, device=self.device)
        bandwidth = 2 * source.numel() / self.median(source.clone)
        del source
        prior = self.prior(self.tiny).eval().to(self.device)
        millions = sum(p.numel() for p in prior.parameters()) / 1e6
        prior.hold(self.machine.dtype)
        held = sum(p.numel() * p.element_size() for p in prior.backbone.parameters())
        floor = prior.num_latents * held / bandwidth
        for guidance in (1.0, 2.0):
            taken = self.median(self.machine.used(lambda w=guidance: prior.sample(CLASSES[:1], w)))  # type: ignore[misc]
            name = f"{millions:.0f} M, {prior.num_latents} latents, batch 1, guidance {guidance:g}"
            yield {"name": name, "ms": 1e3 * taken, "floor, ms": 1e3 * floor, "times the floor": taken / floor}


def trained_gradient(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """Latents, pictures and gradient of their squared error, as one vector; nothing in it is drawn."""
    tokenizer.zero_grad()
    z = tokenizer.encode(images)
    x = tokenizer.decode(z)
    (x - images).square().mean().backward()
    gradients = [p.grad.flatten() for p in tokenizer.parameters() if p.grad is not None]
    parts = [z.detach().flatten(), x.detach().flatten(), torch.cat(gradients)]
    return torch.cat([part.float() / part.float().norm() for part in parts])


def captured(tokenizer: Tokenizer, z: Tensor) -> Tensor:
    """`decode` replayed from a CUDA graph that was captured on other latents."""
    static, side = torch.zeros_like(z), torch.cuda.Stream()
    with torch.inference_mode():
        with torch.cuda.stream(side):
            for _ in range(3):
                tokenizer.decode(static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = tokenizer.decode(static)
        static.copy_(z)
        graph.replay()
        torch.cuda.synchronize()
    return out


def agrees(name: str, call: Callable[[], Tensor], wanted: Tensor, limit: float) -> Finding:
    """The finding of one path; a path that fails is a finding as well, with its reason."""
    try:
        found = distance(call().detach(), wanted)
    except Exception as error:  # what is looked for here is whether it runs at all
        return {"name": name, "right": False, "failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return {"name": name, "distance": found, "limit": limit, "right": found <= limit}


def line(finding: Finding) -> str:
    """A finding as text."""
    values = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in finding.items())
    return "  " + "  ".join(list(values))


def main(arguments: list[str] | None = None) -> int:
    """Run the sections; the exit status is 1 where a path is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--tiny", action="store_true", help="everything small")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("got --device cuda where torch finds none, wanted a CUDA machine; --device cpu --tiny runs here")
    torch.backends.cudnn.allow_tf32 = False
    start, gpu = time.perf_counter(), Gpu(device, options.tiny)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    content: dict[str, Any] = {"device": name, "torch": torch.__version__}
    sections = {"agreement": gpu.agreement, "machine": gpu.rates, "step": gpu.steps, "sample": gpu.samples}
    for section, findings in sections.items():
        content[section] = []
        print(section, flush=True)
        for finding in findings():
            content[section].append(finding)
            print(line(finding), flush=True)
            if time.perf_counter() - start > 60 * options.minutes:
                print(f"  {options.minutes:g} minutes are over; the rest is left out", flush=True)
                break
        if time.perf_counter() - start > 60 * options.minutes:
            break
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{time.perf_counter() - start:.0f} s, written to {options.out}")
    return int(not all(finding["right"] for finding in content["agreement"]))


if __name__ == "__main__":
    raise SystemExit(main())
