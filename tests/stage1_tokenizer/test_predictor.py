"""The predictor of the next latent: what it sees, what its share means, whom it trains, where it is not."""

from pathlib import Path

import pytest
import torch

from stage1_tokenizer import Tokenizer
from stage1_tokenizer.predictor import LatentPredictor
from tests.tiny import C, K, awaken, pictures, tiny_tokenizer


def predictor(**options: float) -> LatentPredictor:
    torch.manual_seed(0)
    return LatentPredictor(K, C, 16, 1, 2, **options)  # type: ignore[arg-type]


def test_a_prediction_sees_the_latents_before_and_no_other() -> None:
    model, z = predictor(), torch.randn(2, K, C, requires_grad=True)
    awaken(model)
    guess = model(z)
    for i in range(K - 1):  # of latent i + 1
        (by,) = torch.autograd.grad(guess[:, i].sum(), z, retain_graph=True)
        assert (by.abs().amax((0, 2)) > 0).tolist() == [j <= i for j in range(K)]


def test_the_share_is_one_where_nothing_is_known_and_none_where_all_is() -> None:
    """Before it has learned it expects 0; whatever the latents' size. Latents that repeat are learned, noise is not."""
    g = torch.Generator().manual_seed(1)
    noise, repeated = torch.randn(512, K, C, generator=g), torch.randn(512, 1, C, generator=g).expand(-1, K, -1)
    for z in (noise, 5 * noise):
        assert predictor().losses(z, torch.mean)["unpredicted"].item() == pytest.approx(1.0, abs=0.02)
    left = {}
    for name, z in (("noise", noise), ("repeated", repeated)):
        model = predictor()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
        for _ in range(60):
            loss = model.losses(z, torch.mean)["predictor"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        left[name] = model.losses(z, torch.mean)["unpredicted"].item()
    assert left["repeated"] < 0.1 and left["noise"] > 0.6


def test_it_pulls_at_the_encoder_and_at_itself_by_its_weight() -> None:
    pulls = []
    for weight in (0.1, 0.2):
        tokenizer = tiny_tokenizer().train()
        tokenizer.predictor = predictor(weight=weight)
        awaken(tokenizer.predictor)
        torch.manual_seed(1)
        parts, _ = tokenizer.losses(pictures())
        assert "predictor" in tokenizer.objective and tokenizer.total(parts) > tokenizer.total(
            {name: part for name, part in parts.items() if name != "predictor"}
        )
        parts["predictor"].backward()
        for part in (tokenizer.encoder, tokenizer.predictor):
            assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())
        assert all(p.grad is None for p in tokenizer.decoder.parameters())
        pulls.append(next(tokenizer.encoder.parameters()).grad)
    torch.testing.assert_close(2 * pulls[0], pulls[1])  # type: ignore[operator]


def test_predictions_are_asked_for_the_picture_and_teach_decoder_and_encoder() -> None:
    tokenizer = tiny_tokenizer().train()
    tokenizer.predictor = predictor(reconstruction=0.5)
    awaken(tokenizer.predictor)
    z, images = torch.randn(5, K, C, requires_grad=True), pictures()
    parts = tokenizer.predictor.losses(z, lambda guess: tokenizer.full_error(guess, images))
    keep = torch.ones(5, K, dtype=torch.bool)
    line = torch.cat([z[:, :1], tokenizer.predictor(z)], dim=1)
    wanted = 0.5 * (tokenizer.decoder.decode(line, keep) - images).square().mean()
    torch.testing.assert_close(parts["predicted"], wanted)
    assert "predicted" in tokenizer.objective and "predicted" not in predictor().losses(z, torch.mean)
    parts["predicted"].backward()
    for part in (tokenizer.decoder, tokenizer.predictor):
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())
    assert z.grad is not None and z.grad[:, :-1].any() and not z.grad[:, -1].any()  # nothing follows the last latent


def test_an_export_knows_nothing_of_it_and_is_a_start_for_it(tmp_path: Path) -> None:
    plain = tiny_tokenizer()
    own = Tokenizer(
        plain.image_size, plain.encoder, plain.bottleneck, plain.decoder, plain.lengths, plain.text, None, predictor()
    ).eval()
    assert own.spec == plain.spec and own.fingerprint == plain.fingerprint
    own.save_pretrained(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.predictor is None and torch.equal(loaded.encode(pictures()), own.encode(pictures()))
    before = {n: t.clone() for n, t in own.predictor.state_dict().items()}  # type: ignore[union-attr]
    own.start_from(loaded)
    assert all(torch.equal(t, before[n]) for n, t in own.predictor.state_dict().items())  # type: ignore[union-attr]


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="num_latents 1"):
        LatentPredictor(1, C)
    for options in ({"weight": 0.0}, {"reconstruction": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            LatentPredictor(K, C, **options)  # type: ignore[arg-type]
    plain = tiny_tokenizer()
    with pytest.raises(ValueError, match="predictor.num_latents is 9"):
        Tokenizer(plain.image_size, plain.encoder, plain.bottleneck, plain.decoder, predictor=LatentPredictor(9, C))
