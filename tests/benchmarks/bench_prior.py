"""`python -m tests.benchmarks.bench_prior`: what a sample costs with our head and with the head of MAR, in one run.

A 100-million-parameter causal prior with the head of MAR-B (6 blocks of 1,024), 32 latents of 16 floats, batch 8,
guided: midpoint x 4 with that head hoisted, against 100 ancestral steps with full adaLN. The slow one may be timed on
its first few latents and scaled (`--latents`): every latent costs the same there. CPU time of the process is printed
beside wall time, because a shared machine stretches only the latter. Head FLOPs are counted, not estimated.
"""

import argparse
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from stage1_tokenizer.precision import matmul_dtype
from stage1_tokenizer.vocabulary import CaptionVocabulary
from stage2_prior.backbone import RotaryBackbone
from stage2_prior.diffusion import DDPM
from stage2_prior.diffusion_head import DiffusionHead
from stage2_prior.head_nets import AdaLNNet, HoistedNet
from stage2_prior.heads import FlowHead, Head
from stage2_prior.prior import CausalPrior

CAPTION = "a small red circle above a large blue star on a white background"
CHANNELS, LATENTS, WIDTH, HEAD_WIDTH, HEAD_DEPTH = 16, 32, 768, 1024, 6


def make_prior(head: Head, latents: int, depth: int) -> CausalPrior:
    vocabulary = CaptionVocabulary(rows=64, context_length=24)
    vocabulary.fit([CAPTION])
    backbone = RotaryBackbone(WIDTH, depth, heads=12, max_tokens=24 + LATENTS)
    return CausalPrior(latents, CHANNELS, vocabulary, backbone, head).eval()


@torch.inference_mode()
def timed(prior: CausalPrior, batch: int) -> tuple[float, float]:
    """(wall, CPU) seconds of one call, the better of two."""
    dtype = matmul_dtype(torch.device("cpu"))
    found = []
    for _ in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            prior.sample([CAPTION] * batch, guidance=2.0)
        found.append((time.perf_counter() - wall, time.process_time() - cpu))
    return min(found)


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
    parser.add_argument("--depth", type=int, default=9, help="blocks of the transformer; 9 make 100 M in all")
    parser.add_argument("--latents", type=int, default=4, help="latents that the slow head is timed on, up to 32")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    net = {"latent_dim": CHANNELS, "cond_dim": WIDTH, "width": HEAD_WIDTH, "depth": HEAD_DEPTH}
    heads = {
        "flow, hoisted, midpoint x 4": (FlowHead(HoistedNet(**net)), LATENTS),
        "diffusion, full adaLN, DDPM x 100": (DiffusionHead(AdaLNNet(**net), sampler=DDPM(100)), options.latents),
    }
    rows = []
    for name, (head, latents) in heads.items():
        prior = make_prior(head, latents, options.depth)
        millions = sum(p.numel() for p in prior.parameters()) / 1e6
        wall, cpu = (seconds * LATENTS / latents / options.batch for seconds in timed(prior, options.batch))
        flops = head_flops(head) * LATENTS / 1e9
        rows.append((wall, cpu, flops))
        print(
            f"{name:36s} {millions:5.0f} M  {wall:7.3f} s/image wall  {cpu:7.3f} s CPU  head {flops:8.2f} GFLOP/image"
        )
    (wall, cpu, flops), (slow_wall, slow_cpu, slow_flops) = rows
    print(f"ratio: wall {slow_wall / wall:.1f}, CPU {slow_cpu / cpu:.1f}, head FLOPs {slow_flops / flops:.1f}")


if __name__ == "__main__":
    main()
