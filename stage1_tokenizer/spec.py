"""Modules that remember how they were built: class path and plain arguments, for exports and checkpoints.

A config file names classes by path (`class_path`, `init_args`), and so does the `config.json` of an exported folder.
`Spec` records a constructor's arguments as plain JSON, nested modules as specs of their own; `build` is the inverse.
Building imports a class by name, so `build` only does it for packages that the caller trusts: a downloaded config
cannot name anything else.
"""

import functools
import importlib
import inspect
import sys
from typing import Any, ClassVar

from torch import nn

TRUSTED = ("stage1_tokenizer", "stage2_prior")
RENAMED: dict[str, str] = {}  # last names that exports of earlier versions use, and what they are called now


class SpecError(ValueError):
    """A module description that cannot be recorded or must not be built."""


class Spec:
    """Mixin: `self.spec` is the plain JSON description of this object, taken from its constructor's arguments.

    `unrecorded` names arguments that say where weights come from at the start, and the value that a description holds
    instead: an export has its weights in it, and must not ask for a file of the machine that it was made on.
    `retired` names arguments of earlier versions and the value at which they changed nothing: exports hold them still.
    """

    spec: dict[str, Any]
    unrecorded: ClassVar[dict[str, Any]] = {}
    retired: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Of a class without a constructor anywhere; where there is one, each instance has its own.
        cls.spec = {"class_path": public_path(cls), "init_args": {}}
        if "__init__" not in cls.__dict__:
            return
        original = cls.__init__

        @functools.wraps(original)
        def init(self: Any, *args: Any, **kw: Any) -> None:
            if type(self).__init__ is init:  # a subclass records its own arguments, not those that it passes upwards
                bound = inspect.signature(original).bind(self, *args, **kw)
                bound.apply_defaults()
                arguments = {name: plain(value) for name, value in list(bound.arguments.items())[1:]}
                arguments |= self.unrecorded
                object.__setattr__(self, "spec", {"class_path": public_path(type(self)), "init_args": arguments})
            original(self, *args, **kw)

        cls.__init__ = init  # type: ignore[method-assign]


def public_path(cls: type) -> str:
    """Where a class is imported from: its package if that offers it as a public name, else the module it stands in."""
    package = cls.__module__.split(".")[0]
    offered = cls.__name__ in getattr(sys.modules[package], "__all__", ()) and "." not in cls.__qualname__
    return f"{package if offered else cls.__module__}.{cls.__qualname__}"


def find_class(path: str) -> Any:
    """What `path` names. A path inside this project is read by its last name: files move, public names stay.

    Raises ImportError or AttributeError where there is no such thing.
    """
    module_name, _, name = path.rpartition(".")
    package = module_name.split(".")[0]
    name = RENAMED.get(name, name)
    if package in TRUSTED and name in importlib.import_module(package).__all__:
        return getattr(importlib.import_module(package), name)
    return getattr(importlib.import_module(module_name), name)


def plain(value: Any) -> Any:
    """`value` as JSON types, `Spec` objects as their spec. Raises SpecError for anything else."""
    if isinstance(value, Spec):
        return value.spec
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise SpecError(f"got a {type(value).__name__} as constructor argument, wanted a number, string or Spec module.")


def build(spec: dict[str, Any], trusted: tuple[str, ...] = TRUSTED) -> Any:
    """The object that `spec` describes. Raises SpecError for a class outside `trusted` or odd arguments."""
    path, given = spec.get("class_path", ""), spec.get("init_args", {})
    if not isinstance(path, str) or not isinstance(given, dict):
        raise SpecError(f"got class path {path!r:.60} with arguments {given!r:.60}, wanted a name and a mapping.")
    if path.split(".")[0] not in trusted:
        raise SpecError(
            f"got class path {path!r:.200}, wanted one in {', '.join(trusted)}; if you trust its package, load with "
            f"trust=({path.split('.')[0]!r:.100},)."
        )
    try:
        cls = find_class(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise SpecError(f"got class path {path!r}, which does not exist here ({error}); update the package.") from error
    if not (isinstance(cls, type) and issubclass(cls, Spec) and issubclass(cls, nn.Module)):
        raise SpecError(f"got class path {path!r}, wanted a module class that records its arguments.")
    given = {k: v for k, v in given.items() if k not in cls.retired or v != cls.retired[k]}
    given |= {k: v for k, v in cls.unrecorded.items() if k in given}  # no file or download that an export may name
    arguments = {k: build_value(v, trusted) for k, v in given.items()}
    try:
        return cls(**arguments)
    except Exception as error:  # of a value that its constructor did not expect, torch and Python raise all kinds
        if isinstance(error, ValueError) and type(error).__module__.split(".")[0] in TRUSTED:
            raise
        reason = " ".join(str(error).split())
        raise SpecError(f"got arguments {sorted(arguments)} for {path}: {reason:.300}.") from error


def build_value(value: Any, trusted: tuple[str, ...]) -> Any:
    if isinstance(value, dict) and "class_path" in value:
        return build(value, trusted)
    return [build_value(v, trusted) for v in value] if isinstance(value, list) else value
