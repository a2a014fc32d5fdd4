"""What the playground shows is what the models give: prefixes, edits, lines that grow, and refusals in one sentence."""

import io
import itertools
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from data.sources.open import SourceConfig
from stage1_tokenizer.evaluation.reconstruct import ReconstructError
from stage1_tokenizer.similarity import psnr
from stage2_prior import Head, MaskedPrior, MSEHead
from stage2_prior.latent_space import PriorError
from stage2_prior.play.command import free_port, main
from stage2_prior.play.studio import Drawing, PlayError, Studio
from stage2_prior.variants.captioning import CaptioningPrior
from tests.data_samples import prepared
from tests.small_priors import awake, parts
from tests.tiny import CAPTIONS, SIZE, C, K, pictures, tiny_tokenizer


def made(prior: bool = True, head: Head | None = None) -> Studio:
    """A studio over small models that know each other."""
    tokenizer = tiny_tokenizer()
    if not prior:
        return Studio(tokenizer, None, CAPTIONS, "there is no prior in runs/x/prior")
    vocabulary, backbone, flow = parts(K, C, tokens=20)
    model = awake(CaptioningPrior(K, C, vocabulary, backbone, head or flow))
    model.bind(K, C, tokenizer.fingerprint)
    return Studio(tokenizer, model, CAPTIONS)


def png_of(seed: int = 1) -> bytes:
    buffer = io.BytesIO()
    pixels = (pictures(1, 40, seed)[0].permute(1, 2, 0) * 127.5 + 127.5).to(torch.uint8).numpy()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_prefix_is_shown_with_what_its_last_latent_changed() -> None:
    studio = made()
    tokenizer, picture = studio.tokenizer, studio.read(png_of(), "photo.png")
    assert picture.image.shape == (1, 3, SIZE, SIZE) and picture.z.shape == (1, K, C)
    sum_of_changes = torch.zeros_like(picture.image)
    for k in range(1, K + 1):
        seen = studio.unspool(picture, k)
        expected = tokenizer.decode(tokenizer.encode(picture.image, k))
        torch.testing.assert_close(seen.image, expected, atol=1e-5, rtol=0)
        assert seen.psnr == psnr(seen.image, picture.image).item()
        sum_of_changes = sum_of_changes + seen.change
        torch.testing.assert_close(sum_of_changes, seen.image, atol=1e-5, rtol=0)
        cosine = (tokenizer.embed_latents(picture.z[:, :k]) @ tokenizer.embed_text(CAPTIONS).T)[0]
        assert [c for c, _ in seen.captions] == [CAPTIONS[i] for i in cosine.argsort(descending=True)]
    mean, std = tokenizer.posterior(picture.image)
    kl = (0.5 * (mean**2 + std**2 - 1) - std.log()).sum() / math.log(2)
    assert seen.bits == pytest.approx(kl.item(), rel=1e-4)


def test_a_line_grows_to_what_the_prior_draws_at_once() -> None:
    studio, how = made(), Drawing(guidance=2.5, steps=4, solver="Heun", temperature=0.9, seed=3, negative="a star")
    lines = list(studio.draw("a red circle", how))
    assert [z.shape for z in lines] == [(1, k, C) for k in range(1, K + 1)]
    assert all(torch.equal(a, b[:, :-1]) for a, b in itertools.pairwise(lines))
    options: dict[str, Any] = {
        "guidance": 2.5,
        "steps": 4,
        "temperature": 0.9,
        "negative": "a star",
        "solver": studio.solvers()["Heun"],
    }
    once = studio.prior.sample(["a red circle"], generator=torch.Generator().manual_seed(3), **options)
    torch.testing.assert_close(lines[-1], once, atol=1e-4, rtol=1e-4)
    for other in (replace(how, seed=4), replace(how, negative=""), replace(how, solver="Euler")):
        assert (list(studio.draw("a red circle", other))[-1] - once).abs().max() > 1e-3


def test_edits_keep_what_they_say() -> None:
    studio = made()
    a, b = (studio.read(png_of(seed), "x") for seed in (1, 2))
    kept = list(studio.draw("a star", Drawing(), prefix=a.z[:, :2]))
    assert torch.equal(kept[-1][:, :2], a.z[:, :2]) and kept[0].shape[1] == 3
    assert list(studio.draw("a star", Drawing(), prefix=a.z)) == []  # nothing is left to draw
    both = studio.swap(a, b, 2)
    torch.testing.assert_close(both[:1], studio.decode(torch.cat([a.z[:, :2], b.z[:, 2:]], 1)))
    assert torch.equal(studio.swap(a, b, K)[:1], studio.swap(b, a, K)[1:])
    walk = studio.interpolate(a, b, 5)
    torch.testing.assert_close(walk[[0, 4]], studio.decode(torch.cat([a.z, b.z])), atol=1e-5, rtol=1e-5)


