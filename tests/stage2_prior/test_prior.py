"""CausalPrior: causality, cache, guidance, identity of the latent space, exports."""

import pytest
import torch

from stage1_tokenizer.text.vocabulary import CaptionVocabulary
from stage2_prior import CausalPrior, Prior
from stage2_prior.backbone import Backbone, RotaryBackbone
from stage2_prior.guidance import FallingGuidance, Guidance, RisingGuidance
from stage2_prior.heads.flow import FlowHead
from stage2_prior.heads.mse import MSEHead
from stage2_prior.heads.nets import AdaLNNet, HoistedNet
from stage2_prior.prior import PriorError
from stage2_prior.training.lit_prior import LitPrior
from stage2_prior.variants.captioning import CaptioningPrior
from stage2_prior.variants.masked import MaskedPrior

K, C, D = 6, 4, 32
CAPTIONS = ["a red circle", "a large blue square above a small green star", "a cross"]


Net = type[AdaLNNet] | type[HoistedNet]


def make_prior(
    net: Net = AdaLNNet, backbone: type[Backbone] = Backbone, dropout: float = 0.1, word_sum: bool = False
) -> CausalPrior:
    """A small prior whose zero-initialised matrices are filled, so that every path carries something."""
    torch.manual_seed(0)
    vocabulary = CaptionVocabulary(rows=64, context_length=16)
    vocabulary.fit(CAPTIONS)
    head = FlowHead(net(C, D, width=24, depth=2))
    trunk = backbone(D, depth=2, heads=2, max_tokens=32)
    prior = CausalPrior(K, C, vocabulary, trunk, head, dropout, word_sum=word_sum)
    for parameter in prior.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return prior.eval()


@pytest.fixture(
    params=[(AdaLNNet, Backbone), (HoistedNet, RotaryBackbone), (HoistedNet, Backbone, 0.1, True)],
    ids=["plain", "rotary", "word-sum"],
)
def prior(request: pytest.FixtureRequest) -> CausalPrior:
    return make_prior(*request.param)


def test_a_latent_sees_only_what_is_before_it(prior: CausalPrior) -> None:
    z, text = torch.randn(3, K, C), prior.encode_text(CAPTIONS)
    before = prior.conditions(z, text)
    for j in range(K - 1):
        changed = z.clone()
        changed[:, j] += 3
        after = prior.conditions(changed, text)
        torch.testing.assert_close(after[:, : j + 1], before[:, : j + 1], rtol=0, atol=1e-5)
        assert (after[:, j + 1 :] - before[:, j + 1 :]).abs().amax(-1).min() > 1e-3  # control: later rows do see it


def test_every_latent_sees_every_word_and_no_padding(prior: CausalPrior) -> None:
    z, text = torch.randn(3, K, C), prior.encode_text(CAPTIONS)
    before = prior.conditions(z, text)
    ids = text.ids.clone()
    ids[~text.text_mask] = 7
    torch.testing.assert_close(prior.conditions(z, text._replace(ids=ids)), before, rtol=0, atol=1e-5)
    ids = text.ids.clone()
    ids[1, 2] = 7  # one word of row 1
    change = (prior.conditions(z, text._replace(ids=ids)) - before).abs().amax(-1)  # (B,K)
    assert change[1].min() > 1e-4
    assert change[[0, 2]].max() < 1e-5  # rows are independent


def test_a_caption_means_the_same_alone_and_beside_longer_ones(prior: CausalPrior) -> None:
    z = torch.randn(3, K, C)
    together = prior.conditions(z, prior.encode_text(CAPTIONS))
    alone = prior.conditions(z[:1], prior.encode_text(CAPTIONS[:1]))
    torch.testing.assert_close(alone, together[:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 0.0])
