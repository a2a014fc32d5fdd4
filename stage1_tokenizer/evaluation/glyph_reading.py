"""How many of the characters in a picture survive a prefix, as read by an OCR that no one here trained.

    python -m stage1_tokenizer glyphs --tokenizer runs/glyphs/tokenizer --data runs/glyphs/data --out runs/reading

Pictures of `prepare --source glyphs` are encoded, decoded from their first k latents as a receiver of so many bits gets
them (a noisy code with its noise), cut into rows of characters and read by PP-OCRv4 (`pip install unspool[ocr]`), real
pictures too: what it misses there is its own error. Beside the share of characters stand the bits of the code, a
symbol's where it has symbols and the rate of its noise elsewhere, and the counting bound: a code of b bits names at
most 2^b pictures, so that of 2^n equally likely ones it brings back a share of 2^(b - n) without an error, and no more.

Letters: M pictures, N characters of each, S side in pixels, K latents, k prefix length.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.reading.datamodule import ImageDataModule
from data.sources.glyphs import grid
from stage1_tokenizer.evaluation.latent_use import code_bits, received
from stage1_tokenizer.evaluation.reconstruct import ReconstructError, reconstruct
from stage1_tokenizer.evaluation.reconstruction_pass import prefix_lengths
from stage1_tokenizer.evaluation.report import Report
from stage1_tokenizer.precision import default_device
from stage1_tokenizer.tokenizer import Tokenizer

LINE_HEIGHT = 48  # pixels, of the reader's input
Reader = Callable[[np.ndarray], str]  # a row of characters, (h, w, 3) uint8 -> its text


class GlyphError(ValueError):
    """Pictures or a reader that cannot be used here."""


def rapid_reader() -> Reader:
    """The recogniser of PP-OCRv4, 6,625 symbols. Raises GlyphError where it is not installed."""
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError:
        raise GlyphError("reading characters needs `pip install unspool[ocr]`.") from None
    engine = RapidOCR(use_det=False, use_cls=False)

    def read(row: np.ndarray) -> str:
        width = max(1, round(row.shape[1] * LINE_HEIGHT / row.shape[0]))
        line = np.asarray(Image.fromarray(row).resize((width, LINE_HEIGHT), Image.Resampling.BICUBIC))
        line = np.pad(line, ((0, 0), (LINE_HEIGHT // 2, LINE_HEIGHT // 2), (0, 0)), mode="edge")
        found, _ = engine(line, use_det=False, use_cls=False, use_rec=True)
        return found[0][0] if found else ""

    return read


def right_characters(reader: Reader, pictures: Tensor, texts: Sequence[str]) -> Tensor:
    """pictures (M,3,S,S) in [-1,1], their texts of N characters -> (M,N) bool: which are read, in their places."""
    pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    right = []
    for picture, text in zip(pixels, texts, strict=True):
        columns, cell = grid(picture.shape[0], len(text))
        row: list[bool] = []
        for start in range(0, len(text), columns):
            wanted, top = text[start : start + columns], round(start // columns * cell)
            strip = picture[top : round(top + cell), : round(len(wanted) * cell)]
            got = "".join(reader(np.ascontiguousarray(strip)).split())
            row += [a == b for a, b in itertools.zip_longest(wanted, got[: len(wanted)])]
        right.append(row)
    return torch.tensor(right)


def read_glyphs(
    tokenizer: Tokenizer, reader: Reader, images: Tensor, texts: Sequence[str], alphabet: int, lengths: Sequence[int]
) -> dict[str, Any]:
    """Figures of M pictures (M,3,S,S) with N characters each, of `alphabet` equally likely ones, by k (0: real).

    characters, whole: shares read right, of characters and of pictures. bits: of the first k latents. wanted_bits: of a
    picture. bound: the largest share of whole pictures that a code of so many bits allows.
    """
    pictures, _ = reconstruct(tokenizer, images, lengths, z=received(tokenizer, images))
    bits, wanted = code_bits(tokenizer, images), len(texts[0]) * math.log2(alphabet)
    result: dict[str, Any] = {"n": len(texts), "characters_each": len(texts[0]), "wanted_bits": wanted}
    right = {k: right_characters(reader, picture, texts) for k, picture in ({0: images} | pictures).items()}
    return result | {
        "characters": {k: hits.double().mean().item() for k, hits in right.items()},
        "whole": {k: hits.all(1).double().mean().item() for k, hits in right.items()},
        "bits": {k: bits[k - 1] for k in lengths},
        "bound": {k: 2.0 ** min(0.0, bits[k - 1] - wanted) for k in lengths},
    }


def page(result: dict[str, Any]) -> Report:
    """Table and curve of the figures."""
    lengths = list(result["bits"])
    report = Report("Characters read", f"{result['n']} pictures of {result['characters_each']} characters, PP-OCRv4")
    rows = [
        [name, *("" if k not in result[key] else form.format(result[key][k]) for k in (0, *lengths))]
        for name, key, form in (
            ("characters read", "characters", "{:.3f}"),
            ("whole pictures", "whole", "{:.3f}"),
            ("whole pictures, at most", "bound", "{:.3g}"),
            ("bits of the code", "bits", "{:,.0f}"),
        )
    ]
    note = f"A picture holds {result['wanted_bits']:,.0f} bits; bits of noisy floats are an upper bound, their rate."
    report.table("By prefix length", ["", "real", *(f"k = {k}" for k in lengths)], rows, note)
    shares = {name: (lengths, [result[name][k] for k in lengths]) for name in ("characters", "whole", "bound")}
    return report.curve("Read right", "latents", "share", shares)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m stage1_tokenizer glyphs", description="Read the characters of decoded pictures back by OCR."
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="exported folder, or a Hub repository by id")
    parser.add_argument("--data", type=Path, required=True, help="shards of `prepare --source glyphs`")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--latents", type=int, nargs="+", metavar="K", help="prefix lengths (default: 1, 2, 4, ..., K)")
    parser.add_argument("--limit", type=int, default=200, help="held-out pictures that are read (default: %(default)s)")
    parser.add_argument("--device", default=default_device(), help="cpu or cuda (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        tokenizer = Tokenizer.from_pretrained(options.tokenizer).to(options.device)
        data = ImageDataModule(str(options.data), image_size=tokenizer.image_size)
        held = data.arrays("val", options.limit)
        if not all(held["attributes"]) or any(not n.startswith("glyph") for a in held["attributes"] for n in a):
            raise GlyphError(f"the pictures in {options.data} are not of `prepare --source glyphs`; give those.")
        texts = ["".join(attributes.values()) for attributes in held["attributes"]]
        alphabet = len(
            {c for captions in data.captions("train") for text in captions for c in text} | {*"".join(texts)}
        )
        lengths = options.latents or prefix_lengths(tokenizer.num_latents)
        result = read_glyphs(tokenizer, rapid_reader(), held["images"], texts, max(alphabet, 2), lengths)
        written = page(result).write(options.out, result)
    except (GlyphError, ReconstructError, ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(json.dumps(result["characters"]), f"report: {written}", sep="\n")
    return 0
