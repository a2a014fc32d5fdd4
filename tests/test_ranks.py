"""Two processes train what one trains: the same losses, gradients, samples, figures and files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.__main__ import main as data_main
from data.reading.datamodule import ImageDataModule
from stage1_tokenizer.evaluation.classifier_fit import Budget, report_classifier
from tests.ranked_run import (
    CONFIGS,
    CONTRASTS,
    distance,
    interleaved,
    ranked,
    reference_gradients,
    same_run,
    text_gradients,
    words_of as words,
)

pytestmark = pytest.mark.slow
STEPS = "--trainer.max_steps"
GRADIENTS = [(count, kind) for kind in CONTRASTS for count in (6, 7)]  # seven pictures: ranks hold four and three


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs of one process (`one`) and of two (`two`), and what went on from a checkpoint of the other."""
    folder = tmp_path_factory.mktemp("ranks")
    one, two, data = folder / "one", folder / "two", folder / "data"
    scenes = ["--source", "scenes", "--num", "60", "--val-fraction", "0.3", "--workers", "1", "--out", str(data)]
    assert not data_main(["prepare", *scenes])
    keep = "--checkpoint.keep_every=2"
    check = ["--trainer.val_check_interval=4"]
    steps: dict[str, Any] = {
        "fit": same_run("stage1", "fit", *words("stage1", one, data, 1, f"{STEPS}=4", keep, *check))
    }
    same_run("stage1", "predict", *words("stage1", one, data, 1))
    steps["prior"] = same_run("stage2", "fit", *words("stage2", one, data, 1, f"{STEPS}=3"))
    middle = one / "stage1" / "checkpoints" / "step=2.ckpt"
    report_classifier(ImageDataModule(str(data), image_size=32), one, budget=Budget(2, 120))  # for both reports
    alone = folder / "alone"
    shutil.copytree(one, alone)
    for stage in ("stage1", "stage2"):
        steps[f"report of {stage}"] = same_run(stage, "test", *report_words(stage, alone, data, 1))
    shutil.copytree(one, folder / "together")
    commands = [["gradients", str(count), kind] for count, kind in GRADIENTS]
    commands += [["reference", kind] for kind in ("softmax", "sigmoid")]
    commands += [
        ["stage1", "fit", *words("stage1", two, data, 2, f"{STEPS}=4", keep, *check)],
        ["stage1", "fit", *words("stage1", folder / "back", data, 2, f"{STEPS}=4", f"--resume={middle}")],
        ["stage2", "fit", *words("stage2", two, data, 2, f"{STEPS}=3", f"--data.data_dir={one / 'latents'}")],
        *([stage, "test", *report_words(stage, folder / "together", data, 2)] for stage in ("stage1", "stage2")),
    ]
    done = ranked(2, folder, commands)
    steps["resumed"] = same_run(
        "stage1", "fit", *words("stage1", folder / "on", data, 1, f"{STEPS}=4", f"--resume={middle_of(two)}")
    )
    return {"one": one, "two": two, "folder": folder, "steps": steps, "ranks": done}


def report_words(stage: str, run: Path, data: Path, world: int) -> list[str]:
    """Options of a report in several batches."""
    own = ["--trainer.accelerator=cpu", f"--trainer.devices={world}", "--trainer.enable_progress_bar=false"]
    own += [f"--run_dir={run}", f"--data.data_dir={data if stage == 'stage1' else run / 'latents'}"]
    if stage == "stage2":
        report = ["batch_size=4", "guidances=[1.0]", "num_captions=8", "nll_lines=2", "classify_lines=2"]
        report += [f"images_dir={data}"]
        own += [f"--model.report.init_args.{option}" for option in report]
    else:
        own += ["--data.val_batch_size=4"]
    return [f"--config={CONFIGS / stage / 'demo.yaml'}", *own]


def middle_of(run: Path) -> Path:
    return run / "stage1" / "checkpoints" / "step=2.ckpt"


def stored(run: Path, stage: str = "stage1") -> dict[str, Any]:
    return torch.load(run / stage / "checkpoints" / "last.ckpt", weights_only=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("at", "count", "kind"), [(i, *case) for i, case in enumerate(GRADIENTS)])
