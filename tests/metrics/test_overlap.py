"""Overlap scores against numbers worked by hand on drawings of a few pixels."""

import math

import numpy as np
import pytest

from sdseg_cli.core.metrics.overlap import (
    Counts,
    count_classes,
    count_overlap,
    dice,
    dice_agreement,
    draw_agreement,
    iou,
    precision,
    recall,
    sum_counts,
)


def drawn(*rows: str) -> np.ndarray:
    return np.array([[character == "#" for character in row] for row in rows])


TRUTH = drawn(
    "......",
    ".###..",
    ".###..",
    "......",
)
SHIFTED = drawn(
    "......",
    "..###.",
    "..###.",
    "......",
)
EMPTY = np.zeros_like(TRUTH)


def test_counts_of_a_square_shifted_by_one_column():
    assert count_overlap(SHIFTED, TRUTH) == Counts(true_positive=4, false_positive=2, false_negative=2)


def test_scores_of_a_square_shifted_by_one_column():
    counts = count_overlap(SHIFTED, TRUTH)
    assert dice(counts) == pytest.approx(8 / 12)
    assert iou(counts) == pytest.approx(4 / 8)
    assert precision(counts) == pytest.approx(4 / 6)
    assert recall(counts) == pytest.approx(4 / 6)


def test_precision_looks_at_the_prediction_and_recall_at_the_truth():
    counts = Counts(true_positive=3, false_positive=1, false_negative=2)
    assert precision(counts) == pytest.approx(3 / 4)
    assert recall(counts) == pytest.approx(3 / 5)


def test_equal_masks_score_one_under_both_conventions():
    counts = count_overlap(TRUTH, TRUTH)
    assert [dice(counts), iou(counts), dice(counts, "sdseg"), iou(counts, "sdseg")] == [1, 1, 1, 1]


@pytest.mark.faults(27)
def test_both_empty_is_undefined_and_absent_under_standard():
    counts = count_overlap(EMPTY, EMPTY)
    assert counts.is_absent
    assert all(math.isnan(score) for score in (dice(counts), iou(counts), precision(counts), recall(counts)))


@pytest.mark.faults(27)
def test_both_empty_scores_zero_under_the_official_convention():
    counts = count_overlap(EMPTY, EMPTY)
    assert dice(counts, "sdseg") == 0
    assert iou(counts, "sdseg") == 0


@pytest.mark.faults
def test_an_empty_truth_with_a_prediction_scores_zero_under_standard_and_one_under_the_official_convention():
    counts = count_overlap(TRUTH, EMPTY)
    assert counts.is_false_alarm
    assert (dice(counts), iou(counts), precision(counts), recall(counts)) == (0, 0, 0, 0)
    assert (dice(counts, "sdseg"), iou(counts, "sdseg")) == (1, 1)


@pytest.mark.faults(27)
@pytest.mark.parametrize("convention", ["standard", "sdseg"])
def test_a_missed_structure_scores_zero_under_both_conventions(convention):
    counts = count_overlap(EMPTY, TRUTH)
    assert counts.is_missed
    assert dice(counts, convention) == 0
    assert iou(counts, convention) == 0
    assert (precision(counts), recall(counts)) == (0, 0)


def test_classes_are_counted_each_against_the_rest():
    truth = np.array([[0, 1, 1], [2, 2, 0]], np.uint8)
    prediction = np.array([[1, 1, 2], [2, 0, 0]], np.uint8)
    first, second = count_classes(prediction, truth, 3)
    assert first == Counts(true_positive=1, false_positive=1, false_negative=1)
    assert second == Counts(true_positive=1, false_positive=1, false_negative=1)


def test_counting_leaves_its_inputs_alone():
    prediction, truth = SHIFTED.copy(), EMPTY.copy()
    dice(count_overlap(prediction, truth), "sdseg")
    assert (prediction == SHIFTED).all()
    assert not truth.any()


def test_a_volume_is_scored_by_the_sum_of_its_slices():
    slices = [Counts(9, 1, 0), Counts(0, 0, 10)]
    assert sum_counts(slices) == Counts(9, 1, 10)
    assert dice(sum_counts(slices)) == pytest.approx(18 / 29)


def test_agreement_of_soft_predictions_is_the_shared_mass():
    first = np.array([0.5, 1.0, 0.0])
    second = np.array([0.25, 1.0, 0.25])
    assert dice_agreement(first, second) == pytest.approx(2 * 1.25 / 3.0)


def test_agreement_of_masks_is_their_dice_and_two_empty_ones_agree():
    assert dice_agreement(SHIFTED, TRUTH) == pytest.approx(8 / 12)
    assert dice_agreement(EMPTY, EMPTY) == 1
    assert dice_agreement(EMPTY, TRUTH) == 0


@pytest.mark.faults
def test_different_shapes_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"prediction has shape \(4, 6\), ground truth \(6, 4\)"):
        count_overlap(TRUTH, TRUTH.T)


@pytest.mark.faults
def test_a_label_beyond_the_classes_is_refused_with_its_value():
    with pytest.raises(ValueError, match="ground truth holds label 7, expected at most 1"):
        count_classes(np.zeros((1, 2), np.uint8), np.array([[0, 7]], np.uint8), 2)


@pytest.mark.faults
def test_an_unknown_convention_is_refused():
    with pytest.raises(ValueError, match="'offical', expected one of standard, sdseg"):
        dice(Counts(1, 1, 1), "offical")


def test_the_draw_agreement_is_the_mean_agreement_of_all_pairs_worked_by_hand():
    # Areas 4, 4 and 2; the first two share 2 pixels, the others 1 and 0.
    one = np.array([[[4, 2, 1], [2, 4, 0], [1, 0, 2]]])
    expected = (4 / 8 + 2 / 6 + 0) / 3
    assert draw_agreement(one) == pytest.approx(expected)
    absent = np.zeros((1, 3, 3), int)
    assert draw_agreement(np.concatenate([one, absent])) == pytest.approx(expected)  # nobody sees that class


def test_two_empty_draws_agree_and_without_any_or_with_one_draw_nothing_is_predicted():
    one_of_three = np.zeros((1, 3, 3), int)
    one_of_three[0, 0, 0] = 5  # only the first draw holds anything
    assert draw_agreement(one_of_three) == pytest.approx(1 / 3)
    assert math.isnan(draw_agreement(np.zeros((2, 3, 3), int)))
    assert math.isnan(draw_agreement(np.array([[[7]]])))
