"""The page of the reconstruction report: from its metrics and a few pictures to a `Report`; measures nothing.

Headlines first, then the table by prefix length and the pictures, since that is what one looks for; curves, what a
classifier and the captions show, and the latents themselves follow (`reconstruction_tables`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stage1_tokenizer.evaluation.image_metrics import Skipped
from stage1_tokenizer.evaluation.reconstruction_tables import (
    captions_table,
    classifier_table,
    curves,
    frechet_entries,
    latent_table,
    main_table,
    percent,
    retrieval_table,
)
from stage1_tokenizer.evaluation.report import Figure, Report


@dataclass
class Pictures:
    """What the grid shows, in [-1, 1]; n pictures each."""

    original: Tensor  # (n, 3, H, W)
    learned: Mapping[int, Tensor]  # k -> (n, 3, H, W)
    pca: Mapping[int, Tensor]


def page(metrics: Mapping[str, Any], pictures: Pictures, skipped: Sequence[Skipped]) -> Report:
    """The report's page. metrics: what `reconstruction_report` returns. skipped: what was left out."""
    lengths = metrics["prefix_lengths"]
    report = Report(
        "Reconstruction by prefix length",
        f"{metrics['num_images']:,} held-out pictures; {lengths[-1]} latents of {metrics['floats'][1]} floats; "
        "the first k latents decoded, next to the first principal components with the same number of floats. "
        "No decoder reads a caption: a picture is made from latents alone.",
    )
    report.figures(headlines(metrics))
    main_table(report, metrics, lengths)
    rows = [("original", [pictures.original] * 2)]
    rows += [(f"k = {k}: {metrics['floats'][k]} floats", [pictures.learned[k], pictures.pca[k]]) for k in lengths]
    report.grid("Prefixes", ["learned latents", "PCA, same floats"], rows)
    report.section("Curves")
    curves(report, metrics, lengths)
    if "classifier" in metrics:
        classifier_table(report, metrics["classifier"], lengths)
    if "retrieval" in metrics:
        retrieval_table(report, metrics["retrieval"], lengths, metrics["text_lengths"])
        captions_table(report, metrics, lengths)
    latent_table(report, metrics["latents"])
    return report.skipped(skipped).provenance(metrics["provenance"])


def headlines(metrics: Mapping[str, Any]) -> list[Figure]:
    """Up to five figures that sum the report up."""
    first, last = metrics["prefix_lengths"][0], metrics["prefix_lengths"][-1]
    pca = metrics["pca"]["psnr"]
    figures = [
        Figure(f"PSNR, all {last} latents", f"{metrics['psnr'][last]:.2f} dB", f"PCA {pca[last]:.2f} dB"),
        Figure(
            f"PSNR, first latent{'s' * (first > 1)}", f"{metrics['psnr'][first]:.2f} dB", f"PCA {pca[first]:.2f} dB"
        ),
    ]
    if "classifier" in metrics:
        read = metrics["classifier"]
        what = "all attributes read" if "layout" in read["real"] else "class read"
        figures.append(
            Figure(
                f"{what}, {last} latents",
                percent(read["reconstruction"][last]["all"]),
                f"real pictures {percent(read['real']['all'])}, PCA {percent(read['pca'][last]['all'])}",
            )
        )
    features, distance = next(iter(frechet_entries(metrics).items()))
    figures.append(
        Figure(
            f"Fréchet distance, n = {distance['n']:,}",
            f"{distance['reconstruction'][last]:,.1f}",
            f"PCA {distance['pca'][last]:,.1f}, real–real {distance['real_real']:,.1f}; {features} features",
        )
    )
    if "retrieval" in metrics:
        kind = list(metrics["retrieval"])[-1]
        entry = metrics["retrieval"][kind]
        share, chance = entry["recall"][first][1], entry["chance"][1]
        figures.append(
            Figure(
                "caption R@1 from the first latent",
                f"{share:.3f}",
                f"{share / chance:.0f} x chance, {kind}, among {metrics['retrieval']['n']:,}",
            )
        )
    return figures
