"""Checkpointing: fewer activations, the same gradients."""

from collections.abc import Callable

import pytest
import torch

from stage1_tokenizer.decoder import Decoder, ViTDecoder
from stage1_tokenizer.encoder import PatchTrunk, QFormerEncoder
from stage1_tokenizer.layers import Block
from stage1_tokenizer.variants.flow_decoder import FlowDecoder
from stage1_tokenizer.variants.timm_trunk import TimmTrunk
from stage1_tokenizer.variants.titok import TiTokEncoder
from tests.tiny import WIDTH, C, K, awaken, pictures

TIMM = "vit_tiny_patch16_224"


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
