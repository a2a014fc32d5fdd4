"""Pictures through a tokenizer from the shell: each one, and what its first k latents bring back, in one grid.

    python -m stage1_tokenizer reconstruct --tokenizer runs/demo/tokenizer photo.jpg --latents 1 2 4 8 --out grid.png

A row of the grid per picture: the original at the tokenizer's size, then each k. PSNR by k is printed as a table.
Pictures are decoded, cropped to their centred square and resized by the data room, as training pictures are: only
formats of its allow-list are opened, and a header that claims too many pixels is refused before anything is decoded.

Letters: N pictures, K latents, k prefix length.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.pictures.decode import MAX_PIXELS, SOURCE_FORMATS, PictureError, open_picture, short
from data.pictures.resize import pixels_of, resize
from data.pictures.transforms import to_unit_range
from stage1_tokenizer.evaluation.picture_sheet import image_grid
from stage1_tokenizer.evaluation.reconstruction_pass import prefix_lengths
from stage1_tokenizer.precision import default_device
from stage1_tokenizer.similarity import psnr
from stage1_tokenizer.tokenizer import Tokenizer

SHOWN_SIZE = 128  # pixels of the grid that one picture is at least wide


class ReconstructError(ValueError):
    """A picture that cannot be read, or an option that this tokenizer cannot serve."""


def load_picture(path: Path, size: int) -> Tensor:
    """The picture in a file, its centred square at `size` pixels: (3, size, size) in [-1, 1].

    Raises ReconstructError for a file that is missing or no usable picture (`read_picture`).
    """
    if not path.is_file():
        raise ReconstructError(f"there is no file {path}; give the path of a picture")
    return read_picture(path.read_bytes(), str(path), size)


def read_picture(content: bytes, name: str, size: int) -> Tensor:
    """The picture in the bytes of a file, its centred square at `size` pixels: (3, size, size) in [-1, 1].

    name: of the file, for errors. Raises ReconstructError for what is no picture of the formats that `prepare` opens,
    or has more than 64 million pixels.
    """
    try:
        pixels = pixels_of(content, open_picture(content, SOURCE_FORMATS), size, "center_crop")
    except PictureError as error:
        wanted = f"{', '.join(SOURCE_FORMATS)} of at most {MAX_PIXELS // 10**6} million pixels"
        raise ReconstructError(f"{name} is no usable picture ({error.reason}), wanted {wanted}; convert it") from error
    except Exception as error:  # the decoders raise many kinds on a damaged file
        raise ReconstructError(f"{name} does not decode ({short(error)}); save the picture again") from error
    return to_unit_range(resize(pixels, size)[None])[0]


@torch.inference_mode()
def reconstruct(
    tokenizer: Tokenizer, images: Tensor, lengths: Sequence[int], seed: int = 0, z: Tensor | None = None
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """images (N, 3, H, W) in [-1, 1] -> pictures (N, 3, H, W) and PSNR in dB (N,), both by k.

    seed: of a stochastic decoder's noise. z: (N, K, C), what is decoded; None: posterior means. Raises ReconstructError
    for a k that is not from 1 to K.
    """
    wrong = [k for k in lengths if not 1 <= k <= tokenizer.num_latents]
    if wrong:
        raise ReconstructError(
            f"got --latents {wrong[0]}, wanted 1 to {tokenizer.num_latents}, which is what this tokenizer has"
        )
    device = tokenizer.latent_mean.device
    generator = torch.Generator(device).manual_seed(seed)
    z = tokenizer.encode(images.to(device)) if z is None else z  # (N, K, C)
    pictures = {k: tokenizer.decode(z[:, :k], generator=generator).cpu() for k in lengths}
    return pictures, {k: psnr(picture, images) for k, picture in pictures.items()}


def table(names: Sequence[str], decibels: dict[int, Tensor]) -> list[str]:
    """Lines of text: a picture a row, a k a column, and the mean where there are several pictures."""
    rows = [["PSNR, dB", *(f"k = {k}" for k in decibels)]]
    rows += [[name, *(f"{values[i]:.2f}" for values in decibels.values())] for i, name in enumerate(names)]
    if len(names) > 1:
        rows.append(["mean", *(f"{values.mean():.2f}" for values in decibels.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m stage1_tokenizer reconstruct",
        description="Encode pictures, decode their first k latents, and write original and reconstructions as a grid.",
    )
    parser.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE", help=f"files: {', '.join(SOURCE_FORMATS)}")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="exported folder, or a Hub repository by id")
    parser.add_argument("--latents", type=int, nargs="+", metavar="K", help="prefix lengths (default: 1, 2, 4, ..., K)")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), help="PNG to write (default: %(default)s)")
    parser.add_argument("--device", default=default_device(), help="cpu or cuda (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.out.suffix.lower() != ".png":
            raise ReconstructError(f"got --out {options.out}, wanted a name that ends in .png; the grid is a PNG")
        tokenizer = Tokenizer.from_pretrained(options.tokenizer).to(options.device)
        lengths = options.latents or prefix_lengths(tokenizer.num_latents)
        images = torch.stack([load_picture(path, tokenizer.image_size) for path in options.pictures])
        pictures, decibels = reconstruct(tokenizer, images, lengths)
        scale = max(1, SHOWN_SIZE // tokenizer.image_size)
        rows = [torch.stack([image, *(by_k[i] for by_k in pictures.values())]) for i, image in enumerate(images)]
        image_grid(rows, scale).save(options.out)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(*table([path.name for path in options.pictures], decibels), f"grid: {options.out}", sep="\n")
    return 0
