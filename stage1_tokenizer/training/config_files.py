"""Configs by name: `--config demo` is stage1/demo.yaml of the shipped ones, `--config variants/no_text` an overlay.

A path that exists is always meant as such; a name is looked up in the folder `configs` that is installed beside this
package, so that commands run from any folder. A name that is neither is an error with the nearest shipped names.
"""

import difflib
from pathlib import Path


class ConfigError(ValueError):
    """A `--config` that is neither a file nor a shipped config."""


def shipped() -> dict[str, Path]:
    """Shipped configs by name, such as "stage1/demo" and "variants/no_text"."""
    root = Path(__file__).resolve().parents[2] / "configs"  # beside this package, in a checkout as in a wheel
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.glob("*/*.yaml"))}


def find_config(name: str, stage: str) -> str:
    """The file that `--config name` means for a command of `stage` ("stage1", "stage2").

    Raises ConfigError where there is no such file and no shipped config of that name.
    """
    if Path(name).is_file():
        try:
            Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{name} is not UTF-8 text ({error}); expected a YAML file") from error
        return name
    known = shipped()
    bare = name.removeprefix("configs/").removesuffix(".yaml")
    for candidate in (bare, f"{stage}/{bare}", f"variants/{bare}"):
        if candidate in known:
            return str(known[candidate])
    short = {key.removeprefix(f"{stage}/"): key for key in known}
    near = difflib.get_close_matches(bare, [*known, *short], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"shipped are {', '.join(known)}."
    raise ConfigError(f"found no config {name}, neither a file nor a shipped one; {hint}")


def with_files(words: list[str], stage: str) -> list[str]:
    """Words of a command line with the values of `--config` as files."""
    done: list[str] = []
    for word in words:
        if done and done[-1] in ("--config", "-c"):
            word = find_config(word, stage)
        elif word.startswith("--config="):
            word = f"--config={find_config(word.removeprefix('--config='), stage)}"
        done.append(word)
    return done
