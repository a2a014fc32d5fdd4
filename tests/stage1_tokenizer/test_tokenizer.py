"""The tokenizer's contract: exact prefixes, determinism, standardised latents, files, and refusals."""

import json
from pathlib import Path

import pytest
import torch

from stage1_tokenizer import Tokenizer
from stage1_tokenizer.bottleneck import Bottleneck, KLBottleneck
from stage1_tokenizer.layers import Linears
from stage1_tokenizer.text.captioner import PrefixCaptioner
from stage1_tokenizer.variants.normed import NormBottleneck
from tests.tiny import CAPTIONS, SIZE, WIDTH, C, K, pictures, tiny_tokenizer


@pytest.mark.parametrize("linear_path", [False, True])
def test_prefix_does_not_depend_on_how_many_latents_there_are(linear_path: bool) -> None:
    tokenizer = tiny_tokenizer(linear_path=linear_path)
    if tokenizer.linear_path is not None:
        tokenizer.linear_path.fit(pictures(40, seed=3))
    full = tokenizer.encode(pictures())
    assert full.shape == (5, K, C)
    for k in range(1, K + 1):
        torch.testing.assert_close(tokenizer.encode(pictures(), k), full[:, :k], atol=1e-5, rtol=0)


@pytest.mark.parametrize("bottleneck", [KLBottleneck(WIDTH, K, C), NormBottleneck(WIDTH, K, C)])
def test_an_encoder_beside_a_linear_path_starts_silent_and_learns(bottleneck: Bottleneck) -> None:
    parts = tiny_tokenizer(linear_path=True)
    encoder, decoder, path = parts.encoder, parts.decoder, parts.linear_path
    assert isinstance(bottleneck.project, Linears) and bottleneck.project.weight.any() and path is not None
    path.fit(pictures(40, seed=3))
    tokenizer = Tokenizer(SIZE, encoder, bottleneck, decoder, linear_path=path)
    h, shift = encoder(pictures()), path.encode(pictures(), K)
    assert torch.equal(bottleneck.posterior(h, shift)[0], bottleneck.posterior(torch.zeros_like(h), shift)[0])
    parts_of_loss, _ = tokenizer.train().losses(pictures())
    parts_of_loss["pixel"].backward()
    gradient = bottleneck.project.weight.grad
    assert gradient is not None and gradient[..., :C].any(), "silent at the start, not for good"


def test_changing_a_query_leaves_every_earlier_latent_as_it_was() -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer.encode(pictures())
    with torch.no_grad():
        tokenizer.get_parameter("encoder.queries")[3] += torch.randn(WIDTH)
    after = tokenizer.encode(pictures())
    torch.testing.assert_close(after[:, :3], before[:, :3], atol=1e-5, rtol=0)
    assert (after[:, 3] - before[:, 3]).abs().max() > 1e-2
    assert (after[:, 4:] - before[:, 4:]).abs().max() > 1e-4, "later queries read earlier ones"


def test_decode_of_a_prefix_ignores_what_was_dropped() -> None:
    tokenizer = tiny_tokenizer()
    z = tokenizer.encode(pictures())
    raw = torch.cat([z[:, :2], torch.full_like(z[:, 2:], 50.0)], 1)
    keep = torch.arange(K)[None].expand(len(z), -1) < 2
    noisy = tokenizer.decoder.decode(raw, keep)
    torch.testing.assert_close(tokenizer.decode(z[:, :2]), noisy.clamp(-1, 1), atol=1e-5, rtol=0)
    assert (tokenizer.decode(z[:, :3]) - tokenizer.decode(z[:, :2])).abs().max() > 1e-4


def test_encode_is_deterministic_and_decode_stays_in_range() -> None:
    tokenizer = tiny_tokenizer()
    z = tokenizer.encode(pictures())
    torch.testing.assert_close(z, tokenizer.encode(pictures()), atol=0, rtol=0)
    x = tokenizer.decode(20 * z)
    assert x.shape == (5, 3, SIZE, SIZE) and x.abs().max() <= 1


def test_statistics_standardise_posterior_samples() -> None:
    tokenizer = tiny_tokenizer()
    images = pictures(400)
    assert tokenizer.fit_statistics(images.split(100)) == 400
    mean, std = tokenizer.posterior(images)
    sample = mean + std * torch.randn_like(mean)
    torch.testing.assert_close(mean.mean(0), torch.zeros(K, C), atol=1e-3, rtol=0)
    torch.testing.assert_close((mean.var(0) + std.square().mean(0)).sqrt(), torch.ones(K, C), atol=5e-3, rtol=0)
    assert 0.9 < sample.std() < 1.1


def test_statistics_do_not_change_what_is_decoded() -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer.decode(tokenizer.encode(pictures())[:, :3])
    tokenizer.fit_statistics([pictures(50, seed=9)])
    torch.testing.assert_close(tokenizer.decode(tokenizer.encode(pictures())[:, :3]), before, atol=1e-4, rtol=0)


