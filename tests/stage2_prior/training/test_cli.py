"""Stage 2 from the command line on a tiny run: fit, test, predict, and what each refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data.__main__ import main as data_main
from data.reading.datamodule import ImageDataModule
from data.reading.latents import LatentShardWriter, write_latent_manifest
from data.sources.scenes import COLOURS
from stage1_tokenizer import Tokenizer
from stage1_tokenizer.evaluation.attributes import Slots
from stage1_tokenizer.evaluation.classifier import AttributeClassifier
from stage1_tokenizer.evaluation.classifier_fit import Budget, fit_classifier
from stage1_tokenizer.evaluation.inception import InceptionFeatures
from stage1_tokenizer.evaluation.judge import CaptionJudge, fit_judge
from stage1_tokenizer.export import save_module
from stage1_tokenizer.text.vocabulary import CaptionVocabulary
from stage1_tokenizer.text.words import WordTower
from stage1_tokenizer.training.cli import run_cli
from stage1_tokenizer.training.metrics_file import read_metrics
from stage2_prior import CausalPrior, Prior
from stage2_prior.captions import longest
from stage2_prior.evaluation import distances, generation, sweep as sweep_module
from stage2_prior.evaluation.generation import GenerationReport
from stage2_prior.evaluation.lengths import worthwhile
from stage2_prior.heads.flow import FlowHead
from stage2_prior.heads.mse import MSEHead
from stage2_prior.latent_space import load_space
from stage2_prior.training.latent_data import PriorDataModule, PriorImageModule, read_captions
from stage2_prior.training.lit_prior import LitPrior
from tests.tiny import SIZE, C, K, SmallInception, tiny_tokenizer
from tests.warm import command


def write_latents(tokenizer: Tokenizer, images: ImageDataModule, folder: Path, fingerprint: str) -> None:
    for split in ("train", "val"):
        batch = images.arrays(split)
        with LatentShardWriter(folder, split) as writer, torch.no_grad():
            writer.write_batch(batch, *tokenizer.posterior(batch["images"]))
    write_latent_manifest(folder, K, C, fingerprint)


def config(run_dir: Path, **data: Any) -> dict[str, Any]:
    head = {
        "class_path": "stage2_prior.FlowHead",
        "init_args": {
            "net": {
                "class_path": "stage2_prior.HoistedNet",
                "init_args": {"latent_dim": C, "cond_dim": 32, "width": 24, "depth": 1},
            }
        },
    }
    prior = {
        "class_path": "stage2_prior.CausalPrior",
        "init_args": {
            "num_latents": K,
            "latent_dim": C,
            "vocabulary": {
                "class_path": "stage1_tokenizer.CaptionVocabulary",
                "init_args": {"rows": 64, "context_length": 24},
            },
            "backbone": {
                "class_path": "stage2_prior.Backbone",
                "init_args": {"width": 32, "depth": 1, "heads": 2, "max_tokens": 32},
            },
            "head": head,
        },
    }
    report = {
        "class_path": "stage2_prior.GenerationReport",
        "init_args": {"num_captions": 30, "batch_size": 16, "guidances": [1.0], "nll_lines": 4, "classify_lines": 3},
    }
    return {
        "run_dir": str(run_dir),
        "seed_everything": 1,
        "trainer": {"max_steps": 3, "val_check_interval": 2, "check_val_every_n_epoch": None, "accelerator": "cpu"},
        "data": {"data_dir": str(run_dir / "latents"), "batch_size": 16, "val_batch_size": 16, **data},
        "model": {"prior": prior, "report": report},
    }


def stage2(command: str, run_dir: Path, *more: str, **data: Any) -> None:
    file = run_dir / "stage2_config.yaml"
    file.write_text(yaml.safe_dump(config(run_dir, **data)))
    run_cli("stage2", LitPrior, PriorDataModule, "stage2", [command, "--config", str(file), *more])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with scenes, an untrained tokenizer and its latents, after `fit` of a prior."""
    torch.manual_seed(0)
    run = tmp_path_factory.mktemp("run")
    arguments = ["prepare", "--source", "scenes", "--num", "160", "--size", str(SIZE), "--val-fraction", "0.25"]
    assert data_main([*arguments, "--workers", "1", "--out", str(run / "data")]) == 0
    images = ImageDataModule(str(run / "data"), image_size=SIZE)
    tokenizer = tiny_tokenizer()
    tokenizer.fit_statistics([images.arrays("train")["images"]])
    tokenizer.save_pretrained(run / "tokenizer")
    write_latents(tokenizer, images, run / "latents", tokenizer.fingerprint)
    stage2("fit", run)
    return run


