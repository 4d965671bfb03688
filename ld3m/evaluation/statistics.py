"""95 % intervals and paired t tests over independent values, and DD-Ranking's scores of a set (arXiv 2505.13300).

To add a statistic is to add a function to `STATISTICS`. Its keyword arguments are those of `accuracy` (of the set),
`random_real` (of as many random real images) and `full_data` (of all real data) that it needs, fractions in [0, 1].
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd  # with scipy half a second, which worker processes need not spend

Accuracies = dict[str, list[float]]  # {architecture: one accuracy a network}


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Compute a mean and its 95 % Student t interval, mean -+ t(0.975, n - 1) s / sqrt(n).

    Parameters
    ----------
    values
        At least two, independent. Paired differences give the interval of the paired t test.

    Returns
    -------
    tuple of float
        The mean, the lower end and the upper end.
    """
    from scipy.special import stdtrit  # quantile of Student's t

    mean, error, degrees = _mean_and_error(values)
    half = stdtrit(degrees, 0.975) * error
    return mean, mean - half, mean + half


def p_value(values: Sequence[float]) -> float:
    """Compute the p-value of the two-sided t test that the mean is zero; of paired differences, the paired t test."""
    from scipy.special import stdtr  # Student's t

    mean, error, degrees = _mean_and_error(values)
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return 2 * stdtr(degrees, -abs(mean) / error)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float, int]:
    values = np.asarray(values, dtype=float)
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values)), len(values) - 1


def improvement_over_random(*, accuracy: float, random_real: float) -> float:
    """Compute IOR, the gain over as many random real images with the same recipe, in [-1, 1]: higher is better."""
    return accuracy - random_real


def hard_label_recovery(*, accuracy: float, full_data: float) -> float:
    """Compute HLR, the loss against all real data, both with hard labels, in [-1, 1]: lower is better."""
    return full_data - accuracy


def label_robust_score(*, accuracy: float, random_real: float, full_data: float) -> float:
    """Compute LRS: alpha = (IOR - HLR) / 2, mapped from [-1, 1] onto [0, 1] as (e^alpha - 1/e) / (e - 1/e)."""
    ior = improvement_over_random(accuracy=accuracy, random_real=random_real)
    alpha = 0.5 * ior - 0.5 * hard_label_recovery(accuracy=accuracy, full_data=full_data)
    return (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))


STATISTICS: dict[str, Callable[..., float]] = {
    "IOR": improvement_over_random,
    "HLR": hard_label_recovery,
    "LRS": label_robust_score,
}


def compare(
    accuracies: Accuracies, *, random_real: Accuracies | None = None, full_data: Accuracies | None = None
) -> "pd.DataFrame":
    """Compute accuracy and every statistic of `STATISTICS` whose arguments are given.

    Parameters
    ----------
    accuracies, random_real, full_data
        Of the set, of as many random real images, and of all real data.

    Returns
    -------
    DataFrame
        A row for each architecture, and one for their mean where there are several. A statistic is that of the mean
        accuracies; `_low` and `_high` are its 95 % interval over networks, paired by network.

    Raises
    ------
    ValueError
        Where an accuracy is outside [0, 1], or where the numbers of networks differ.
    """
    import pandas as pd

    given = {"accuracy": accuracies, "random_real": random_real, "full_data": full_data}
    rows = []
    for architecture in [*accuracies, *(["mean"] if len(accuracies) > 1 else [])]:
        found = {name: _networks(name, values, architecture) for name, values in given.items() if values is not None}
        if len(set(map(len, found.values()))) > 1:
            counts = ", ".join(f"{len(values)} of {name}" for name, values in found.items())
            raise ValueError(f"{architecture}: numbers of networks differ, {counts}: evaluate all with the same number")
        networks = pd.DataFrame(found)
        means = networks.mean()
        row = {"architecture": architecture, "n": len(networks)} | _with_interval("accuracy", networks.accuracy)
        row |= means.drop("accuracy").to_dict()
        for name, statistic in STATISTICS.items():
            needed = list(inspect.signature(statistic).parameters)
            if set(needed) <= set(found):
                values = [statistic(**network) for network in networks[needed].to_dict("records")]
                row |= _with_interval(name, values) | {name: statistic(**means[needed])}
        rows.append(row)
    return pd.DataFrame(rows)


def _networks(name: str, accuracies: Accuracies, architecture: str) -> list[float]:
    """The accuracies of one architecture, or the mean over architectures of every network."""
    if architecture == "mean":
        return [sum(values) / len(values) for values in zip(*accuracies.values(), strict=True)]
    values = accuracies[architecture]
    if not all(0 <= value <= 1 for value in values):
        raise ValueError(f"{name} of {architecture} is {values}: accuracies must be in [0, 1]; divide percent by 100")
    return values


def _with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval(values), strict=True))


def permutation(confusion: Tensor) -> list[int] | None:
    """Find the order of classes that a confusion matrix shows, if it is clearly not the given one.

    Of the classes that the order returned moves, it explains more than twice as many images as the given order does,
    plus 5 for each class, plus a quarter of their images times the share of all images that the best order explains.

    Parameters
    ----------
    confusion
        Counts (K, K): rows are the classes of the images, columns those that a network sees.

    Returns
    -------
    list of int or None
        The column of each row; None if the given order holds.
    """
    from scipy.optimize import linear_sum_assignment  # takes 0.4 s

    counts = np.asarray(confusion, dtype=float)
    explained = counts[linear_sum_assignment(counts, maximize=True)].sum() / counts.sum()
    bonus = counts.diagonal() + 5 + explained * counts.sum(1) / 4  # of the given order
    rows, columns = linear_sum_assignment(counts + np.diag(bonus), maximize=True)
    return columns.tolist() if (rows != columns).any() else None
