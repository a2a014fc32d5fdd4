"""What a prior has understood: linear probes of its hidden states, by position and depth.

"What I cannot create, I do not understand": a prior that learns to draw a line has seen no label. If drawing teaches it
what is in a picture, a linear map reads that from its states, better than from the latents that these states have read.
Lines are read without captions. Depth 0 is the token before the first block: what the transformer was given at that
place. Beside the states stand the latents themselves, as far as they were read.

    python -m stage2_prior probe --run_dir runs/demo --priors draws runs/demo/prior reads runs/demo_reads/prior

reads attributes where the shards have them (scenes), class labels elsewhere. A prior of other latents is refused.

Letters: N lines, K latents, C latent channels, D width, S slots (things to be read).
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.reading.datamodule import LatentDataModule
from stage1_tokenizer.evaluation.attributes import Slots
from stage1_tokenizer.evaluation.curves import Series
from stage1_tokenizer.evaluation.probes import linear_probe
from stage1_tokenizer.evaluation.report import Report
from stage2_prior.base import Prior
from stage2_prior.latent_space import PriorError

BATCH = 250


def targets(train: Mapping[str, Any], val: Mapping[str, Any]) -> tuple[Tensor, Tensor, list[int]]:
    """What is read, (N,S) of either split, and the number of classes of each slot.

    Raises PriorError for samples that have neither attributes nor labels.
    """
    if all(train["attributes"]) and all(val["attributes"]):
        slots = Slots.of_scenes(train["attributes"])
        return slots.targets(train["attributes"]), slots.targets(val["attributes"]), slots.sizes
    labels, held = train["labels"].reshape(-1, 1), val["labels"].reshape(-1, 1)
    if int(labels.min()) < 0 or int(held.min()) < 0:
        raise PriorError("these latents have neither attributes nor labels, so there is nothing to read from them.")
    return labels, held, [int(max(labels.max(), held.max())) + 1]


def places(k: int) -> list[int]:
    """Places of a line that are probed: 1st, 2nd, 3rd, 5th, 9th, ... and the last."""
    return sorted({0, k - 1, *(2**i for i in range(k.bit_length()) if 2**i < k)})


def probe(prior: Prior, train: Mapping[str, Any], val: Mapping[str, Any]) -> dict[str, Any]:
    """Mean accuracy over slots, of held-out lines, of probes fitted on training lines.

    train and val: `latents` (N,K,C), `attributes`, `labels`. places: of the line, from 0; read: latents seen there;
    states: for each depth, an accuracy for each place; latents: of a probe on the latents seen there.
    """
    y, held_y, sizes = targets(train, val)
    at = places(prior.num_latents)

    def read(z: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        device = prior.fingerprint_bytes.device
        parts = [prior.states(part.to(device)) for part in z[:, : prior.num_latents].split(BATCH)]
        hidden = torch.cat([part.hidden[:, :, at].float().cpu() for part in parts], dim=1)  # (depth + 1,N,P,D)
        return hidden, torch.cat([part.line.cpu() for part in parts]), parts[0].read

    def accuracy(x: Tensor, held_x: Tensor) -> float:
        return linear_probe(x, y, held_x, held_y, sizes)[:-1].mean().item()

    (hidden, line, seen), (held, held_line, _) = read(train["latents"]), read(val["latents"])
    return {
        "places": at,
        "read": [seen[i] for i in at],
        "states": [[accuracy(x[:, i], h[:, i]) for i in range(len(at))] for x, h in zip(hidden, held, strict=True)],
        "latents": [
            accuracy(line[:, : seen[i]].flatten(1), held_line[:, : seen[i]].flatten(1)) if seen[i] else None for i in at
        ],
    }


def page(results: Mapping[str, Mapping[str, Any]], n: int) -> Report:
    """Curves and tables of every prior's probes."""
    report = Report("Probes of the prior", f"linear maps fitted on {n:,} lines that are read without captions")
    last: Series = {name: (result["read"], result["states"][-1]) for name, result in results.items()}
    report.curve("Behind the last block", "latents read", "mean accuracy", last)
    for name, result in results.items():
        rows = [
            [f"depth {depth}", *(f"{share:.3f}" for share in by_place)]
            for depth, by_place in enumerate(result["states"])
        ]
        rows.append(
            ["the latents themselves", *("–" if share is None else f"{share:.3f}" for share in result["latents"])]
        )
        columns = [name, *(f"{seen} read" for seen in result["read"])]
        report.table(name, columns, rows, "Depth 0 is the token that the transformer was given.")
    return report


def run(run_dir: Path, priors: Sequence[str], train: int, val: int) -> Path:
    """Probe every prior on the latents of `run_dir`; returns the page."""
    data = LatentDataModule(str(run_dir / "latents"))
    info = data.latent_info
    read, held = data.arrays("train", train), data.arrays("val", val)
    names = list(priors[::2]) or ["prior"]
    folders = [Path(path) for path in priors[1::2]] or [run_dir / "prior"]
    results = {}
    for name, folder in zip(names, folders, strict=True):
        prior = Prior.from_pretrained(folder)
        prior.check_space(info["num_latents"], info["latent_dim"], info["tokenizer_fingerprint"])
        results[name] = probe(prior, read, held)
    return page(results, len(read["latents"])).write(run_dir / "probe", {"probe": results})


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m stage2_prior probe",
        description="Linear probes of a prior's hidden states, by position and depth.",
    )
    parser.add_argument("--run_dir", type=Path, required=True, help="run with latents/; gets probe/report.html")
    parser.add_argument(
        "--priors",
        nargs="+",
        default=[],
        metavar="NAME FOLDER",
        help="priors over these latents (default: prior/ of the run)",
    )
    parser.add_argument("--train", type=int, default=4000, help="training lines that the probes are fitted on")
    parser.add_argument("--val", type=int, default=1000, help="held-out lines that they are judged on")
    options = parser.parse_args(arguments)
    if len(options.priors) % 2:
        parser.error("--priors wants a name and a folder for each prior")
    try:
        written = run(**vars(options))
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"probe: {written}")
    return 0