def test_sampling_with_the_cache_equals_the_parallel_forward(prior: CausalPrior, guidance: float) -> None:
    """The condition rows that `sample` used, recorded, against those of the finished line at once."""
    seen: list[torch.Tensor] = []
    original = prior.head.sample

    def recording(cond: torch.Tensor, uncond: torch.Tensor | None = None, *args: object, **kw: object) -> torch.Tensor:
        seen.append(cond)
        return original(cond, uncond, *args, **kw)  # type: ignore[arg-type]

    prior.head.sample = recording  # type: ignore[method-assign,assignment]
    z = prior.sample(CAPTIONS, guidance=guidance, generator=torch.Generator().manual_seed(1))
    text = prior.encode_text(CAPTIONS)
    if guidance == 0:
        text = prior.without_caption(text, torch.ones(3, dtype=torch.bool))
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(seen, 1), prior.conditions(z, text), rtol=0, atol=1e-5)


def test_guided_and_unguided_rows_share_every_sampled_latent(prior: CausalPrior) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = prior.head.sample

    def recording(cond: torch.Tensor, uncond: torch.Tensor, *args: object, **kw: object) -> torch.Tensor:
        seen.append((cond, uncond))
        return original(cond, uncond, *args, **kw)  # type: ignore[arg-type]

    prior.head.sample = recording  # type: ignore[method-assign,assignment]
    z = prior.sample(CAPTIONS, guidance=3.0, generator=torch.Generator().manual_seed(1))
    text = prior.encode_text(CAPTIONS)
    free = prior.without_caption(text, torch.ones(3, dtype=torch.bool))
    with torch.no_grad():
        torch.testing.assert_close(torch.stack([c for c, _ in seen], 1), prior.conditions(z, text), rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.stack([u for _, u in seen], 1), prior.conditions(z, free), rtol=0, atol=1e-5)


def test_guidance_one_is_conditional_and_zero_unconditional_bit_for_bit(prior: CausalPrior) -> None:
    def draw(captions: list[str], guidance: float | Guidance) -> torch.Tensor:
        return prior.sample(captions, guidance, generator=torch.Generator().manual_seed(3))

    assert torch.equal(draw(CAPTIONS, 1.0), draw(CAPTIONS, RisingGuidance(1.0)))
    assert torch.equal(draw(CAPTIONS, 0.0), draw(["a cross"] * 3, 0.0))  # the caption has no say
    assert not torch.equal(draw(CAPTIONS, 1.0), draw(["a cross"] * 3, 1.0))  # control
    assert not torch.equal(draw(CAPTIONS, 2.0), draw(CAPTIONS, 1.0))  # control


def test_guidance_schedules_reach_their_ends_and_skip_the_unconditional_half() -> None:
    assert RisingGuidance(3.0).scales(5) == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert FallingGuidance(3.0).scales(5) == [3.0, 2.5, 2.0, 1.5, 1.0]
    prior = make_prior()
    assert isinstance(prior.head, FlowHead)
    rows: list[int] = []
    prior.head.net.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    prior.sample(CAPTIONS, Guidance(2.0, low=0.2, high=0.6))
    times = prior.head.solver.times()
    assert rows == [6 if 0.2 <= t <= 0.6 else 3 for t in times] * K
    rows.clear()
    prior.sample(CAPTIONS, FallingGuidance(2.0))
    assert rows[-len(times) :] == [3] * len(times) and rows[0] == 6


def test_same_seed_same_sample_and_rows_have_their_own_noise(prior: CausalPrior) -> None:
    def draw(seed: int, captions: list[str]) -> torch.Tensor:
        return prior.sample(captions, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1, CAPTIONS), draw(1, CAPTIONS))
    assert not torch.equal(draw(1, CAPTIONS), draw(2, CAPTIONS))
    same = draw(1, ["a cross"] * 3)
    assert (same[0] - same[1]).abs().max() > 0.1  # one caption, different pictures
    other = draw(1, ["a cross", "a red circle", "a cross"])
    torch.testing.assert_close(other[[0, 2]], same[[0, 2]], rtol=0, atol=1e-4)  # another row's caption has no say


@pytest.mark.parametrize("steps", [2, 8, 12])
def test_steps_counts_evaluations_of_the_head(prior: CausalPrior, steps: int) -> None:
    calls: list[int] = []
    prior.head.net.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    prior.sample(CAPTIONS, guidance=2.0, steps=steps)
    assert len(calls) == steps * K


