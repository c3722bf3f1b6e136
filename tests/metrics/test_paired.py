"""Paired differences against figures worked out by hand and by another implementation."""

import math

import numpy as np
import pytest

from sdseg_cli.core.metrics.paired import holm, paired_difference


def test_the_difference_is_taken_case_by_case():
    found = paired_difference([0.9, 0.8, 0.7], [0.8, 0.8, 0.4])
    assert found.mean == pytest.approx((0.1 + 0 + 0.3) / 3)
    assert (found.n, found.left_out) == (3, 0)
    assert found.low < found.mean < found.high


def test_a_case_without_a_finite_score_on_one_side_is_left_out_on_both():
    found = paired_difference([0.9, math.nan, 3.0, 2.0], [0.5, 0.5, math.inf, 1.0])
    assert found.mean == pytest.approx((0.4 + 1.0) / 2)
    assert (found.n, found.left_out) == (2, 2)


def test_pairing_separates_what_two_intervals_cannot():
    # Cases differ far more from one another than the two methods do on any of them.
    cases = np.random.default_rng(0).uniform(0.2, 0.9, 40)
    better = cases + 0.02 + np.random.default_rng(1).normal(0, 0.005, 40)
    found = paired_difference(better, cases)
    assert found.low > 0
    assert found.p_value < 1e-6


def test_the_p_value_of_all_positive_differences_is_the_exact_one():
    # Five cases, all better: of the 2^5 signs one is as extreme, on each of the two sides.
    found = paired_difference([0.5, 0.6, 0.7, 0.8, 0.9], [0.41, 0.52, 0.63, 0.74, 0.85])
    assert found.p_value == pytest.approx(2 / 32)


def test_a_difference_in_the_last_bit_is_none():
    assert paired_difference([0.1 + 0.2, 0.5], [0.3, 0.5]).p_value == 1


def test_equal_scores_do_not_differ():
    found = paired_difference([0.5, 0.6], [0.5, 0.6])
    assert (found.mean, found.low, found.high, found.p_value) == (0, 0, 0, 1)


@pytest.mark.parametrize("scores", [[], [0.5]])
def test_below_two_cases_there_is_no_interval_and_no_test(scores):
    found = paired_difference(scores, scores)
    assert math.isnan(found.low)
    assert math.isnan(found.p_value)


@pytest.mark.faults
def test_scores_of_other_cases_are_refused():
    with pytest.raises(ValueError, match="3 scores against 2"):
        paired_difference([1, 2, 3], [1, 2])


def test_holm_multiplies_the_smallest_by_all_and_never_falls():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == pytest.approx([1, 1])
    kept = holm([math.nan, 0.02])
    assert math.isnan(kept[0])
    assert kept[1] == pytest.approx(0.02)
