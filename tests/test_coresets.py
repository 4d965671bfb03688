"""Coresets against plain searches over every next choice."""

import pytest
import torch

from ld3m.data.coresets import herding, k_center


@pytest.fixture
def features():
    return torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_herding_takes_the_best_next_image(features):
    chosen = herding(features, 6).tolist()
    for k in range(6):
        others = [i for i in range(30) if i not in chosen[:k]]
        gap = {i: (features[[*chosen[:k], i]].mean(0) - features.mean(0)).norm().item() for i in others}
        assert chosen[k] == min(gap, key=gap.get)


def test_k_center_takes_the_farthest_next_image(features):
    chosen = k_center(features, 6).tolist()
    assert chosen[0] == (features - features.mean(0)).norm(dim=1).argmin()
    for k in range(1, 6):
        gap = {i: min((features[i] - features[j]).norm().item() for j in chosen[:k]) for i in range(30)}
        assert chosen[k] == max(gap, key=gap.get)


@pytest.mark.parametrize("choose", [herding, k_center])
def test_all_images_once_and_refusals(choose, features):
    for rows in (features, torch.zeros(3, 2)):  # equal rows are distinct images
        assert sorted(choose(rows, len(rows)).tolist()) == list(range(len(rows)))
    for count in (0, 31):
        with pytest.raises(ValueError, match="choose 1..30"):
            choose(features, count)
