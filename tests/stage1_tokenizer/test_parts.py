"""Every encoder, bottleneck and decoder keeps the contract: exact prefixes, gradients, files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from stage1_tokenizer import Tokenizer
from stage1_tokenizer.bottleneck import Bottleneck, KLBottleneck
from stage1_tokenizer.decoder import Decoder, ViTDecoder
from stage1_tokenizer.encoder import Encoder, PatchTrunk, QFormerEncoder
from stage1_tokenizer.layers import Block
from stage1_tokenizer.prefixes import PrefixLengths, keep_mask
from stage1_tokenizer.training.optim import MuonAdamW, parameter_groups
from stage1_tokenizer.variants.convolutional import ConvDecoder, ConvTrunk
from stage1_tokenizer.variants.flow_decoder import FlowDecoder
from stage1_tokenizer.variants.normed import NoiseBottleneck, NormBottleneck
from stage1_tokenizer.variants.quantised import FSQBottleneck, VQBottleneck
from stage1_tokenizer.variants.timm_trunk import TimmTrunk
from stage1_tokenizer.variants.titok import TiTokEncoder
from tests.tiny import SIZE, WIDTH, C, K, awaken, pictures

TIMM = "vit_tiny_patch16_224"


def encoders() -> dict[str, Encoder]:
    return {
        "qformer": QFormerEncoder(PatchTrunk(SIZE, 4, WIDTH, 1, 2, stem_width=8), K, 2, 2),
        "masked patches": QFormerEncoder(PatchTrunk(SIZE, 4, WIDTH, 1, 2, stem_width=8, mask_ratio=0.5), K, 1, 2),
        "convolutions": QFormerEncoder(ConvTrunk(SIZE, (8, 16), (1, 1), WIDTH), K, 1, 2),
        "titok": TiTokEncoder(PatchTrunk(SIZE, 4, WIDTH, 0, 2, stem_width=8), K, 2, 2),
    }


def bottlenecks() -> dict[str, Bottleneck]:
    return {
        "kl": KLBottleneck(WIDTH, K, C),
        "norm": NormBottleneck(WIDTH, K, C),
        "noise": NoiseBottleneck(WIDTH, K, C),
        "fsq": FSQBottleneck(WIDTH, K, (8, 8, 5, 5)),
        "vq": VQBottleneck(WIDTH, K, C, codes=64),
    }


def decoders() -> dict[str, Decoder]:
    return {
        "vit": ViTDecoder(SIZE, 4, K, C, WIDTH, 1, 2, tail_channels=8, tail_depth=1),
        "convolutions": ConvDecoder(SIZE, K, C, (8, 16), (1, 1), WIDTH),
        "flow": FlowDecoder(SIZE, 4, K, C, WIDTH, 1, 2, tail_channels=8, tail_depth=1),
    }


@pytest.mark.parametrize("decoder", decoders())
@pytest.mark.parametrize("bottleneck", bottlenecks())
@pytest.mark.parametrize("encoder", encoders())
def test_every_combination_keeps_the_contract(encoder: str, bottleneck: str, decoder: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(SIZE, encoders()[encoder], bottlenecks()[bottleneck], decoders()[decoder], PrefixLengths(K))
    awaken(tokenizer)
    parts, reconstruction = tokenizer.train().losses(pictures(4))
    tokenizer.total(parts).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())
    assert reconstruction.shape == (4, 3, SIZE, SIZE)

    tokenizer.eval()
    full = tokenizer.encode(pictures())
    for k in (1, 3, K):
        torch.testing.assert_close(tokenizer.encode(pictures(), k), full[:, :k], atol=1e-5, rtol=0)
    tokenizer.save_pretrained(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.encode(pictures()), full, atol=0, rtol=0)
    x, y = (m.decode(full[:, :2], generator=torch.Generator().manual_seed(3)) for m in (tokenizer, loaded))
    torch.testing.assert_close(x, y, atol=0, rtol=0)


@pytest.mark.parametrize(("channels", "depths"), [((8,), (1,)), ((8, 12, 16), (1, 0, 2))])
def test_convolutions_start_from_a_base_and_correct_it_at_every_level(
    channels: tuple[int, ...], depths: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    decoder = ConvDecoder(SIZE, K, C, channels, depths, WIDTH, base=True)
    awaken(decoder)
    z, keep = torch.randn(3, K, C), torch.ones(3, K, dtype=torch.bool)
    base = pictures(3).requires_grad_()
    decoder(z, keep, base).sum().backward()
    assert base.grad is not None and (base.grad - 1).abs().max() > 0.01, "more than the sum that it ends in"
    for level in decoder.base:
        assert isinstance(level, torch.nn.Conv2d) and level.weight.grad is not None and level.weight.grad.any()
    hidden = torch.zeros(3, K, dtype=torch.bool)
    assert torch.equal(decoder(z, hidden, base), decoder(-z, hidden, base)), "hidden latents do not come through"
    trunk = ConvTrunk(SIZE, channels, depths, WIDTH)
    assert trunk(pictures()).shape == (5, trunk.num_patches, WIDTH)
    assert trunk.num_patches == (SIZE // 2 ** len(channels)) ** 2


def test_convolutions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got image_size 24 and 4 levels, wanted a multiple of 2\^levels"):
        ConvDecoder(24, K, C, (8, 8, 8, 8), (1, 1, 1, 1), WIDTH)
    with pytest.raises(ValueError, match=r"got channels \(8, 16\) and depths \(1,\)"):
        ConvTrunk(SIZE, (8, 16), (1,), WIDTH)
    with pytest.raises(ValueError, match=r"wanted \(B, 3, 16, 16\)"):
        ConvTrunk(SIZE, (8,), (1,), WIDTH)(pictures(2, 32))


def test_flow_decoder_draws_what_the_latents_say_and_either_picture_where_they_say_nothing() -> None:
    decoder = decoders()["flow"]
    z = torch.randn(2, K, C).repeat_interleave(32, 0)
    images = pictures(2).repeat_interleave(32, 0)
    told, untold = (keep_mask(torch.full((64,), k), K) for k in (K, 0))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=5e-3)
    for step in range(300):
        loss = decoder.losses(z, told if step % 2 else untold, images)[1].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def share_nearer_to_the_right_one(keep: torch.Tensor) -> float:
        drawn = decoder.decode(z, keep, generator=torch.Generator().manual_seed(0))
        right, wrong = (drawn - images).square().mean((1, 2, 3)), (drawn - images.flip(0)).square().mean((1, 2, 3))
        assert (torch.minimum(right, wrong) < 0.35 * torch.maximum(right, wrong)).float().mean() > 0.8, "no averages"
        return (right < wrong).float().mean().item()

    assert share_nearer_to_the_right_one(told) == 1.0
    assert 0.2 < share_nearer_to_the_right_one(untold) < 0.8


def test_flow_decoder_corrects_the_linear_path_where_it_is_told_to() -> None:
    torch.manual_seed(2)
    decoder = FlowDecoder(SIZE, 4, K, C, WIDTH, 1, 2, tail_channels=8, tail_depth=1, base=True)
    plain = decoders()["flow"]
    z, keep, base = torch.randn(3, K, C), torch.ones(3, K, dtype=torch.bool), pictures(3)
    x_t, t = torch.randn(3, 3, SIZE, SIZE), torch.full((3,), 0.5)
    tokens = decoder.tokens(z, keep)
    change = decoder(x_t, t, tokens, base + 0.1) - decoder(x_t, t, tokens, base)
    assert (change.mean() - 0.1).abs() < 0.05, "the base comes through"

    def draw(d: FlowDecoder, base: torch.Tensor | None) -> torch.Tensor:
        with torch.no_grad():
            return d.decode(z, keep, base, generator=torch.Generator().manual_seed(0))

    assert isinstance(plain, FlowDecoder) and torch.equal(draw(plain, base), draw(plain, None))
    assert not torch.equal(draw(decoder, base), draw(decoder, base.flip(0)))
    decoder.losses(z, keep, pictures(3), base)[1].mean().backward()
    assert decoder.base is not None and decoder.base.weight.grad is not None and decoder.base.weight.grad.any()
    with pytest.raises(ValueError, match="linear_path"):
        decoder.decode(z, keep)


def test_noise_is_for_training_only() -> None:
    bottleneck = NoiseBottleneck(WIDTH, K, C)
    h = torch.randn(2, K, WIDTH)
    assert (bottleneck(h)[0] - bottleneck(h)[0]).abs().max() > 0.01
    mean, std = bottleneck.posterior(h)
    assert not std.any() and torch.equal(mean, bottleneck.posterior(h)[0])
    torch.testing.assert_close(mean.var(-1, correction=0), torch.ones(2, K), atol=1e-3, rtol=0)


def test_timm_trunk_loads_weights_from_a_file_and_gives_patches_only(tmp_path: Path) -> None:
    torch.manual_seed(1)
    reference = timm.create_model(TIMM, img_size=32, num_classes=0).eval()
    save_file(reference.state_dict(), tmp_path / "vit.safetensors")
    trunk = TimmTrunk(TIMM, 32, checkpoint=str(tmp_path / "vit.safetensors"), frozen=True).eval()
    images = pictures(2, 32)
    assert trunk(images).shape == (2, trunk.num_patches, trunk.width) and trunk.num_patches == 4
    normalised = ((images + 1) / 2 - trunk.mean) / trunk.std
    torch.testing.assert_close(trunk(images), reference.forward_features(normalised)[:, 1:], atol=1e-5, rtol=0)
    assert not any(p.requires_grad for p in trunk.parameters())
    encoder = QFormerEncoder(trunk, K, 1, 2).eval()
    awaken(encoder)
    torch.testing.assert_close(encoder(images, 2), encoder(images)[:, :2], atol=1e-5, rtol=0)


def timm_file(path: Path, name: str, **options: Any) -> Any:
    """A random timm model with a head, in eval mode; its weights are in the file."""
    torch.manual_seed(4)
    model = timm.create_model(name, num_classes=5, **options).eval()
    state = model.state_dict()
    save_file(state, path) if path.suffix == ".safetensors" else torch.save({"state_dict": state, "epoch": 3}, path)
    return model


@torch.no_grad()
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_an_ordinary_timm_checkpoint_loads_at_any_size(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"vit.{ending}"
    model = timm_file(file, TIMM, img_size=32)
    trunk = TimmTrunk(TIMM, 32, checkpoint=str(file)).eval()
    images = pictures(2, 64)
    small, large = (((F.interpolate(images, s) + 1) / 2 - trunk.mean) / trunk.std for s in (32, 64))
    torch.testing.assert_close(trunk(F.interpolate(images, 32)), model.forward_features(small)[:, 1:], atol=0, rtol=0)
    # at 64 pixels timm reads the same file as its own pretrained weights
    overlay = {"file": str(file), "num_classes": 5}
    wider = timm.create_model(TIMM, True, pretrained_cfg_overlay=overlay, img_size=64, num_classes=0).eval()
    trunk = TimmTrunk(TIMM, 64, checkpoint=str(file)).eval()
    torch.testing.assert_close(trunk(images), wider.forward_features(large)[:, 1:], atol=0, rtol=0)
    assert trunk.num_patches == 16


@pytest.mark.parametrize(
    ("other", "options", "said"),
    [
        (TIMM, {"patch_size": 8}, "got patch_embed.proj.weight of size .*, wanted .* differ"),
        (TIMM, {"depth": 3}, "got blocks.3.norm1.weight of size None, wanted"),
        ("vit_small_patch16_224", {"depth": 3}, "got cls_token of size .*, wanted"),
        ("deit_tiny_distilled_patch16_224", {"depth": 3}, ""),  # timm fails to make sense of it
        ("resnet10t", {"img_size": None}, "got cls_token of size None, wanted"),
    ],
)
def test_weights_of_another_model_are_refused(other: str, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    timm_file(tmp_path / "other.safetensors", other, **{"img_size": 32, **options})
    with pytest.raises(ValueError, match=rf"holds another model than {TIMM}.*{said}.*; set `name` to that model"):
        TimmTrunk(TIMM, 32, checkpoint=str(tmp_path / "other.safetensors"))


def test_files_that_are_no_plain_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": Path("/")}, tmp_path / "object.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    (tmp_path / "cut.pth").write_bytes(b"PK")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.pth")
    for file in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match="cannot be read as weights of .*; wanted a .safetensors file or a .pth"):
            TimmTrunk(TIMM, 32, checkpoint=str(file))
    with pytest.raises(ValueError, match="wanted one of the two"):
        TimmTrunk(TIMM, 32, checkpoint=str(tmp_path / "cut.pth"), pretrained=True)


@torch.no_grad()
def test_timm_trunk_hides_patches_in_training_and_keeps_their_places() -> None:
    trunk = TimmTrunk(TIMM, 64, mask_ratio=1.0).eval()
    seen: list[torch.Tensor] = []
    trunk.model.patch_embed.register_forward_hook(lambda module, inputs, out: seen.append(out))
    images = pictures(8, 64)
    assert torch.equal(trunk(images), trunk(images))
    assert trunk.train()(images).shape == (8, 16, trunk.width)
    whole, _, part = seen  # (B,N,D) each
    grey = trunk.model.patch_embed(torch.zeros(1, 3, 64, 64))
    hidden = torch.isclose(part, grey, atol=1e-5).all(-1)
    assert hidden.any() and not hidden.all(), "some are grey squares, which the model reads as the mean colour"
    torch.testing.assert_close(part[~hidden], whole[~hidden], atol=1e-5, rtol=0)  # the others are where they were
    assert "mask_ratio" not in trunk.spec["init_args"], "exports do not depend on how they were trained"
    with pytest.raises(ValueError, match="mask_ratio 1.5, wanted"):
        TimmTrunk(TIMM, 32, mask_ratio=1.5)
    with pytest.raises(ValueError, match="frozen: true and mask_ratio 0.5"):
        TimmTrunk(TIMM, 32, frozen=True, mask_ratio=0.5)


def checkpointed(part: str, on: bool) -> tuple[torch.nn.Module, Callable[[torch.nn.Module], torch.Tensor]]:
    """A part that trains with or without checkpointing, all its paths alive, and a scalar that it computes."""
    torch.manual_seed(5)
    images = pictures(2, 32)
    patches = PatchTrunk(32, 4, WIDTH, 2, 2, stem_width=8, checkpointing=on)
    shape = {"patch_size": 4, "num_latents": K, "latent_dim": C, "width": WIDTH, "depth": 2, "tail_channels": 8}
    module: torch.nn.Module
    if part in ("vit", "flow"):
        module = (ViTDecoder if part == "vit" else FlowDecoder)(32, **shape, checkpointing=on)  # type: ignore[arg-type]
        z, keep = torch.randn(2, K, C), torch.ones(2, K, dtype=torch.bool)
        torch.manual_seed(6)
        awaken(module)
        return module, lambda m: m.losses(z, keep, images)[1].mean()  # type: ignore[operator]
    if part == "trunk":
        module = patches
    elif part == "qformer":
        module = QFormerEncoder(patches, K, 2, 2, checkpointing=on)
    elif part == "titok":
        module = TiTokEncoder(PatchTrunk(32, 4, WIDTH, 0, 2, stem_width=8), K, 2, 2, checkpointing=on)
    else:
        module = TimmTrunk(TIMM, 32, checkpointing=on)
    torch.manual_seed(6)
    awaken(module)
    return module, lambda m: m(images).square().mean()


@pytest.mark.parametrize("part", ["trunk", "qformer", "titok", "vit", "flow", "timm"])
def test_checkpointing_keeps_fewer_activations_and_the_same_gradients(part: str) -> None:
    losses, gradients, kept, specs = [], [], [], []
    for on in (False, True):
        module, objective = checkpointed(part, on)
        module.train()
        sizes: list[int] = []
        torch.manual_seed(7)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):  # type: ignore[misc]
            loss = objective(module)
        if isinstance(module, Decoder):  # an adaptive weight looks at the last layer before the whole goes backward
            assert torch.autograd.grad(loss, module.last_weight, retain_graph=True)[0].any()
        loss.backward()
        losses.append(loss.detach())
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
        kept.append(sum(sizes))
        specs.append(module.spec)
        for block in module.modules():
            assert not isinstance(block, Block) or block.checkpointing == on or part == "titok"
    assert gradients[0] and any(g.any() for g in gradients[0].values())
    torch.testing.assert_close(losses[0], losses[1], atol=0, rtol=0)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-5)
    assert kept[1] < 0.6 * kept[0], kept
    assert specs[0] == specs[1], "what is exported, and its fingerprint, is the same"


def test_checkpointing_can_be_compiled() -> None:
    module, objective = checkpointed("qformer", True)
    objective(module).backward()
    plain = {n: p.grad for n, p in module.named_parameters()}
    module.zero_grad()
    torch._dynamo.reset()
    module.compile(backend="aot_eager", fullgraph=True)
    objective(module).backward()
    torch.testing.assert_close({n: p.grad for n, p in module.named_parameters()}, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("decoder", decoders())
def test_weight_decay_shrinks_maps_and_leaves_everything_else_alone(decoder: str) -> None:
    module = torch.nn.ModuleDict({"encoder": encoders()["masked patches"], "decoder": decoders()[decoder]})
    awaken(module)
    groups = {group["group"]: group["params"] for group in parameter_groups(module)}
    names = {p: name for name, p in module.named_parameters()}
    decayed = {names[p] for p in groups["decay"]}
    assert {"encoder.trunk.stem.weight", "encoder.trunk.patch.weight", "encoder.mix.weight"} <= decayed
    last = {"decoder.out.weight"} if decoder == "convolutions" else {"decoder.patch.weight", "decoder.tail.out.weight"}
    assert {"decoder.latent.weight"} | last <= decayed
    plain = {names[p].rpartition(".")[2] for p in groups["plain"]}
    assert plain <= {"bias", "gain", "weight", "queries", "position", "null"}
    assert all("norm" in names[p] for p in groups["plain"] if names[p].endswith("weight")), "only those of norms"

    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = MuonAdamW(parameter_groups(module), lr=0.1, weight_decay=0.5)
    optimizer.step()
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if name in decayed else 1.0), atol=1e-6, rtol=1e-5)


def test_weight_decay_of_a_timm_trunk_follows_timm() -> None:
    trunk = TimmTrunk(TIMM, 32)
    decayed = {n for n, p in trunk.named_parameters() if getattr(p, "group", "plain") == "decay"}
    assert {"model.patch_embed.proj.weight", "model.blocks.0.attn.qkv.weight"} <= decayed
    assert not any(name.endswith(("bias", "pos_embed", "cls_token")) or ".norm" in name for name in decayed)


def test_missing_weights_are_an_error() -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; wanted weights of"):
        TimmTrunk(TIMM, 32, checkpoint="nowhere.safetensors")
