"""Objectives, spaces, networks and controls that params.yaml names by import path, `package.module:name`."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from functools import wraps
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


def imported(key: str, path: str) -> Callable[..., Any]:
    """Return the object of an import path, that of `key`; modules in the repository's folder are found too.

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
        raise ValueError(f"{key} = {path!r}: cannot be imported ({type(error).__name__}: {error})") from error


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
    factory = imported(key, path)
    try:
        inspect.signature(factory).bind(*[None] * positional, **dict.fromkeys(names))
    except (TypeError, ValueError) as error:
        called = ", ".join((*["..."] * positional, *(f"{name}=..." for name in names)))
        raise ValueError(f"{key} = {path!r}: {error}; it is called as factory({called})") from error


def own(kind: str, key: str, path: str) -> Callable[..., Any]:
    """Return the factory of an objective, a space, a network or a control, with a check of what it returns.

    Raises
    ------
    ValueError
        when it is called (an objective also in every step), which names the key, the import path and what is missing.
    """
    factory = imported(key, path)

    def require(holds: bool, otherwise: str) -> None:
        if not holds:
            raise ValueError(f"{key} = {path!r}: {otherwise}; see docs/extend.md")

    @wraps(factory, updated=())
    def make(*arguments: Any, **options: Any) -> Any:
        made = factory(*arguments, **options)
        return CHECKS[kind](require, made, *arguments, **options)

    return make


def _objective(require: Callable, made: Any, *_: Any, **__: Any) -> Callable[..., tuple[float, Tensor]]:
    require(callable(made), f"returned {_kind(made)}, must return objective(images, labels, *, step)")
    require(isinstance(getattr(made, "learnables", None), dict), "its objective lacks the dict `learnables`")
    for name, value in made.learnables.items():
        is_rate = isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad and value.item() > 0
        require(is_rate, f"its learnable {name} is {_kind(value)}: must be one positive number that requires_grad")

    def objective(images: Tensor, labels: Tensor, *, step: int) -> tuple[float, Tensor]:
        returned = made(images, labels, step=step)
        loss, gradient = returned if isinstance(returned, tuple) and len(returned) == 2 else (None, None)
        require(isinstance(loss, int | float), f"its objective returned {_kind(returned)}, not (number, gradient)")
        fits = isinstance(gradient, Tensor) and gradient.shape == images.shape
        require(fits, f"the gradient of its objective is {_kind(gradient)}, not {_kind(images)}, as the images")
        return returned

    objective.learnables = made.learnables
    return objective


def _space(require: Callable, made: Any, x: Tensor, labels: Tensor, **_: Any) -> Any:
    missing = [name for name in ("labels", "learnables", "render", "tensors") if not hasattr(made, name)]
    require(not missing, f"returned {_kind(made)}, which lacks {', '.join(missing)}")
    require(torch.equal(made.labels.cpu(), labels.cpu()), "its `labels` are not those that it was given")
    for name, tensor in made.learnables.items():
        require(tensor.is_leaf and tensor.requires_grad, f"its learnable {name} is no leaf that requires_grad")
    images = made.render(step=0)
    require(isinstance(images, Tensor) and images.shape == x.shape, f"render() gave {_kind(images)}, not {_kind(x)}")
    require(images.requires_grad, "render() has no gradient for its `learnables`")
    return made


def _network(require: Callable, made: Any, *, channels: int, size_px: int, classes: int, **_: Any) -> Network:
    require(isinstance(made, Network), f"returned {_kind(made)}, must be a subclass of Network")
    require(not list(made.buffers()), "its network has buffers, such as batch norm's, which MTT cannot train")
    with torch.no_grad():
        logits = made(torch.zeros(2, channels, size_px, size_px))
    require(logits.shape == (2, classes), f"its network gave {_kind(logits)} for 2 images, not {(2, classes)}")
    return made


def _control(require: Callable, made: Any, run: Any, ipc: int) -> tuple[Tensor, Tensor]:
    is_pair = isinstance(made, tuple) and len(made) == 2 and all(isinstance(part, Tensor) for part in made)
    require(is_pair, f"returned {_kind(made)}, must be (images, labels)")
    needed = (len(made[1]), *run.dataset.train.shape)
    require(made[0].shape == needed, f"its images are {_kind(made[0])}, not {needed} with these labels")
    return made


CHECKS = {"objective": _objective, "space": _space, "network": _network, "control": _control}


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"
