"""The page of the generation report: from its metrics and pictures to a `Report`; measures nothing.

Letters: N captions, K latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stage1_tokenizer.evaluation.report import Figure, Report

HEADLINE_GROUPS = 4


@dataclass
class Pictures:
    """What the grids show, in [-1, 1]."""

    captions: list[str]  # n different ones
    real: Tensor  # (n,3,H,W) held-out pictures
    generated: dict[str, Tensor]  # guidance -> (n,3,H,W)
    same: Tensor  # (at most n,seeds,3,H,W) of the first captions
    nearest: Tensor  # (n,3,H,W) training pictures nearest to those of the largest guidance
    read_out: Tensor  # (m,3,H,W) held-out pictures whose captions are read out


def page(metrics: Mapping[str, Any], pictures: Pictures, guidance: str) -> Report:
    """The report's page. metrics: those of the report. guidance: the scale of the headlines, as a key of metrics."""
    report = Report("Generation", f"{metrics['captions']:,} held-out captions, guidance {float(guidance):g}")
    report.figures(headlines(metrics, guidance))
    if "faithfulness" in metrics:
        _faithfulness_table(report, metrics)
    if "judge" in metrics:
        _judge_table(report, metrics["judge"])
    _distribution_table(report, metrics)
    for distances in (value for name, value in metrics.items() if name.startswith("distances")):
        report.table(*distance_table(distances))
    for name, scores in metrics.items():
        if name.startswith("scores["):
            _score_table(report, name, scores)
    _neighbour_table(report, metrics["neighbours"])
    report.section("Curves")
    _curves(report, metrics, guidance)
    _left_out(report, metrics)
    _grids(report, metrics["captioning"], pictures)
    return report.provenance(metrics["provenance"])


def headlines(metrics: Mapping[str, Any], guidance: str) -> list[Figure]:
    """The figures that sum the report up, at one guidance scale."""
    figures = []
    if "faithfulness" in metrics:
        ours, best = metrics["faithfulness"][guidance], metrics["faithfulness"]["real"]
        for name, share in list(ours.items())[:HEADLINE_GROUPS]:
            title = f"everything right, {name} [{metrics['features']}]"
            figures.append(Figure(title, f"{share:.3f}", f"real pictures {best[name]:.3f}"))
    if "judge" in metrics:
        found, chance = metrics["judge"]["caption_of_picture"], metrics["judge"]["chance"]
        note = f"real pictures {found['real']:.3f}, chance {chance:.4f}, among {metrics['judge']['n']:,}"
        figures.append(Figure("captions that the judge finds first", f"{found[guidance]:.3f}", note))
    figures.append(_distance_figure(metrics["distances"], guidance))
    latents, cost = metrics["latents"]["1.0"], metrics["cost"]
    spread = f"{latents['lowest']:.2f} to {latents['highest']:.2f}"
    figures.append(Figure("spread of latents, samples / data", spread, "lowest and highest position, guidance 1"))
    how = f"{cost['evaluations_per_latent']} evaluations per latent, batch {cost['batch_size']}, decoding too"
    figures.append(Figure("pictures per second", f"{cost['images_per_second']:.0f}", how))
    reading = metrics["captioning"]
    if reading:
        chance = f"word for word; of the next line's captions {reading['right_of_the_next_line']:.3f}"
        figures.append(Figure("captions read out right", f"{reading['right']:.3f}", chance))
    return figures


def _distance_figure(distances: Mapping[str, Any], guidance: str) -> Figure:
    """The Frechet distance, with what reconstructions and real pictures are at."""
    note = (
        f"real-real {distances['real_real']:.1f}, reconstruction {distances['reconstruction_real']:.1f}"
        f", n = {distances['n']}"
    )
    if "same_captions" in distances:
        floor = distances["same_captions"]
        note += (
            f"; on {floor['n']} captions that training pictures have, too: {floor['generated_real'][guidance]:.1f}"
            f" against {floor['reconstruction_real']:.1f} for reconstructions of other pictures and"
            f" {floor['real_real']:.1f} for real pictures of those captions"
        )
    value = f"{distances['generated_real'][guidance]:.1f}"
    return Figure(f"Fréchet distance [{distances['features']}]", value, note)


