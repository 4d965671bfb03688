"""Objectives, spaces, networks and controls that params.yaml names by import path, `package.module:name`."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

from ld3m.pipeline.blocks import Extension
from ld3m.pipeline.params import Params
from ld3m.runtime import paths

OBJECTIVE = ("normalization", "new_network", "experts", "strategy", "threads", "seed")
SPACE = ("normalization", "prior", "seed", "threads")
NETWORK = ("channels", "size_px", "classes")


def imported(path: str) -> Callable[..., Any]:
    """Return the object of an import path; modules in the repository's folder are found too.

    Raises
    ------
    ValueError
        if the module cannot be imported or lacks the name.
    """
    module, _, name = path.partition(":")
    if str(paths.ROOT) not in sys.path:
        sys.path.append(str(paths.ROOT))
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(f"{path!r} cannot be imported ({type(error).__name__}: {error})") from error


def check_factories(params: Params) -> None:
    """Import everything that params.yaml names by import path, and check that it can be called as it will be.

    Raises
    ------
    ValueError
        which names the key, the import path, and what is missing.
    """
    for kind, arguments, count in (("objectives", OBJECTIVE, 1), ("spaces", SPACE, 2)):
        for name, block in getattr(params, kind).__pydantic_extra__.items():
            _check(f"{kind}.{name}.factory", block.factory, count, (*arguments, *block.options()))
    for name, block in params.networks.items():
        if isinstance(block, Extension):
            _check(f"networks.{name}.factory", block.factory, 0, (*NETWORK, *block.options()))
    for key, control in params.controls.items():
        if ":" in control.control:
            _check(f"controls.{key}.control", control.control, 2, ())


def _check(key: str, path: str, positional: int, names: Iterable[str]) -> None:
    try:
        inspect.signature(imported(path)).bind(*[None] * positional, **dict.fromkeys(names))
    except (TypeError, ValueError) as error:
        called = ", ".join((*["..."] * positional, *(f"{name}=..." for name in names)))
        raise ValueError(f"{key} = {path!r}: {error}; it is called as factory({called})") from error
