"""What a training measured, as curves to be drawn: by a figure of its own, or in a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Metrics = Sequence[Mapping[str, Any]]  # the records of ``metrics.jsonl``


@dataclass(frozen=True)
class Convergence:
    """How the validation Dice of one run grew.

    Attributes:
        method: the run's method; several runs may be of one.
        steps: optimizer steps, rising; at least one.
        dices: mean over the cases at each of the steps, [0, 1].
        minutes: trained until each of the steps; None where no time was recorded.
    """

    method: str
    steps: tuple[float, ...]
    dices: tuple[float, ...]
    minutes: tuple[float, ...] | None


def series(metrics: Metrics, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values (float64, (N,)) of the records with a finite value for ``key``, by rising step."""
    pairs = sorted(
        (float(record["step"]), float(record[key]))
        for record in metrics
        if record.get(key) is not None and record.get("step") is not None and math.isfinite(record[key])
    )
    array = np.array(pairs, float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def convergences(runs: Mapping[str, Sequence[Metrics]]) -> list[Convergence]:
    """The curve of every run that was ever validated.

    Args:
        runs: method -> the metrics of each of its runs.
    """
    found = []
    for method, every in runs.items():
        for metrics in every:
            steps, dices = series(metrics, "validation_dice")
            if not len(steps):
                continue
            known, seconds = series(metrics, "seconds")
            minutes = tuple(np.interp(steps, known, seconds) / 60) if len(known) else None
            found.append(Convergence(method, tuple(steps), tuple(dices), minutes))
    return found