def _faithfulness_table(report: Report, metrics: Mapping[str, Any]) -> None:
    read, sizes = metrics["faithfulness"], metrics["group_sizes"]
    rows = [
        [name, str(sizes.get(name.split(", without")[0], "")), *(f"{shares[name]:.3f}" for shares in read.values())]
        for name in read["real"]
    ]
    columns = [f"guidance {name}" if name in metrics["latents"] else name for name in read]
    report.table(f"What the {metrics['features']} reads right", ["captions of", "number", *columns], rows)


def _judge_table(report: Report, judge: Mapping[str, Any]) -> None:
    columns = [
        name if name in ("real", "reconstruction") else f"guidance {name}" for name in judge["caption_of_picture"]
    ]
    kinds = (("caption of the picture", "caption_of_picture"), ("picture of the caption", "picture_of_caption"))
    rows = [[title, f"{judge['chance']:.4f}", *(f"{x:.3f}" for x in judge[key].values())] for title, key in kinds]
    note = (
        f"Share found first among {judge['n']:,} held-out ones by a tower on ImageNet features that was trained "
        "apart from tokenizer and prior. Real pictures say how much it knows."
    )
    report.table("What an independent judge finds", ["found first", "chance", *columns], rows, note)


def _distribution_table(report: Report, metrics: Mapping[str, Any]) -> None:
    distances, rows = metrics["distances"], []
    for name, spread in metrics["latents"].items():
        precision, recall = distances["precision_recall"][name]
        cells = (precision, recall, spread["overall"], spread["lowest"], spread["highest"])
        drift = f"{spread['slope_along_line']:+.3f}"
        rows.append([name, f"{distances['generated_real'][name]:.1f}", *(f"{c:.3f}" for c in cells), drift])
    columns = ["guidance", "Fréchet", "precision", "recall", "std ratio", "lowest", "highest", "drift on the line"]
    note = f"Distances, precision and recall in {distances['features']} features; standard deviations of latents, "
    report.table("Distribution, by guidance", columns, rows, note + "samples over data.")


def _neighbour_table(report: Report, figures: Mapping[str, Any]) -> None:
    rows = [
        [name, *(f"{figures[key][name]:.3f}" for key in ("recognised_seen", "recognised", "nearer_to_training"))]
        for name in figures["recognised"]
    ]
    columns = ["guidance", "recognised, training captions", "recognised, held-out captions", "nearer to training"]
    note = (
        f"In {figures['features']} features. Recognised: the nearest real picture has the shortest caption that was "
        f"asked for ({figures['n_seen']} captions of training pictures, {figures['n']} held-out ones). Nearer to "
        "training: than the median held-out picture is to its nearest training picture; 0.5 copies nothing."
    )
    report.table("Nearest real pictures", columns, rows, note)


def _score_table(report: Report, name: str, scores: Mapping[str, Any]) -> None:
    kinds = {"fid": "FID", "sfid": "sFID", "inception_score": "Inception score"}
    shown = {key: title for key, title in kinds.items() if key in scores["real"]}
    rows = [
        [w if w == "real" else f"guidance {w}", *(f"{score[key]:.2f}" for key in shown)] for w, score in scores.items()
    ]
    note = f"n = {scores['real']['n']:,}; the reference is {scores['real']['reference']}."
    report.table(f"Scores in {name[7:-1]} features", ["pictures", *shown.values()], rows, note)


