"""Parts of small priors, of real classes, that the tests of several kinds of prior share."""

import torch

from stage1_tokenizer.text.vocabulary import CaptionVocabulary
from stage2_prior import Prior
from stage2_prior.backbone import Backbone
from stage2_prior.heads.base import Head
from stage2_prior.heads.flow import FlowHead
from stage2_prior.heads.nets import HoistedNet

K, C, D = 6, 4, 32
CAPTIONS = ["a red circle", "a large blue square above a small green star", "a cross"]


def parts(
    k: int = K, c: int = C, width: int = D, depth: int = 2, tokens: int = 0
) -> tuple[CaptionVocabulary, Backbone, Head]:
    """Vocabulary, transformer and head that fit each other; `tokens`: room for more than caption and line."""
    torch.manual_seed(0)
    vocabulary = CaptionVocabulary(rows=64, context_length=12)
    vocabulary.fit(CAPTIONS)
    backbone = Backbone(width, depth, heads=2, max_tokens=12 + k + tokens)
    return vocabulary, backbone, FlowHead(HoistedNet(c, width, 24, 2))


def awake(prior: Prior) -> Prior:
    for parameter in prior.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return prior.eval()
