"""Exported folders: config.json + model.safetensors + a model card, in the layout the Hugging Face hub expects.

A card may have a picture beside it (`pictures.png`), where the pictures that a model was trained on may be shown.

Nothing in a folder is executed: the config names classes of this package (see `spec`), weights are safetensors.
Readers of files are imported with the first file, so that the models themselves need torch alone.
"""

import json
import math
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from data.forms import parse_json
from stage1_tokenizer.spec import TRUSTED, build

FORMAT = 1
FILES = ("config.json", "model.safetensors")
CARD, PICTURE = "README.md", "pictures.png"
LARGEST_PICTURE = 1 << 23  # bytes that are taken along from a folder
LEAST_ALLOWED = 1 << 26  # numbers that a module may hold besides its export: caption memories, masks
LEAST_PARTS = 2_000  # tensors and modules
ELEMENTWISE = {
    *("mul", "div", "add", "sub", "rsub", "pow", "neg", "exp", "log", "sin", "cos", "sqrt", "__rmul__", "__radd__"),
    *("__rsub__", "__rpow__", "tril", "triu", "cumsum"),
}
COMPARISONS = {"lt", "le", "gt", "ge", "eq", "ne"}
IN_PLACE = {"normal_", "uniform_", "zero_", "fill_", "mul_", "div_", "add_", "clamp_", "erfinv_"}

M = TypeVar("M", bound=nn.Module)


@runtime_checkable
class KeepsFacts(Protocol):
    """A module whose export holds more than its spec and weights."""

    def export_facts(self) -> dict[str, Any]: ...

    def loaded_from(self, config: dict[str, Any]) -> None: ...


def save_module(module: nn.Module, folder: str | Path, card: str | None = None) -> Path:
    """Write `module` (a Spec) to `folder`; the weights file is written whole before it gets its name.

    Tensors whose names begin as one of `module.training_state` are left out, if it has any.
    Without a `card`, a module that was loaded keeps the one of the folder that it came from, with its picture, whatever
    was done to it.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    left_out: tuple[str, ...] = getattr(module, "training_state", ())
    state = {name: t for name, t in module.state_dict().items() if not name.startswith(left_out)}
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    partial = folder / "model.safetensors.part"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(folder / "model.safetensors")
    facts = module.export_facts() if isinstance(module, KeepsFacts) else {}
    config = {"format": FORMAT, "library": "unspool", **facts, **module.spec}  # type: ignore[dict-item]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    name = type(module).__name__
    if card is None and hasattr(module, "loaded_picture"):
        (folder / PICTURE).write_bytes(module.loaded_picture)  # type: ignore[arg-type]
    card = card or getattr(module, "loaded_card", None)
    stub = f"---\nlibrary_name: unspool\n---\n# {name}\n\nExported by Unspool.\n"
    (folder / CARD).write_text(card or stub, encoding="utf-8")
    return folder


def load_module(cls: type[M], path: str | Path, revision: str | None = None, trust: Sequence[str] = ()) -> M:
    """The module in a folder or Hub repository, in eval mode. Errors as `Tokenizer.from_pretrained`.

    trust: packages besides this project's whose classes may be imported, by name.
    """
    from safetensors.torch import load_file

    folder = Path(path)
    if not folder.exists() and str(path).count("/") == 1 and not str(path).startswith((".", "/", "~")):
        import huggingface_hub

        folder = Path(
            huggingface_hub.snapshot_download(str(path), revision=revision, allow_patterns=[*FILES, CARD, PICTURE])
        )
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {' and no '.join(missing)}; wanted an exported {cls.__name__} folder: run fit first, or "
            "name the folder that fit left."
        )
    config, wanted = read_config(folder), read_shapes(folder)
    trusted = (*TRUSTED, *trust)
    if not trust:  # who trusts a package has code of it run; it may do what cannot be done without numbers
        limit = LEAST_ALLOWED + 4 * sum(math.prod(shape) for shape in wanted.values())
        with torch.device("meta"), ShapesOnly(), at_most(limit, LEAST_PARTS + 10 * len(wanted)):
            check_fit(folder, cls, build(config, trusted), wanted)  # nothing is allocated: a config may name any size
    module = build(config, trusted)
    check_fit(folder, cls, module, wanted)
    tensors = load_file(folder / "model.safetensors")
    module.load_state_dict(tensors, strict=True)
    if isinstance(module, KeepsFacts):
        module.loaded_from(config)
    if (folder / CARD).is_file():
        module.loaded_card = (folder / CARD).read_text("utf-8", "replace")  # type: ignore[assignment]
        if (folder / PICTURE).is_file() and (folder / PICTURE).stat().st_size <= LARGEST_PICTURE:
            module.loaded_picture = (folder / PICTURE).read_bytes()  # type: ignore[assignment]
    return module.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of an export. Raises ValueError where it is none, or of a newer format."""
    try:
        config = parse_json((folder / "config.json").read_bytes())
    except ValueError as error:
        raise ValueError(f"{folder}/config.json is not JSON ({error}); export again, or fetch it again.") from error
    if not isinstance(config, dict) or not isinstance(config.get("format", 0), int):
        raise ValueError(f"{folder}/config.json is no config of an export; export again, or fetch it again.")
    if config.get("format", 0) > FORMAT:
        raise ValueError(f"{folder} has format {config['format']}, this version reads up to {FORMAT}; update unspool.")
    return config


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of an export's tensors by name, from the header alone. Raises ValueError for a file that is not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder}/model.safetensors is damaged ({reason}); export again, or fetch it.") from error