def test_fit_exports_a_prior_of_these_latents(run_dir: Path) -> None:
    prior = Prior.from_pretrained(run_dir / "prior")
    tokenizer = Tokenizer.from_pretrained(run_dir / "tokenizer")
    prior.check(tokenizer)
    assert prior.vocabulary is not None and prior.vocabulary.size > 20
    z = prior.sample(["a large red circle in the center on a white background"])
    assert tokenizer.decode(z).shape == (1, 3, SIZE, SIZE)
    lines = read_metrics(run_dir / "stage2" / "metrics.csv")
    assert any("val/loss" in line for line in lines)


def test_report_says_all_it_promises(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quick(images: ImageDataModule, run: Path, device: torch.device) -> AttributeClassifier:
        data = images.arrays("train")
        classifier = AttributeClassifier(generation_slots(data), SIZE, width=8, feature_dim=16)
        fit_classifier(classifier, data, Budget(steps=2, seconds=20), seed=0)
        return classifier

    monkeypatch.setattr(generation, "report_classifier", quick)
    monkeypatch.setattr(distances, "MANY", 1)
    monkeypatch.setattr(distances, "same_caption_pairs", lambda images, real: (list(range(20)), list(range(20, 40))))
    stage2("test", run_dir)
    metrics = json.loads((run_dir / "generation" / "metrics.json").read_text())
    assert len(metrics["latents"]["2.0"]["std_ratio"]) == K
    assert set(metrics["faithfulness"]) == {"1.0", "2.0", "real", "reconstruction"}
    sizes = metrics["group_sizes"]
    assert sizes["1 object"] + sizes["2 objects"] == sizes["all"] == 30
    assert sizes.get("seen combination", 0) + sizes["unseen combination"] == 30
    assert metrics["cost"]["evaluations_per_latent"] == 8 and metrics["cost"]["images_per_second"] > 0
    assert metrics["diversity"]["smallest_rms_between_two_seeds"] > 0.001
    same = metrics["distances"]["same_captions"]
    assert same["n"] == 20 and same["generated_over_reconstruction"]["2.0"] == pytest.approx(
        same["generated_real"]["2.0"] / same["reconstruction_real"]
    )
    told = metrics["classification_by_likelihood"]
    assert told["lines"] == 3 and told["chance"] == 0.1 and len(told["accuracy_by_prefix"]) == K
    assert metrics["nll"]["lines"] == 4 and len(metrics["nll"]["by_position"]) == K
    lengths = metrics["lengths"]
    assert list(lengths["distance"]) == ["1.0", "2.0"] and str(lengths["best"]["1.0"]) in lengths["distance"]["1.0"]
    by_length = {int(k): distance for k, distance in lengths["distance"]["2.0"].items()}
    assert Prior.from_pretrained(run_dir / "prior").best_length == worthwhile(by_length)
    card = (run_dir / "prior" / "README.md").read_text()
    assert all(figure["value"] in card for figure in metrics["figures"]) and "Pipeline.from_pretrained" in card
    assert set(metrics["neighbours"]["nearer_to_training"]) == {"1.0", "2.0"}
    assert metrics["skipped"][0]["name"] == "frechet[effnet-lite0-1280]"
    page = (run_dir / "generation" / "report.html").read_text()
    assert "Nearest training picture" in page and "pictures drawn from k latents" in page
    assert "for real pictures of those captions" in page and "Own caption chosen by likelihood" in page
    assert "like is compared with like" in page
    assert "One caption, eight seeds" in page and "unseen combination" in page
    assert "1 object, without shapes" in page and "captions of" in page


def test_sweep_fills_every_cell(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def untrained(images: ImageDataModule, run: Path) -> AttributeClassifier:
        return AttributeClassifier(Slots.of_scenes(images.arrays("train")["attributes"]), SIZE, width=8).eval()

    monkeypatch.setattr(sweep_module, "report_classifier", untrained)
    options = ["--guidances", "1", "2", "--steps", "2", "4", "--num_captions", "16"]
    assert sweep_module.main(["--run_dir", str(run_dir), *options]) == 0
    metrics = json.loads((run_dir / "sweep" / "metrics.json").read_text())
    assert [(c["steps"], c["guidance"]) for c in metrics["cells"]] == [(2, 1), (2, 2), (4, 1), (4, 2)]
    assert metrics["features"] == "attribute-classifier"
    assert all(c["frechet"] > 0 and 0 <= c["right"] <= 1 for c in metrics["cells"])
    with pytest.raises(SystemExit):
        sweep_module.main(["--run_dir", str(run_dir), "--steps", "3"])  # midpoint asks twice per interval


def test_sweep_compares_solvers_over_seeds(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep_module, "report_classifier", lambda images, run: None)
    run_dir = shutil.copytree(run_dir, tmp_path / "run")
    prior = CausalPrior.from_pretrained(run_dir / "prior")
    assert isinstance(prior.head, FlowHead)
    torch.nn.init.normal_(prior.head.net.out.weight, std=0.5)  # a field that bends, as that of a trained head does
    prior.save_pretrained(run_dir / "prior")
    where = ["--run_dir", str(run_dir), "--guidances", "1", "--num_captions", "16"]
    methods = ["Midpoint", "AdamsBashforth", "Euler"]
    paths = [f"stage2_prior.heads.solvers.{name}" for name in methods]
    assert sweep_module.main([*where, "--steps", "2", "64", "--seeds", "0", "1", "--solvers", *paths]) == 0
    metrics = json.loads((run_dir / "sweep" / "metrics.json").read_text())
    cells = {(c["solver"], c["steps"]): c for c in metrics["cells"]}
    assert set(cells) == {(name, n) for name in methods for n in (2, 64)} and metrics["seeds"] == [0, 1]
    for cell in cells.values():
        first, second = (found["frechet"] for found in cell["by_seed"])
        assert first != second and cell["frechet"] == pytest.approx((first + second) / 2)
    best = [cells[name, 64]["frechet"] for name in methods]
    assert all(cells[name, 64]["against_most"] == 0 for name in methods)
    assert max(best) / min(best) < 1.05  # all solvers find the same flow in the end
    pairs = zip(cells["Euler", 2]["by_seed"], cells["Euler", 64]["by_seed"], strict=True)
    ratios = [few["frechet"] / many["frechet"] - 1 for few, many in pairs]
    assert cells["Euler", 2]["against_most"] == pytest.approx(sum(ratios) / 2)
    assert abs(ratios[0]) > 1e-3, "two Euler steps are not the flow"
    assert "Midpoint, 2 evaluations" in (run_dir / "sweep" / "report.html").read_text()
    with pytest.raises(SystemExit):
        sweep_module.main([*where, "--solvers", "stage2_prior.MSEHead"])
    assert "error: " in capsys.readouterr().err


def test_pairs_of_one_caption_are_found(run_dir: Path) -> None:
    images = ImageDataModule(str(run_dir / "data"), image_size=SIZE)
    train, real = images.arrays("train"), images.arrays("val")
    real["captions"][3] = real["captions"][4] = train["captions"][5]
    supply = sum(longest(c) == longest(train["captions"][5]) for c in train["captions"])
    rows, twins = distances.same_caption_pairs(images, real["captions"])
    assert 3 in rows and (4 in rows) == (supply > 1)
    assert len(set(twins)) == len(twins)  # no training picture stands for two
    for row, twin in zip(rows, twins, strict=True):
        assert longest(real["captions"][row]) == longest(train["captions"][twin])


def test_a_prior_without_a_density_says_so(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "report_classifier", lambda *_, **__: None)
    prior = Prior.from_pretrained(run_dir / "prior")
    assert isinstance(prior, CausalPrior)
    prior.head = MSEHead(C, 32)
    report = GenerationReport(num_captions=10, batch_size=10, guidances=[1.0])
    tokenizer, data = load_space(run_dir / "tokenizer"), PriorDataModule(str(run_dir / "latents"))
    report.images_dir = str(run_dir / "data")
    page = report.write(prior, tokenizer, data, tmp_path).read_text()
    metrics = json.loads((tmp_path / "generation" / "metrics.json").read_text())
    for part in ("nll", "classification_by_likelihood"):
        assert "got a MSEHead for log_prob, wanted a head with a density" in metrics[part]["skipped"]
    assert "got a MSEHead" in page


class MeanColour:
    """Stands in for ImageNet features: the mean colour of a picture, repeated."""

    feature_name = "effnet-lite0-1280"

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)).repeat(1, 427)[:, :1280]


