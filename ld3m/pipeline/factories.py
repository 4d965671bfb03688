"""Objectives, spaces, networks and controls that params.yaml names by import path, `package.module:name`."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ld3m.models.networks import Network
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


def checked_objective(made: Any, key: str) -> Callable[..., tuple[float, Tensor]]:
    """What the factory of an objective returned, which checks itself what it returns in every step.

    `key` names the factory in errors, here and below: ValueErrors that say what is missing.
    """
    _require(key, callable(made), f"returned {_kind(made)}, must return objective(images, labels, *, step)")
    _require(key, isinstance(getattr(made, "learnables", None), dict), "its objective lacks the dict `learnables`")

    def objective(images: Tensor, labels: Tensor, *, step: int) -> tuple[float, Tensor]:
        returned = made(images, labels, step=step)
        loss, gradient = returned if isinstance(returned, tuple) and len(returned) == 2 else (None, None)
        _require(
            key, isinstance(loss, int | float), f"its objective returned {_kind(returned)}, must be (loss, gradient)"
        )
        fits = isinstance(gradient, Tensor) and gradient.shape == images.shape
        needed = f"must be a tensor {tuple(images.shape)}, as the images"
        _require(key, fits, f"its objective's gradient is {_kind(gradient)}, {needed}")
        return returned

    objective.learnables = made.learnables
    return objective


def check_space(made: Any, key: str, *, shape: tuple[int, ...], labels: Tensor) -> None:
    """Check what the factory of a space returned, for `labels` (N,) and images of `shape` (C, H, W): render it once."""
    missing = [name for name in ("labels", "learnables", "render", "tensors") if not hasattr(made, name)]
    _require(key, not missing, f"returned {_kind(made)}, which lacks {', '.join(missing)}")
    _require(key, torch.equal(made.labels.cpu(), labels.cpu()), "its `labels` are not those that it was given")
    for name, tensor in made.learnables.items():
        _require(key, tensor.is_leaf and tensor.requires_grad, f"its learnable {name} is no leaf that requires_grad")
    images, needed = made.render(step=0), (len(labels), *shape)
    fits = isinstance(images, Tensor) and images.shape == needed
    _require(key, fits, f"its render() gave {_kind(images)}, must be a tensor {needed}")
    _require(key, images.requires_grad, "its render() has no gradient for its `learnables`")


def check_network(made: Any, key: str, *, shape: tuple[int, ...], classes: int) -> None:
    """Check what the factory of a network returned, for images of `shape` (C, H, W)."""
    _require(key, isinstance(made, Network), f"returned {_kind(made)}, must be a subclass of Network")
    _require(key, not list(made.buffers()), "its network has buffers, such as batch norm's, which MTT cannot train")
    with torch.no_grad():
        logits = made(torch.zeros((2, *shape), device=next(made.parameters()).device))
    _require(
        key, logits.shape == (2, classes), f"its network gave {_kind(logits)} for 2 images, must be {(2, classes)}"
    )


def check_control(made: Any, key: str, *, shape: tuple[int, ...]) -> None:
    """Check what a control returned: normalized images (N, C, H, W) of `shape` (C, H, W), and labels (N,)."""
    is_pair = isinstance(made, tuple) and len(made) == 2 and all(isinstance(part, Tensor) for part in made)
    _require(key, is_pair, f"returned {_kind(made)}, must be (images, labels)")
    images, labels = made
    needed = (len(labels), *shape)
    _require(key, images.shape == needed, f"its images are {_kind(images)}, must be {needed} with these labels")


def _require(key: str, holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(f"{key}: {otherwise}; see docs/extend.md")


def _kind(value: Any) -> str:
    return (
        f"a tensor {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else "None"
        if value is None
        else f"a {type(value).__name__}"
    )
