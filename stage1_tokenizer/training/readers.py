"""Teach text tower and prefix reader of an exported tokenizer on the latents of all training pictures.

    python -m stage1_tokenizer readers --tokenizer runs/flickr8k/tokenizer --data runs/flickr8k/data

In a step of `fit` a caption is told from those of one small batch, since every picture is decoded. Here pictures are
encoded once, and a step contrasts 512 of them with 512 captions and decodes none. Encoder, decoder and latents
stay as they are, and so does the fingerprint: what changes is how well the words in them are read.

Letters: N pictures, K latents, C latent channels.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.reading.datamodule import ImageDataModule
from stage1_tokenizer.precision import default_device
from stage1_tokenizer.supervision import Supervision
from stage1_tokenizer.tokenizer import Tokenizer
from stage1_tokenizer.training.optim import warmup_flat_cosine
from stage1_tokenizer.training.options import OptimizerOptions

BATCH = 512


@torch.no_grad()
def encoded(tokenizer: Tokenizer, data: ImageDataModule, mirrored: bool) -> tuple[Tensor, Tensor, list[list[str]]]:
    """(mean, std) of the training pictures' posteriors before standardisation, (N,V,K,C) each, and their captions.

    mirrored: each picture twice, V = 2. Raises ValueError where a picture has no caption.
    """
    parts, captions, device = [], [], tokenizer.latent_mean.device
    total = len(data.split("train"))
    for at in tqdm(range(0, total, 100), desc="encode", disable=None, leave=False):
        batch = data.samples("train", list(range(at, min(at + 100, total))))
        images = batch["images"].to(device)
        views = [tokenizer.posterior(x) for x in ((images, images.flip(3)) if mirrored else (images,))]
        mean, std = (torch.stack(x, 1).cpu() for x in zip(*views, strict=True))  # (n,V,K,C)
        parts.append((mean, std))
        captions += [[caption for caption in texts if caption.strip()] for texts in batch["captions"]]
    if not all(captions):
        raise ValueError(f"{data.data_dir} has pictures without captions, wanted one of each at least; prepare others.")
    mean, std = (torch.cat(x) for x in zip(*parts, strict=True))
    scale = tokenizer.latent_scale.cpu()
    return mean * scale + tokenizer.latent_mean.cpu(), std * scale, captions


def teach_readers(
    text: Supervision, mean: Tensor, std: Tensor, captions: Sequence[Sequence[str]], steps: int, seed: int
) -> float:
    """Train `text` in place on draws of posteriors mean, std (N,V,K,C), each with any of its captions.

    Returns the loss of the last step.
    """
    optimizer = OptimizerOptions().build(text)
    rates = [group["lr"] for group in optimizer.param_groups]
    generator, loss, device = torch.Generator().manual_seed(seed), 0.0, next(text.parameters()).device
    text.train()
    for step in tqdm(range(steps), desc="readers", disable=None, leave=False):
        factor = warmup_flat_cosine(step, steps, 30, 0.3)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        rows = torch.randperm(len(mean), generator=generator)[:BATCH]
        view = torch.randint(mean.shape[1], (len(rows),), generator=generator)
        noise = torch.randn(len(rows), *mean.shape[2:], generator=generator)
        z = (mean[rows, view] + std[rows, view] * noise).to(device)  # (B,K,C)
        u = torch.rand(len(rows), generator=generator).tolist()
        chosen = [captions[i][int(x * len(captions[i]))] for i, x in zip(rows.tolist(), u, strict=True)]
        parts = text.losses(z, text.vocabulary.encode(chosen)[0].to(device))
        total = torch.stack([part for part in parts.values() if part.requires_grad]).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        loss = total.item()
    text.eval()
    return loss


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m stage1_tokenizer readers", description="Teach the text part of a tokenizer on all latents."
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="exported folder, or a Hub repository by id")
    parser.add_argument("--data", required=True, metavar="DIR", help="image shards with captions")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the export (default: the same)")
    parser.add_argument("--steps", type=int, default=400, help="of 512 pairs (default: %(default)s)")
    parser.add_argument("--mirror", action="store_true", help="mirrored pictures too; not where captions say left")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=default_device(), help="cpu or cuda (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        tokenizer = Tokenizer.from_pretrained(options.tokenizer).to(options.device)
        text = tokenizer.text_part()
        data = ImageDataModule(options.data, image_size=tokenizer.image_size)
        mean, std, captions = encoded(tokenizer, data, options.mirror)
        torch.manual_seed(options.seed)
        loss = teach_readers(text, mean, std, captions, options.steps, options.seed)
        out = tokenizer.save_pretrained(options.out or options.tokenizer)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"loss {loss:.3f} after {options.steps} steps", f"tokenizer: {out}", sep="\n")
    return 0
