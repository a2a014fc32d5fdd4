"""The worked example of CONTRIBUTING.md runs: a user's own head trains by its config, is exported, refused, trusted."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from stage1_tokenizer.spec import SpecError
from stage2_prior import Prior
from tests.small_priors import CAPTIONS, C, D, K, awake, parts

ROOT = Path(__file__).resolve().parent.parent


def block(language: str) -> str:
    """The first code block of a language in CONTRIBUTING.md."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)[0]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_heads.py").write_text(block("python"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_heads", raising=False)


def test_a_head_of_ones_own_learns_and_is_loaded_where_it_is_trusted(package: None, tmp_path: Path) -> None:
    from stage2_prior import CausalPrior

    made = yaml.safe_load(block("yaml"))["model"]["prior"]["init_args"]["head"]
    assert made["class_path"] == "my_heads.LaplaceHead"
    vocabulary, backbone, _ = parts()
    head = sys.modules.get("my_heads") or __import__("my_heads")
    prior = awake(
        CausalPrior(
            K, C, vocabulary, backbone, head.LaplaceHead(**made["init_args"] | {"latent_dim": C, "cond_dim": D})
        )
    )
    z, text = torch.randn(3, K, C), prior.encode_text(CAPTIONS)
    optimizer, losses = torch.optim.Adam(prior.parameters(), 1e-2), []
    for _ in range(30):
        loss = prior.losses(z, text).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    drawn = prior.sample(CAPTIONS, guidance=2.0, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (3, K, C) and drawn.isfinite().all()
    prior.save_pretrained(tmp_path / "prior")
    with pytest.raises(SpecError, match="my_heads"):
        Prior.from_pretrained(tmp_path / "prior")
    again = Prior.from_pretrained(tmp_path / "prior", trust=("my_heads",))
    assert torch.equal(
        again.sample(CAPTIONS, generator=torch.Generator().manual_seed(0)),
        prior.sample(CAPTIONS, generator=torch.Generator().manual_seed(0)),
    )
