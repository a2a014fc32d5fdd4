"""`python -m stage2_prior.evaluation.summary RUN_DIR`: where the reports of a run lie, and five lines of figures.

A line whose figures were not measured on this data (attributes on photographs, say) is left out; a missing report is an
error, since both commands that write them run before this one.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


class SummaryError(ValueError):
    """A run folder without its reports."""


def read_metrics(run_dir: Path, report: str) -> dict[str, Any]:
    """metrics.json of the report "reconstruction" or "generation". Raises SummaryError where it is missing."""
    file = run_dir / report / "metrics.json"
    if not file.is_file():
        stage = {"reconstruction": "stage1_tokenizer", "generation": "stage2_prior"}[report]
        raise SummaryError(f"found no {file}; write it with `python -m {stage} test` for this run")
    metrics: dict[str, Any] = json.loads(file.read_text())
    return metrics


def reconstruction_lines(metrics: dict[str, Any]) -> list[str]:
    """PSNR by prefix length next to PCA, attributes read back, retrieval from the first latent."""
    psnr, pca = metrics["psnr"], metrics["pca"]["psnr"]
    curve = "  ".join(f"{k}: {psnr[k]:.1f} ({psnr[k] - pca[k]:+.1f})" for k in psnr)
    lines = [f"PSNR in dB by latents kept (over PCA at equal floats)  {curve}"]
    if "classifier" in metrics:
        read, full = metrics["classifier"], str(metrics["prefix_lengths"][-1])
        lines.append(
            f"everything read back from reconstructions {read['reconstruction'][full]['all']:.1%} "
            f"(PCA {read['pca'][full]['all']:.1%}, real pictures {read['real']['all']:.1%})"
        )
    kinds = {k: v for k, v in metrics.get("retrieval", {}).items() if isinstance(v, dict)}
    if kinds:
        first = str(metrics["prefix_lengths"][0])
        name, best = max(kinds.items(), key=lambda item: item[1]["recall"][first]["1"])
        recall = best["recall"][first]["1"]
        lines.append(
            f"R@1 of {name} captions from the first latent alone {recall:.1%} among {metrics['retrieval']['n']} "
            f"({recall / best['chance']['1']:.0f} times chance)"
        )
    return lines


def generation_lines(metrics: dict[str, Any]) -> list[str]:
    """Faithfulness to captions by group, Frechet distance, spread of latents, speed."""
    guidance = str(metrics["cost"]["guidance"])
    lines = []
    if "faithfulness" in metrics:
        read = metrics["faithfulness"][guidance]
        groups = "  ".join(f"{name} {share:.3f}" for name, share in read.items() if "without" not in name)
        lines.append(f"everything the caption says is in the picture, guidance {guidance}: {groups}")
    distances, spread = metrics["distances"], metrics["latents"][guidance]
    fair = ""
    if "same_captions" in distances:
        same = distances["same_captions"]
        fair = (
            f"; on {same['n']} captions of training pictures {same['generated_real'][guidance]:.1f}, of other pictures"
            f" with these captions {same['reconstruction_real']:.1f} reconstructed, {same['real_real']:.1f} real"
        )
    lines.append(
        f"Frechet distance [{distances['features']}, n = {distances['n']}] {distances['generated_real'][guidance]:.1f} "
        f"(reconstructions {distances['reconstruction_real']:.1f}, real pictures {distances['real_real']:.1f}{fair}); "
        f"spread of latents {spread['lowest']:.2f} to {spread['highest']:.2f} of the data's; "
        f"{metrics['cost']['images_per_second']:.0f} images/s"
    )
    return lines


def main(args: list[str] | None = None) -> int:
    """Print the summary; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m stage2_prior.evaluation.summary", description=__doc__.split("\n")[0]
    )
    parser.add_argument("run_dir", type=Path, help="folder of the run, such as runs/demo")
    run_dir = parser.parse_args(args).run_dir
    try:
        made = {report: read_metrics(run_dir, report) for report in ("reconstruction", "generation")}
    except SummaryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\n{run_dir / 'reconstruction' / 'report.html'}\n{run_dir / 'generation' / 'report.html'}\n")
    for line in reconstruction_lines(made["reconstruction"]) + generation_lines(made["generation"]):
        print(f"* {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
