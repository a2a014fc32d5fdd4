"""TiTokEncoder: the same contract as the Q-Former, exact prefixes through one shared sequence."""

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.encoder import PatchTrunk
from stage1_tokenizer.spec import build
from stage1_tokenizer.variants.titok import TiTokEncoder, prefix_mask


def encoder(num_latents: int = 6) -> TiTokEncoder:
    """Small, and with output projections that are not zero, or attention would not matter."""
    made = TiTokEncoder(PatchTrunk(16, 4, width=32, depth=0, stem_width=8), num_latents=num_latents, depth=2)
    for name, parameter in made.named_parameters():
        if name.endswith(("out.weight", "down.weight")):
            torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def images() -> Tensor:
    return torch.rand(3, 3, 16, 16) * 2 - 1


@torch.no_grad()
def test_prefixes_are_exact() -> None:
    made, x = encoder(), images()
    full = made(x)
    assert full.shape == (3, 6, 32)
    for k in range(1, 7):
        torch.testing.assert_close(made(x, k), full[:, :k], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_query_changes_nothing_before_it_and_something_after_it() -> None:
    made, x = encoder(), images()
    before = made(x)
    made.queries[2] += torch.randn(32)  # not a constant: the norms would remove it
    after = made(x)
    torch.testing.assert_close(after[:, :2], before[:, :2], atol=1e-5, rtol=0)
    assert (after[:, 2:] - before[:, 2:]).abs().amax((0, 2)).min() > 1e-3  # each later latent reads the third


@torch.no_grad()
def test_latents_read_the_picture_through_attention() -> None:
    made, x = encoder(), images()
    made.mix.weight.zero_()  # leaves attention as the only way in
    assert (made(x)[0] - made(x)[1]).abs().max() > 1e-3


def test_mask_and_specs() -> None:
    mask = prefix_mask(2, 3)
    assert mask.tolist() == [
        [True, True, False, False, False],
        [True, True, False, False, False],
        [True, True, True, False, False],
        [True, True, True, True, False],
        [True, True, True, True, True],
    ]
    made = encoder()
    again = build(made.spec)
    again.load_state_dict(made.state_dict())
    with pytest.raises(ValueError, match="at least one block"):
        TiTokEncoder(PatchTrunk(16, 4, width=32, depth=0, stem_width=8), depth=0)


def test_pictures_of_another_size_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\), wanted \(B, 3, 16, 16\)"):
        encoder()(torch.zeros(2, 3, 32, 32))