def test_reading_is_what_the_prior_reads() -> None:
    studio = made()
    picture = studio.read(png_of(), "x")
    assert studio.caption(picture) == studio.prior.caption(picture.z)[0]
    assert studio.nats(picture, "a star", 4) == studio.prior.log_prob(picture.z, ["a star"], 4)[0].tolist()


def test_only_solvers_that_fit_are_offered() -> None:
    assert "Heun" in made().solvers() and "DDPM" not in made().solvers()
    assert made(head=MSEHead(C, 32, 24, 2)).solvers() == {} == made(prior=False).solvers()


@pytest.mark.parametrize(
    ("caption", "how", "sentence"),
    [
        ("", Drawing(), "at least one word"),
        ("a" * 10_000, Drawing(), "10000 characters, wanted at most 500"),
        ("a", Drawing(negative="b " * 5_000), "10000 characters"),
        ("a", Drawing(guidance=1.0, negative="b"), "guidance above 1"),
        ("a", Drawing(guidance=-1.0), "guidance=-1"),
        ("a", Drawing(temperature=float("nan")), "temperature=nan"),
        ("a", Drawing(steps=10**6), "wanted 0 .* to 100"),
        ("a", Drawing(seed=-1), "seed -1"),
    ],
)
def test_a_drawing_that_cannot_be_is_refused(caption: str, how: Drawing, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        next(made().draw(caption, how))


def test_uploads_that_are_no_pictures_are_refused() -> None:
    studio = made()
    for content in (b"", b"words, not pixels\n" * 9, png_of()[:200], b"%PDF-1.4"):
        with pytest.raises(ReconstructError):
            studio.read(content, "upload.png")
    with pytest.raises(ValueError, match="1 to 6"):
        studio.unspool(studio.read(png_of(), "x"), K + 1)


def test_without_a_prior_pictures_still_unspool(tmp_path: Path) -> None:
    studio = made(prior=False)
    assert studio.unspool(studio.read(png_of(), "x"), 2).psnr > 0
    with pytest.raises(PlayError, match="no prior in runs/x/prior"):
        next(studio.draw("a star", Drawing()))


def test_a_prior_of_another_tokenizer_is_refused() -> None:
    vocabulary, backbone, head = parts(K, C)
    prior = awake(MaskedPrior(K, C, vocabulary, backbone, head, sets=2))
    prior.bind(K, C, "0123456789abcdef")
    with pytest.raises(PriorError, match="other weights"):
        Studio(tiny_tokenizer(), prior)


def test_the_command_answers_wrong_options_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port("127.0.0.1", None) != port
        for words, sentence in (
            (["--port", str(port)], f"port {port} (Address already in use); choose another with --port"),
            ([], "give --run_dir"),
            (["--run_dir", str(tmp_path / "nothing")], "nothing/tokenizer"),
        ):
            with pytest.raises(SystemExit) as ended:
                main(words)
            error = capsys.readouterr().err
            assert ended.value.code == 1 and sentence in error and error.count("\n") == 1


def test_the_command_serves_what_a_run_holds_to_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(SourceConfig("scenes", num=60, size=SIZE, seed=4), tmp_path / "data", val_fraction=0.5)
    studio = made()
    studio.tokenizer.save_pretrained(tmp_path / "tokenizer")
    served: list[tuple[Studio, list[tuple[str, torch.Tensor]], str, int]] = []
    page = SimpleNamespace(serve=lambda *arguments: served.append(arguments))
    monkeypatch.setitem(sys.modules, "stage2_prior.play.page", page)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "restored when the test ends")
    port = free_port("127.0.0.1", None)
    left, others = (tmp_path / "page_uploads" / str(number) / "a picture" for number in (port, port + 1))
    for file in (left, others):  # of a page that was killed, and of one that may be running
        file.parent.mkdir(parents=True)
        file.touch()
    assert main(["--run_dir", str(tmp_path), "--port", str(port)]) == 0
    assert not left.exists() and others.exists() and os.environ["GRADIO_TEMP_DIR"] == str(left.parent)
    studio.prior.save_pretrained(tmp_path / "prior")
    assert main(["--run_dir", str(tmp_path)]) == 0
    (without, *_), (whole, examples, host, _) = served
    assert host == "127.0.0.1" and without.maybe_prior is None and str(tmp_path / "prior") in without.absent
    assert whole.prior.fingerprint == studio.tokenizer.fingerprint
    assert len(set(whole.captions)) == len(whole.captions) > 10
    assert 10 < len(examples) <= 24 and examples[3][0].partition(": ")[2] in whole.captions
    assert whole.encode(examples[3][1]).z.shape == (1, K, C)
    monkeypatch.setitem(sys.modules, "stage2_prior.play.page", None)  # as where Gradio is not installed
    with pytest.raises(SystemExit):
        main(["--run_dir", str(tmp_path)])
    assert "pip install 'unspool[play]'" in capsys.readouterr().err