def test_a_judge_of_captions_stands_beside_what_it_finds_in_real_pictures(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "report_classifier", lambda *_, **__: None)
    monkeypatch.setattr(generation, "imagenet_features", lambda weights, device: MeanColour())
    judge = CaptionJudge(WordTower(CaptionVocabulary(64, 24), 16, 16))
    train = ImageDataModule(str(run_dir / "data"), image_size=SIZE).arrays("train")
    fit_judge(judge, MeanColour().features(train["images"]), train["captions"], steps=2, seed=0)
    save_module(judge, tmp_path / "judge")
    options: dict[str, Any] = {"num_captions": 10, "batch_size": 10, "guidances": [1.0], "nll_lines": 0}
    report = GenerationReport(**options, imagenet_weights="installed", judge=str(tmp_path / "judge"))
    report.images_dir = str(run_dir / "data")
    prior, data = Prior.from_pretrained(run_dir / "prior"), PriorDataModule(str(run_dir / "latents"))
    page = report.write(prior, load_space(run_dir / "tokenizer"), data, tmp_path).read_text()
    found = json.loads((tmp_path / "generation" / "metrics.json").read_text())["judge"]
    assert found["n"] == 10 and set(found["picture_of_caption"]) == {"1.0", "2.0", "real", "reconstruction"}
    assert "What an independent judge finds" in page and "captions that the judge finds first" in page
    with pytest.raises(ValueError, match="got a judge and no imagenet_weights"):
        GenerationReport(judge="anywhere")


