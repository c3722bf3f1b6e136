"""Distances between the outlines of two masks, in millimetres where the spacing is known, else pixels.

Definitions, since tools differ: the surface is the set of mask pixels with a neighbour (4- or
6-connected) outside the mask, HD95 is the larger of the two directed 95th percentiles (linear
interpolation), ASSD is the mean over the distances of both surfaces pooled, NSD (normalised surface Dice)
the share of both surfaces pooled, counted by pixels, that lies within a tolerance of the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

NSD_TOLERANCE = 2.0


@dataclass(frozen=True)
class SurfaceScores:
    """HD95 and ASSD in the unit of the spacing, NSD in [0, 1].

    Both empty: NaN; only one empty: infinite distances and an NSD of 0.
    """

    hd95: float
    assd: float
    nsd: float = math.nan


def surface_scores(
    prediction: np.ndarray,
    ground_truth: np.ndarray,
    spacing: tuple[float, ...] | None = None,
    *,
    tolerance: float = NSD_TOLERANCE,
) -> SurfaceScores:
    """Measure the distances of two masks.

    Args:
        prediction: bool, (H, W) or (D, H, W).
        ground_truth: bool, the same shape.
        spacing: size of a pixel along each axis, in array order, in mm; None counts pixels.
        tolerance: of the NSD, in the unit of the spacing.

    Returns:
        HD95, ASSD and NSD. A missed or invented structure is infinitely far, so that it cannot improve a
        score by dropping out of it.

    Raises:
        ValueError: the shapes differ, or the spacing does not fit the shape or is not positive.
    """
    if prediction.shape != ground_truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, ground truth {ground_truth.shape}")
    spacing = spacing or (1.0,) * prediction.ndim
    if len(spacing) != prediction.ndim or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing is {spacing}, expected {prediction.ndim} positive numbers")
    has_prediction, has_truth = bool(prediction.any()), bool(ground_truth.any())
    if not has_prediction and not has_truth:
        return SurfaceScores(math.nan, math.nan)
    if not has_prediction or not has_truth:
        return SurfaceScores(math.inf, math.inf, 0.0)
    to_truth, to_prediction = _directed_distances(prediction, ground_truth, spacing)
    hd95 = max(float(np.percentile(to_truth, 95)), float(np.percentile(to_prediction, 95)))
    pooled = np.concatenate([to_truth, to_prediction])
    return SurfaceScores(hd95, float(pooled.mean()), float((pooled <= tolerance).mean()))


def _directed_distances(
    prediction: np.ndarray, ground_truth: np.ndarray, spacing: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    # Imported here: MONAI takes seconds to import and most commands never measure a distance.
    from monai.metrics.utils import get_mask_edges, get_surface_distance

    edges, true_edges = get_mask_edges(prediction.astype(bool), ground_truth.astype(bool), crop=True)[:2]
    return (
        np.asarray(get_surface_distance(edges, true_edges, spacing=list(spacing)), dtype=np.float64),
        np.asarray(get_surface_distance(true_edges, edges, spacing=list(spacing)), dtype=np.float64),
    )
