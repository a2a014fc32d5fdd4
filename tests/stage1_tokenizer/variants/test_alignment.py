"""Features on prefixes: what the loss asks for, of whom, and that nothing of it is exported."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from stage1_tokenizer.similarity import WeightsError
from stage1_tokenizer.tokenizer import Tokenizer
from stage1_tokenizer.training.optim import parameter_groups
from stage1_tokenizer.variants.alignment import FEATURES, FeatureAlignment
from tests.tiny import CAPTIONS, C, K, pictures, tiny_tokenizer


class Flat(torch.nn.Module):
    """A classifier whose pooled features are a fixed map of the picture's mean colour, far from zero."""

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        weight = torch.randn(FEATURES, 3, generator=torch.Generator().manual_seed(0))
        return 5 + F.conv2d(images.mean((2, 3), keepdim=True), weight[..., None, None])


def aligned(lengths: tuple[int, ...] = (1, 3)) -> FeatureAlignment:
    torch.manual_seed(0)
    part = FeatureAlignment(K, C, lengths, width=16, side=16)
    part._teacher = [Flat()]
    return part.train()


def with_alignment(text: bool) -> Tokenizer:
    tokenizer = tiny_tokenizer(text).train()
    tokenizer.alignment = aligned()
    return tokenizer


def test_the_loss_is_a_cosine_that_falls_with_the_length() -> None:
    part, z, images = aligned(), torch.randn(5, K, C), pictures()
    parts = part.losses(z, images)
    wanted = F.normalize(part.features(images), dim=-1)
    torch.testing.assert_close(part.features(images).mean(0), torch.zeros(FEATURES), atol=1e-4, rtol=0)
    cosine = [(part.reader(z[:, :k], [k])[:, 0] * wanted).sum(-1).mean() for k in (1, 3)]
    weights = torch.tensor([1.0, 1 / (1 + torch.log2(torch.tensor(3.0)))])
    expected = ((1 - torch.stack(cosine)) * weights / weights.sum()).sum()
    torch.testing.assert_close(parts["alignment"], expected)
    assert parts["cosine_k1"].item() == pytest.approx(cosine[0].item(), abs=1e-5)


def test_only_latents_of_its_prefixes_are_taught_and_the_teacher_stays() -> None:
    part, z = aligned((1, 2)), torch.randn(5, K, C, requires_grad=True)
    part.losses(z, pictures())["alignment"].backward()
    assert z.grad is not None and (z.grad[:, :2] != 0).any((0, 2)).all() and not z.grad[:, 2:].any()
    assert not any("teacher" in name for name in part.state_dict())


def test_prefixes_learn_what_the_classifier_sees() -> None:
    part, images = aligned((1,)), pictures(8)
    z = torch.zeros(8, K, C, requires_grad=True)
    optimizer = torch.optim.Adam([z, *part.parameters()], lr=0.02)
    first = part.losses(z, images)["cosine_k1"]
    for _ in range(60):
        optimizer.zero_grad()
        part.losses(z, images)["alignment"].backward()
        optimizer.step()
    assert first < 0.3 and part.losses(z, images)["cosine_k1"] > 0.8


@pytest.mark.parametrize("text", [False, True])
def test_it_joins_the_objective_beside_text_or_without_and_is_not_exported(text: bool, tmp_path: Path) -> None:
    tokenizer, images = with_alignment(text), pictures(4)
    ids = tokenizer.vocabulary.encode(CAPTIONS)[0] if text else None
    for step in range(2):  # the balance knows a gradient from the second step on
        parts, _ = tokenizer.losses(images, ids, step=4 * step)
        tokenizer.zero_grad()
        tokenizer.total(parts).backward()
    assert {"alignment", "cosine_k1", "pixel"} <= parts.keys() and ("text" in parts) == text
    assert tokenizer.alignment is not None and tokenizer.alignment.get_buffer("balance.norms").all()
    assert "alignment" not in tokenizer.losses(images, ids, step=1)[0], "every fourth step"
    trained = {p for group in parameter_groups(tokenizer) for p in group["params"]}
    assert set(tokenizer.alignment.parameters()) <= trained

    loaded = Tokenizer.from_pretrained(tokenizer.save_pretrained(tmp_path))
    assert loaded.alignment is None and loaded.fingerprint == tokenizer.fingerprint
    tokenizer.start_from(loaded)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got lengths \(1, 9\), every 4; wanted lengths within 1..6"):
        FeatureAlignment(K, C, (1, 9))
    with pytest.raises(WeightsError, match="no file at .*nowhere"):
        FeatureAlignment(K, C, (1,), weights=str(tmp_path / "nowhere")).prepare()
    tokenizer = tiny_tokenizer(text=False)
    with pytest.raises(ValueError, match="alignment.latent_dim is 5; make them equal"):
        Tokenizer(
            16, tokenizer.encoder, tokenizer.bottleneck, tokenizer.decoder, alignment=FeatureAlignment(K, C + 1, (1,))
        )
