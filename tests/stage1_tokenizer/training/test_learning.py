"""A tokenizer starts to learn at once: no plateau at the background of the scenes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from data.pictures.transforms import to_unit_range
from data.sources.scenes import Scenes
from stage1_tokenizer.precision import has_fast_bfloat16
from stage1_tokenizer.similarity import psnr
from stage1_tokenizer.training.optim import MuonAdamW, parameter_groups, warmup_flat_cosine
from tests.same_numbers import build

STEPS, BATCH = 110, 16
SMALL = ["--sizes.width=64", "--model.tokenizer.init_args.decoder.init_args.width=64"]


def scenes(start: int, stop: int) -> Tensor:
    pixels = Scenes(stop, seed=0).draw(np.arange(start, stop))[1]
    return to_unit_range(torch.from_numpy(pixels).permute(0, 3, 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("overlay", [None, "titok"])
def test_better_than_the_background_within_110_steps(overlay: str | None) -> None:
    configs = ["stage1/demo", "variants/no_text", *([f"variants/{overlay}"] if overlay else [])]
    tokenizer = build("stage1", configs, SMALL).tokenizer.train()
    optimizer = MuonAdamW(parameter_groups(tokenizer))
    rates = [group["lr"] for group in optimizer.param_groups]
    images, held_out = scenes(0, STEPS * BATCH), scenes(10_000, 10_200)
    for step in range(STEPS):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * warmup_flat_cosine(step, STEPS)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16(torch.device("cpu"))):
            parts, _ = tokenizer.losses(images[step * BATCH : (step + 1) * BATCH], step=step)
            loss = tokenizer.total(parts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        tokenizer.eval()
        reached = psnr(tokenizer.decode(tokenizer.encode(held_out)), held_out).mean()
        background = held_out.flatten(2).median(-1).values[..., None, None].expand_as(held_out)
        floor = psnr(background, held_out).mean()
        assert reached > floor + 0.25, f"{reached:.2f} dB, background {floor:.2f} dB"
