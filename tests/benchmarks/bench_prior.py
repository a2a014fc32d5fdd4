"""`python -m tests.benchmarks.bench_prior`: what a sample costs with our head and with the head of MAR, in one run.

A causal prior of 100 million parameters with the head of MAR-B (6 blocks of 1,024), 32 latents of 16 floats, batch 8,
guided: that head's time tabulated and its condition in every block, or added once, or added once with half the blocks
(and two more in the transformer, so that the prior stays at 100 million), midpoint x 4 (8 evaluations) and Adams-
Bashforth x 4 (4 evaluations), the last ones also with late latents in sets, against 100 ancestral steps with full
adaLN. The slow one is timed on lines of 1 and of `--latents` latents: each further latent costs what the difference
says. CPU time of the process is printed beside wall time, because a shared machine stretches only the latter. Weights
are held in the format of the products (`Prior.hold`) for all. Head FLOPs are counted.
"""

import argparse
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from stage1_tokenizer.precision import matmul_dtype
from stage1_tokenizer.text.vocabulary import CaptionVocabulary
from stage2_prior.backbone import RotaryBackbone
from stage2_prior.heads.base import Head
from stage2_prior.heads.ddpm import DDPM
from stage2_prior.heads.diffusion import DiffusionHead
from stage2_prior.heads.flow import FlowHead
from stage2_prior.heads.nets import AdaLNNet, AddedConditionNet, HoistedNet
from stage2_prior.heads.solvers import AdamsBashforth, Midpoint
from stage2_prior.orders import SetOrder
from stage2_prior.prior import CausalPrior

CAPTION = "a small red circle above a large blue star on a white background"
CHANNELS, LATENTS, WIDTH, HEAD_WIDTH, HEAD_DEPTH = 16, 32, 768, 1024, 6


SETS = [1, 1, 2, 4, 8, 16]  # of the 32 latents, the last row: late ones are drawn together


def make_prior(head: Head, latents: int, depth: int, sets: bool = False) -> CausalPrior:
    vocabulary = CaptionVocabulary(rows=64, context_length=24)
    vocabulary.fit([CAPTION])
    backbone = RotaryBackbone(WIDTH, depth, heads=12, max_tokens=24 + LATENTS)
    return CausalPrior(latents, CHANNELS, vocabulary, backbone, head, order=SetOrder(SETS) if sets else None).eval()


@torch.inference_mode()
def timed(prior: CausalPrior, batch: int) -> tuple[float, float]:
    """(wall, CPU) seconds of one call, the better of two."""
    dtype = matmul_dtype(torch.device("cpu"))
    found = []
    prior.hold(dtype)
    for _ in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        prior.sample([CAPTION] * batch, guidance=2.0)
        found.append((time.perf_counter() - wall, time.process_time() - cpu))
    return min(found)


def seconds_per_image(head: Head, latents: int, depth: int, batch: int, sets: bool) -> tuple[float, float]:
    """(wall, CPU) seconds per picture of LATENTS latents, from a line of `latents` and, if that is shorter, of one."""
    wall, cpu = timed(make_prior(head, latents, depth, sets), batch)
    if latents < LATENTS:
        wall_one, cpu_one = timed(make_prior(head, 1, depth), batch)
        wall, cpu = (a + (LATENTS - 1) * (b - a) / (latents - 1) for a, b in ((wall_one, wall), (cpu_one, cpu)))
    return wall / batch, cpu / batch


@torch.inference_mode()
def head_flops(head: Head) -> int:
    """Floating-point operations of one guided latent of one picture."""
    plan, cond, uncond = head.plan(), torch.randn(1, WIDTH), torch.randn(1, WIDTH)
    with FlopCounterMode(display=False) as counter:
        head.sample(cond, uncond, 2.0, plan=plan)
    return counter.get_total_flops()


def main(arguments: list[str] | None = None) -> None:
    """Print one line per head and the two ratios."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_prior", description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--depth", type=int, default=9, help="blocks of the transformer; 9 make 100 M with a whole head"
    )
    parser.add_argument("--latents", type=int, default=3, help="latents that the slow head is timed on, 2 to 32")
    options = parser.parse_args(arguments)
    if not 2 <= options.latents <= LATENTS:
        parser.error(f"got --latents {options.latents}, wanted 2 to {LATENTS}")
    torch.manual_seed(0)
    net = {"latent_dim": CHANNELS, "cond_dim": WIDTH, "width": HEAD_WIDTH, "depth": HEAD_DEPTH}
    slow = "diffusion, full adaLN, DDPM x 100"
    heads: dict[str, tuple[Head, int, int]] = {
        slow: (DiffusionHead(AdaLNNet(**net), solver=DDPM(100)), options.latents, options.depth)
    }
    for name, net_class, blocks in (
        ("condition in blocks", HoistedNet, HEAD_DEPTH),
        ("condition added", AddedConditionNet, HEAD_DEPTH),
        ("added, half the blocks", AddedConditionNet, HEAD_DEPTH // 2),
    ):
        depth = options.depth + (2 if blocks < HEAD_DEPTH else 0)
        for solver in (Midpoint(4), AdamsBashforth(4)):
            for late in ("", ", in sets") if blocks < HEAD_DEPTH else ("",):
                light = FlowHead(net_class(**net | {"depth": blocks}), solver=solver)
                heads[f"flow, {name}, {type(solver).__name__} x 4{late}"] = (light, LATENTS, depth)
    rows = {}
    for name, (head, latents, depth) in heads.items():
        millions = sum(p.numel() for p in make_prior(head, LATENTS, depth).parameters()) / 1e6
        products = head_flops(head) * LATENTS / 1e9
        wall, cpu = seconds_per_image(head, latents, depth, options.batch, name.endswith("in sets"))
        rows[name] = (wall, cpu, products)
        cost = f"{wall:8.3f} s/image wall {cpu:8.3f} s CPU   head {rows[name][2]:7.2f} GFLOP"
        ratios = [f"{a / b:.1f}" for a, b in zip(rows[slow], rows[name], strict=True)]
        of_slow = f"slow/this: wall {ratios[0]}, CPU {ratios[1]}, FLOPs {ratios[2]}"
        print(f"{name:58s}{millions:5.0f} M {cost}   {of_slow}", flush=True)


if __name__ == "__main__":
    main()