def test_text_losses_of_two_ranks_have_the_gradients_of_one(
    runs: dict[str, Any], at: int, count: int, kind: str
) -> None:
    alone = text_gradients(count, kind)
    for rank in runs["ranks"]:
        for name, value in alone.items():
            torch.testing.assert_close(rank[at][name], value, rtol=2e-5, atol=1e-6, msg=name)
    half = text_gradients(count // 2, kind)["text 0"]  # what a rank would train that sees its own captions only
    assert abs(half - alone["text 0"]) > 0.01


@pytest.mark.parametrize(("at", "kind"), [(len(GRADIENTS), "softmax"), (len(GRADIENTS) + 1, "sigmoid")])
def test_contrastive_losses_are_those_of_open_clip_on_one_rank_and_on_two(
    runs: dict[str, Any], at: int, kind: str
) -> None:
    alone = reference_gradients(kind)
    for name in ("ours", "ours i", "ours t"):
        torch.testing.assert_close(alone[name], alone[name.replace("ours", "theirs")], rtol=1e-5, atol=1e-6)
    for rank in runs["ranks"]:
        torch.testing.assert_close(rank[at]["ours"], alone["ours"], rtol=1e-5, atol=1e-6)
        if kind == "softmax":  # each of open_clip's sigmoid losses is that of the rank's own pictures
            for name in ("ours", "ours i", "ours t"):
                torch.testing.assert_close(
                    rank[at][name], rank[at][name.replace("ours", "theirs")], rtol=1e-5, atol=1e-6
                )


def test_fits_of_two_ranks_are_those_of_one(runs: dict[str, Any]) -> None:
    at = len(GRADIENTS) + 2
    for stage, name, place in (("stage1", "fit", at), ("stage2", "prior", at + 2)):
        keys = interleaved([rank[place]["keys"] for rank in runs["ranks"]])
        assert keys == runs["steps"][name]["keys"]
        one, two = stored(runs["one"], stage), stored(runs["two"], stage)
        # biases of attention's keys have no gradient but rounding, which AdamW makes as large as any other
        whole, most, where = distance(one["state_dict"], two["state_dict"], but="in_proj_bias")
        assert whole < 1e-5 and most < 2e-4, (whole, most, where)
        averages = [c["callbacks"]["EMAWeights"]["averages"] for c in (one, two)]
        assert distance(*averages)[0] < 1e-5
    figures = runs["steps"]["fit"]["figures"]
    assert len(figures) == 5
    for rank in runs["ranks"]:
        assert rank[at]["figures"] == pytest.approx(figures, rel=1e-4)
    one, two = (load_file(runs[name] / "tokenizer" / "model.safetensors") for name in ("one", "two"))
    for name in ("latent_mean", "latent_scale"):  # of the average, over training pictures
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-4)


def test_a_checkpoint_goes_on_with_other_ranks_at_the_same_sample(runs: dict[str, Any]) -> None:
    whole, at = runs["steps"]["fit"]["keys"], len(GRADIENTS) + 3
    assert runs["steps"]["resumed"]["keys"] == whole[2:]
    assert interleaved([rank[at]["keys"] for rank in runs["ranks"]]) == whole[2:]
    weights = stored(runs["one"])["state_dict"]
    for run in ("on", "back"):
        assert distance(weights, stored(runs["folder"] / run)["state_dict"])[0] < 1e-5


@pytest.mark.parametrize("report", ["reconstruction", "generation"])
def test_reports_of_two_ranks_have_the_figures_of_one(runs: dict[str, Any], report: str) -> None:
    one, two = (
        json.loads((runs["folder"] / run / report / "metrics.json").read_text()) for run in ("alone", "together")
    )
    stage = "stage1" if report == "reconstruction" else "stage2"
    read = [rank[-2 if stage == "stage1" else -1]["read"] for rank in runs["ranks"]]
    assert 0 < min(read) < 0.7 * runs["steps"][f"report of {stage}"]["read"]  # what is left to the first is not shared
    figures, shared = flat(one), flat(two)
    assert figures.keys() == shared.keys() and len(figures) > 100
    for name, value in figures.items():
        if name.split(".")[1] not in ("cost", "report_cost", "provenance", "figures"):
            wanted = pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value
            assert shared[name] == wanted, name


def flat(content: Any, place: str = "") -> dict[str, Any]:
    """Every value of nested dictionaries and lists by its place."""
    if isinstance(content, (dict, list)):
        entries = content.items() if isinstance(content, dict) else enumerate(content)
        return {name: value for key, inner in entries for name, value in flat(inner, f"{place}.{key}").items()}
    return {place: content}
