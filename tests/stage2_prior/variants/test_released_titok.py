"""A released TiTok as a latent space: the published network's numbers, safetensors only, an export of its own."""

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.__main__ import main as data_main
from data.reading.datamodule import LatentDataModule
from stage2_prior.__main__ import main
from stage2_prior.latent_space import PriorError, load_space
from stage2_prior.variants import released_titok
from stage2_prior.variants.released_titok import ReleasedTiTok
from tests.tiny import TINY_CLIP, pictures, tiny_clip

SIZE, PATCH, K, C, HEADS, TEXT = 16, 4, 5, 3, 2, (20, 32)
N = (SIZE // PATCH) ** 2
WIDTHS = {"encoder": (16, 2), "decoder": (24, 1)}  # width, depth


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(released_titok.SIZES, "small", [16, 2, HEADS])
    monkeypatch.setitem(released_titok.SIZES, "large", [24, 1, HEADS])
    monkeypatch.setattr(released_titok, "TEXT_MODEL", TINY_CLIP)


def release(folder: Path, text: bool = False, **changed: Any) -> Path:
    """A random model as its authors publish it: names and shapes of the released files, small sizes."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"latent_tokens": (K, WIDTHS["encoder"][0])}
    for part, (d, depth) in WIDTHS.items():
        shapes |= {f"{part}.class_embedding": (1, d), f"{part}.positional_embedding": (N + 1, d)}
        shapes[f"{part}.latent_token_positional_embedding"] = (K, d)
        for norm in ("ln_pre", "ln_post", *(f"transformer.{i}.ln_{j}" for i in range(depth) for j in (1, 2))):
            shapes |= {f"{part}.{norm}.weight": (d,), f"{part}.{norm}.bias": (d,)}
        for i in range(depth):
            block = f"{part}.transformer.{i}"
            shapes |= {f"{block}.attn.in_proj_weight": (3 * d, d), f"{block}.attn.in_proj_bias": (3 * d,)}
            for name, rows, columns in (("attn.out_proj", d, d), ("mlp.c_fc", 4 * d, d), ("mlp.c_proj", d, 4 * d)):
                shapes |= {f"{block}.{name}.weight": (rows, columns), f"{block}.{name}.bias": (rows,)}
    encoder, decoder = WIDTHS["encoder"][0], WIDTHS["decoder"][0]
    for name, shape in {
        "encoder.patch_embed": (encoder, 3, PATCH, PATCH),
        "encoder.conv_out": (2 * C, encoder, 1, 1),
        "decoder.decoder_embed": (decoder, C),
        "decoder.ffn.0": (3 * PATCH**2, decoder, 1, 1),
        "decoder.conv_out": (3, 3, 3, 3),
        **({"decoder.text_guidance_proj": (decoder, TEXT[1])} if text else {}),
    }.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes["decoder.mask_token"] = (1, 1, decoder)
    if text:
        shapes["decoder.text_guidance_positional_embedding"] = (TEXT[0], decoder)
    save_file({name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    model = {"quantize_mode": "vae", "token_size": C, "num_latent_tokens": K, "is_legacy": False}
    model |= {"vit_enc_model_size": "small", "vit_dec_model_size": "large", "finetune_decoder": False}
    model |= {"vit_enc_patch_size": PATCH, "vit_dec_patch_size": PATCH, **changed}
    config = {"model": {"vq_model": model}, "dataset": {"preprocessing": {"crop_size": SIZE}}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def published(w: dict[str, Tensor], part: str, x: Tensor) -> Tensor:
    """Blocks and norms of the published network, written out: x (n,D) of one picture -> (n,D)."""

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{part}.{name}.weight"] + w[f"{part}.{name}.bias"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{part}.{name}.weight"].T + w[f"{part}.{name}.bias"]

    x = norm("ln_pre", x)
    for i in range(WIDTHS[part][1]):
        block = f"transformer.{i}"
        y = norm(f"{block}.ln_1", x)
        qkv = y @ w[f"{part}.{block}.attn.in_proj_weight"].T + w[f"{part}.{block}.attn.in_proj_bias"]
        q, k, v = (part.unflatten(1, (HEADS, -1)).transpose(0, 1) for part in qkv.chunk(3, -1))  # (H,n,D/H)
        seen = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + linear(f"{block}.attn.out_proj", seen.transpose(0, 1).flatten(1))
        hidden = linear(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", x))
        x = x + linear(f"{block}.mlp.c_proj", hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)))
    return norm("ln_post", x)


def embedded(w: dict[str, Tensor], part: str, grid: Tensor, latents: Tensor, text: Tensor | None = None) -> Tensor:
    """What goes into the blocks: class, grid (N,D), latents (K,D), text (L,D)."""
    cells = torch.cat([w[f"{part}.class_embedding"], grid]) + w[f"{part}.positional_embedding"]
    line = latents + w[f"{part}.latent_token_positional_embedding"]
    return torch.cat([cells, line, *([] if text is None else [text])])


@torch.no_grad()
@pytest.mark.parametrize("text", [False, True], ids=["titok", "text-aware"])
def test_numbers_are_those_of_the_published_network(text: bool, tmp_path: Path) -> None:
    clip = tiny_clip(tmp_path)
    space = ReleasedTiTok(SIZE, str(release(tmp_path, text)), clip=str(clip), caption="A red circle.").eval()
    w, images = load_file(tmp_path / "model.safetensors"), pictures(3)
    mean, std = space.posterior(images)
    assert mean.shape == std.shape == (3, K, C) == (3, space.num_latents, space.latent_dim)

    patches = F.conv2d((images[1:2] + 1) / 2, w["encoder.patch_embed.weight"], w["encoder.patch_embed.bias"], PATCH)
    x = published(w, "encoder", embedded(w, "encoder", patches[0].flatten(1).T, w["latent_tokens"]))[1 + N :]
    moments = x @ w["encoder.conv_out.weight"].flatten(1).T + w["encoder.conv_out.bias"]
    torch.testing.assert_close(mean[1], moments[:, :C], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std[1], (moments[:, C:] / 2).exp(), rtol=1e-4, atol=1e-5)

    read = None
    if text:
        whole = open_clip.create_model(TINY_CLIP, pretrained=str(clip), force_custom_text=True).eval()
        whole.text.output_tokens = True
        _, tokens = whole.text(open_clip.tokenize(["A red circle."], context_length=TEXT[0]))
        read = tokens[0] @ w["decoder.text_guidance_proj.weight"].T + w["decoder.text_guidance_proj.bias"]
        read = read + w["decoder.text_guidance_positional_embedding"]
    line = mean[1] @ w["decoder.decoder_embed.weight"].T + w["decoder.decoder_embed.bias"]
    x = embedded(w, "decoder", w["decoder.mask_token"][0].expand(N, -1), line, read)
    x = published(w, "decoder", x)[1 : 1 + N]
    x = x @ w["decoder.ffn.0.weight"].flatten(1).T + w["decoder.ffn.0.bias"]
    side = SIZE // PATCH
    # a patch is laid out as rows, columns, colours
    grid = x.reshape(side, side, PATCH, PATCH, 3).permute(4, 0, 2, 1, 3).reshape(1, 3, SIZE, SIZE)
    wanted = F.conv2d(grid, w["decoder.conv_out.weight"], w["decoder.conv_out.bias"], padding=1)[0] * 2 - 1
    torch.testing.assert_close(space.join(mean)[1], wanted, rtol=1e-4, atol=1e-4)

    assert space.fit_statistics([images]) == 3
    z = space.encode(images)
    assert z.mean(0).abs().max() < 1e-4
    torch.testing.assert_close(space.decode(z)[1], wanted.clamp(-1, 1), rtol=1e-4, atol=1e-4)


def test_an_export_needs_the_folder_no_more_and_has_an_identity(tmp_path: Path) -> None:
    words = ["prepare", "--source", "scenes", "--num", "24", "--size", str(SIZE), "--val-fraction", "0.25"]
    assert data_main([*words, "--workers", "1", "--out", str(tmp_path / "data")]) == 0
    own = tmp_path / "own"
    own.mkdir()
    release(own, text=True)
    run = ["titok", "--run_dir", str(tmp_path), "--data", str(tmp_path / "data"), "--image_size", str(SIZE)]
    assert main([*run, "--folder", str(own), "--clip", str(tiny_clip(own))]) == 0
    shutil.rmtree(own)
    space, data = load_space(tmp_path / "tokenizer"), LatentDataModule(str(tmp_path / "latents"))
    assert isinstance(space, ReleasedTiTok) and space.text_tokens.abs().sum() > 0
    assert data.latent_info["tokenizer_fingerprint"] == space.fingerprint
    held = data.arrays("val")
    assert held["latents"].shape[1:] == (K, C) and (held["latents_std"] > 0).all()
    assert space.decode(held["latents"][:, :2]).shape[1:] == (3, SIZE, SIZE)
    config = (tmp_path / "tokenizer" / "config.json").read_text()
    assert str(tmp_path) not in config and json.loads(config)["class_path"] == "stage2_prior.ReleasedTiTok"
    for changed in (space.text_tokens, space.queries, space.smooth.bias):
        with torch.no_grad():
            before = space.fingerprint
            changed.view(-1)[0] += 0.1  # type: ignore[union-attr]
        assert space.fingerprint != before


def test_folders_of_another_kind_are_refused(tmp_path: Path) -> None:
    for name, content, message in (
        ("none", None, "no config.json"),
        ("other", '{"_class_name": "UNet2DModel"}', "not that of a TiTok"),
        ("list", "[]", "not that of a TiTok"),
        ("broken", "{", "not that of a TiTok"),
    ):
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "config.json").write_text(content)
        with pytest.raises(PriorError, match=message):
            ReleasedTiTok(SIZE, str(tmp_path / name))
    for absurd in ({"vit_enc_patch_size": 0}, {"num_latent_tokens": "many"}, {"vit_enc_model_size": "huge"}):
        with pytest.raises(PriorError, match="not that of a TiTok"):
            ReleasedTiTok(SIZE, str(release(tmp_path, **absurd)))
    found = json.loads((release(tmp_path) / "config.json").read_text())
    del found["model"]["vq_model"]["vit_dec_patch_size"]
    (tmp_path / "config.json").write_text(json.dumps(found))
    with pytest.raises(PriorError, match="not that of a TiTok"):
        ReleasedTiTok(SIZE, str(tmp_path))
    for changed in ({"quantize_mode": "vq"}, {"is_legacy": True}, {"vit_dec_patch_size": 8}):
        with pytest.raises(PriorError, match="wanted one with a KL bottleneck"):
            ReleasedTiTok(SIZE, str(release(tmp_path, **changed)))
    for changed in ({"num_latent_tokens": K + 1}, {"token_size": C + 1}, {"vit_enc_model_size": "large"}):
        with pytest.raises(PriorError, match="not those of its config"):
            ReleasedTiTok(SIZE, str(release(tmp_path, **changed)))
    with pytest.raises(PriorError, match="set image_size to 16"):
        ReleasedTiTok(32, str(release(tmp_path)))
    with pytest.raises(PriorError, match="set clip to a file"):
        ReleasedTiTok(SIZE, str(release(tmp_path, text=True)))
    (tmp_path / "model.safetensors").write_bytes(b"never run")
    with pytest.raises(PriorError, match="cannot be read"):
        ReleasedTiTok(SIZE, str(tmp_path))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(PriorError, match="can run code"):
        ReleasedTiTok(SIZE, str(tmp_path))
    for arguments in ({}, {"folder": str(tmp_path), "config": {}}):
        with pytest.raises(PriorError, match="give the folder"):
            ReleasedTiTok(SIZE, **arguments)  # type: ignore[arg-type]