# -- pictures, encoded in the step ------------------------------------------------------------------------------------

PICTURES = ["--data=stage2_prior.PriorImageModule", f"--data.image_size={SIZE}"]


def from_pictures(command: str, run_dir: Path, *more: str) -> None:
    stage2(command, run_dir, *PICTURES, f"--data.data_dir={run_dir / 'data'}", *more)


def losses_of(run_dir: Path) -> list[float]:
    lines = read_metrics(run_dir / "stage2" / "metrics.csv")
    return [line["val/loss"] for line in lines if "val/loss" in line]


def copied(run_dir: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in ("data", "latents", "tokenizer"):
        (folder / name).symlink_to(run_dir / name)
    return folder


def test_pictures_train_as_their_latents_do_and_resume_exactly(run_dir: Path, tmp_path: Path) -> None:
    """The same samples in the same order with the same noise: shards and the step differ by rounding alone."""
    plain = [
        "--precision=32-true",
        "--trainer.max_steps=4",
        "--checkpoint.every_n_steps=2",
        "--checkpoint.keep_every=2",
    ]
    latents, pictures = copied(run_dir, tmp_path / "latents"), copied(run_dir, tmp_path / "pictures")
    stage2("fit", latents, *plain)
    from_pictures("fit", pictures, *plain)
    wanted, found = losses_of(latents), losses_of(pictures)
    assert len(found) == 2 and found == pytest.approx(wanted, rel=1e-4)
    whole = Prior.from_pretrained(pictures / "prior").state_dict()
    for name, weight in Prior.from_pretrained(latents / "prior").state_dict().items():
        torch.testing.assert_close(whole[name], weight, rtol=1e-3, atol=1e-3)

    resumed = copied(run_dir, tmp_path / "resumed")
    middle = pictures / "stage2" / "checkpoints" / "step=2.ckpt"
    assert not any("tokenizer" in name or "encoder" in name for name in torch.load(middle)["state_dict"])
    from_pictures("fit", resumed, *plain, f"--resume={middle}")
    parts = Prior.from_pretrained(resumed / "prior").state_dict()
    assert all(torch.equal(whole[name], weight) for name, weight in parts.items())


def test_flipped_pictures_are_other_samples(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: what the step encodes is what the data module gives, and nobody looks at it."""
    plain = ["--precision=32-true", "--trainer.max_steps=2"]
    straight, flipped = copied(run_dir, tmp_path / "straight"), copied(run_dir, tmp_path / "flipped")
    looked: list[bool] = []

    def check(images: torch.Tensor, size: int, look: bool) -> torch.Tensor:
        looked.append(look)
        return images

    monkeypatch.setattr("stage1_tokenizer.tokenizer.check_images", check)
    from_pictures("fit", straight, *plain)
    from_pictures("fit", flipped, *plain, "--data.flip=1.0")
    assert looked and not any(looked)  # a look at the values waits for a GPU in every step
    a, b = (Prior.from_pretrained(r / "prior").state_dict()["latent_in.weight"] for r in (straight, flipped))
    assert (a - b).abs().max() > 1e-4


def test_pictures_of_another_size_or_tokenizer_are_refused(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        from_pictures("validate", run_dir, f"--data.image_size={2 * SIZE}")
    assert "set data.image_size to that" in capsys.readouterr().err
    tiny_tokenizer(seed=1).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(SystemExit):
        from_pictures("validate", run_dir, f"--model.tokenizer_dir={tmp_path / 'tokenizer'}")
    assert "other weights or statistics" in capsys.readouterr().err


def test_report_from_pictures_equals_that_from_latents(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "report_classifier", lambda *_, **__: None)
    prior, space = Prior.from_pretrained(run_dir / "prior"), load_space(run_dir / "tokenizer")
    report = GenerationReport(num_captions=16, batch_size=16, guidances=[1.0], nll_lines=2, classify_lines=0)
    for name, data in (
        ("a", PriorDataModule(str(run_dir / "latents"))),
        ("b", PriorImageModule(str(run_dir / "data"), image_size=SIZE)),
    ):
        copied(run_dir, tmp_path / name)
        report.write(prior, space, data, tmp_path / name)
    a, b = (json.loads((tmp_path / n / "generation" / "metrics.json").read_text()) for n in "ab")
    assert b["latents"]["2.0"]["std_ratio"] == pytest.approx(a["latents"]["2.0"]["std_ratio"], rel=1e-3)
    assert b["nll"]["by_position"] == pytest.approx(a["nll"]["by_position"], rel=1e-2)


def test_scores_stand_against_a_reference_or_the_held_out_pictures(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "report_classifier", lambda *_, **__: None)
    inception = InceptionFeatures(SmallInception(), "cpu")
    monkeypatch.setattr(generation, "inception_features", lambda weights, device: inception)
    shift = 1e3  # so far away that nothing else counts
    mean, mean_s = (np.full(width, shift) for width in inception.widths[:2])
    np.savez(tmp_path / "far.npz", mu=mean, sigma=np.eye(len(mean)), mu_s=mean_s, sigma_s=np.eye(len(mean_s)))
    prior, space = Prior.from_pretrained(run_dir / "prior"), load_space(run_dir / "tokenizer")
    options: dict[str, Any] = {"num_captions": 10, "batch_size": 4, "guidances": [1.0], "nll_lines": 0}
    for reference in (None, str(tmp_path / "far.npz")):
        report = GenerationReport(**options, inception_weights="given", reference=reference)
        report.images_dir = str(run_dir / "data")
        page = report.write(prior, space, PriorDataModule(str(run_dir / "latents")), tmp_path).read_text()
        metrics = json.loads((tmp_path / "generation" / "metrics.json").read_text())
        scores = metrics["scores[inception-v3-compat]"]
        assert set(scores) == {"1.0", "2.0", "real"} and "Inception score" in page
        if reference is None:
            distances = metrics["distances[inception-v3-compat]"]["generated_real"]
            assert scores["2.0"]["fid"] == pytest.approx(distances["2.0"]) and scores["real"]["fid"] < 1e-6
        else:
            assert scores["real"]["fid"] == pytest.approx(len(mean) * shift**2, rel=0.01)
            assert scores["real"]["sfid"] == pytest.approx(len(mean_s) * shift**2, rel=0.01)
    with pytest.raises(ValueError, match="got a reference and no inception_weights"):
        GenerationReport(reference="anywhere")


def generation_slots(data: dict[str, Any]) -> Any:
    from stage1_tokenizer.evaluation.attributes import Slots

    return Slots.of_scenes(data["attributes"])


def test_predict_makes_a_picture_of_every_caption(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("a red circle\n\n# a comment\n" + "a small blue star\n" * 17, encoding="utf-8")
    stage2("predict", run_dir, captions_file=str(captions))
    assert str(run_dir / "images") in capsys.readouterr().out  # says where they are
    listing = json.loads((run_dir / "images" / "captions.json").read_text())
    assert len(listing) == 18 and listing["00000.png"] == "a red circle"
    pictures = [Image.open(run_dir / "images" / name) for name in listing]
    assert all(p.size == (SIZE, SIZE) for p in pictures)
    assert pictures[1].tobytes() != pictures[2].tobytes()  # one caption, two draws
    captions.write_text("a red circle\n", encoding="utf-8")
    stage2("predict", run_dir, captions_file=str(captions))
    assert sorted(p.name for p in (run_dir / "images").iterdir()) == ["00000.png", "captions.json"]  # no leftovers


@pytest.mark.slow
def test_two_ranks_write_one_listing(run_dir: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("images"))
    captions = [f"a {size} {colour} circle" for size in ("small", "large") for colour in COLOURS]
    captions += captions[:1] * 4  # the same caption on both ranks must not be the same picture
    (tmp_path / "captions.txt").write_text("\n".join(captions))
    file = tmp_path / "config.yaml"
    data = {"captions_file": str(tmp_path / "captions.txt"), "val_batch_size": 2}
    file.write_text(yaml.safe_dump(config(run, **data)))
    # The first rank starts the second as a user's command would.
    done = command("stage2_prior", "predict", f"--config={file}", "--trainer.devices=2", "--trainer.strategy=ddp")
    assert done.returncode == 0, done.stderr[-2000:]
    listing = json.loads((run / "images" / "captions.json").read_text())
    assert list(listing.values()) == captions and list(listing) == sorted(listing)
    assert sorted(p.name for p in (run / "images").iterdir()) == sorted([*listing, "captions.json"])
    same = [(run / "images" / name).read_bytes() for name, caption in listing.items() if caption == captions[0]]
    assert len(same) == len(set(same)) == 5


def test_other_latents_are_refused(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A prior of one tokenizer on the latents, or with the decoder, of another."""
    other = tiny_tokenizer(seed=1)
    images = ImageDataModule(str(run_dir / "data"), image_size=SIZE)
    write_latents(other, images, tmp_path / "latents", other.fingerprint)
    with pytest.raises(SystemExit):
        stage2("validate", run_dir, f"--data.data_dir={tmp_path / 'latents'}")
    assert "other weights or statistics" in capsys.readouterr().err
    other.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(SystemExit):
        stage2("predict", run_dir, f"--model.tokenizer_dir={tmp_path / 'tokenizer'}")
    assert "other weights or statistics" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        stage2("fit", run_dir, "--overwrite=true", f"--model.prior.init_args.num_latents={K + 1}")
    assert f"wanted {K + 1} x 4 or more" in capsys.readouterr().err


def test_a_prior_may_model_the_first_latents_alone(run_dir: Path, tmp_path: Path) -> None:
    """Its loss is that of the cut lines, and what it draws decodes as a prefix."""
    for name in ("data", "latents", "tokenizer"):
        (tmp_path / name).symlink_to(run_dir / name)
    stage2("fit", tmp_path, f"--run_dir={tmp_path}", "--model.prior.init_args.num_latents=2")
    prior, tokenizer = Prior.from_pretrained(tmp_path / "prior"), Tokenizer.from_pretrained(run_dir / "tokenizer")
    prior.check(tokenizer)
    z = prior.sample(["a red circle"] * 2, generator=torch.Generator().manual_seed(0))
    assert z.shape == (2, 2, 4) and tokenizer.decode(z).shape == (2, 3, SIZE, SIZE)


def test_latents_without_statistics_are_refused(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ImageDataModule(str(run_dir / "data"), image_size=SIZE)
    write_latents(tiny_tokenizer(), images, tmp_path / "latents", "")
    with pytest.raises(SystemExit):
        stage2("validate", run_dir, f"--data.data_dir={tmp_path / 'latents'}")
    assert "no tokenizer fingerprint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no captions file"), (b"\n# only\n", "no caption"), (b"\xff\xfe\x00", "not UTF-8")]
)
def test_bad_caption_files_get_one_sentence(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "captions.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_captions(str(file))


def test_samples_without_a_caption_train_the_null_word(run_dir: Path) -> None:
    prior = Prior.from_pretrained(run_dir / "prior")
    text = LitPrior(prior).text({"captions": [["a red circle"], [], [""]], "labels": torch.full((3,), -1)}, 1.0)
    assert text.ids[1, 0] == prior.null and text.ids[2, 0] == prior.null and text.ids[0, 0] != prior.null
    assert text.text_mask.sum(1).tolist()[1:] == [1, 1]
