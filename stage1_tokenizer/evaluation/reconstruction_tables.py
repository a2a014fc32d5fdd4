"""Tables and curves of the reconstruction report's page, one function each: metrics in, a part of a `Report` out.

Letters: K latents, k prefix length.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stage1_tokenizer.evaluation.curves import Series
from stage1_tokenizer.evaluation.report import Report


class Measure(NamedTuple):
    """A row of the main table: a value for each k, and how it is written."""

    title: str
    by_k: Mapping[int, float]
    form: str


def main_table(report: Report, metrics: Mapping[str, Any], lengths: Sequence[int]) -> None:
    """One row per measure, with the same of PCA below every learned one, and one column per prefix length."""
    # One measure per row: a table that grows downwards stays readable on a narrow screen.
    rows = [["floats", *(str(metrics["floats"][k]) for k in lengths)], *_bits_rows(metrics["latents"], lengths)]
    for title, by_k, form in _measures(metrics, lengths):
        rows.append([title, *(form.format(by_k[k]) for k in lengths)])
    report.table(
        "By prefix length",
        ["first k latents", *(f"k = {k}" for k in lengths)],
        rows,
        " ".join(_main_notes(metrics, lengths)),
        quiet="PCA",
    )


def _measures(metrics: Mapping[str, Any], lengths: Sequence[int]) -> list[Measure]:
    """What was measured of pictures, ours and PCA's, in the order of the table."""
    titles = {"psnr": ("PSNR dB", "{:.2f}"), "ssim": ("SSIM", "{:.3f}")}
    titles |= {name: (name, "{:.3f}") for name in metrics if name.startswith("lpips[")}
    measures = []
    for name, (title, form) in titles.items():
        measures += [Measure(title, metrics[name], form), Measure(f"PCA {title}", metrics["pca"][name], form)]
    if "classifier" in metrics:
        read = metrics["classifier"]
        title = "all attributes" if "layout" in read["real"] else "class"
        for label, key in ((title, "reconstruction"), (f"PCA {title}", "pca")):
            measures.append(Measure(label, {k: read[key][k]["all"] for k in lengths}, "{:.1%}"))
        if "words" in read:
            measures.append(Measure("word", read["words"]["reconstruction"], "{:.1%}"))
    if "zero_shot" in metrics:
        measures.append(Measure("zero-shot class", metrics["zero_shot"], "{:.1%}"))
    if "linear_probe" in metrics:
        probe = metrics["linear_probe"]
        measures += [
            Measure("linear probe", probe["learned"], "{:.1%}"),
            Measure("PCA linear probe", probe["pca"], "{:.1%}"),
        ]
    distances = frechet_entries(metrics)
    for features, entry in distances.items():
        title = "FD" if len(distances) == 1 else f"FD {features}"
        measures.append(Measure(title, entry["reconstruction"], "{:.2f}"))
        measures.append(Measure(f"PCA {title}", entry["pca"], "{:.2f}"))
        for kind in ("precision", "recall"):
            if f"reconstruction_{kind}" in entry:
                measures.append(Measure(kind, entry[f"reconstruction_{kind}"], "{:.2f}"))
                measures.append(Measure(f"PCA {kind}", entry[f"pca_{kind}"], "{:.2f}"))
    for name, agreement in metrics.items():
        if name.startswith("imagenet_top1_agreement"):
            measures.append(Measure("same ImageNet class", agreement["reconstruction"], "{:.2f}"))
            measures.append(Measure("PCA same ImageNet class", agreement["pca"], "{:.2f}"))
    return measures


