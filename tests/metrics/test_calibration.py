"""Reliability bins and calibration error, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from sdseg_cli.core.metrics.calibration import count_reliability, expected_calibration_error, reliability


def test_pixels_fall_into_their_bins_with_the_sums_worked_by_hand():
    probabilities = np.array([[0.0, 0.2, 0.25], [0.6, 0.7, 1.0]], np.float32)
    truth = np.array([[0, 0, 1], [1, 0, 1]], bool)
    counts = count_reliability(probabilities, truth, bins=2)
    np.testing.assert_allclose(counts, [[3, 0.45, 1], [3, 2.3, 2]], atol=1e-6)
    low, high = reliability(counts)
    assert (low.low, low.high, low.pixels) == (0.0, 0.5, 3)
    assert (low.predicted, low.observed) == pytest.approx((0.15, 1 / 3))
    assert (high.predicted, high.observed) == pytest.approx((2.3 / 3, 2 / 3))
    # (|0.45 - 1| + |2.3 - 2|) / 6
    assert expected_calibration_error(counts) == pytest.approx(0.85 / 6)
    assert expected_calibration_error(counts, least=0.5) == pytest.approx(0.1)


def test_an_edge_belongs_to_the_bin_above_it_and_one_to_the_last():
    counts = count_reliability(np.array([0.1, 0.5, 1.0]), np.array([False, True, True]))
    assert counts[:, 0].tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 0, 1]


def test_the_share_that_is_promised_is_no_error_and_the_opposite_is_all_of_it():
    honest = count_reliability(np.full(10, 0.3), np.arange(10) < 3)
    assert expected_calibration_error(honest) == pytest.approx(0.0)
    wrong = count_reliability(np.array([0.0, 1.0]), np.array([True, False]))
    assert expected_calibration_error(wrong) == pytest.approx(1.0)


def test_counts_of_parts_add_up_to_those_of_the_whole():
    generator = np.random.default_rng(3)
    probabilities, truth = generator.random((4, 50)), generator.random((4, 50)) > 0.4
    whole = count_reliability(probabilities, truth)
    parts = sum(count_reliability(p, t) for p, t in zip(probabilities, truth, strict=True))
    np.testing.assert_allclose(parts, whole)
    assert whole[:, 0].sum() == 200


def test_without_pixels_there_is_no_error_and_no_mean():
    counts = np.zeros((10, 3))
    assert math.isnan(expected_calibration_error(counts))
    assert all(math.isnan(one.predicted) and math.isnan(one.observed) for one in reliability(counts))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        count_reliability(np.zeros(2), np.zeros(3, bool))
