"""What the evaluation refuses, each in one sentence that names what it got, what it wanted, and what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stage1_tokenizer.evaluation.attributes import Slots
from stage1_tokenizer.evaluation.classifier import AttributeClassifier, LabelClassifier
from stage1_tokenizer.evaluation.classifier_fit import Budget, fit_classifier
from stage1_tokenizer.evaluation.frechet import frechet_distance, precision_recall
from stage1_tokenizer.evaluation.image_metrics import lpips_metric
from stage1_tokenizer.evaluation.latent_use import latent_use
from stage1_tokenizer.evaluation.picture_sheet import image_strip
from stage1_tokenizer.evaluation.report import Report
from stage1_tokenizer.evaluation.retrieval import retrieval
from stage1_tokenizer.similarity import psnr, ssim

PICTURES, SMALL, SLOTS = torch.zeros(4, 3, 24, 24), torch.zeros(4, 3, 8, 8), Slots({"class": ["0", "1"]})
FEW = {"images": SMALL, "labels": torch.zeros(4, dtype=torch.long)}

CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "pictures of two sizes": (lambda: psnr(PICTURES, SMALL), "(4, 3, 24, 24) against (4, 3, 8, 8), wanted two equal"),
    "too small for SSIM": (lambda: ssim(SMALL, SMALL), "got 8 x 8 pictures, wanted sides of 11 or more"),
    "an unknown trunk": (lambda: lpips_metric("resnet"), "got LPIPS trunk 'resnet', wanted one of alex, vgg, squeeze"),
    "posteriors of two shapes": (lambda: latent_use(torch.zeros(3, 2, 4), torch.ones(3, 2, 5)), "wanted two equal"),
    "a caption too few": (lambda: retrieval(torch.eye(2), torch.eye(2), ["a"], ["a", "b"]), "got 1 and 2 captions"),
    "features of two widths": (lambda: frechet_distance(torch.zeros(5, 3), torch.zeros(5, 4)), "got features (5, 3)"),
    "a single picture": (lambda: frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3)), "N and M of 2 or more"),
    "fewer than neighbours": (lambda: precision_recall(torch.zeros(3, 2), torch.zeros(9, 2)), "got 3 and 9 pictures"),
    "no picture": (lambda: image_strip(SMALL[:0]), "got pictures of shape (0, 3, 8, 8), wanted (N, 3, H, W)"),
    "a ragged table": (lambda: Report("t").table("x", ["a", "b"], [["1"]]), "got rows of [1] cells, wanted 2"),
    "a ragged grid": (lambda: Report("t").grid("x", ["a"], [("r", [SMALL] * 2)]), "got rows of [2] strips, wanted 1"),
    "an odd size": (lambda: AttributeClassifier(SLOTS, 24), "got pictures of 24 pixels, wanted 16, 32, 64"),
    "too few to train on": (
        lambda: fit_classifier(LabelClassifier(SLOTS, 8), FEW, Budget(1, 60), 0),
        "got 4 pictures to train a classifier on, wanted 5 or more; prepare more data",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_sentence(case: str) -> None:
    call, message = CASES[case]
    with pytest.raises(ValueError) as error:
        call()
    sentence = str(error.value)
    assert message in sentence and "wanted" in sentence and "\n" not in sentence and ". " not in sentence