def check_fit(folder: Path, cls: type[nn.Module], module: nn.Module, wanted: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless `module` is a `cls` whose tensors have the names and shapes of the file's."""
    if not isinstance(module, cls):
        raise ValueError(f"{folder} holds a {type(module).__name__}, wanted a {cls.__name__}.")
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    wrong = sorted(n for n in own.keys() | wanted.keys() if own.get(n) != wanted.get(n))
    if wrong:
        raise ValueError(
            f"{folder}: {len(wrong)} tensors do not fit its config.json, {wrong[0]} among them; "
            "the two files are not from one export."
        )


class ShapesOnly(TorchFunctionMode):
    """Within, initial values on the meta device are not computed: only shapes are asked for.

    In-place functions give back their tensor, element-wise ones a tensor of the broadcast shape. Without it, PyTorch's
    rules for shapes import its compiler, which is half of the time that a small model takes to load.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, tensors = getattr(func, "__name__", ""), [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if tensors and all(tensor.is_meta for tensor in tensors):
            if name in ELEMENTWISE or name in COMPARISONS:
                shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
                dtype = reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
                return torch.empty(shape, dtype=torch.bool if name in COMPARISONS else dtype, device="meta")
            if name in IN_PLACE:
                return tensors[0]
        return func(*args, **kwargs)


@contextmanager
def at_most(elements: int, parts: int) -> Iterator[None]:
    """Within, modules of this thread that together have more numbers, or tensors and modules, raise ValueError."""
    left, thread = elements, threading.get_ident()

    def count(module: nn.Module, name: str, tensor: Any) -> None:
        nonlocal left, parts
        if threading.get_ident() != thread:
            return
        left, parts = left - (tensor.numel() if isinstance(tensor, Tensor) else 0), parts - 1
        if left < 0 or parts < 0:
            raise ValueError(f"this config describes a model far larger than its weights: over {elements} numbers.")

    registries = nn.modules.module
    handles = [
        registries.register_module_parameter_registration_hook(count),
        registries.register_module_buffer_registration_hook(count),
        registries.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def push_module(module: nn.Module, repo_id: str, card: str | None = None, **create: Any) -> str:
    """Create `repo_id` if needed and upload the export; returns its address."""
    import huggingface_hub

    api = huggingface_hub.HfApi()
    repo = api.create_repo(repo_id, exist_ok=True, **create)
    with tempfile.TemporaryDirectory() as folder:
        save_module(module, folder, card)
        api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message="Export from Unspool")
    return str(repo)
