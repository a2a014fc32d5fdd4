"""`python -m tests.benchmarks.bench_ranks`: what two processes train against what one trains, both stages, float32.

The demo's configs on drawn scenes, the same global batch of 12 and the same random draws; prints the relative distance
of the weights, of their averages, and of the tensor that differs most.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from data.__main__ import main as data_main
from tests.ranked_run import distance, interleaved, ranked, same_run, words_of


def main(arguments: list[str] | None = None) -> None:
    """Train with one and with two processes and compare; `arguments` as on the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_ranks", description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args(arguments).steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, one, two = folder / "data", folder / "one", folder / "two"
        data_main(["prepare", "--source", "scenes", "--num", "160", "--workers", "1", "--out", str(data)])
        for stage in ("stage1", "stage2"):
            more = [f"--trainer.max_steps={steps}"]
            latents = [f"--data.data_dir={one / 'latents'}"] if stage == "stage2" else []
            keys = same_run(stage, "fit", *words_of(stage, one, data, 1, *more))["keys"]
            ranks = ranked(2, folder, [[stage, "fit", *words_of(stage, two, data, 2, *more, *latents)]])
            assert interleaved([rank[0]["keys"] for rank in ranks]) == keys, "the order of samples differs"
            if stage == "stage1":
                same_run(stage, "predict", *words_of(stage, one, data, 1))
            file = Path(stage) / "checkpoints" / "last.ckpt"
            a, b = (torch.load(run / file, weights_only=True) for run in (one, two))
            whole, most, where = distance(a["state_dict"], b["state_dict"], but="in_proj_bias")
            average = distance(*(c["callbacks"]["EMAWeights"]["averages"] for c in (a, b)))[0]
            print(f"{stage}, {steps} steps: weights {whole:.1e}, averages {average:.1e}, most {most:.1e} ({where})")


if __name__ == "__main__":
    main()
