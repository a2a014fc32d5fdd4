"""Speed of the two models of a config pair: encode, decode, both training steps, sampling with guidance and decoding.

The networks are built from the configs and not trained: speed does not depend on the weights.
"""

from pathlib import Path
from typing import Any

import torch
import yaml

from stage1_tokenizer.precision import matmul_dtype
from stage1_tokenizer.training.optim import MuonAdamW, parameter_groups
from tests.benchmarks.measure import Row, matmul_peak, measure
from tests.same_numbers import build

CAPTION = "a small red circle above a large blue star on a white background"


def model_rows(
    stage1: Path, stage2: Path, device: torch.device, seconds: float, batch: int | None = None
) -> tuple[dict[str, Any], list[Row]]:
    """What was measured with (format, peak, threads), and one row for each thing measured.

    stage1, stage2: config files. seconds: time spent on each row. batch: pictures per call; None: as the configs say.
    """
    first, second = (yaml.safe_load(path.read_text()) for path in (stage1, stage2))
    tokenizer = build("stage1", [str(stage1)], []).tokenizer.to(device)
    prior = build("stage2", [str(stage2)], []).prior.to(device)
    for vocabulary in (tokenizer.vocabulary, prior.vocabulary):
        vocabulary.fit([CAPTION])
    dtype = matmul_dtype(device)
    peak = matmul_peak(dtype, device)
    size, guidance = tokenizer.image_size, second["model"]["sampling"]["guidance"]
    val = batch or first["data"]["val_batch_size"]
    batch1, batch2 = batch or first["data"]["batch_size"], batch or second["data"]["batch_size"]

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def pictures(n: int) -> torch.Tensor:
        return torch.rand(n, 3, size, size, device=device) * 2 - 1

    images, z = pictures(val), torch.randn(val, tokenizer.num_latents, tokenizer.latent_dim, device=device)
    captions = [CAPTION] * val

    @torch.inference_mode()
    def encode() -> None:
        with autocast():
            tokenizer.encode(images)

    @torch.inference_mode()
    def decode() -> None:
        with autocast():
            tokenizer.decode(z)

    @torch.inference_mode()
    def sample() -> None:
        with autocast():
            tokenizer.decode(prior.sample(captions, guidance))

    train_images, train_z = pictures(batch1), z.repeat(1 + batch2 // val, 1, 1)[:batch2]
    ids = tokenizer.vocabulary.encode([CAPTION] * batch1)[0].to(device)
    words = prior.encode_text([CAPTION] * batch2)
    optimizers = [MuonAdamW(parameter_groups(m), lr=1e-4, matrix_lr=1e-4) for m in (tokenizer, prior)]

    def tokenizer_step() -> None:
        with autocast():
            loss = tokenizer.total(tokenizer.losses(train_images, ids, 0)[0])  # step 0 is one with the text loss
        loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()

    def prior_step() -> None:
        with autocast():
            loss = prior.losses(train_z, words).mean()
        loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()

    rows = []
    tokenizer.eval(), prior.eval()
    rows.append(measure("encode", encode, val, peak, device, seconds))
    rows.append(measure("decode", decode, val, peak, device, seconds))
    rows.append(measure("sample and decode, guided", sample, val, peak, device, seconds))
    tokenizer.train(), prior.train()
    rows.append(measure("tokenizer step, with text", tokenizer_step, batch1, peak, device, seconds))
    rows.append(measure("prior step", prior_step, batch2, peak, device, seconds))
    setting = {
        "configs": [stage1.as_posix(), stage2.as_posix()],
        "format": str(dtype).removeprefix("torch."),
        "matmul_peak_flops": peak,
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    return setting, rows