def test_exported_folder_round_trips(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.fit_statistics([pictures(50)])
    tokenizer.save_pretrained(tmp_path / "tok")
    loaded = Tokenizer.from_pretrained(tmp_path / "tok")
    assert sorted(p.name for p in (tmp_path / "tok").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    torch.testing.assert_close(loaded.encode(pictures()), tokenizer.encode(pictures()), atol=0, rtol=0)
    torch.testing.assert_close(loaded.embed_text(CAPTIONS), tokenizer.embed_text(CAPTIONS), atol=0, rtol=0)
    assert loaded.fingerprint == tokenizer.fingerprint and not loaded.training


def test_a_loaded_tokenizer_keeps_its_card(tmp_path: Path) -> None:
    card = "# Circles\n\nHöchstens rot.\n"
    first = tiny_tokenizer().save_pretrained(tmp_path / "first", card)
    (first / "pictures.png").write_bytes(b"a picture")
    loaded = Tokenizer.from_pretrained(first)
    again = Tokenizer.from_pretrained(loaded.save_pretrained(tmp_path / "again"))
    assert (tmp_path / "again" / "README.md").read_text("utf-8") == card
    assert (tmp_path / "again" / "pictures.png").read_bytes() == b"a picture"
    again.save_pretrained(tmp_path / "again", "# Another")
    assert (tmp_path / "again" / "README.md").read_text() == "# Another"
    assert loaded.state_dict().keys() == tiny_tokenizer().state_dict().keys()
    (tmp_path / "first" / "README.md").unlink()
    Tokenizer.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "first")
    assert "Exported by Unspool" in (tmp_path / "first" / "README.md").read_text()


def test_fingerprint_follows_the_latent_space_only() -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer.fingerprint
    with torch.no_grad():
        tokenizer.get_parameter("decoder.queries").add_(1)
    assert tokenizer.fingerprint == before
    tokenizer.latent_mean += 0.1
    assert tokenizer.fingerprint != before


def test_embeddings_are_unit_vectors_of_the_prefix() -> None:
    tokenizer = tiny_tokenizer()
    z = tokenizer.encode(pictures())
    for k in (1, K):
        e = tokenizer.embed_latents(z[:, :k])
        torch.testing.assert_close(e.norm(dim=-1), torch.ones(5), atol=1e-4, rtol=0)
    changed = z.clone()
    changed[:, 2:] += 5
    torch.testing.assert_close(tokenizer.embed_latents(changed[:, :2]), tokenizer.embed_latents(z[:, :2]))
    with torch.no_grad():
        tokenizer.get_parameter("text.reader.length")[2] += 100  # of k = 3, on which text is not trained
    torch.testing.assert_close(tokenizer.embed_latents(z[:, :3]), tokenizer.embed_latents(z[:, :2]))
    text = tokenizer.embed_text(CAPTIONS)
    assert text.shape == (4, e.shape[1]) and (text @ text.T - torch.eye(4)).abs().max() > 1e-3


def test_losses_have_gradients_everywhere_and_a_finite_total() -> None:
    tokenizer = tiny_tokenizer().train()
    ids, _ = tokenizer.vocabulary.encode(CAPTIONS)
    parts, reconstruction = tokenizer.losses(pictures(4), ids)
    assert reconstruction.shape == (4, 3, SIZE, SIZE)
    assert {"pixel", "prefix", "kl", "text"} <= parts.keys()
    tokenizer.total(parts).backward()
    broken = [n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    dead = [n for n, p in tokenizer.named_parameters() if p.grad is not None and not p.grad.any()]
    assert not broken and not dead


def test_text_and_pixels_each_reach_the_encoder_and_only_their_own_side_behind_it() -> None:
    tokenizer = tiny_tokenizer().train()
    ids, _ = tokenizer.vocabulary.encode(CAPTIONS)
    tokenizer.total(tokenizer.losses(pictures(4), ids)[0]).backward()  # the balance has now seen both gradients
    for part, behind, not_behind in (("text", "text", "decoder"), ("pixel", "decoder", "text")):
        tokenizer.zero_grad()
        tokenizer.losses(pictures(4), ids)[0][part].backward()
        alive = {n.split(".")[0] for n, p in tokenizer.named_parameters() if p.grad is not None and p.grad.any()}
        assert alive == {"encoder", "bottleneck", behind}, f"{part} reaches {alive}, and must not reach {not_behind}"


def test_training_reduces_the_loss() -> None:
    tokenizer = tiny_tokenizer(text=False).train()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=1e-2)
    images, losses = pictures(32), []
    for step in range(60):
        loss = tokenizer.total(tokenizer.losses(images, step=step)[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(2, 3, 8, 8), "wanted (B, 3, 16, 16)"),
        (torch.zeros(2, 1, SIZE, SIZE), "wanted (B, 3, 16, 16)"),
        (torch.zeros(3, SIZE, SIZE), "wanted (B, 3, 16, 16)"),
        (torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8), "x / 127.5 - 1"),
        (torch.full((2, 3, SIZE, SIZE), 200.0), "wanted finite values in [-1, 1]"),
        (torch.full((2, 3, SIZE, SIZE), float("nan")), "wanted finite values in [-1, 1]"),
    ],
)
def test_wrong_images_are_refused_with_one_sentence(images: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError) as error:
        tiny_tokenizer().encode(images)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_values_are_not_looked_at_where_somebody_vouches_for_them() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.checks_pixels = False
    assert tokenizer.encode(torch.full((2, 3, SIZE, SIZE), 200.0)).shape == (2, K, C)
    with pytest.raises(ValueError, match="wanted \\(B, 3, 16, 16\\)"):
        tokenizer.encode(torch.zeros(2, 3, 8, 8))


