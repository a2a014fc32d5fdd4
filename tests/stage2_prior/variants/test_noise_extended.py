"""A noise-extended prior: its mask, its copies, its sampling."""

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.flow import logit_normal_times
from stage2_prior.guidance import Guidance, RisingGuidance
from stage2_prior.heads.flow import CleanOutput, NextLevelOutput, Output, VelocityOutput
from stage2_prior.heads.solvers import Midpoint
from stage2_prior.orders import (
    noise_extended_blocks,
    noise_extended_mask,
)
from stage2_prior.variants.noise_extended import NoiseExtendedPrior
from tests.small_priors import CAPTIONS, C, K, awake, parts


def noise_extended(output: Output | None = None) -> NoiseExtendedPrior:
    vocabulary, backbone, _ = parts()
    prior = awake(NoiseExtendedPrior(K, C, vocabulary, backbone, output=output))
    assert isinstance(prior, NoiseExtendedPrior)
    return prior


# -- noise-extended ---------------------------------------------------------------------------------------------------


def test_noise_extended_mask_is_as_drawn() -> None:
    mask = noise_extended_mask(torch.tensor([[True, False]]), num_latents=2, copies=2)[0, 0].int()
    assert mask.tolist() == [
        # w  pad z1 z2 a1 a2 b1 b2
        [1, 0, 0, 0, 0, 0, 0, 0],  # a word
        [1, 0, 0, 0, 0, 0, 0, 0],  # padding asks, nobody asks it
        [1, 0, 1, 0, 0, 0, 0, 0],  # clean 1
        [1, 0, 1, 1, 0, 0, 0, 0],  # clean 2
        [1, 0, 0, 0, 1, 0, 0, 0],  # first copy of 1: not the clean 1
        [1, 0, 1, 0, 0, 1, 0, 0],  # first copy of 2
        [1, 0, 0, 0, 0, 0, 1, 0],
        [1, 0, 1, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize(("num_latents", "copies", "words"), [(6, 2, [3, 1]), (70, 3, [5, 2])])
def test_the_blocks_of_flex_attention_hold_the_pairs_of_the_dense_mask(
    num_latents: int, copies: int, words: list[int]
) -> None:
    text_mask = torch.arange(max(words)) < torch.tensor(words)[:, None]
    dense = noise_extended_mask(text_mask, num_latents, copies)
    blocks = noise_extended_blocks(text_mask, num_latents, copies)
    at = torch.arange(dense.shape[-1])
    for b in range(len(words)):
        assert torch.equal(blocks.mask_mod(torch.tensor(b), torch.tensor(0), at[:, None], at), dense[b, 0])
    side = blocks.BLOCK_SIZE[0]
    padded = torch.nn.functional.pad(dense, (0, -len(at) % side, 0, -len(at) % side))
    seen = padded.unflatten(-1, (-1, side)).unflatten(-3, (-1, side)).any(-1).any(-2)  # (B,1,block,block)
    assert torch.equal(blocks.to_dense().bool(), seen)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_the_velocities_of_the_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its unfused CPU form; what CUDA compiles is the same function of the same mask."""
    prior = noise_extended()
    z, x_t, t = torch.randn(3, K, C), torch.randn(3, 2, K, C), torch.rand(3, 2, K)
    with torch.no_grad():
        text = prior.encode_text(CAPTIONS)
        dense = prior.velocities(z, x_t, t, text)
        monkeypatch.setattr("stage2_prior.variants.noise_extended.noise_extended_mask", noise_extended_blocks)
        torch.testing.assert_close(prior.velocities(z, x_t, t, text), dense, rtol=0, atol=1e-5)
        silent = prior.without_caption(text, torch.ones(3, dtype=torch.bool))
        assert (prior.velocities(z, x_t, t, silent) - dense).abs().max() > 1e-3  # control


def test_a_copy_sees_earlier_clean_latents_and_itself_and_nothing_else() -> None:
    """By derivatives: which inputs move which velocities."""
    prior = noise_extended()
    z, x_t = torch.randn(1, K, C, requires_grad=True), torch.randn(1, 2, K, C, requires_grad=True)
    t, text = torch.rand(1, 2, K), prior.encode_text(CAPTIONS[:1])
    v = prior.velocities(z, x_t, t, text)
    for copy in range(2):
        for i in range(K):
            by_clean, by_copy = torch.autograd.grad(v[0, copy, i].sum(), (z, x_t), retain_graph=True)
            reached = by_clean[0].abs().amax(-1) > 0  # (K,)
            assert reached.tolist() == [j < i for j in range(K)]
            own = torch.zeros(2, K, dtype=torch.bool)
            own[copy, i] = True
            assert torch.equal(by_copy[0].abs().amax(-1) > 0, own)


@pytest.mark.parametrize(
    ("guidance", "output"),
    [
        (1.0, None),
        (3.0, None),
        (RisingGuidance(3.0), None),
        (Guidance(3.0, low=0.2, high=0.6), None),
        (3.0, CleanOutput()),
        (3.0, NextLevelOutput(4)),
    ],
    ids=["1", "3", "rising", "interval", "clean", "next level"],
)
def test_noise_extended_sampling_with_the_cache_equals_the_parallel_forward(
    guidance: float | Guidance, output: Output | None
) -> None:
    """The velocities that the solver was given, against those of the finished line at once.

    The unconditional ones are of the same line: twins share every sampled latent.
    """
    prior = noise_extended(output)
    asked: list[tuple[Tensor, float, Tensor]] = []

    class Recording(Midpoint):
        def forward(self, field, x, generator=None, temperature=1.0):  # type: ignore[no-untyped-def]
            def spy(x: Tensor, t: float) -> Tensor:
                v = field(x, t)
                asked.append((x, t, v))
                return v

            return super().forward(spy, x, generator, temperature)

    prior.solver = Recording(steps=2)
    z = prior.sample(CAPTIONS, guidance, generator=torch.Generator().manual_seed(1))
    calls = prior.solver.num_evaluations
    x_t = torch.stack([x for x, _, _ in asked], 1).unflatten(1, (K, calls)).transpose(1, 2)  # (B,S,K,C)
    t = torch.tensor([t for _, t, _ in asked]).view(K, calls).T.expand(3, -1, -1)  # (B,S,K)
    text = prior.encode_text(CAPTIONS)
    with torch.no_grad():
        v_c = prior.velocities(z, x_t, t, text)
        v_u = prior.velocities(z, x_t, t, prior.without_caption(text, torch.ones(3, dtype=torch.bool)))
    schedule = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    low, high = schedule.interval
    w = torch.where((t >= low) & (t <= high), torch.tensor(schedule.scales(K)), 1.0)[..., None]
    found = torch.stack([v for _, _, v in asked], 1).unflatten(1, (K, calls)).transpose(1, 2)
    torch.testing.assert_close(found, v_u + w * (v_c - v_u), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("output", [VelocityOutput(), NextLevelOutput(4)])
def test_the_loss_of_a_copy_is_that_of_its_output(output: Output) -> None:
    """A transformer that answers with zeros: what is left is the target's own size, known for latents of one value."""
    prior = noise_extended(output)
    torch.nn.init.zeros_(prior.out.weight)
    z, text = torch.full((64, K, C), 2.0), prior.encode_text(CAPTIONS[:1] * 64)
    with torch.no_grad():
        loss = prior.losses(z, text, torch.Generator().manual_seed(1)).mean().item()
    t = logit_normal_times(100_000, 1, device=z.device, generator=torch.Generator().manual_seed(2))[0]
    at = NextLevelOutput(4).step(t)
    wanted: dict[type, Tensor | float] = {
        VelocityOutput: 5.0,  # (noise - 2)^2
        NextLevelOutput: (2 * (at.data + at.noisy * (1 - t))).square().mean()
        + ((at.noisy * t).square() + at.variance).mean(),
    }
    assert loss == pytest.approx(float(wanted[type(output)]), rel=0.05)


def test_noisy_copies_stay_float32_under_autocast() -> None:
    """x_t in training and the solver's state in sampling: most of their numbers do not exist in bfloat16."""
    prior, seen = noise_extended(), []
    prior.noisy_in.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].detach()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = prior.losses(torch.randn(3, K, C), prior.encode_text(CAPTIONS))
        z = prior.sample(CAPTIONS)
    assert len(seen) == 1 + 8 * K and loss.dtype == torch.float32
    assert all(x.dtype == torch.float32 and (x != x.bfloat16()).float().mean() > 0.7 for x in [*seen, z])
