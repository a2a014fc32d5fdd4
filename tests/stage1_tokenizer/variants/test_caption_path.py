"""A linear path with canonical components: what it finds, where it puts it, and that prefixes stay exact."""

import pytest
import torch

from stage1_tokenizer.encoder import Trunk
from stage1_tokenizer.linear_path import LinearPath
from stage1_tokenizer.prefixes import keep_mask
from stage1_tokenizer.spec import build
from stage1_tokenizer.variants.caption_path import CaptionPath, canonical_components, word_weights
from tests.tiny import SIZE, C, K, pictures

FREE = (0, 1, 2)
COLOURS = ("red", "green", "blue")


class Means(Trunk):
    """Two patches whose mean is the picture's mean colour, mixed, beside features of no use."""

    image_size, num_patches, width = SIZE, 2, 5

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        colour = images.mean((2, 3))
        mixed = torch.cat(
            [colour @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5], [0.5, 0.0, 1.0]]), colour[:, :2]], 1
        )
        return torch.stack([mixed - 1, mixed + 1], 1)  # (B,2,5)


def scenes(n: int = 120) -> tuple[torch.Tensor, list[list[str]]]:
    """Pictures in one of three colours, lit unevenly, and captions that name the colour."""
    torch.manual_seed(0)
    which = torch.arange(n) % 3
    images = 0.7 * torch.eye(3)[which][..., None, None] - 0.4 + 0.3 * pictures(n)
    return images.clamp(-1, 1), [[f"something {COLOURS[i]}", f"it is {COLOURS[i]}"] for i in which.tolist()]


@pytest.fixture(scope="module")
def path() -> CaptionPath:
    torch.manual_seed(0)
    path = CaptionPath(Means(), FREE, SIZE, K, C)
    path.fit(*scenes())
    return path


def test_canonical_components_find_what_two_views_share() -> None:
    torch.manual_seed(0)
    shared, x, y = torch.randn(2000, 1), torch.randn(2000, 6), torch.randn(2000, 4)
    x[:, 2:3] += 3 * shared
    y[:, 1:2] -= 2 * shared
    weights = canonical_components(x, y, 8)
    read = (x - x.mean(0)) @ weights.T
    assert weights.shape == (8, 6) and not weights[4:].any(), "no more than there are words"
    correlation = torch.corrcoef(torch.cat([read[:, :2], shared], 1).T)[2, :2].abs()
    assert correlation[0] > 0.9 and correlation[1] < 0.15
    torch.testing.assert_close(read[:, :4].std(0), torch.ones(4), atol=1e-3, rtol=0)


def test_words_that_all_pictures_have_weigh_nothing() -> None:
    weights = word_weights([["a red dog", "a dog"], ["a cat"]])
    assert weights.shape == (2, 4) and (weights == 0).all(0).sum() == 1
    assert sorted(weights[0][weights[0] > 0].tolist()) == pytest.approx([0.5 * 0.6931, 0.6931], abs=1e-3)


def test_free_channels_name_colours_and_the_others_are_principal(path: CaptionPath) -> None:
    images, captions = scenes()
    z = path.encode(images, K)  # (B,K,C)
    plain = LinearPath(SIZE, K, C)
    plain.fit(images)
    principal = plain.encode(images, K).abs().flatten(1)  # of either sign
    torch.testing.assert_close(z.abs().flatten(1)[:, :7], principal[:, :7], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(z[:, 2, :2].abs(), principal[:, 7:9], atol=1e-3, rtol=1e-3)
    words = torch.stack([z[:, 1, -1], z[:, 2, -2]], 1)
    colour = torch.tensor([COLOURS.index(texts[0].split()[-1]) for texts in captions])
    centres = torch.stack([words[colour == i].mean(0) for i in range(3)])
    assert (torch.cdist(words, centres).argmin(1) == colour).float().mean() > 0.95
    keep = keep_mask(torch.full((len(z),), K), K)
    shown = path.decode(z, keep)
    z[:, 1, -1] = z[:, 2, -2:] = 7.0
    assert torch.equal(path.decode(z, keep), shown), "pixels are not read from them"
    assert (path.variances == 0).nonzero().tolist() == [[1, 3], [2, 2], [2, 3]]


def test_prefixes_are_exact_and_an_export_has_its_numbers(path: CaptionPath) -> None:
    images, _ = scenes(6)
    whole = path.encode(images, K)
    for k in (1, 2, 3, K):
        torch.testing.assert_close(path.encode(images, k), whole[:, :k])
    again = build(path.spec, ("stage1_tokenizer", "tests"))
    again.load_state_dict(path.state_dict(), strict=True)
    assert torch.equal(again.encode(images, K), whole)


def test_what_has_no_captions_or_no_room_is_refused() -> None:
    images, _ = scenes(12)
    with pytest.raises(ValueError, match="pictures without captions for a CaptionPath"):
        CaptionPath(Means(), FREE, SIZE, K, C).fit(images, [[]] * 12)
    with pytest.raises(ValueError, match=r"got free \(5,\), wanted at most 6 numbers of channels from 0 to 4"):
        CaptionPath(Means(), (5,), SIZE, K, C)
    trained = Means()
    trained.weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="wanted a frozen trunk; set frozen: true"):
        CaptionPath(trained, FREE, SIZE, K, C)
