"""Two methods on the same cases: the difference case by case, its interval and whether it may be chance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdseg_cli.core.metrics.summary import BOOTSTRAP_RESAMPLES, bootstrap_interval


@dataclass(frozen=True)
class PairedDifference:
    """One metric of a method minus that of the baseline, over the cases where both are finite.

    ``mean`` with its bootstrap interval at 95 % (``low``, ``high``; NaN below two cases), ``n`` cases, and
    the two-sided p-value of the Wilcoxon signed-rank test (Wilcoxon 1945, zeros by Pratt 1959): 1 where no
    case differs, NaN below two cases. ``left_out`` counts the cases without a finite score on one side.
    """

    mean: float
    low: float
    high: float
    n: int
    p_value: float
    left_out: int


def paired_difference(
    values: Sequence[float],
    baseline: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = BOOTSTRAP_RESAMPLES,
) -> PairedDifference:
    """Compare one metric of two methods, case by case.

    Args:
        values: one score per case; NaN is undefined, infinity a missed structure.
        baseline: the other method's scores of the same cases, in the same order.
        seed: of the bootstrap's resampling.
        resamples: number of bootstrap resamples.

    Raises:
        ValueError: the two differ in length.
    """
    first, second = np.asarray(values, float), np.asarray(baseline, float)
    if first.shape != second.shape:
        raise ValueError(f"{first.size} scores against {second.size}: they are not of the same cases")
    both = np.isfinite(first) & np.isfinite(second)
    # Rounded: the mean of equal numbers may differ from them in its last bit, and ranks would see that.
    difference = np.round(first[both] - second[both], 12)
    low, high, _ = bootstrap_interval(difference, seed=seed, resamples=resamples)
    return PairedDifference(
        float(difference.mean()) if difference.size else math.nan,
        low,
        high,
        int(difference.size),
        _signed_rank(difference),
        int(both.size - difference.size),
    )


def _signed_rank(difference: np.ndarray) -> float:
    if difference.size < 2:
        return math.nan
    if not difference.any():
        return 1.0
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few cases: the answer is then coarse, not wrong
        return float(stats.wilcoxon(difference, zero_method="pratt").pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for being several (Holm 1979): each may be held against 0.05 afterwards.

    Args:
        p_values: of one family of tests; NaN (no test) is left as it is and counts for none.

    Returns:
        The adjusted values, in the same order.
    """
    order = sorted(
        (index for index, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i]
    )
    adjusted, highest = list(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