def distance_table(distances: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]], str]:
    """Heading, columns, rows and note of all Frechet distances to held-out pictures."""
    parts = [(f"all {distances['n']} captions", "paired", distances)]
    if "same_captions" in distances:
        same = distances["same_captions"]
        parts.append((f"{same['n']} captions that training pictures have, too", "other pictures", same))
        if "at_infinity" in same:
            parts.append(("the same, extrapolated to infinite n", "other pictures", same["at_infinity"]))
    guidances = list(distances["generated_real"])
    rows = [
        [name, f"{d['reconstruction_real']:.2f} ({which})", f"{d['real_real']:.2f}"]
        + [f"{d['generated_real'][w]:.2f}" for w in guidances]
        for name, which, d in parts
    ]
    columns = ["pictures of", "reconstructions", "other real pictures", *(f"guidance {w}" for w in guidances)]
    note = (
        f"In {distances['features']} features. Paired: reconstructions of the held-out pictures themselves, beside real"
        " pictures of any caption."
    )
    if "same_captions" in distances:
        note += (
            " Below, both are of other pictures with the same captions, as generated ones are: only there like is"
            " compared with like."
        )
    return f"Fréchet distances to held-out pictures, {distances['features']}", columns, rows, note


def _curves(report: Report, metrics: Mapping[str, Any], guidance: str) -> None:
    latents, nll = metrics["latents"], metrics.get("nll", {})
    choice = metrics.get("classification_by_likelihood", {})
    line = list(range(1, len(latents[guidance]["std_ratio"]) + 1))
    ratios = {f"guidance {w}": (line, latents[w]["std_ratio"]) for w in latents}
    report.curve("Spread of latents by position", "position", "std of samples / data", ratios)
    if "by_position" in nll:
        curve = {"held-out lines": (line, nll["by_position"])}
        report.curve("Negative log-likelihood by position", "position", "nats per latent", curve)
    lengths = metrics["lengths"]
    drawn = {f"guidance {w}": (list(by_k), list(by_k.values())) for w, by_k in lengths["distance"].items()}
    heading = f"Fréchet distance of pictures drawn from k latents, {lengths['features']} features"
    report.curve(heading, "latents drawn", "distance (lower is better)", drawn)
    if "accuracy" in choice:
        heading = f"Own caption chosen by likelihood: {choice['lines']} lines, {choice['captions_per_line']} captions"
        chance = [choice["chance"]] * len(line)
        curves = {"own caption": (line, choice["accuracy_by_prefix"]), "chance": (line, chance)}
        report.curve(heading, "latents", "accuracy", curves)
        nats = {"own caption over others": (line, choice["nats_by_position"])}
        report.curve("Log-likelihood ratio of the own caption by position", "position", "nats", nats)


def _left_out(report: Report, metrics: Mapping[str, Any]) -> None:
    """The likelihoods that this prior has not, and why."""
    names = {"nll": "negative log-likelihood", "classification_by_likelihood": "classification by likelihood"}
    rows = [[name, metrics[key]["skipped"]] for key, name in names.items() if "skipped" in metrics.get(key, {})]
    if rows:
        report.table("Left out", ["figure", "reason"], rows)


def _grids(report: Report, reading: Mapping[str, Any], pictures: Pictures) -> None:
    captions = pictures.captions
    columns = ["held-out picture", *(f"guidance {float(w):g}" for w in pictures.generated)]
    sets = [pictures.real, *pictures.generated.values()]

    def rows(*columns: Tensor) -> list[tuple[str, list[Tensor]]]:
        return [(caption, [column[i : i + 1] for column in columns]) for i, caption in enumerate(captions)]

    report.grid("Captions by guidance", columns, rows(*sets))
    beside = rows(sets[-1], pictures.nearest)
    report.grid("Nearest training picture", [columns[-1], "nearest training picture"], beside)
    if reading:
        read = zip(reading["examples"], pictures.read_out.split(1), strict=False)
        report.grid("Captions read out", ["held-out picture"], [(caption, [picture]) for caption, picture in read])
    strips = [(c, [same]) for c, same in zip(captions, pictures.same, strict=False)]
    report.grid("One caption, eight seeds", [""], strips)
