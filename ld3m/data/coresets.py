"""Real images chosen to stand for a class: the baselines that select instead of learning."""

import torch
from torch import Tensor


def herding(features: Tensor, count: int) -> Tensor:
    """Indices (count,) of distinct rows of `features` (n, F), chosen one by one so that the mean of the chosen ones is
    as near to the mean of all as it can be (Rebuffi et al., 2017, iCaRL)."""
    _check(features, count)
    mean, total = features.mean(0), torch.zeros_like(features[0])
    chosen: list[int] = []
    for k in range(1, count + 1):
        distance = ((total + features) / k - mean).norm(dim=1)
        distance[chosen] = torch.inf
        chosen.append(int(distance.argmin()))
        total = total + features[chosen[-1]]
    return torch.tensor(chosen)


def k_center(features: Tensor, count: int) -> Tensor:
    """Indices (count,) of distinct rows of `features` (n, F): the one nearest to the mean, then always the one farthest
    from all chosen so far, which keeps the largest distance to a center within twice the optimum (Gonzalez, 1985)."""
    _check(features, count)
    chosen = [int((features - features.mean(0)).norm(dim=1).argmin())]
    nearest = torch.full_like(features[:, 0], torch.inf)
    while len(chosen) < count:
        nearest = nearest.minimum((features - features[chosen[-1]]).norm(dim=1))
        nearest[chosen] = -torch.inf  # where rows are equal, too, none is chosen twice
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen)


def _check(features: Tensor, count: int) -> None:
    if not 1 <= count <= len(features):
        raise ValueError(f"count is {count}: choose 1..{len(features)} of {len(features)} images")
