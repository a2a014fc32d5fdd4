"""The page of the reconstruction report: from its metrics and a few pictures to a `Report`; measures nothing."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from stage1_tokenizer.evaluation.image_metrics import Skipped
from stage1_tokenizer.evaluation.report import Figure, Report


def page(metrics: Mapping[str, Any], pictures: Mapping[str, Any], skipped: Sequence[Skipped]) -> Report:
    """The report's page.

    Args:
        metrics: what `reconstruction_report` returns.
        pictures: "original" (n, 3, H, W), "learned" and "pca" {k: (n, 3, H, W)}, in [-1, 1].
        skipped: what was left out.
    """
    lengths = metrics["prefix_lengths"]
    report = Report(
        "Reconstruction by prefix length",
        f"{metrics['num_images']:,} held-out pictures; {lengths[-1]} latents of {metrics['floats'][1]} floats; "
        "the first k latents decoded, next to the first principal components with the same number of floats. "
        "No decoder reads a caption: a picture is made from latents alone.",
    )
    report.figures(headlines(metrics))
    _main_table(report, metrics, lengths)
    _grid(report, metrics, pictures, lengths)
    report.section("Curves")
    _curves(report, metrics, lengths)
    if "baseline" in metrics:
        _baseline_table(report, metrics["baseline"])
    if "classifier" in metrics:
        _classifier_table(report, metrics["classifier"], lengths)
    if "retrieval" in metrics:
        _retrieval_table(report, metrics["retrieval"], lengths, metrics["text_lengths"])
        _captions_table(report, metrics, lengths)
    _latent_table(report, metrics["latents"])
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
                _percent(read["reconstruction"][last]["all"]),
                f"real pictures {_percent(read['real']['all'])}, PCA {_percent(read['pca'][last]['all'])}",
            )
        )
    name, distance = next((key, value) for key, value in metrics.items() if key.startswith("frechet["))
    figures.append(
        Figure(
            f"Fréchet distance, n = {distance['n']:,}",
            f"{distance['reconstruction'][last]:,.1f}",
            f"PCA {distance['pca'][last]:,.1f}, real–real {distance['real_real']:,.1f}; {name[8:-1]} features",
        )
    )
    if "retrieval" in metrics:
        kind = list(metrics["retrieval"])[-1]
        found = metrics["retrieval"][kind]
        share, chance = found["recall"][first][1], found["chance"][1]
        figures.append(
            Figure(
                "caption R@1 from the first latent",
                f"{share:.3f}",
                f"{share / chance:.0f} x chance, {kind}, among {metrics['retrieval']['n']:,}",
            )
        )
    return figures


def _main_table(report: Report, metrics: Mapping[str, Any], lengths: Sequence[int]) -> None:
    """One row per prefix length, with the same measure of PCA beside every learned one."""
    columns: list[tuple[str, Mapping[int, float], str]] = []
    for name, title, form in (("psnr", "PSNR dB", "{:.2f}"), ("ssim", "SSIM", "{:.3f}")):
        columns += [(title, metrics[name], form), (f"PCA {title}", metrics["pca"][name], form)]
    for name in [n for n in metrics if n.startswith("lpips[")]:
        columns += [(name, metrics[name], "{:.3f}"), (f"PCA {name}", metrics["pca"][name], "{:.3f}")]
    if "classifier" in metrics:
        read = metrics["classifier"]
        title = "all attributes" if "layout" in read["real"] else "class"
        for label, key in ((title, "reconstruction"), (f"PCA {title}", "pca")):
            columns.append((label, {k: read[key][k]["all"] for k in lengths}, "{:.1%}"))
        if "words" in read:
            columns.append(("word", read["words"]["reconstruction"], "{:.1%}"))
    if "zero_shot" in metrics:
        columns.append(("zero-shot class", metrics["zero_shot"], "{:.1%}"))
    if "linear_probe" in metrics:
        probe = metrics["linear_probe"]
        columns += [("linear probe", probe["learned"], "{:.1%}"), ("PCA linear probe", probe["pca"], "{:.1%}")]
    distances = [(key, value) for key, value in metrics.items() if key.startswith("frechet[")]
    for name, entry in distances:
        title = "FD" if len(distances) == 1 else f"FD {name[8:-1]}"
        columns += [(title, entry["reconstruction"], "{:.2f}"), (f"PCA {title}", entry["pca"], "{:.2f}")]
        for kind in ("precision", "recall"):
            if f"reconstruction_{kind}" in entry:
                columns.append((kind, entry[f"reconstruction_{kind}"], "{:.2f}"))
                columns.append((f"PCA {kind}", entry[f"pca_{kind}"], "{:.2f}"))
    # One measure per row: a table that grows downwards stays readable on a narrow screen.
    rows = [[title, *(form.format(by_k[k]) for k in lengths)] for title, by_k, form in columns]
    bits = list(itertools.accumulate(metrics["latents"]["rate_bits"]))
    if all(math.isfinite(value) for value in bits):
        rows.insert(0, ["bits at most (rate)", *(f"{bits[k - 1]:,.0f}" for k in lengths)])
    if "bits_per_latent" in metrics["latents"]:
        held = metrics["latents"]["bits_per_latent"]
        rows.insert(0, ["bits at most (symbols)", *(f"{held * k:,.0f}" for k in lengths)])
    rows.insert(0, ["floats", *(str(metrics["floats"][k]) for k in lengths)])
    notes = [
        f"FD is the Fréchet distance to the held-out pictures in {n[8:-1]} features, n = {e['n']:,}; "
        f"as many training pictures are at {e['real_real']:.2f}."
        for n, e in distances
    ]
    if "classifier" in metrics:
        notes.append(
            f"Attributes and classes are read by a classifier that reads {_percent(read['real']['all'])} of the "
            "real pictures right."
        )
    if "words" in metrics.get("classifier", {}):
        notes.append(
            f"Words: {read['words']['n']} pictures have one; from the real pictures "
            f"{_percent(read['words']['real'])} are read."
        )
    if "linear_probe" in metrics:
        n = metrics["linear_probe"]["n"]
        notes.append(f"Linear probe: mean accuracy over what there is to read, fitted on {n:,} training pictures.")
    if metrics["pca"]["num_floats"] < metrics["floats"][lengths[-1]]:
        n = metrics["pca"]["num_floats"]
        notes.append(f"PCA has only {n} components here: there are no more training pictures.")
    report.table(
        "By prefix length", ["first k latents", *(f"k = {k}" for k in lengths)], rows, " ".join(notes), quiet="PCA"
    )


def _curves(report: Report, metrics: Mapping[str, Any], lengths: Sequence[int]) -> None:
    def line(by_k: Mapping[int, float]) -> tuple[Sequence[float], Sequence[float]]:
        return lengths, [by_k[k] for k in lengths]

    report.curve(
        "PSNR by prefix length",
        "latents",
        "PSNR, dB",
        {"learned": line(metrics["psnr"]), "PCA": line(metrics["pca"]["psnr"])}
        | ({"without text losses": line(metrics["baseline"]["psnr"])} if _complete(metrics, lengths) else {}),
    )
    if "classifier" in metrics:
        read = metrics["classifier"]
        report.curve(
            "Read right by the classifier",
            "latents",
            "share of pictures",
            {
                label: line({k: read[key][k]["all"] for k in lengths})
                for label, key in (("learned", "reconstruction"), ("PCA", "pca"))
            },
        )
    name, entry = next((key, value) for key, value in metrics.items() if key.startswith("frechet["))
    report.curve(
        f"Fréchet distance, {name[8:-1]} features",
        "latents",
        "distance (lower is better)",
        {
            "learned": line(entry["reconstruction"]),
            "PCA": line(entry["pca"]),
            "real–real": (lengths, [entry["real_real"]] * len(lengths)),
        },
    )
    if "retrieval" in metrics:
        kinds = [kind for kind in metrics["retrieval"] if kind != "n"]
        report.curve(
            "Retrieval of captions, R@1",
            "latents",
            "share of pictures",
            {kind: line({k: metrics["retrieval"][kind]["recall"][k][1] for k in lengths}) for kind in kinds},
        )
        report.curve(
            "What a prefix tells about the caption",
            "latents",
            "bits, at least",
            {kind: line(metrics["retrieval"][kind]["bits"]) for kind in kinds},
        )
    if "linear_probe" in metrics:
        report.curve(
            "Linear probe",
            "latents",
            "mean accuracy",
            {"learned": line(metrics["linear_probe"]["learned"]), "PCA": line(metrics["linear_probe"]["pca"])},
        )
    positions = list(range(1, len(metrics["latents"]["rate_bits"]) + 1))
    if all(map(math.isfinite, metrics["latents"]["rate_bits"])):
        report.curve(
            "Rate of each latent",
            "position",
            "bits",
            {
                "KL to N(0, 1)": (positions, metrics["latents"]["rate_bits"]),
                "active units": (positions, metrics["latents"]["active_units"]),
            },
        )


def _complete(metrics: Mapping[str, Any], lengths: Sequence[int]) -> bool:
    return "baseline" in metrics and all(k in metrics["baseline"]["psnr"] for k in lengths)


def _grid(report: Report, metrics: Mapping[str, Any], pictures: Mapping[str, Any], lengths: Sequence[int]) -> None:
    rows: list[tuple[str, list[Tensor]]] = [("original", [pictures["original"]] * 2)]
    for k in lengths:
        rows.append((f"k = {k}: {metrics['floats'][k]} floats", [pictures["learned"][k], pictures["pca"][k]]))
    report.grid("Prefixes", ["learned latents", "PCA, same floats"], rows)


def _baseline_table(report: Report, baseline: Mapping[str, Any]) -> None:
    lengths = list(baseline["psnr"])
    rows = [
        ["without text losses, dB", *(f"{baseline['psnr'][k]:.2f}" for k in lengths)],
        ["cost of text, dB", *(f"{baseline['cost'][k]:+.2f}" for k in lengths)],
    ]
    report.table(
        "What the text losses cost",
        ["PSNR", *(f"k = {k}" for k in lengths)],
        rows,
        f"Against the run reported on {baseline['date']} ({baseline['command']}); a positive cost is PSNR lost.",
    )


def _classifier_table(report: Report, read: Mapping[str, Any], lengths: Sequence[int]) -> None:
    if len(read["real"]) <= 2:  # one slot: the main table has it
        return
    last = lengths[-1]
    rows = [
        [
            name,
            _percent(read["real"][name]),
            *(_percent(read["reconstruction"][k][name]) for k in lengths),
            _percent(read["pca"][last][name]),
        ]
        for name in read["real"]
    ]
    columns = ["attribute", "real", *(f"k = {k}" for k in lengths), f"PCA, k = {last}"]
    report.table(
        "Attributes read from reconstructions",
        columns,
        rows,
        "Objects are counted from the top left; an object that is not there has to be read as absent.",
    )


def _retrieval_table(report: Report, found: Mapping[str, Any], lengths: Sequence[int], trained: Sequence[int]) -> None:
    rows = []
    for kind in [name for name in found if name != "n"]:
        for rank in (1, 5):
            shares = [f"{found[kind]['recall'][k][rank]:.3f}" for k in lengths]
            distinct, chance = f"{found[kind]['distinct']:,}", f"{found[kind]['chance'][rank]:.4f}"
            rows.append([f"{kind}, R@{rank}", distinct, chance, *shares])
        told = [f"{found[kind]['bits'][k]:.1f}" for k in lengths]
        rows.append([f"{kind}, bits of {found[kind]['most_bits']:.1f}", distinct, "0", *told])
    columns = ["caption", "distinct", "chance", *(f"k = {k}" for k in lengths)]
    untrained = ""
    if not set(lengths) <= set(trained):
        untrained = (
            f" Text was trained on prefixes of {', '.join(map(str, trained))} latents: another one is read as the "
            "longest of these within it, or as the shortest of these where it is shorter still."
        )
    report.table(
        "Captions found from a prefix",
        columns,
        rows,
        f"Picture to caption among the captions of {found['n']:,} held-out pictures; a word-for-word copy of "
        "the picture's caption counts as a hit, ties do not. Bits: what the prefix tells about which caption it is, "
        "at least, from the likelihood of the right one." + untrained,
    )


def _captions_table(report: Report, metrics: Mapping[str, Any], lengths: Sequence[int]) -> None:
    """Captions near to prefixes of a few pictures and, with a captioner, its likelihoods and its own captions."""
    examples, shown = metrics["captions_read"], sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]})
    rows = [[item["caption"], *(item["nearest"][k] for k in shown)] for item in examples]
    columns = ["caption of the picture", *(f"nearest to k = {k}" for k in shown)]
    note = "The pictures are those of the grid above; the nearest of the held-out captions to the first k latents."
    report.table("What a prefix says", columns, rows, note)
    if "caption_bits" not in metrics:
        return
    rows = [[item["caption"], *(item["written"][k] for k in shown)] for item in examples]
    report.table("Captions written from a prefix", ["caption of the picture", *(f"k = {k}" for k in shown)], rows)
    bits = metrics["caption_bits"]
    report.table(
        "Likelihood of the true caption",
        ["bits per caption", "no picture", *(f"k = {k}" for k in lengths)],
        [[kind, *(f"{by_k[k]:.1f}" for k in (0, *lengths))] for kind, by_k in bits.items()],
        "Mean -log2 p(caption | first k latents) of the tokenizer's caption decoder; what it saves against no picture "
        "is what the prefix tells.",
    )


def _latent_table(report: Report, latents: Mapping[str, Any]) -> None:
    positions = range(1, len(latents["active_units"]) + 1)
    rows = [
        [
            str(p),
            str(latents["active_units"][p - 1]),
            f"{latents['rate_bits'][p - 1]:.1f}",
            f"{latents['mean_variance'][p - 1]:.2f}",
        ]
        for p in positions
    ]
    total = ["all", str(sum(latents["active_units"])), f"{sum(latents['rate_bits']):.1f}", ""]
    columns = ["position", "active units", "rate, bits", "share of variance that is signal"]
    note = ""
    if "bits_per_latent" in latents:
        note = f" A position is a symbol here: no noise, and at most {latents['bits_per_latent']:.1f} bits."
    report.table(
        "Latents",
        columns,
        [*rows, total],
        "Active: the posterior mean varies by more than 0.01 over pictures. Rate: mean KL of the standardised "
        "posterior to N(0, 1), an upper bound of what the position tells about the picture." + note,
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
