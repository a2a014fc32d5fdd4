"""The whole reconstruction report with a linear tokenizer on small scenes: figures are those of PCA, the page opens."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.sources.scenes import Scenes, captions_of
from stage1_tokenizer.bottleneck import Bottleneck, KLBottleneck
from stage1_tokenizer.evaluation.classifier import AttributeClassifier
from stage1_tokenizer.evaluation.classifier_fit import Budget, report_classifier
from stage1_tokenizer.evaluation.reconstruction import reconstruction_report
from stage1_tokenizer.evaluation.reconstruction_pass import prefix_lengths
from stage1_tokenizer.evaluation.reconstruction_text import caption_bits, text_metrics
from stage1_tokenizer.pca import PCA
from stage1_tokenizer.similarity import psnr
from stage1_tokenizer.text.captioner import PrefixCaptioner
from stage1_tokenizer.text.contrast import MaxOverQueries, SoftmaxContrast
from stage1_tokenizer.text.readers import PrefixReader, QueryReader
from stage1_tokenizer.text.supervision import PrefixText
from stage1_tokenizer.text.towers import TextTower
from stage1_tokenizer.text.vocabulary import CaptionVocabulary
from stage1_tokenizer.tokenizer import Tokenizer
from stage1_tokenizer.variants.quantised import FSQBottleneck
from tests.tiny import rows_of


class FakeData:
    """Scenes of 16 pixels with the data module's methods; a manifest on disk, as its fingerprint."""

    def __init__(self, folder: Path, train: int = 80, val: int = 24) -> None:
        self.data_dir, self.val_batch_size = str(folder), 10
        (folder / "manifest.json").write_text('{"scenes": 1}')
        scenes, pixels = Scenes(train + val, seed=3, size=16).draw(np.arange(train + val))
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        self.splits: dict[str, dict[str, Any]] = {}
        self.asked: list[tuple[str, list[int]]] = []
        for name, rows in (("train", slice(0, train)), ("val", slice(train, None))):
            self.splits[name] = {
                "images": images[rows],
                "attributes": scenes[rows],
                "captions": [captions_of(scene) for scene in scenes[rows]],
                "labels": torch.full((len(scenes[rows]),), -1),
            }

    def split(self, split: str) -> torch.Tensor:
        return self.splits[split]["images"]

    def samples(self, split: str, rows: list[int]) -> dict[str, Any]:
        self.asked.append((split, rows))
        return rows_of(self.splits[split], rows)


