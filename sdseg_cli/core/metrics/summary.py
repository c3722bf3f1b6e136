"""From the scores of the cases to one line of a table: mean, median, spread and an interval."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BOOTSTRAP_RESAMPLES = 9999
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """What the scores of several cases say together.

    ``mean``, ``std`` and the interval are over the finite scores; ``infinite`` counts the others
    (missed or invented structures, for a distance) and must be shown beside them. The median is over
    all defined scores, the infinite ones included. NaN where nothing can be said.
    """

    mean: float
    median: float
    std: float
    low: float
    high: float
    n: int  # cases with a defined score, infinite ones included
    undefined: int  # cases whose score is NaN
    infinite: int
    interval_method: str  # "BCa", "percentile", "constant" or "none"


def summarise(values: Sequence[float], *, seed: int = 0, resamples: int = BOOTSTRAP_RESAMPLES) -> Summary:
    """Summarise one metric over cases.

    Args:
        values: one score per case; NaN is undefined, infinity a missed structure.
        seed: of the bootstrap's resampling.
        resamples: number of bootstrap resamples.

    Returns:
        The summary. ``std`` is the sample standard deviation (n - 1). The interval is the bias-corrected
        and accelerated bootstrap interval (Efron 1987) of the mean at 95 %; one case has none, equal
        scores have one of width zero.
    """
    scores = np.asarray(values, dtype=np.float64)
    defined = scores[~np.isnan(scores)]
    finite = defined[np.isfinite(defined)]
    low, high, method = bootstrap_interval(finite, seed=seed, resamples=resamples)
    std = float(finite.std(ddof=1)) if finite.size > 1 else math.nan
    if method == "constant":
        std = 0.0  # computed, it would be a rounding error
    return Summary(
        mean=float(finite.mean()) if finite.size else math.nan,
        median=float(np.median(defined)) if defined.size else math.nan,
        std=std,
        low=low,
        high=high,
        n=int(defined.size),
        undefined=int(scores.size - defined.size),
        infinite=int(defined.size - finite.size),
        interval_method=method,
    )


def bootstrap_interval(
    values: np.ndarray, *, seed: int = 0, resamples: int = BOOTSTRAP_RESAMPLES
) -> tuple[float, float, str]:
    """Interval of the mean of finite ``values`` at 95 %, and how it was made.

    Args:
        values: float64, (n,), finite.
        seed: of the resampling.
        resamples: number of bootstrap resamples.

    Returns:
        (low, high, method): NaN and "none" below two values, the value itself and "constant" where all
        are equal, "BCa" otherwise, or "percentile" where BCa is degenerate.
    """
    if values.size < 2:
        return math.nan, math.nan, "none"
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0]), "constant"
    from scipy import stats

    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            # BCa warns and answers NaN on degenerate data; the answer is looked at below.
            warnings.simplefilter("ignore")
            interval = stats.bootstrap(
                (values,),
                np.mean,
                confidence_level=CONFIDENCE,
                n_resamples=resamples,
                batch=max(1, 2_000_000 // values.size),
                method=method,
                vectorized=True,
                random_state=np.random.default_rng(seed),
            ).confidence_interval
        if math.isfinite(interval.low) and math.isfinite(interval.high):
            return float(interval.low), float(interval.high), method
    return math.nan, math.nan, "none"


def mean_of_defined(values: Sequence[float]) -> float:
    """Mean of the defined values; NaN without any, infinite if one is."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan
