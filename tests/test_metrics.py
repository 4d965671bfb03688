import math

import pandas as pd
import pytest

from ld3m.evaluation.statistics import (
    PLAIN,
    augmentation_robust_score,
    compare,
    hard_label_recovery,
    improvement_over_random,
    interval,
    label_robust_score,
)

T_975_DF_1, T_975_DF_2 = 12.7062047, 4.30265273  # from a printed table of Student's t


def test_the_interval_is_that_of_student():
    # mean 0.6, standard deviation 0.1, standard error 0.1 / sqrt(3)
    half = T_975_DF_2 * 0.1 / 3**0.5
    assert interval(pd.Series([0.5, 0.7, 0.6])) == pytest.approx((0.6, 0.6 - half, 0.6 + half), rel=1e-6)
    assert interval([0.4, 0.4]) == pytest.approx((0.4, 0.4, 0.4))


def test_recovery_and_improvement_have_the_sign_of_the_paper():
    assert hard_label_recovery(real=0.9, synthetic=0.6) == pytest.approx(0.3)
    assert improvement_over_random(synthetic=0.6, random_real=0.5) == pytest.approx(0.1)


# (e^alpha - e^-1) / (e - e^-1), worked out by hand with e = 2.718281828, e^-1 = 0.367879441
@pytest.mark.parametrize(
    "hlr, ior, weight, expected",
    [
        (0.3, 0.1, 0.5, (0.904837418 - 0.367879441) / 2.350402387),  # alpha = -0.1
        (0.0, 1.0, 1.0, 1.0),
        (1.0, 0.0, 0.0, 0.0),
        (0.2, 0.4, 0.75, (1.284025417 - 0.367879441) / 2.350402387),  # alpha = 0.3 - 0.05 = 0.25
        (0.0, 0.0, 0.5, (1 - 0.367879441) / 2.350402387),
    ],
)
def test_the_label_robust_score_is_the_formula(hlr, ior, weight, expected):
    assert label_robust_score(hlr=hlr, ior=ior, weight=weight) == pytest.approx(expected, abs=1e-8)


def test_the_augmentation_robust_score_is_the_formula():
    expected = (math.exp(0.75 * 0.3 + 0.25 * -0.1) - math.exp(-1)) / (math.exp(1) - math.exp(-1))  # beta = 0.2
    assert augmentation_robust_score(augmented=0.3, plain=-0.1, weight=0.75) == pytest.approx(expected)
    assert augmentation_robust_score(augmented=0.2, plain=0.2) == pytest.approx(expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda: hard_label_recovery(real=90.0, synthetic=0.6),
        lambda: improvement_over_random(synthetic=0.6, random_real=-0.1),
        lambda: label_robust_score(hlr=30.0, ior=0.1),
        lambda: label_robust_score(hlr=0.3, ior=0.1, weight=1.5),
        lambda: augmentation_robust_score(augmented=float("nan"), plain=0.0),
    ],
)
def test_percent_and_what_is_no_fraction_are_refused(call):
    with pytest.raises(ValueError, match=r"must be in \[-?[01], 1\]; divide percent by 100"):
        call()


SET = {"convnet": [0.8, 0.9], "vit": [0.4, 0.2]}
RANDOM = {"convnet": [0.6, 0.6], "vit": [0.3, 0.3]}
FULL = {"convnet": [1.0, 1.0], "vit": [0.5, 0.7]}


def test_a_comparison_is_paired_by_seed_and_shows_the_parts():
    table = compare(SET, seen="convnet", random_real=RANDOM, full_data=FULL).set_index("architecture")
    assert list(table.index) == ["convnet", "vit", "mean"] and (table.n == 2).all()
    half = T_975_DF_1 * 0.1 / 2  # of two values 0.1 apart: standard deviation 0.1 / sqrt(2)
    convnet = table.loc["convnet"]
    assert [convnet.accuracy, convnet.accuracy_low, convnet.accuracy_high] == pytest.approx(
        [0.85, 0.85 - half, 0.85 + half]
    )
    assert [convnet.random_real, convnet.full_data, convnet.IOR, convnet.HLR] == pytest.approx([0.6, 1.0, 0.25, 0.15])
    assert [convnet.IOR_low, convnet.IOR_high] == pytest.approx([0.25 - half, 0.25 + half])
    assert convnet.LRS == pytest.approx(label_robust_score(hlr=0.15, ior=0.25))
    # over architectures, seed by seed: 0.6, 0.55 against 0.45, 0.45 and 0.75, 0.85
    mean = table.loc["mean"]
    assert [mean.accuracy, mean.IOR, mean.HLR] == pytest.approx([0.575, 0.125, 0.225])
    assert mean.HLR_high == pytest.approx(0.225 + T_975_DF_1 * 0.15 / 2)


def test_a_comparison_leaves_out_what_is_not_there():
    assert {"IOR", "HLR", "LRS", "ARS"}.isdisjoint(compare(SET, seen="convnet").columns)
    beside = compare(SET, seen="convnet", random_real=RANDOM)
    assert "IOR" in beside and "LRS" not in beside and "ARS" not in beside
    assert list(compare({"vit": [0.1, 0.2]}, seen="convnet").architecture) == ["vit"]


def test_the_distilling_network_without_augmentation_gives_ars_and_is_no_judge():
    plain = {PLAIN: [0.7, 0.6]}
    table = compare(SET | plain, seen="convnet", random_real=RANDOM | {PLAIN: [0.5, 0.5]}, full_data=FULL)
    table = table.set_index("architecture")
    assert list(table.index) == ["convnet", "vit", "mean"] and table.accuracy["mean"] == pytest.approx(0.575)
    assert table.loc["convnet", "plain IOR"] == pytest.approx(0.15)
    assert table.ARS["convnet"] == pytest.approx(augmentation_robust_score(augmented=0.25, plain=0.15))
    assert table.ARS.drop("convnet").isna().all()


def test_a_comparison_refuses_other_seeds():
    with pytest.raises(ValueError, match="convnet: 2 seeds, but random_real has 3"):
        compare(SET, seen="convnet", random_real={"convnet": [0.1] * 3, "vit": [0.1] * 3})
