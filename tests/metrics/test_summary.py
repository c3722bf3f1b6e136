"""Summaries: what drops out is counted, and the interval survives one case and equal cases."""

import math

import numpy as np
import pytest

from sdseg_cli.core.metrics.summary import summarise


def test_mean_median_and_sample_deviation():
    summary = summarise([0.5, 0.7, 0.9, 0.9])
    assert summary.mean == pytest.approx(0.75)
    assert summary.median == pytest.approx(0.8)
    assert summary.std == pytest.approx(math.sqrt((0.0625 + 0.0025 + 0.0225 + 0.0225) / 3))
    assert (summary.n, summary.undefined, summary.infinite) == (4, 0, 0)


def test_undefined_scores_are_left_out_and_counted():
    summary = summarise([0.5, math.nan, 0.7])
    assert summary.mean == pytest.approx(0.6)
    assert (summary.n, summary.undefined) == (2, 1)


@pytest.mark.faults
def test_a_missed_structure_stays_in_the_median_and_is_counted_beside_the_mean():
    summary = summarise([1.0, math.inf, math.inf])
    assert summary.mean == 1.0
    assert summary.median == math.inf
    assert (summary.n, summary.infinite) == (3, 2)


def test_the_interval_is_scipys_bca_interval_and_repeats_itself():
    from scipy import stats

    values = np.random.default_rng(5).beta(8, 2, 30)
    summary = summarise(values, resamples=999)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=999, method="BCa", random_state=np.random.default_rng(0)
    ).confidence_interval
    assert (summary.low, summary.high) == (expected.low, expected.high)
    assert summary == summarise(values, resamples=999)
    assert summary.low < summary.mean < summary.high
    assert summary.interval_method == "BCa"


@pytest.mark.faults
def test_one_case_has_no_interval_and_no_deviation():
    summary = summarise([0.8])
    assert summary.mean == summary.median == 0.8
    assert all(math.isnan(value) for value in (summary.low, summary.high, summary.std))
    assert summary.interval_method == "none"


@pytest.mark.faults
def test_equal_cases_have_an_interval_of_width_zero():
    summary = summarise([0.8, 0.8, 0.8])
    assert (summary.low, summary.high, summary.std) == (0.8, 0.8, 0.0)
    assert summary.interval_method == "constant"


@pytest.mark.faults
def test_no_cases_and_only_undefined_ones_say_nothing():
    assert math.isnan(summarise([]).mean)
    summary = summarise([math.nan, math.nan])
    assert math.isnan(summary.mean)
    assert (summary.n, summary.undefined) == (0, 2)
