"""Encode and decode as graphs of `torch.export`, and as ONNX files for programs without torch.

    python -m stage1_tokenizer export_onnx --tokenizer runs/demo/tokenizer --out onnx   # encode.onnx, decode.onnx

    encode: images (B, 3, H, W) float32 in [-1, 1] -> z (B, K, C) float32, standardised
    decode: z (B, K, C) float32, k (B,) int64 from 1 to K -> images (B, 3, H, W) float32 in [-1, 1]

B is dynamic. `k` says how many latents of each line are visible, so that one graph decodes any prefix: what lies behind
is not looked at. Pixels and k are not checked inside a graph. Needs the extra `onnx` for the files.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from stage1_tokenizer.prefixes import keep_mask
from stage1_tokenizer.tokenizer import Tokenizer

OPSET = 18


class GraphError(ValueError):
    """A tokenizer that cannot be written as a graph."""


class Encode(nn.Module):
    """`Tokenizer.encode` as a forward."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(images)


class Decode(nn.Module):
    """`Tokenizer.decode` as a forward, with the lengths of prefixes as a tensor."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, z: Tensor, k: Tensor) -> Tensor:
        keep = keep_mask(k, self.tokenizer.num_latents)  # (B,K)
        raw = torch.where(keep[..., None], self.tokenizer.unstandardised(z), 0.0)  # whatever stands there, NaN too
        decoded = self.tokenizer.decoder.decode(raw, keep, self.tokenizer.base(raw, keep))
        return decoded.float().clamp(-1, 1)


def export_graphs(tokenizer: Tokenizer) -> dict[str, torch.export.ExportedProgram]:
    """The graphs "encode" and "decode" of a tokenizer on the CPU, of any batch size.

    Raises GraphError for a decoder that draws noise: a graph has no seed that a caller could set.
    """
    tokenizer = tokenizer.eval().requires_grad_(False)
    size, k = tokenizer.image_size, tokenizer.num_latents
    images, lengths = torch.zeros(2, 3, size, size), torch.tensor([1, k])
    with torch.no_grad():
        z = tokenizer.encode(images)
        once, twice = (tokenizer.decode(z, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    if not torch.equal(once, twice):
        name = type(tokenizer.decoder).__name__
        raise GraphError(f"got a {name}, which draws noise, and a graph has no seed; export a deterministic decoder.")
    looks, tokenizer.checks_pixels = tokenizer.checks_pixels, False  # a graph has no branch on values
    batch = {0: torch.export.Dim("batch")}
    try:
        return {
            "encode": torch.export.export(Encode(tokenizer), (images,), dynamic_shapes=(batch,)),
            "decode": torch.export.export(Decode(tokenizer), (z, lengths), dynamic_shapes=(batch, batch)),
        }
    finally:
        tokenizer.checks_pixels = looks


def export_onnx(tokenizer: Tokenizer, folder: str | Path) -> list[Path]:
    """Write encode.onnx and decode.onnx, weights included, into a folder; returns their paths.

    Errors as `export_graphs`. Raises ModuleNotFoundError without `onnx` and `onnxscript`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    outputs = {"encode": ["z"], "decode": ["images"]}
    for name, program in export_graphs(tokenizer).items():
        paths.append(folder / f"{name}.onnx")
        written = torch.onnx.export(
            program, output_names=outputs[name], opset_version=OPSET, dynamo=True, verbose=False
        )
        assert written is not None, "an ONNXProgram"
        written.save(paths[-1])
    return paths


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m stage1_tokenizer export_onnx",
        description="Write a tokenizer as encode.onnx and decode.onnx, of any batch size and prefix length.",
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="exported folder, or a Hub repository by id")
    parser.add_argument("--out", type=Path, default=Path("onnx"), help="folder to write to (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        paths = export_onnx(Tokenizer.from_pretrained(options.tokenizer), options.out)
    except ModuleNotFoundError as error:
        parser.exit(1, f"error: {error}; writing ONNX needs pip install 'unspool[onnx]'\n")
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(*(f"{path}: {path.stat().st_size / 2**20:.1f} MiB" for path in paths), sep="\n")
    return 0
