"""params.yaml as frozen models: an unknown key, a missing key or a value out of range is an error that names it.

    python -m ld3m.pipeline.profiles apply profiles/smoke.yaml    # merge a profile into params.yaml, comments kept
    python -m ld3m.pipeline.profiles check                        # read params.yaml and say whether it is valid

The notebooks and the commands read them. `Experiment` and what enumerates cells or settings (tables, report, published,
ablations, explore, check) are given a `Params`; every other function of the library takes explicit values.
"""

import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.events import AliasEvent

from ld3m.pipeline.params import Params
from ld3m.runtime.paths import PARAMS, PROFILES

REPLACED = ("learning_rates", "settings", "cells", "controls", "changes")  # a profile replaces these whole
PAPER = PROFILES / "paper.yaml"  # what `paper: true` stands for


def load_params(overrides: dict[str, Any] | None = None, *, path: Path = PARAMS) -> Params:
    """The validated parameters; `overrides` are dotted keys, e.g. {"distill.momentum": 0.9}.

    Where `paper` is true, profiles/paper.yaml is laid over the file, and `overrides` over both.
    """
    values, overrides = _read(path), overrides or {}
    if overrides.get("paper", values.get("paper")) is True:
        _lay(values, PAPER)
    for key, value in overrides.items():
        *parents, last = key.split(".")
        node = values
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            raise ValueError(f"override {key!r}: there is no such key in {path.name}")
        node[last] = value
    return validate(values, origin=path.name)


def ablation_settings(
    ablation: str, overrides: dict[str, Any] | None = None, *, path: Path = PARAMS
) -> dict[str, tuple[Params, str, str]]:
    """The settings that an ablation measures, which are those that change something, and the baseline if it is the
    first: {setting: (its parameters, objective, space)}."""
    params = load_params(overrides, path=path)
    given = params.ablations
    if ablation not in given.settings:
        raise ValueError(
            f"there is no ablation {ablation!r} in ablations.settings; there are {', '.join(given.settings)}"
        )
    settings = {}
    for name, changes in given.settings[ablation].items():
        if changes or (ablation, name) == given.baseline:
            keys = dict(changes)
            objective, space = keys.pop("objective", "dm"), keys.pop("space", "ld3m")
            shared = {
                "processes": 1,
                "cluster": None,
                "grid.architecture": given.architecture,
                "evaluate.seeds": given.seeds,
                f"distill.{objective}.{space}.iterations": given.iterations,
            }
            try:
                settings[name] = load_params((overrides or {}) | shared | keys, path=path), objective, space
            except ValueError as error:
                raise ValueError(f"ablations.settings.{ablation}.{name}: {error}") from None
    return settings


def validate(values: Any, *, origin: str) -> Params:
    """Plain values as Params, or a ValueError with one line for every wrong key."""
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        lines = [f"{origin} is not valid:"]
        for problem in error.errors(include_url=False):
            if problem["type"] == "too_short" and len(problem["input"]) >= problem["ctx"]["min_length"]:
                continue  # too short without its wrong entries, which have lines of their own
            key = ".".join(map(str, problem["loc"])).removesuffix(".[key]")
            message = problem["msg"].removeprefix("Value error, ")
            wrong = "unknown key, see the committed params.yaml" if problem["type"] == "extra_forbidden" else message
            got = (
                ""
                if problem["type"] == "missing" or isinstance(problem["input"], dict)
                else f" (got {problem['input']!r})"
            )
            lines.append(f"  {key or '(whole)'}: {wrong}{got}")
        raise ValueError("\n".join(lines)) from None


def apply_profile(profile: Path, *, path: Path = PARAMS) -> None:
    """Merges a profile, a file or the name of one in profiles/, into params.yaml, which keeps its comments.

    Refused whole where the result is not valid.
    """
    _read(path)  # refuses what is missing or not YAML
    named = PROFILES / f"{profile}.yaml"
    if not profile.is_file() and not named.is_file():
        known = ", ".join(f"profiles/{file.name}" for file in sorted(PROFILES.glob("*.yaml")))
        raise FileNotFoundError(f"{profile} is missing; the repository has {known}")
    profile = profile if profile.is_file() else named
    yaml = YAML()
    yaml.width = 4096  # or it would break long lines
    yaml.representer.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))
    values = yaml.load(path.read_text())
    _lay(values, profile)
    validate(values, origin=f"{path.name} with {profile.name}")
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        yaml.dump(values, file)
    partial.replace(path)


def _lay(values: Any, profile: Path, above: tuple[Path, ...] = ()) -> None:
    """Merges a profile into `values`, after the one beside it that it names as `over`."""
    overlay = _read(profile)
    if base := overlay.pop("over", None):
        below = profile.parent / str(base)
        if below in (profile, *above):
            raise ValueError(f"{profile.name}: over = {base!r} leads back to a profile that it lies under")
        _lay(values, below, (*above, profile))
    _merge(values, overlay, origin=profile.name, under="")


def _merge(values: Any, overlay: dict[str, Any], *, origin: str, under: str) -> None:
    for key, value in overlay.items():
        if key not in values and under not in ("datasets", "networks"):
            raise ValueError(f"{origin}: unknown key {f'{under}.{key}'.lstrip('.')}")
        if isinstance(value, dict) and isinstance(values.get(key), dict) and key not in REPLACED:
            _merge(values[key], value, origin=origin, under=f"{under}.{key}".lstrip("."))
        elif key not in values or values[key] != value:  # what is equal keeps its comments
            values[key] = value


def _read(path: Path) -> Any:
    try:
        text = Path(path).read_text()
        if any(isinstance(event, AliasEvent) for event in YAML(typ="safe").parse(text)):
            raise ValueError("aliases are not allowed: a few lines of them can stand for more values than memory holds")
        values = YAML(typ="safe").load(text)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; `git checkout {Path(path).name}` restores it") from None
    except OSError:
        raise
    except Exception as error:  # ruamel raises many kinds: for a date that does not exist, for what is nested too deep
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values")
    return values


if __name__ == "__main__":
    try:
        match sys.argv[1:]:
            case ["apply", profile]:
                apply_profile(Path(profile))
                print(f"params.yaml now has the values of {profile}; next: python -m ld3m.pipeline.check")
            case ["check"]:
                load_params()
                print("params.yaml is valid")
            case _:
                sys.exit(__doc__)
    except (ValueError, FileNotFoundError) as problem:
        sys.exit(str(problem))