def test_wrong_latents_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    for k in (0, -1, K + 1):
        with pytest.raises(ValueError, match=f"got {k} latents, wanted a prefix of 1 to 6"):
            tokenizer.encode(pictures(), k)
    with pytest.raises(ValueError, match="wanted a prefix of 1 to 6"):
        tokenizer.decode(torch.zeros(2, K + 1, C))
    with pytest.raises(ValueError, match="wanted \\(B, k, 4\\)"):
        tokenizer.decode(torch.zeros(2, K, C + 1))
    with pytest.raises(ValueError, match="without text supervision"):
        tiny_tokenizer(text=False).embed_text(["a"])


def test_damaged_or_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run fit first"):
        Tokenizer.from_pretrained(tmp_path / "nothing")
    folder = tiny_tokenizer().save_pretrained(tmp_path / "tok")
    config = json.loads((folder / "config.json").read_text())

    def rewrite(**changes: object) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    rewrite(format=99)
    with pytest.raises(ValueError, match="update unspool"):
        Tokenizer.from_pretrained(folder)
    rewrite(class_path="os.system")
    with pytest.raises(ValueError, match="if you trust its package"):
        Tokenizer.from_pretrained(folder)
    rewrite(class_path="stage1_tokenizer.PrefixLengths", init_args={})
    with pytest.raises(ValueError, match="holds a PrefixLengths, wanted a Tokenizer"):
        Tokenizer.from_pretrained(folder)
    tiny_tokenizer(text=False).save_pretrained(tmp_path / "other")
    (folder / "config.json").write_text((tmp_path / "other" / "config.json").read_text())
    with pytest.raises(ValueError, match="not from one export"):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["decoder", "bottleneck", "lengths", "linear_path"])
def test_disagreeing_parts_are_refused_at_construction(name: str) -> None:
    from stage1_tokenizer.spec import build

    parts = tiny_tokenizer(linear_path=True).spec["init_args"]
    parts[name]["init_args"]["num_latents"] = K + 2
    with pytest.raises(ValueError, match=rf"encoder.num_latents is 6 but {name}.num_latents is 8"):
        build({"class_path": "stage1_tokenizer.Tokenizer", "init_args": parts})


@pytest.mark.parametrize("size", ["num_latents", "latent_dim"])
@pytest.mark.parametrize("name", ["decoder", "linear_path", "text.reader", "text.captioner"])
def test_parts_of_other_sizes_are_refused_at_construction(name: str, size: str) -> None:
    from stage1_tokenizer.spec import build

    parts = tiny_tokenizer(linear_path=True).spec["init_args"]
    parts["text"]["init_args"]["captioner"] = PrefixCaptioner(64, 12, K, C, 32, 1, 2).spec
    build({"class_path": "stage1_tokenizer.Tokenizer", "init_args": parts})
    found = parts
    for step in name.split("."):
        found = found[step]["init_args"]
    found[size] += 3
    with pytest.raises(ValueError, match=rf"\.{size} is {found[size] - 3} but {name}.{size} is {found[size]}; make"):
        build({"class_path": "stage1_tokenizer.Tokenizer", "init_args": parts})


def test_weights_held_in_bfloat16_keep_the_identity_and_answer_alike(tmp_path: Path) -> None:
    whole = tiny_tokenizer(linear_path=True)
    whole.save_pretrained(tmp_path)
    held = Tokenizer.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in held.parameters()} == {torch.float32, torch.bfloat16}
    assert held.fingerprint == whole.fingerprint, "a prior accepts it"
    with torch.no_grad():
        z, got = whole.encode(pictures()), held.encode(pictures())
        assert got.dtype == torch.float32 and 0 < (got - z).abs().max() < 0.1 * z.abs().max()
        for a, b in ((whole.decode(z), held.decode(z)), (whole.embed_latents(z), held.embed_latents(z))):
            assert torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).min() > 0.995
        a, b = (tokenizer.embed_text(CAPTIONS) for tokenizer in (whole, held))
        assert torch.nn.functional.cosine_similarity(a, b).min() > 0.995


def test_a_loss_that_is_not_minimised_is_an_error_and_a_figure_is_not() -> None:
    tokenizer, loss = tiny_tokenizer(), torch.ones((), requires_grad=True)
    assert tokenizer.total({"pixel": 2 * loss, "kl_nats": loss.detach()}) == 2
    with pytest.raises(ValueError, match="got the loss 'align', wanted one of pixel"):
        tokenizer.total({"pixel": loss, "align": loss})
