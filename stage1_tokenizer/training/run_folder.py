"""One run folder per run, fixed by its owner: what lies where, what a fit may overwrite, and what it leaves behind.

    run_dir/stage1|stage2/   config.yaml (resolved, of the last fit), run.json (one entry per fit: commit, seed,
                             versions, threads, what it resumed from), metrics.csv (appends), checkpoints/
    run_dir/tokenizer|prior/ exports, written by the lit modules

Two rules keep results from getting lost. A fit never starts over in a folder that holds checkpoints without
`overwrite`, and `resume auto` fails where there is nothing to resume: neither ever becomes the other silently.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from stage1_tokenizer.evaluation.provenance import describe_process
from stage1_tokenizer.training.checkpoint_file import is_whole, newest_first, writing


class RunFolderError(ValueError):
    """A run folder that does not hold what the command needs, or holds what it must not lose."""


class RunFolder:
    """Paths of one stage of one run.

    run_dir: the run's folder, e.g. runs/demo. stage: "stage1" or "stage2", the subfolder of what fit keeps.
    """

    def __init__(self, run_dir: str | Path, stage: str) -> None:
        self.run_dir = Path(run_dir)
        self.stage_dir = self.run_dir / stage
        self.checkpoint_dir = self.stage_dir / "checkpoints"
        self.last_checkpoint = self.checkpoint_dir / "last.ckpt"
        self.metrics_file = self.stage_dir / "metrics.csv"
        self.config_file = self.stage_dir / "config.yaml"
        self.run_file = self.stage_dir / "run.json"

    def checkpoint_to_resume(self, resume: str | None, overwrite: bool) -> Path | None:
        """The checkpoint that a fit continues from, None for a fit from scratch.

        resume: None, "auto" (the run's last checkpoint) or a path. overwrite: start over, dropping the stage's
        checkpoints and metrics. Raises RunFolderError if there is nothing to resume, or if a fit from scratch would
        lose checkpoints.
        """
        if resume is not None and overwrite:
            raise RunFolderError(f"got resume={resume} and overwrite=true; choose one: continue, or start over")
        if resume == "auto":
            return self.last_whole_checkpoint()
        if resume is not None:
            if not Path(resume).is_file():
                raise RunFolderError(f"got --resume {resume}, which is no file; give a .ckpt file, or auto")
            if not is_whole(Path(resume)):
                whole = next((str(p) for p in newest_first(Path(resume).parent) if is_whole(p)), "none beside it")
                raise RunFolderError(f"got --resume {resume}, which is damaged (checksums are wrong); intact: {whole}")
            return Path(resume)
        if any(self.checkpoint_dir.glob("*.ckpt")) and not overwrite:
            raise RunFolderError(
                f"{self.checkpoint_dir} holds checkpoints of an earlier fit; continue it with --resume auto, start "
                "over with --overwrite true (its checkpoints and metrics are deleted), or choose another --run_dir"
            )
        return None

    def last_whole_checkpoint(self) -> Path:
        """The newest checkpoint whose checksums are right; says so where that is not the last one."""
        present = newest_first(self.checkpoint_dir)
        if not present:
            raise RunFolderError(
                f"got --resume auto and found no checkpoint at {self.last_checkpoint}; leave --resume out to start "
                "from scratch, or give the run_dir of the run to continue"
            )
        for place, path in enumerate(present):
            if is_whole(path):
                if place:
                    print(f"damaged: {', '.join(p.name for p in present[:place])}; going on from {path}", flush=True)
                return path
        raise RunFolderError(
            f"got --resume auto and all {len(present)} checkpoints of {self.checkpoint_dir} are damaged: their "
            "checksums are wrong; start over with --overwrite true"
        )

    @rank_zero_only
    def begin_fit(self, config_yaml: str, seed: Any, resumed: Path | None, overwrite: bool) -> None:
        """Prepare the stage's folder for a fit: clear it (`overwrite`), write config.yaml, add to run.json."""
        if overwrite:
            shutil.rmtree(self.checkpoint_dir, ignore_errors=True)
            for file in (self.metrics_file, self.run_file):
                file.unlink(missing_ok=True)
        self.stage_dir.mkdir(parents=True, exist_ok=True)
        for folder in (self.checkpoint_dir, self.stage_dir, self.run_dir):  # of a fit that was killed
            for torn in folder.glob("*.part"):
                torn.unlink(missing_ok=True)
        write_atomically(self.config_file, config_yaml)
        fits = json.loads(self.run_file.read_text())["fits"] if self.run_file.is_file() else []
        fits.append({**describe_process(), "seed": seed, "resumed_from": None if resumed is None else str(resumed)})
        write_atomically(self.run_file, json.dumps({"fits": fits}, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old or the new content, never a part of it."""
    part = path.with_name(path.name + ".part")
    with writing(path):
        part.write_text(text)
        os.replace(part, path)
