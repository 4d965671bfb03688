"""Scores of a set beyond accuracy, all on fractions in [0, 1]: HLR, IOR, LRS and ARS of DD-Ranking (arXiv 2505.13300),
and 95 % intervals over independent values."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit  # Student's t and its quantile; scipy.stats takes a second to import

Accuracies = dict[str, list[float]]  # {architecture: one accuracy a network}
PLAIN = "plain"  # in the place of an architecture: the one that distils, trained without augmentation


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % Student t interval over independent values (two at least)."""
    values = np.asarray(values, dtype=float)
    mean, error = values.mean(), values.std(ddof=1) / math.sqrt(len(values))
    half = stdtrit(len(values) - 1, 0.975) * error
    return mean, mean - half, mean + half


def p_value(values: Sequence[float]) -> float:
    """Of Student's two-sided t test that the mean is zero, over independent values; of differences, the paired test."""
    values = np.asarray(values, dtype=float)
    error = values.std(ddof=1) / math.sqrt(len(values))
    if error == 0:
        return 1.0 if values.mean() == 0 else 0.0
    return 2 * stdtr(len(values) - 1, -abs(values.mean()) / error)


def hard_label_recovery(*, real: float, synthetic: float) -> float:
    """HLR, what the set loses against all real data, both with hard labels: lower is better."""
    return _fraction(real) - _fraction(synthetic)


def improvement_over_random(*, synthetic: float, random_real: float) -> float:
    """IOR, what the set gains over as many random real images with the same labels and recipe: higher is better."""
    return _fraction(synthetic) - _fraction(random_real)


def label_robust_score(*, hlr: float, ior: float, weight: float = 0.5) -> float:
    """LRS, alpha = w IOR - (1 - w) HLR mapped from [-1, 1] onto [0, 1]: higher is better."""
    return _squash(_between(weight, 0, "weight") * _between(ior) - (1 - weight) * _between(hlr))


def augmentation_robust_score(*, augmented: float, plain: float, weight: float = 0.5) -> float:
    """ARS of the IORs with and without augmentation, beta = g IOR(augmented) + (1 - g) IOR(plain), mapped as LRS is."""
    return _squash(_between(weight, 0, "weight") * _between(augmented) + (1 - weight) * _between(plain))


def compare(
    accuracies: Accuracies, *, seen: str, random_real: Accuracies | None = None, full_data: Accuracies | None = None
) -> pd.DataFrame:
    """One row an architecture and one for their mean: accuracy; HLR, IOR, LRS and ARS as far as the others are given.

    `random_real` and `full_data` are the accuracies of as many random real images and of all real data. Differences
    are paired by network; every mean has the low and high end of its 95 % interval. ARS is that of `seen`, the
    architecture that `PLAIN` stands for.
    """
    others = {"random_real": random_real, "full_data": full_data}
    judges = [architecture for architecture in accuracies if architecture != PLAIN]
    rows = []
    for architecture in [*judges, *(["mean"] if len(judges) > 1 else [])]:
        synthetic = _seeds(accuracies, architecture)
        row = {"architecture": architecture, "n": len(synthetic)} | _with_interval("accuracy", synthetic)
        values = {name: _seeds(given, architecture) for name, given in others.items() if given is not None}
        for name, given in values.items():
            if len(given) != len(synthetic):
                raise ValueError(
                    f"{architecture}: {len(synthetic)} seeds, but {name} has {len(given)}: judge both with the same"
                    " params.yaml"
                )
            row[name] = np.mean(given)
        if "random_real" in values:
            pairs = zip(synthetic, values["random_real"], strict=True)
            row |= _with_interval("IOR", [improvement_over_random(synthetic=a, random_real=b) for a, b in pairs])
        if "full_data" in values:
            pairs = zip(synthetic, values["full_data"], strict=True)
            row |= _with_interval("HLR", [hard_label_recovery(real=b, synthetic=a) for a, b in pairs])
        if len(values) == 2:
            row["LRS"] = label_robust_score(hlr=row["HLR"], ior=row["IOR"])
        if architecture == seen and PLAIN in accuracies and random_real is not None:
            plain = np.mean(accuracies[PLAIN]), np.mean(random_real[PLAIN])
            row["plain IOR"] = improvement_over_random(synthetic=plain[0], random_real=plain[1])
            row["ARS"] = augmentation_robust_score(augmented=row["IOR"], plain=row["plain IOR"])
        rows.append(row)
    return pd.DataFrame(rows)


def _seeds(accuracies: Accuracies, architecture: str) -> list[float]:
    """The accuracies of one architecture, or the mean over architectures of every seed."""
    if architecture == "mean":
        judges = [values for name, values in accuracies.items() if name != PLAIN]
        return [sum(values) / len(values) for values in zip(*judges, strict=True)]
    return accuracies[architecture]


def _with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval(values), strict=True))


def _squash(value: float) -> float:
    return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))


def _fraction(accuracy: float) -> float:
    return _between(accuracy, 0, "an accuracy")


def _between(value: float, low: float = -1, name: str = "a difference of accuracies") -> float:
    if not low <= value <= 1:
        raise ValueError(f"{name} is {value}: it must be in [{low}, 1]; divide percent by 100")
    return value
