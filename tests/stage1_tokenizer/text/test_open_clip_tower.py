"""A pretrained open_clip text tower: open_clip's own embeddings, frozen, and an export that needs no other file."""

from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from stage1_tokenizer.encoder import QFormerEncoder
from stage1_tokenizer.spec import build
from stage1_tokenizer.text.contrast import SoftmaxContrast
from stage1_tokenizer.text.readers import PrefixReader
from stage1_tokenizer.text.supervision import PrefixText
from stage1_tokenizer.text.towers import OpenClipTower, WholeVocabulary
from stage1_tokenizer.tokenizer import Tokenizer
from stage1_tokenizer.variants.timm_trunk import TimmTrunk
from tests.tiny import CAPTIONS, SIZE, TINY_CLIP, C, K, pictures, prefix_text, tiny_clip, tiny_tokenizer

MODEL = TINY_CLIP


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def tokenizer_with(tower: OpenClipTower) -> Tokenizer:
    spec = tiny_tokenizer(text=False).spec["init_args"]
    parts = {name: build(spec[name]) for name in ("encoder", "bottleneck", "decoder", "lengths")}
    text = PrefixText(tower, PrefixReader(K, C, 32, tower.embed_dim), SoftmaxContrast(), [1, K])
    return Tokenizer(SIZE, text=text, **parts)


def test_captions_embed_as_open_clip_embeds_them(weights: Path) -> None:
    reference = open_clip.create_model(MODEL, pretrained=str(weights)).eval()
    wanted = reference.encode_text(open_clip.tokenize(CAPTIONS, context_length=20), normalize=True)
    tower = OpenClipTower(WholeVocabulary(16), MODEL, str(weights))
    ids, _ = tower.vocabulary.encode(CAPTIONS)
    torch.testing.assert_close(tower(ids), wanted, atol=1e-5, rtol=1e-5)
    assert tower.vocabulary.decode(ids) == CAPTIONS
    other = OpenClipTower(WholeVocabulary(16), MODEL)
    assert (other(ids) - wanted).abs().max() > 0.01, "without the file it is another tower"


def test_a_frozen_tower_teaches_and_does_not_learn(weights: Path) -> None:
    tokenizer = tokenizer_with(OpenClipTower(WholeVocabulary(16), MODEL, str(weights))).train()
    ids = tokenizer.vocabulary.encode(CAPTIONS)[0]
    parts, _ = tokenizer.losses(pictures(4), ids)
    tokenizer.total(parts).backward()
    text = prefix_text(tokenizer)
    assert all(p.grad is None and not p.requires_grad for p in text.tower.parameters())
    assert text.reader.position.weight.grad is not None and text.reader.position.weight.grad.any()
    free = OpenClipTower(WholeVocabulary(16), MODEL, str(weights), frozen=False)
    free(ids).sum().backward()
    assert free.transformer.token_embedding.weight.grad is not None


def test_an_export_holds_the_weights_and_asks_for_no_file(weights: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "clip.safetensors"
    checkpoint.write_bytes(weights.read_bytes())
    tokenizer = tokenizer_with(OpenClipTower(WholeVocabulary(16), MODEL, str(checkpoint))).eval()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    checkpoint.unlink()
    again = Tokenizer.from_pretrained(tmp_path / "tokenizer")
    assert torch.equal(again.embed_text(CAPTIONS), tokenizer.embed_text(CAPTIONS))
    tower = prefix_text(again).tower
    assert isinstance(tower, OpenClipTower)
    tower.check_weights()
    assert str(tmp_path) not in (tmp_path / "tokenizer" / "config.json").read_text()


def test_an_export_with_a_timm_trunk_asks_for_no_file(tmp_path: Path) -> None:
    import timm

    name = "vit_tiny_patch16_224"
    save_file(timm.create_model(name, img_size=32, num_classes=0).state_dict(), tmp_path / "vit.safetensors")
    trunk = TimmTrunk(name, 32, checkpoint=str(tmp_path / "vit.safetensors"))
    spec = QFormerEncoder(trunk, K, 1, 3).spec
    (tmp_path / "vit.safetensors").unlink()
    assert isinstance(build(spec), QFormerEncoder)


def test_missing_weights_and_wrong_models_are_refused(weights: Path) -> None:
    with pytest.raises(FileNotFoundError, match="wanted open_clip weights"):
        OpenClipTower(WholeVocabulary(16), MODEL, "nowhere.pt")
    with pytest.raises(ValueError, match="list_models"):
        OpenClipTower(WholeVocabulary(16), "no-such-model")
    with pytest.raises(ValueError, match="in 20 places, wanted CLIP's 49408 in 77"):
        OpenClipTower(WholeVocabulary(77), MODEL, str(weights))
    with pytest.raises(ValueError, match="frozen and has no weights"):
        OpenClipTower(WholeVocabulary(16), MODEL).check_weights()
    tower = OpenClipTower(WholeVocabulary(16), MODEL, str(weights))
    with pytest.raises(ValueError, match="reader.embed_dim is 16"):
        PrefixText(tower, PrefixReader(K, C, 32, 16), SoftmaxContrast(), [1])
