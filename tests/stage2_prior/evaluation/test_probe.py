"""Probes of a prior's states: what a state has seen, what a linear map reads from it, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.reading.latents import LatentShardWriter, write_latent_manifest
from stage2_prior import Prior
from stage2_prior.__main__ import main
from stage2_prior.evaluation.probe import places, probe
from stage2_prior.latent_space import PriorError
from stage2_prior.orders import LearnedOrder, ReversedOrder, SetOrder
from stage2_prior.prior import CausalPrior
from stage2_prior.variants.joint import JointPrior
from stage2_prior.variants.masked import MaskedPrior
from tests.small_priors import C, K, awake, parts


def causal(order: LearnedOrder | None = None) -> Prior:
    vocabulary, backbone, head = parts()
    return awake(CausalPrior(K, C, vocabulary, backbone, head, order=order))


def joint() -> Prior:
    vocabulary, backbone, _ = parts()
    return awake(JointPrior(K, C, vocabulary, backbone))


@pytest.mark.parametrize("make", [causal, lambda: causal(ReversedOrder()), lambda: causal(SetOrder([1, 2, 3])), joint])
def test_a_state_has_seen_as_many_latents_as_it_says(make) -> None:  # type: ignore[no-untyped-def]
    prior, z = make(), torch.randn(3, K, C)
    states = prior.states(z)
    assert states.hidden.shape == (3, 3, K, 32), "before the first of two blocks and behind each"
    order = prior.order.positions(K) if isinstance(prior, CausalPrior) else list(range(K))
    assert torch.equal(states.line, z[:, order])
    for j in range(K):
        other = states.line.clone()
        other[:, j] += 2
        back = torch.empty_like(other)
        back[:, order] = other
        moved = (prior.states(back).hidden[-1] - states.hidden[-1]).abs().amax(dim=(0, 2))  # (K,) by place
        assert (moved > 1e-5).tolist() == [seen > j for seen in states.read]


def test_what_was_read_is_read_back_and_what_was_not_is_chance() -> None:
    """A label that is the sign of the second latent's first float; and one that is nothing's, the control."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(1000, K, C, generator=g)
    sign, coin = (z[:, 1, 0] > 0).long(), torch.randint(2, (1000,), generator=g)

    def result(labels: Tensor) -> dict[str, Any]:
        def part(rows: slice) -> dict[str, object]:
            return {"latents": z[rows], "labels": labels[rows], "attributes": [{}] * len(z[rows])}

        return probe(causal(), part(slice(0, 700)), part(slice(700, None)))

    found = result(sign)
    assert found["places"] == [0, 1, 2, 4, 5] == found["read"] and len(found["states"]) == 3
    states = found["states"]
    assert all(abs(by_place[i] - 0.5) < 0.1 for by_place in states for i in (0, 1))  # not read yet
    assert states[0][2] > 0.95 and states[-1][2] > 0.8, "the token of the third place carries the second latent"
    assert abs(states[0][3] - 0.5) < 0.1, "and the next token another one"
    assert found["latents"][0] is None and abs(found["latents"][1] - 0.5) < 0.1 and found["latents"][2] > 0.95
    assert max(result(coin)["states"][-1]) < 0.6


def test_places_are_few_and_reach_the_end() -> None:
    assert places(16) == [0, 1, 2, 4, 8, 15] and places(1) == [0] and places(2) == [0, 1]


def latents(folder: Path, labels: bool = True) -> Path:
    for split, n in (("train", 60), ("val", 20)):
        with LatentShardWriter(folder / "latents", split) as writer:
            for i in range(n):
                label = i % 3 if labels else -1
                writer.write(f"{i:03d}", torch.randn(K, C), torch.ones(K, C), ["a cross"], {}, label=label)
    write_latent_manifest(folder / "latents", K, C, "0123456789abcdef")
    return folder


def test_the_command_writes_a_page_with_a_table_for_each_prior(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = latents(tmp_path)
    for name, prior in (("prior", causal()), ("joint", joint())):
        prior.save_pretrained(run / name)
    words = ["probe", "--run_dir", str(run), "--priors", "alone", str(run / "prior"), "joint", str(run / "joint")]
    assert main(words) == 0
    written = json.loads((run / "probe" / "metrics.json").read_text())["probe"]
    assert list(written) == ["alone", "joint"] and written["joint"]["read"] == [K] * 5
    assert "depth 2" in (run / "probe" / "report.html").read_text()
    assert main(["probe", "--run_dir", str(run)]) == 0
    for bad, message in (
        (["--priors", "one"], "a name and a folder"),
        (["--priors", "one", str(run / "nowhere")], "error: "),
    ):
        with pytest.raises(SystemExit):
            main(["probe", "--run_dir", str(run), *bad])
        assert message in capsys.readouterr().err


def test_what_cannot_be_probed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, prior = latents(tmp_path, labels=False), causal()
    prior.save_pretrained(run / "prior")
    with pytest.raises(SystemExit):
        main(["probe", "--run_dir", str(run)])
    assert "neither attributes nor labels" in capsys.readouterr().err
    prior.bind(K, C, "f" * 16)
    prior.save_pretrained(run / "prior")
    with pytest.raises(SystemExit):
        main(["probe", "--run_dir", str(run)])
    assert "got latents of tokenizer" in capsys.readouterr().err
    vocabulary, backbone, head = parts()
    with pytest.raises(PriorError, match="does not read a line in one run"):
        MaskedPrior(K, C, vocabulary, backbone, head, sets=2).states(torch.randn(2, K, C))
