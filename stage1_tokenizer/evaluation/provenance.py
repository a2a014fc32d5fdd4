"""Where figures come from: command, date, commit of this source tree, seed, versions, threads, device.

Every report prints these facts and every fit keeps them in its run folder. They live here, on the lower of the two
floors that need them.
"""

import importlib.metadata
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("unspool", "torch", "torchvision", "lightning", "timm", "open-clip-torch", "webdataset", "numpy")


def provenance(seed: int | None = None, data_dir: str | Path | None = None) -> dict[str, str]:
    """The facts as a report prints them: name -> text.

    seed: of what the report drew at random; None where nothing. data_dir: of the pictures that are shown.
    """
    process = describe_process()
    versions = {"Python": process["python"], **process["versions"]}
    return {
        "command": " ".join(process["command"]),
        "date": process["started"],
        "commit": process["commit"] or "not in a git checkout",
        "seed": "none used" if seed is None else str(seed),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "device": f"{process['device']}, {process['torch_threads']} threads",
        **({"pictures": credit} if data_dir is not None and (credit := attribution(data_dir)) else {}),
    }


def attribution(data_dir: str | Path) -> str:
    """Whose pictures these are and under which licence, as the manifest has it; "" where it has nothing."""
    manifest = Path(data_dir) / "manifest.json"
    return str(json.loads(manifest.read_text(encoding="utf-8")).get("attribution", "")) if manifest.is_file() else ""


class Cost:
    """What a report costs, from where this is made on: time, and the most memory that the process has held."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def so_far(self) -> dict[str, float]:
        """seconds; gigabytes (10^9 bytes) held at most: since the process began, and of a GPU since the report did."""
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts in bytes there, in KiB elsewhere
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        cost = {"seconds": time.monotonic() - self.began, "gigabytes": peak / 1e9}
        if torch.cuda.is_available():
            cost["gigabytes_of_the_gpu"] = torch.cuda.max_memory_allocated() / 1e9
        return cost

    def text(self) -> str:
        """The same in words."""
        cost = self.so_far()
        gpu = f", {cost['gigabytes_of_the_gpu']:.2f} GB of the GPU" if "gigabytes_of_the_gpu" in cost else ""
        return f"{cost['seconds']:,.0f} s; the process held {cost['gigabytes']:.2f} GB at most{gpu}"


def describe_process() -> dict[str, Any]:
    """What a result depends on besides its config, ready for JSON."""
    script = Path(sys.argv[0])
    program = f"python -m {script.parent.name}" if script.name == "__main__.py" else script.name
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [program, *sys.argv[1:]],
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := installed_version(name)) is not None},
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " cpu",
    }


def commit() -> str | None:
    """The git commit of this source tree, with "+changes" if tracked files differ; None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)

    try:
        head = git("rev-parse", "HEAD")
    except FileNotFoundError:  # no git on this machine
        return None
    if head.returncode:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    return head.stdout.strip() + ("+changes" if changed else "")


def installed_version(name: str) -> str | None:
    """The version of an installed distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