class LinearTokenizer(Tokenizer):
    """PCA as a tokenizer of 4 latents of 8 floats; a caption's embedding is a hash, so retrieval is at chance."""

    pca: PCA

    def __init__(self, text: PrefixText | None = None, bottleneck: Bottleneck | None = None) -> None:
        torch.nn.Module.__init__(self)
        self.num_latents, self.latent_dim, self.image_size, self.text = 4, 8, 16, text
        self.latent_mean, self.latent_scale = torch.zeros(4, 8), torch.ones(4, 8)
        self.bottleneck = bottleneck or KLBottleneck(8, 4, 8)  # asked what it can hold, not run

    def posterior(self, images: torch.Tensor, k: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.pca.encode(images).unflatten(1, (4, 8))
        return z, torch.full_like(z, 0.1)

    def decode(self, z: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        return self.pca.decode(z.flatten(1))

    def embed_text(self, captions: list[str]) -> torch.Tensor:
        rows = [torch.randn(6, generator=torch.Generator().manual_seed(sum(map(ord, c)))) for c in captions]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)

    def embed_latents(self, z: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(z.flatten(1)[:, :6], dim=1)


def linear_tokenizer(data: FakeData, text: PrefixText | None = None) -> LinearTokenizer:
    tokenizer = LinearTokenizer(text)
    tokenizer.pca = PCA.fit(data.splits["train"]["images"], 32)
    return tokenizer


def text_part(captioner: PrefixCaptioner | None = None) -> PrefixText:
    """The text part of `LinearTokenizer`, whose vocabulary has the words of scenes."""
    vocabulary = CaptionVocabulary(64, 24)
    vocabulary.fit(caption for scene in Scenes(50).draw(np.arange(50))[0] for caption in captions_of(scene))
    tower, reader = TextTower(vocabulary, 16, 1, 2, 16), PrefixReader(4, 8, 16, 16)
    return PrefixText(tower, reader, SoftmaxContrast(), [1, 4], captioner=captioner)


class References(HTMLParser):
    """Collects whatever a page would load or link to."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attributes if name in ("src", "href", "srcset")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, FakeData]:
    folder = tmp_path_factory.mktemp("run")
    data = FakeData(folder)
    _keep_untrained_classifier(data, folder)
    tokenizer = linear_tokenizer(data, text_part())
    with torch.inference_mode():  # as Lightning tests
        metrics = reconstruction_report(tokenizer, data, folder / "reconstruction", folder, probe_images=60)
    return metrics, folder, data


def _keep_untrained_classifier(data: FakeData, folder: Path) -> None:
    """The cached classifier of the run, trained for two steps only: these tests do not look at its accuracy."""
    assert isinstance(report_classifier(data, folder, budget=Budget(2, 20.0, batch_size=16)), AttributeClassifier)


def test_prefix_lengths() -> None:
    assert prefix_lengths(16) == [1, 2, 4, 8, 16]
    assert prefix_lengths(24) == [1, 2, 4, 8, 16, 24]
    assert prefix_lengths(1) == [1]


def test_a_linear_tokenizer_scores_as_pca(made: tuple[dict[str, Any], Path, FakeData]) -> None:
    metrics, _, data = made
    for name in ("psnr", "ssim"):
        assert metrics[name] == pytest.approx(metrics["pca"][name], abs=1e-3)
    images = data.splits["val"]["images"]
    pca = PCA.fit(data.splits["train"]["images"], 32)
    expected = psnr(pca.reconstruct(images, 16), images).mean().item()
    assert metrics["psnr"][2] == pytest.approx(expected, abs=1e-3) and metrics["floats"][2] == 16
    assert metrics["num_images"] == len(images)


def test_metrics_file_holds_the_same_figures(made: tuple[dict[str, Any], Path, FakeData]) -> None:
    metrics, folder, _ = made
    kept = json.loads((folder / "reconstruction" / "metrics.json").read_text())
    assert kept["psnr"] == {str(k): value for k, value in metrics["psnr"].items()}
    assert {"classifier", "retrieval", "linear_probe", "latents", "provenance"} <= kept.keys()
    assert kept["frechet[attribute-classifier]"]["n"] == metrics["num_images"]
    assert {item["name"] for item in kept["skipped"]} >= {"frechet[inception-v3-compat]"}
    assert kept["retrieval"]["long"]["chance"]["1"] > 0
    assert kept["cost"]["seconds"] > 0 and 0.1 < kept["cost"]["gigabytes"] < 50


def test_page_stands_alone(made: tuple[dict[str, Any], Path, FakeData]) -> None:
    _, folder, _ = made
    page = (folder / "reconstruction" / "report.html").read_text()
    references = References()
    references.feed(page)
    assert references.loaded and all(value.startswith("data:image/png;base64,") for value in references.loaded)
    assert "http" not in page and "url(" not in page and "script" not in references.tags
    assert {"h1", "table", "img", "dl"} <= set(references.tags)
    assert "GB at most" in page and "n = 24" in page and "trained on 32 pictures" in page
    assert list((folder / "reconstruction").glob("*.png"))


def test_classifier_is_trained_once_per_run(made: tuple[dict[str, Any], Path, FakeData]) -> None:
    _, folder, data = made
    kept = (folder / "classifier" / "model.safetensors").read_bytes()
    again = report_classifier(data, folder, seed=1)  # another seed would make other weights
    assert again is not None and (folder / "classifier" / "model.safetensors").read_bytes() == kept


def test_without_a_text_part_retrieval_is_left_out_by_name(
    made: tuple[dict[str, Any], Path, FakeData], tmp_path: Path
) -> None:
    _, folder, data = made
    metrics = reconstruction_report(linear_tokenizer(data), data, tmp_path / "out", folder, limit=12, probe_images=40)
    assert "retrieval" not in metrics and "retrieval" in {item["name"] for item in metrics["skipped"]}


def test_symbols_say_how_many_bits_they_hold(tmp_path: Path, made: tuple[dict[str, Any], Path, FakeData]) -> None:
    metrics, folder, data = made
    assert "bits_per_latent" not in metrics["latents"], "a KL has a rate"
    tokenizer = LinearTokenizer(bottleneck=FSQBottleneck(8, 4, (4,) * 8))
    tokenizer.pca = linear_tokenizer(data).pca
    data.asked.clear()
    metrics = reconstruction_report(tokenizer, data, tmp_path / "out", folder, limit=12, probe_images=40)
    assert [rows for split, rows in data.asked if split == "val"] == [list(range(0, 20, 2)), [20, 22]]  # all over it
    assert metrics["latents"]["bits_per_latent"] == 16
    page = (tmp_path / "out" / "report.html").read_text()
    assert "bits at most (symbols)" in page and "64" in page and "at most 16.0 bits" in page


def test_the_best_of_the_first_latents_finds_the_caption() -> None:
    """Latent 2 alone is wrong about every picture: under `MaxOverQueries` latent 1 still finds the caption."""
    captions = [f"caption {i}" for i in range(8)]

    class Fixed(LinearTokenizer):
        def embed_text(self, captions: list[str]) -> torch.Tensor:
            return torch.eye(8)[[int(c[-1]) for c in captions]]

        def embed_latents(self, z: torch.Tensor) -> torch.Tensor:
            return 0.5 * torch.eye(8).roll(1, 0) if z.shape[1] == 2 else torch.eye(8)

    held = {"captions": [[c] for c in captions], "attributes": [{}] * 8, "labels": torch.arange(8)}
    train = {"captions": held["captions"], "labels": held["labels"]}
    tower = text_part().tower
    best = PrefixText(tower, QueryReader(4, 8, 16, 16), MaxOverQueries(), [1, 2])
    for text, share in ((best, 1.0), (text_part(), 0.0)):
        metrics = text_metrics(Fixed(text), torch.zeros(8, 4, 8), held, train, [1, 2])
        assert metrics["retrieval"]["caption"]["recall"][2][1] == share and metrics["zero_shot"][2] == share
        assert metrics["captions_read"][0]["nearest"][1] == captions[0]


def test_captions_alone_are_enough(tmp_path: Path) -> None:
    data = FakeData(tmp_path, train=50, val=12)
    for split in data.splits.values():
        split["attributes"] = [{} for _ in split["attributes"]]
    tokenizer = linear_tokenizer(data, text_part())
    metrics = reconstruction_report(tokenizer, data, tmp_path / "out", tmp_path, limit=10)
    assert metrics["num_images"] == 10 and "classifier" not in metrics
    assert "frechet[random-conv-s0]" in metrics and "caption 3" in metrics["retrieval"]


def test_a_captioner_is_asked_for_the_caption(tmp_path: Path, made: tuple[dict[str, Any], Path, FakeData]) -> None:
    _, folder, data = made
    torch.manual_seed(0)
    text = text_part(PrefixCaptioner(64, 24, 4, 8, 32, 1, 2)).eval()
    tokenizer = linear_tokenizer(data, text)
    metrics = reconstruction_report(tokenizer, data, tmp_path / "out", folder, limit=12, probe_images=40)
    assert list(metrics["caption_bits"]) == ["short", "medium", "long"]
    assert list(metrics["caption_bits"]["long"]) == [0, 1, 2, 4] and len(metrics["captions_read"][0]["written"]) == 3
    assert "Likelihood of the true caption" in (tmp_path / "out" / "report.html").read_text()


def test_caption_bits_of_a_captioner_that_knows_nothing() -> None:
    text = text_part(PrefixCaptioner(64, 24, 4, 8, 32, 1, 2)).eval()
    assert text.captioner is not None
    torch.nn.init.zeros_(text.captioner.out.weight)
    torch.nn.init.zeros_(text.captioner.out.bias)
    bits = caption_bits(text, torch.randn(2, 4, 8), ["a red circle", "a red circle and a blue star"], [1, 4])
    tokens = (4 + 8) / 2  # words and the end
    assert bits == pytest.approx(dict.fromkeys((0, 1, 4), tokens * 6), abs=1e-4)  # of 64 rows: 6 bits each