def frechet_entries(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The Frechet distances of a metrics.json by the name of their features."""
    return {name[len("frechet[") : -1]: entry for name, entry in metrics.items() if name.startswith("frechet[")}


def _bits_rows(latents: Mapping[str, Any], lengths: Sequence[int]) -> list[list[str]]:
    """Upper bounds of what the first k latents hold: of symbols their number, of noisy floats their rate."""
    rows = []
    if "bits_per_latent" in latents:
        rows.append(["bits at most (symbols)", *(f"{latents['bits_per_latent'] * k:,.0f}" for k in lengths)])
    bits = list(itertools.accumulate(latents["rate_bits"]))
    if all(math.isfinite(value) for value in bits):
        rows.append(["bits at most (rate)", *(f"{bits[k - 1]:,.0f}" for k in lengths)])
    return rows


def _main_notes(metrics: Mapping[str, Any], lengths: Sequence[int]) -> list[str]:
    """What the rows of the main table mean: features, readers, numbers of pictures."""
    notes = [
        f"FD is the Fréchet distance to the held-out pictures in {features} features, n = {entry['n']:,}; "
        f"as many training pictures are at {entry['real_real']:.2f}."
        for features, entry in frechet_entries(metrics).items()
    ]
    if "classifier" in metrics:
        read = metrics["classifier"]
        notes.append(
            f"Attributes and classes are read by the {read['features']}, trained on {read['trained_on']:,} pictures, "
            f"which reads {percent(read['real']['all'])} of the real pictures right."
        )
        if "words" in read:
            words = read["words"]
            share = percent(words["real"])
            notes.append(f"Words: {words['n']} pictures have one; from the real pictures {share} are read.")
    if "linear_probe" in metrics:
        n = metrics["linear_probe"]["n"]
        notes.append(f"Linear probe: mean accuracy over what there is to read, fitted on {n:,} training pictures.")
    if metrics["pca"]["num_floats"] < metrics["floats"][lengths[-1]]:
        n = metrics["pca"]["num_floats"]
        notes.append(f"PCA has only {n} components here: there are no more training pictures.")
    return notes


def curves(report: Report, metrics: Mapping[str, Any], lengths: Sequence[int]) -> None:
    """Every figure by prefix length, ours against PCA, and the rate by position."""

    pca = metrics["pca"]
    psnr = {"learned": metrics["psnr"], "PCA": pca["psnr"]}
    report.curve("PSNR by prefix length", "latents", "PSNR, dB", _over(lengths, psnr))
    if "classifier" in metrics:
        read = metrics["classifier"]
        shares = {
            label: {k: read[key][k]["all"] for k in lengths}
            for label, key in (("learned", "reconstruction"), ("PCA", "pca"))
        }
        heading = f"Read right by the {read['features']}"
        report.curve(heading, "latents", "share of pictures", _over(lengths, shares))
    features, entry = next(iter(frechet_entries(metrics).items()))
    distances = {"learned": entry["reconstruction"], "PCA": entry["pca"]}
    distances["real–real"] = dict.fromkeys(lengths, entry["real_real"])
    heading = f"Fréchet distance, {features} features"
    report.curve(heading, "latents", "distance (lower is better)", _over(lengths, distances))
    if "retrieval" in metrics:
        _retrieval_curves(report, metrics["retrieval"], lengths)
    if "linear_probe" in metrics:
        accuracy = {"learned": metrics["linear_probe"]["learned"], "PCA": metrics["linear_probe"]["pca"]}
        report.curve("Linear probe", "latents", "mean accuracy", _over(lengths, accuracy))
    rate, units = metrics["latents"]["rate_bits"], metrics["latents"]["active_units"]
    if all(map(math.isfinite, rate)):
        positions = list(range(1, len(rate) + 1))
        by_position: Series = {"KL to N(0, 1)": (positions, rate), "active units": (positions, units)}
        report.curve("Rate and active units of each latent", "position", "bits; channels in use", by_position)


def _over(lengths: Sequence[int], by_label: Mapping[str, Mapping[int, float]]) -> Series:
    """Label -> {k: value} as lines over k."""
    return {label: (lengths, [by_k[k] for k in lengths]) for label, by_k in by_label.items()}


def _retrieval_curves(report: Report, result: Mapping[str, Any], lengths: Sequence[int]) -> None:
    kinds = [kind for kind in result if kind != "n"]
    recall = {kind: {k: result[kind]["recall"][k][1] for k in lengths} for kind in kinds}
    report.curve("Retrieval of captions, R@1", "latents", "share of pictures", _over(lengths, recall))
    bits = {kind: result[kind]["bits"] for kind in kinds}
    report.curve("Information of a prefix about the caption", "latents", "bits, at least", _over(lengths, bits))


def classifier_table(report: Report, read: Mapping[str, Any], lengths: Sequence[int]) -> None:
    """Share read right of every slot, of real pictures and of decoded ones; nothing where there is one slot."""
    if len(read["real"]) <= 2:  # one slot: the main table has it
        return
    last = lengths[-1]
    rows = [
        [
            name,
            percent(read["real"][name]),
            *(percent(read["reconstruction"][k][name]) for k in lengths),
            percent(read["pca"][last][name]),
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


def retrieval_table(report: Report, result: Mapping[str, Any], lengths: Sequence[int], trained: Sequence[int]) -> None:
    """Recall and bits of every kind of caption by k. trained: prefix lengths that text was trained on."""
    rows = []
    for kind in [name for name in result if name != "n"]:
        distinct = f"{result[kind]['distinct']:,}"
        for title, which, rank in (("", "recall", 1), ("", "recall", 5), ("picture ", "recall_of_pictures", 1)):
            shares = [f"{result[kind][which][k][rank]:.3f}" for k in lengths]
            rows.append([f"{kind}, {title}R@{rank}", distinct, f"{result[kind]['chance'][rank]:.4f}", *shares])
        bits = [f"{result[kind]['bits'][k]:.1f}" for k in lengths]
        rows.append([f"{kind}, bits of {result[kind]['most_bits']:.1f}", distinct, "0", *bits])
    columns = ["caption", "distinct", "chance", *(f"k = {k}" for k in lengths)]
    untrained = ""
    if not set(lengths) <= set(trained):
        untrained = (
            f" Text was trained on prefixes of {', '.join(map(str, trained))} latents: another one is read as the "
            "longest of these within it, or as the shortest of these where it is shorter still."
        )
    report.table(
        "Captions retrieved from a prefix",
        columns,
        rows,
        f"Picture to caption among the captions of {result['n']:,} held-out pictures; a word-for-word copy of "
        "the picture's caption counts as a hit, ties do not. Picture R@1: caption to picture, among as many. Bits: "
        "information of the prefix about which caption it is, at least, from the likelihood of the right one."
        + untrained,
    )


def captions_table(report: Report, metrics: Mapping[str, Any], lengths: Sequence[int]) -> None:
    """Captions near to prefixes of a few pictures and, with a captioner, its likelihoods and its own captions."""
    examples, shown = metrics["captions_read"], sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]})
    rows = [[item["caption"], *(item["nearest"][k] for k in shown)] for item in examples]
    columns = ["caption of the picture", *(f"nearest to k = {k}" for k in shown)]
    note = "The pictures are those of the grid above; the nearest of the held-out captions to the first k latents."
    report.table("Captions nearest to a prefix", columns, rows, note)
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
        "is what the prefix holds of it.",
    )


def latent_table(report: Report, latents: Mapping[str, Any]) -> None:
    """Active units, rate and signal of every position."""
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
        "posterior to N(0, 1), an upper bound of the information of the position about the picture; "
        f"n = {latents['n']:,}." + note,
    )


def percent(share: float) -> str:
    """A share in [0, 1] as the tables write it."""
    return f"{100 * share:.1f}%"
