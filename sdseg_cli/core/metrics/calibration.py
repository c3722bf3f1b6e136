"""How far probabilities can be trusted: reliability bins, counted as the pixels stream by.

A bin holds three sums: pixels, their predicted probabilities, and how many are truly foreground. Sums add up
over slices, cases and processes, so the whole test split is counted without being held in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

BINS = 10  # of equal width over [0, 1]; bin i holds i/10 <= p < (i + 1)/10, the last one also p = 1


@dataclass(frozen=True)
class ReliabilityBin:
    """One bin: its pixels, their mean predicted probability and the share that is truly foreground."""

    low: float
    high: float
    pixels: int
    predicted: float  # NaN without pixels
    observed: float  # NaN without pixels


def count_reliability(probabilities: np.ndarray, truth: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Count the pixels of one class into bins of their predicted probability.

    Args:
        probabilities: float, any shape, [0, 1]: of the class, per pixel.
        truth: bool, the same shape: whether the pixel is of the class.
        bins: number of bins of equal width.

    Returns:
        float64, (bins, 3): pixels, sum of probabilities, true pixels. Such counts add up.

    Raises:
        ValueError: the shapes differ.
    """
    if probabilities.shape != truth.shape:
        raise ValueError(f"probabilities have shape {probabilities.shape}, the truth {truth.shape}")
    flat = probabilities.ravel()
    # In float32 0.3 * 10 is 3.0000001: the products are made in float64, of the value as it is stored.
    position = np.clip((flat.astype(np.float64) * bins).astype(np.int64), 0, bins - 1)
    return np.stack(
        [
            np.bincount(position, minlength=bins).astype(np.float64),
            np.bincount(position, weights=flat, minlength=bins),
            np.bincount(position, weights=truth.ravel(), minlength=bins),
        ],
        axis=1,
    )


def reliability(counts: np.ndarray) -> tuple[ReliabilityBin, ...]:
    """The bins of counts from :func:`count_reliability`, from the lowest to the highest probability."""
    width = 1 / len(counts)
    return tuple(
        ReliabilityBin(
            index * width,
            (index + 1) * width,
            int(pixels),
            float(predicted / pixels) if pixels else math.nan,
            float(true / pixels) if pixels else math.nan,
        )
        for index, (pixels, predicted, true) in enumerate(counts)
    )


def expected_calibration_error(counts: np.ndarray, *, least: float = 0.0) -> float:
    """Mean distance of predicted probability and observed frequency over the pixels (Naeini et al. 2015).

    Args:
        counts: float64, (bins, 3), from :func:`count_reliability`.
        least: leave out the bins that begin below this probability. Most pixels of most images are surely
            background; 0.5 asks how far the pixels that are called foreground can be trusted.

    Returns:
        sum over the bins of |sum of probabilities - true pixels| / pixels, in [0, 1]; NaN without pixels.
    """
    lows = np.arange(len(counts)) / len(counts)
    chosen = counts[lows >= least - 1e-9]
    pixels = float(chosen[:, 0].sum())
    if pixels == 0:
        return math.nan
    return float(np.abs(chosen[:, 1] - chosen[:, 2]).sum()) / pixels