def test_sampling_in_bfloat16_is_near_float32(prior: CausalPrior) -> None:
    plain = prior.sample(CAPTIONS, generator=torch.Generator().manual_seed(1))
    states: list[torch.Tensor] = []
    prior.head.net.embed.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))  # type: ignore[union-attr]
    with torch.autocast("cpu", torch.bfloat16):
        z = prior.sample(CAPTIONS, generator=torch.Generator().manual_seed(1))
        assert prior.backbone.new_cache(1, 4).keys[0].dtype == torch.bfloat16  # nothing is converted in every step
    assert z.dtype == torch.float32
    assert (z - plain).abs().mean() < 0.1 < plain.abs().mean()
    # The solver's state is float32 in value too: most of its numbers do not exist in bfloat16.
    assert len(states) == 8 * K and {x.dtype for x in states} == {torch.float32}
    assert all((x != x.bfloat16()).float().mean() > 0.7 for x in [*states, z])


def test_checkpointing_changes_memory_and_nothing_else(prior: CausalPrior) -> None:
    z, text = torch.randn(3, K, C), prior.encode_text(CAPTIONS)
    gradients, forwards = [], []
    calls: list[int] = []
    for block in prior.backbone.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    for prior.backbone.checkpointing in (False, True):
        prior.zero_grad()
        calls.clear()
        prior.losses(z, text, torch.Generator().manual_seed(1)).mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in prior.parameters() if p.grad is not None]))
        forwards.append(len(calls))
    assert forwards == [2, 4]  # every block is computed a second time, in the backward pass
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def test_temperature_zero_leaves_nothing_to_chance(prior: CausalPrior) -> None:
    z = [prior.sample(CAPTIONS, temperature=0.0, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    assert torch.equal(*z)


def test_round_trip_of_an_export(prior: CausalPrior, tmp_path) -> None:  # type: ignore[no-untyped-def]
    prior.bind(K, C, "0123456789abcdef")
    prior.save_pretrained(tmp_path)
    loaded = Prior.from_pretrained(tmp_path)
    assert loaded.fingerprint == "0123456789abcdef" and loaded.spec == prior.spec
    a, b = (p.sample(CAPTIONS, generator=torch.Generator().manual_seed(1)) for p in (prior, loaded))
    assert torch.equal(a, b)


def test_another_latent_space_is_refused() -> None:
    prior = make_prior()
    with pytest.raises(PriorError, match="no tokenizer fingerprint"):
        prior.bind(K, C, "")
    with pytest.raises(PriorError, match="wanted 6 x 4"):
        prior.bind(K - 1, C, "0123456789abcdef")  # longer lines have a first part of K
    prior.bind(K, C, "0123456789abcdef")
    prior.bind(K, C, "0123456789abcdef")  # the same again is fine
    with pytest.raises(PriorError, match="other weights or statistics"):
        prior.bind(K, C, "fedcba9876543210")
    with pytest.raises(PriorError, match=r"wanted \(B, 6, 4\)"):
        prior.losses(torch.randn(3, K, C + 1), prior.encode_text(CAPTIONS))


@pytest.mark.parametrize("captions", [[], "a cross", [""], ["   "], [None], [3, "a cross"]])
def test_captions_that_say_nothing_are_refused(captions: list[str]) -> None:
    with pytest.raises(PriorError, match="wanted"):
        make_prior().sample(captions)


def test_a_very_long_caption_is_cut_and_sampled() -> None:
    z = make_prior().sample(["a red circle " * 800])
    assert z.shape == (1, K, C) and bool(z.isfinite().all())


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": -1.0},
        {"guidance": float("nan")},
        {"steps": 0},
        {"steps": 7},  # midpoint asks twice per interval
        {"temperature": -1.0},
        {"temperature": float("inf")},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        make_prior().sample(CAPTIONS, **options)  # type: ignore[arg-type]


def test_parts_that_do_not_fit_are_refused_at_construction() -> None:
    vocabulary = CaptionVocabulary(rows=64, context_length=16)
    with pytest.raises(PriorError, match="backbone.width"):
        CausalPrior(K, C, vocabulary, Backbone(D, 1, 2, 32), MSEHead(C, D + 2))
    with pytest.raises(PriorError, match="max_tokens"):
        CausalPrior(K, C, vocabulary, Backbone(D, 1, 2, 16), MSEHead(C, D))


def test_captions_are_dropped_in_training_only() -> None:
    prior = make_prior(dropout=1.0)
    z, text = torch.randn(3, K, C), prior.encode_text(CAPTIONS)
    other = text._replace(ids=text.ids.flip(0), text_mask=text.text_mask.flip(0))

    def loss(text) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return prior.losses(z, text, torch.Generator().manual_seed(0))

    assert (loss(text) - loss(other)).abs().max() > 1e-4
    prior.train()
    torch.testing.assert_close(loss(text), loss(other))


@pytest.mark.parametrize("kind", [CausalPrior, MaskedPrior])
def test_the_sum_of_words_reaches_the_line_past_the_transformer(kind: type[CausalPrior] | type[MaskedPrior]) -> None:
    vocabulary = CaptionVocabulary(rows=64, context_length=16)
    vocabulary.fit(CAPTIONS)
    blocks = Backbone(D, depth=0, heads=2, max_tokens=32)  # no attention: nothing else can bring a word to a latent
    head = FlowHead(HoistedNet(C, D, width=24, depth=1))
    more = {"sets": 2} if kind is MaskedPrior else {}
    prior = kind(K, C, vocabulary, blocks, head, word_sum=True, **more)  # type: ignore[arg-type]
    assert prior.word_sum is not None
    z = torch.randn(3, K, C)

    def rows(captions: list[str]) -> torch.Tensor:
        text = prior.encode_text(captions)
        if isinstance(prior, MaskedPrior):
            return prior.conditions(z, torch.zeros(3, K, dtype=torch.bool), text)
        return prior.conditions(z, text)

    other = [CAPTIONS[0], CAPTIONS[1], "a circle"]
    assert torch.equal(rows(CAPTIONS), rows(other)), "rows start at zero"
    torch.nn.init.normal_(prior.word_sum.weight)
    change = (rows(CAPTIONS) - rows(other)).abs().amax(-1)  # (B,K)
    assert change[2].min() > 1e-3 and change[:2].max() < 1e-6


@pytest.mark.parametrize("kind", [CausalPrior, CaptioningPrior])
def test_a_latent_counts_by_its_position_in_training(kind: type[CausalPrior], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vocabulary = CaptionVocabulary(rows=64, context_length=16)
    vocabulary.fit(CAPTIONS)
    prior = kind(K, C, vocabulary, Backbone(D, 1, 2, max_tokens=48), FlowHead(HoistedNet(C, D, 24, 1)), 0.0)
    if isinstance(prior, CaptioningPrior):
        prior.caption_weight = 0.0
    lit = LitPrior(prior, position_decay=2.0)
    weights = lit.position_weights
    assert weights is not None and "position_weights" not in lit.state_dict()
    torch.testing.assert_close(weights / weights[0], torch.tensor([1 / i**2 for i in range(1, K + 1)]))
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    monkeypatch.setattr(lit, "log", lambda *args, **kw: None)
    monkeypatch.setattr(lit, "log_dict", lambda *args, **kw: None)
    losses = torch.arange(1.0, 3 * K + 1).view(3, K)
    monkeypatch.setattr(prior, "losses", lambda *args: losses)
    batch = {"latents": torch.randn(3, K, C), "latents_std": torch.zeros(3, K, C), "labels": torch.full((3,), -1)}
    asked = lit.training_step(batch | {"captions": [[c] for c in CAPTIONS]}, 0)["loss"]
    torch.testing.assert_close(asked.detach(), (losses * weights).mean())
    assert LitPrior(prior).position_weights is None
    with pytest.raises(PriorError, match="position_decay=-1"):
        LitPrior(prior, position_decay=-1.0)
