"""Encode and decode as torch.export graphs and as ONNX files give what the tokenizer gives, any batch and prefix."""

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor

from stage1_tokenizer import ConvDecoder, FlowDecoder, FSQBottleneck, PatchTrunk, TiTokEncoder, Tokenizer
from stage1_tokenizer.graphs import GraphError, export_graphs, main
from tests.tiny import SIZE, WIDTH, C, K, awaken, pictures, tiny_tokenizer


def other_parts() -> Tokenizer:
    """A discrete bottleneck, another encoder, a convolutional decoder."""
    torch.manual_seed(0)
    encoder = TiTokEncoder(PatchTrunk(SIZE, 4, WIDTH, 1, 2, stem_width=8), K, 1, 2)
    decoder = ConvDecoder(SIZE, K, 4, channels=(8, 16), depths=(1, 1), width=8)
    tokenizer = Tokenizer(SIZE, encoder, FSQBottleneck(WIDTH, K, (5, 5, 3, 3)), decoder)
    awaken(tokenizer)
    return tokenizer.eval()


MAKERS = {"q-former, linear path": lambda: tiny_tokenizer(linear_path=True), "titok, fsq": other_parts}


def lines(tokenizer: Tokenizer, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n pictures, their lines, a prefix length for each, and what the tokenizer decodes of these."""
    images, k = pictures(n, seed=5), torch.arange(n) % K + 1
    with torch.no_grad():
        z = tokenizer.encode(images)
        decoded = torch.cat([tokenizer.decode(z[i : i + 1, : int(k[i])]) for i in range(n)])
    return images, z, k, decoded


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_graphs_give_what_the_tokenizer_gives(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    graphs = {name: program.module() for name, program in export_graphs(tokenizer).items()}
    for n in (1, 2, 7):
        images, z, k, decoded = lines(tokenizer, n)
        torch.testing.assert_close(graphs["encode"](images), z, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(graphs["decode"](z, k), decoded, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="pixels within"):
        tokenizer.encode(pictures(1) * 9)  # the tokenizer itself looks at pixels as before


@pytest.mark.slow
def test_onnx_files_give_what_the_tokenizer_gives(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(linear_path=True)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert main(["--tokenizer", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "onnx")]) == 0
    encode, decode = (onnxruntime.InferenceSession(tmp_path / "onnx" / f"{n}.onnx") for n in ("encode", "decode"))
    for n in (1, 5):
        images, z, k, decoded = lines(tokenizer, n)
        (written,) = encode.run(["z"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(written), z, atol=1e-4, rtol=1e-4)
        hidden = torch.where(
            torch.arange(K)[:, None] < k[:, None, None], z, torch.tensor(torch.nan)
        )  # is not looked at
        (shown,) = decode.run(["images"], {"z": hidden.numpy(), "k": k.numpy()})
        torch.testing.assert_close(torch.from_numpy(shown), decoded, atol=1e-4, rtol=1e-4)


def test_a_decoder_that_draws_noise_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.decoder = FlowDecoder(SIZE, 4, K, C, WIDTH, 1, 2)
    awaken(tokenizer)
    with pytest.raises(GraphError, match="draws noise"):
        export_graphs(tokenizer)


def test_pictures_are_embedded_where_their_captions_are() -> None:
    tokenizer = tiny_tokenizer()
    images = pictures(3)
    for k in (1, K):
        expected = tokenizer.embed_latents(tokenizer.encode(images)[:, :k])
        torch.testing.assert_close(tokenizer.embed_images(images, k), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokenizer.embed_images(images).norm(dim=1), torch.ones(3))
