"""Intervals and tests against scipy.stats, DD-Ranking's scores against their formulas, comparisons by hand."""

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

from ld3m.evaluation.statistics import (
    STATISTICS,
    compare,
    hard_label_recovery,
    improvement_over_random,
    interval,
    label_robust_score,
    p_value,
    permutation,
)

T_975_DF_1 = 12.7062047  # from a printed table of Student's t
SET = {"convnet": [0.8, 0.9], "vit": [0.4, 0.2]}
RANDOM = {"convnet": [0.6, 0.6], "vit": [0.3, 0.3]}
FULL = {"convnet": [1.0, 1.0], "vit": [0.5, 0.7]}


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_interval_and_the_test_are_those_of_scipy(count):
    values = np.random.default_rng(count).normal(0.1, 0.2, count)
    expected = scipy.stats.ttest_1samp(values, 0)
    assert interval(values)[1:] == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-12)
    assert interval(values)[0] == pytest.approx(values.mean(), rel=1e-12)
    assert p_value(values) == pytest.approx(expected.pvalue, rel=1e-10)


@pytest.mark.parametrize(
    "confusion, expected",
    [
        ([[8, 1, 1], [2, 7, 1], [0, 3, 7]], None),
        ([[1, 8, 1], [7, 2, 1], [0, 3, 7]], [1, 0, 2]),  # two of three are exchanged, of 100 images each
        ([[1, 8, 1], [2, 1, 7], [6, 1, 3]], [1, 2, 0]),
        ([[4, 6, 0], [6, 4, 0], [0, 3, 7]], None),  # not twice as many
        ([[1, 4, 5], [3, 2, 5], [0, 0, 9]], None),  # too few of all
        ([[0, 0, 9], [0, 0, 9], [0, 0, 9]], None),
    ],
)
def test_a_permutation_is_found_where_it_is_clear(confusion, expected):
    assert permutation(10 * torch.tensor(confusion)) == expected


@pytest.mark.parametrize("scale", [2, 12, 60])
def test_the_order_found_has_the_largest_surplus_of_all_orders(scale):
    """Images that the order explains in the classes it moves, beyond what its docstring asks for."""
    for counts in 1 + torch.randint(scale, (40, 3, 3), generator=torch.Generator().manual_seed(0)).double():
        explained = {order: sum(counts[i, k] for i, k in enumerate(order)) for order in permutations(range(3))}
        share = max(explained.values()) / counts.sum()

        def surplus(order, counts=counts, share=share):
            moved = [(i, k) for i, k in enumerate(order) if i != k]
            return float(sum(counts[i, k] - 2 * counts[i, i] - 5 - share * counts[i].sum() / 4 for i, k in moved))

        assert surplus(permutation(counts) or range(3)) == pytest.approx(max(map(surplus, explained)))


def test_values_without_spread_have_no_width():
    assert interval(pd.Series([0.4, 0.4])) == pytest.approx((0.4, 0.4, 0.4))
    assert p_value([0.0, 0.0, 0.0]) == 1 and p_value([0.5, 0.5]) == 0


# (e^alpha - e^-1) / (e - e^-1), worked out by hand with e = 2.718281828, e^-1 = 0.367879441
@pytest.mark.parametrize(
    "accuracy, random_real, full_data, expected",
    [
        (0.6, 0.5, 0.9, (0.904837418 - 0.367879441) / 2.350402387),  # alpha = (0.1 - 0.3) / 2 = -0.1
        (1.0, 0.5, 1.0, (1.284025417 - 0.367879441) / 2.350402387),  # alpha = 0.25
        (0.5, 0.5, 0.5, (1 - 0.367879441) / 2.350402387),
        (1.0, 0.0, 0.0, 1.0),  # alpha = 1
        (0.0, 1.0, 1.0, 0.0),
    ],
)
def test_the_scores_of_dd_ranking_are_their_formulas(accuracy, random_real, full_data, expected):
    score = label_robust_score(accuracy=accuracy, random_real=random_real, full_data=full_data)
    assert score == pytest.approx(expected, abs=1e-8)
    assert improvement_over_random(accuracy=accuracy, random_real=random_real) == accuracy - random_real
    assert hard_label_recovery(accuracy=accuracy, full_data=full_data) == full_data - accuracy


@pytest.mark.parametrize("value", [90.0, 1.5, -0.1, float("nan")])
def test_percent_and_other_values_outside_of_0_to_1_are_refused(value):
    with pytest.raises(ValueError, match=r"accuracy of vit is .* must be in \[0, 1\]; divide percent by 100"):
        compare({"vit": [value, 0.2]})
    assert list(compare({"vit": [0.0, 1.0]}).accuracy) == [0.5]  # the ends are allowed


def test_a_comparison_is_paired_by_network_and_shows_the_parts():
    table = compare(SET, random_real=RANDOM, full_data=FULL).set_index("architecture")
    assert list(table.index) == ["convnet", "vit", "mean"] and (table.n == 2).all()
    half = T_975_DF_1 * 0.1 / 2  # of two values 0.1 apart: standard deviation 0.1 / sqrt(2)
    convnet = table.loc["convnet"]
    assert [convnet.accuracy, convnet.accuracy_low, convnet.accuracy_high] == pytest.approx(
        [0.85, 0.85 - half, 0.85 + half]
    )
    assert [convnet.random_real, convnet.full_data, convnet.IOR, convnet.HLR] == pytest.approx([0.6, 1.0, 0.25, 0.15])
    assert [convnet.IOR_low, convnet.IOR_high] == pytest.approx([0.25 - half, 0.25 + half])
    assert convnet.LRS == pytest.approx(label_robust_score(accuracy=0.85, random_real=0.6, full_data=1.0))
    # over architectures, network by network: 0.6, 0.55 against 0.45, 0.45 and 0.75, 0.85
    mean = table.loc["mean"]
    assert [mean.accuracy, mean.IOR, mean.HLR] == pytest.approx([0.575, 0.125, 0.225])
    assert mean.HLR_high == pytest.approx(0.225 + T_975_DF_1 * 0.15 / 2)


def test_a_comparison_has_the_statistics_whose_arguments_are_given(monkeypatch):
    monkeypatch.setitem(STATISTICS, "ratio", lambda *, accuracy, full_data: accuracy / full_data)  # a new one
    assert set(STATISTICS).isdisjoint(compare(SET).columns)
    assert set(compare(SET, random_real=RANDOM).columns) & set(STATISTICS) == {"IOR"}
    table = compare(SET, random_real=RANDOM, full_data=FULL).set_index("architecture")
    assert table.ratio["convnet"] == pytest.approx(0.85) and {"ratio_low", "ratio_high"} <= set(table.columns)
    assert list(compare({"vit": [0.1, 0.2]}).architecture) == ["vit"]


def test_a_comparison_refuses_another_number_of_networks():
    with pytest.raises(ValueError, match="convnet: numbers of networks differ, 2 of accuracy, 3 of random_real"):
        compare(SET, random_real={"convnet": [0.1] * 3, "vit": [0.1] * 3})
