"""Overlap of two label maps: counts first, scores from the counts, empty masks by a named convention.

Counts add up over the slices of a case, so a volume is scored as a volume. A score is a function of
the counts of one class of one case:

=====================  ==================  ====================
prediction / truth     ``standard``        ``sdseg``
=====================  ==================  ====================
both hold pixels       the formula         the formula
truth only (missed)    0                   0
prediction only        0                   Dice and IoU **1**
both empty             NaN, "absent"       Dice and IoU **0**
=====================  ==================  ====================

``sdseg`` repeats what the published code of the paper does, to make its tables comparable; precision
and recall are not part of it and follow ``standard``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Convention = Literal["standard", "sdseg"]
CONVENTIONS: tuple[str, ...] = get_args(Convention)


@dataclass(frozen=True)
class Counts:
    """Pixels (or voxels) of one class: agreed, only predicted, only true."""

    true_positive: int
    false_positive: int
    false_negative: int

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.true_positive + other.true_positive,
            self.false_positive + other.false_positive,
            self.false_negative + other.false_negative,
        )

    @property
    def predicted(self) -> int:
        """Pixels of the class in the prediction."""
        return self.true_positive + self.false_positive

    @property
    def true(self) -> int:
        """Pixels of the class in the ground truth."""
        return self.true_positive + self.false_negative

    @property
    def is_missed(self) -> bool:
        """The structure is there and the prediction holds none of it."""
        return self.true > 0 and self.predicted == 0

    @property
    def is_false_alarm(self) -> bool:
        """The prediction holds a structure that is not there."""
        return self.true == 0 and self.predicted > 0

    @property
    def is_absent(self) -> bool:
        """Neither holds the structure: there was nothing to find and nothing was found."""
        return self.true == 0 and self.predicted == 0


def count_overlap(prediction: np.ndarray, ground_truth: np.ndarray) -> Counts:
    """Count the overlap of two masks.

    Args:
        prediction: bool, any shape.
        ground_truth: bool, the same shape.

    Returns:
        The counts, in pixels.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(prediction, ground_truth)
    agreed = int(np.count_nonzero(prediction & ground_truth))
    return Counts(
        agreed, int(np.count_nonzero(prediction)) - agreed, int(np.count_nonzero(ground_truth)) - agreed
    )


def count_classes(prediction: np.ndarray, ground_truth: np.ndarray, num_classes: int) -> tuple[Counts, ...]:
    """Count the overlap of every foreground class of two label maps.

    Args:
        prediction: uint8, (H, W) or any shape, class indices in [0, num_classes).
        ground_truth: uint8, the same shape.
        num_classes: number of classes, the background included.

    Returns:
        One entry per class 1 .. num_classes - 1.

    Raises:
        ValueError: the shapes differ, or a label is not below ``num_classes``.
    """
    _check_shapes(prediction, ground_truth)
    for name, labels in (("prediction", prediction), ("ground truth", ground_truth)):
        if labels.size and int(labels.max()) >= num_classes:
            raise ValueError(f"{name} holds label {int(labels.max())}, expected at most {num_classes - 1}")
    pairs = ground_truth.astype(np.int64).ravel() * num_classes + prediction.ravel()
    confusion = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
    return tuple(
        Counts(
            int(confusion[k, k]),
            int(confusion[:, k].sum() - confusion[k, k]),
            int(confusion[k].sum() - confusion[k, k]),
        )
        for k in range(1, num_classes)
    )


def sum_counts(parts: Iterable[Counts]) -> Counts:
    """Add counts: the slices of a case, or the cases of a split for a pooled score."""
    total = Counts(0, 0, 0)
    for part in parts:
        total = total + part
    return total


def dice(counts: Counts, convention: Convention = "standard") -> float:
    """Dice coefficient 2 TP / (2 TP + FP + FN), in [0, 1]; empty masks by ``convention``, see the module."""
    return _scored(counts, convention, lambda c: 2 * c.true_positive / (c.predicted + c.true))


def iou(counts: Counts, convention: Convention = "standard") -> float:
    """Intersection over union TP / (TP + FP + FN), in [0, 1]; empty masks by ``convention``."""
    return _scored(counts, convention, lambda c: c.true_positive / (c.predicted + c.false_negative))


def precision(counts: Counts) -> float:
    """TP / (TP + FP), in [0, 1]; 0 where only one of the two is empty, NaN where both are."""
    return _scored(counts, "standard", lambda c: c.true_positive / c.predicted)


def recall(counts: Counts) -> float:
    """TP / (TP + FN), in [0, 1]; 0 where only one of the two is empty, NaN where both are."""
    return _scored(counts, "standard", lambda c: c.true_positive / c.true)


def dice_agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Dice of two predictions of the same case, hard or soft: 2 sum(min) / (sum + sum).

    Args:
        first: bool or float in [0, 1], any shape.
        second: the same shape. For two masks this is the ordinary Dice coefficient.

    Returns:
        In [0, 1]. Two empty predictions agree: 1 (there is no truth here that either could miss).

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(first, second)
    total = float(first.sum(dtype=np.float64) + second.sum(dtype=np.float64))
    if total == 0:
        return 1.0
    return 2 * float(np.minimum(first, second).sum(dtype=np.float64)) / total


def draw_agreement(overlaps: np.ndarray) -> float:
    """Measure how far the draws of a case agree: the mean Dice over all pairs of draws.

    Pairwise agreement of sampled segmentations as a proxy of quality follows Roy et al. (2019). It ranks
    cases by doubt; it is no estimate of the Dice with the truth, which it mostly exceeds.

    Args:
        overlaps: int, (K, N, N): for each of K foreground classes the pixels that draws i and j share, on the
            diagonal the areas; those of a case's slices added up.

    Returns:
        In [0, 1]: the mean over the classes that at least one draw holds. NaN with fewer than two draws, and
        where no draw holds any class: there is nothing that could agree.
    """
    draws = overlaps.shape[-1]
    if draws < 2:
        return math.nan
    first, second = np.triu_indices(draws, k=1)
    values = []
    for shared in overlaps.astype(np.float64):
        areas = np.diagonal(shared)
        if not areas.any():
            continue
        total = areas[first] + areas[second]
        # Two draws that are both empty agree; see dice_agreement.
        values.append(np.where(total > 0, 2 * shared[first, second] / np.maximum(total, 1), 1.0).mean())
    return float(np.mean(values)) if values else math.nan


def _scored(counts: Counts, convention: Convention, formula: Callable[[Counts], float]) -> float:
    if convention not in CONVENTIONS:
        raise ValueError(f"convention is {convention!r}, expected one of {', '.join(CONVENTIONS)}")
    if counts.is_absent:
        return 0.0 if convention == "sdseg" else math.nan
    if counts.is_false_alarm:
        return 1.0 if convention == "sdseg" else 0.0
    return 0.0 if counts.is_missed else formula(counts)


def _check_shapes(prediction: np.ndarray, ground_truth: np.ndarray) -> None:
    if prediction.shape != ground_truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, ground truth {ground_truth.shape}")
