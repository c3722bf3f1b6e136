"""Sums over the records of an evaluation: means with intervals, tables, and which pictures are kept."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from sdseg_cli.core.engine.evaluation_records import (
    DISTANCES,
    MEAN_OF_CLASSES,
    METRICS,
    CaseScores,
    ClassScores,
    FailedCase,
)
from sdseg_cli.core.engine.report_parts import BEST, MIDDLE, WORST
from sdseg_cli.core.metrics.overlap import (
    dice,
    iou,
    sum_counts,
)
from sdseg_cli.core.metrics.summary import Summary, mean_of_defined, summarise
from sdseg_cli.core.reporting.page import Table
from sdseg_cli.core.reporting.tables import cell, interval_cell

if TYPE_CHECKING:
    pass

CONVENTION_TEXTS: dict[str, str] = {
    "standard": "Empty masks: both empty is undefined and counted as absent; only one empty scores 0 and is "
    "infinitely far.",
    "sdseg": "Empty masks as in the published code: Dice and IoU are 1 where only the truth is empty and 0 "
    "where both are; distances and precision and recall as in 'standard'.",
}


DISTANCE_TEXT = (
    "HD95 is the larger of the two directed 95th percentiles, ASSD the mean over both outlines pooled. "
    "Means of distances are over the cases where both outlines exist: read them with the missed structures "
    "and false alarms counted beside them, which medians include as infinite. NSD is the share of both "
    "outlines within the tolerance of the other; a missed structure scores 0."
)


def keep_pictures(
    records: Iterable[CaseScores | FailedCase], count: int, *, worst: int = WORST + MIDDLE, best: int = BEST
) -> list[CaseScores | FailedCase]:
    """Read records and drop pictures that will not be shown, so that memory stays bounded.

    The ``count`` worst cases keep their picture; the ``worst`` worst and the ``best`` best their stack of
    slices, and the best their picture too. Which cases are in the middle is known only when all are read:
    they are scored once more (see :func:`sdseg_cli.core.engine.evaluation_page.with_middle_pictures`).
    """
    kept: list[CaseScores | FailedCase] = []
    heaps: tuple[list[tuple[float, int]], ...] = ([], [], [])  # of (rank, -position): the head goes first
    most = (max(count, worst), worst, best)
    for position, record in enumerate(records):
        kept.append(record)
        if isinstance(record, FailedCase):
            continue
        goodness = -record.badness if record.badness >= 0 else -math.inf  # nothing to find is not the best
        for heap, rank in zip(heaps, (record.badness, record.badness, goodness), strict=True):
            heapq.heappush(heap, (rank, -position))
        full = [heap for heap, size in zip(heaps, most, strict=True) if len(heap) > size]
        for other in [-heapq.heappop(heap)[1] for heap in full]:
            kept[other] = _without_pictures(cast("CaseScores", kept[other]), other, heaps)
    return kept


def _without_pictures(
    record: CaseScores, position: int, heaps: Sequence[Sequence[tuple[float, int]]]
) -> CaseScores:
    """Drop what no heap of (pictured, worst, best) asks for any more."""
    pictured, worst, best = (any(-other == position for _, other in heap) for heap in heaps)
    return replace(
        record,
        picture=record.picture if pictured or best else None,
        stack=record.stack if worst or best else (),
    )


def worst_cases(scores: Sequence[CaseScores], count: int) -> list[CaseScores]:
    """The ``count`` worst cases with a picture, the worst first; ties in the order given."""
    shown = [record for record in scores if record.picture is not None]
    return sorted(shown, key=lambda record: -record.badness)[:count]


def case_rows(scores: Sequence[CaseScores]) -> list[dict[str, Any]]:
    """One row per case and class, for ``cases.csv``."""
    return [
        {
            "case": record.case_id,
            "group": record.group,
            "slices": record.slices,
            "class": entry.class_name,
            **{metric: getattr(entry, metric) for metric in METRICS},
            "distance_unit": record.unit,
            "true_px": entry.counts.true,
            "predicted_px": entry.counts.predicted,
            "agreed_px": entry.counts.true_positive,
            "outcome": entry.outcome,
            "draw_agreement": record.draw_agreement,
        }
        for record in scores
        for entry in record.classes
    ]


CASE_COLUMNS: tuple[str, ...] = (
    "case",
    "group",
    "slices",
    "class",
    *METRICS,
    "distance_unit",
    "true_px",
    "predicted_px",
    "agreed_px",
    "outcome",
    "draw_agreement",
)


@dataclass(frozen=True)
class ClassSummary:
    """One class over all cases. ``pooled`` scores add up the pixels of all cases first."""

    class_name: str
    metrics: dict[str, Summary]
    missed: int
    false_alarms: int
    absent: int
    pooled_dice: float
    pooled_iou: float


@dataclass(frozen=True)
class EvaluationSummary:
    """All classes over all cases, and with several classes their mean per case as one more entry."""

    cases: int
    unit: str
    classes: tuple[ClassSummary, ...]


def summarise_cases(scores: Sequence[CaseScores], classes: Sequence[str]) -> EvaluationSummary:
    """Compute the summary from the records alone.

    Args:
        scores: one record per case.
        classes: names, the background first.
    """
    units = {record.unit for record in scores}
    unit = units.pop() if len(units) == 1 else "mixed" if units else "px"
    summaries = [
        _summarise_class(name, [record.classes[index] for record in scores], unit)
        for index, name in enumerate(classes[1:])
    ]
    if len(classes) > 2:
        summaries.append(_summarise_means(scores, unit))
    return EvaluationSummary(len(scores), unit, tuple(summaries))


def _summarise_class(name: str, entries: Sequence[ClassScores], unit: str) -> ClassSummary:
    pooled = sum_counts(entry.counts for entry in entries)
    return ClassSummary(
        name,
        {
            metric: _summarise_metric(metric, [getattr(entry, metric) for entry in entries], unit)
            for metric in METRICS
        },
        missed=sum(entry.counts.is_missed for entry in entries),
        false_alarms=sum(entry.counts.is_false_alarm for entry in entries),
        absent=sum(entry.counts.is_absent for entry in entries),
        pooled_dice=dice(pooled),
        pooled_iou=iou(pooled),
    )


def _summarise_means(scores: Sequence[CaseScores], unit: str) -> ClassSummary:
    entries = [entry for record in scores for entry in record.classes]
    metrics = {
        metric: _summarise_metric(
            metric,
            [mean_of_defined([getattr(entry, metric) for entry in record.classes]) for record in scores],
            unit,
        )
        for metric in METRICS
    }
    return ClassSummary(
        MEAN_OF_CLASSES,
        metrics,
        missed=sum(entry.counts.is_missed for entry in entries),
        false_alarms=sum(entry.counts.is_false_alarm for entry in entries),
        absent=sum(entry.counts.is_absent for entry in entries),
        pooled_dice=math.nan,
        pooled_iou=math.nan,
    )


def _summarise_metric(metric: str, values: Sequence[float], unit: str) -> Summary:
    if metric in DISTANCES and unit == "mixed":
        values = [math.nan] * len(values)  # millimetres and pixels have no mean
    return summarise(values)


def evaluation_table(summary: EvaluationSummary, title: str, convention: str) -> Table:
    """The summary as a table: one row per class and metric, the counts of empty masks below it."""
    rows = []
    for entry in summary.classes:
        for metric, values in entry.metrics.items():
            digits = 2 if metric in DISTANCES else 4
            rows.append(
                (
                    entry.class_name,
                    _metric_label(metric, summary.unit),
                    cell(values.mean, digits),
                    interval_cell(values.low, values.high, digits),
                    cell(values.median, digits),
                    _cases_cell(values),
                )
            )
    columns = ("class", "metric", "mean", "95 % interval", "median", "cases")
    counts = "; ".join(
        f"{entry.class_name}: {entry.missed} missed, {entry.false_alarms} "
        f"{_false_alarms(entry.false_alarms)}, {entry.absent} absent"
        for entry in summary.classes
        if entry.class_name != MEAN_OF_CLASSES
    )
    caption = (
        f"{summary.cases} cases. {counts}. Convention {convention!r}. {CONVENTION_TEXTS[convention]} "
        f"{DISTANCE_TEXT}"
    )
    return Table(title, caption, columns, tuple(rows))


def _cases_cell(values: Summary) -> str:
    """``96``, or ``93 of 96`` where infinite distances are left out of the mean."""
    return f"{values.n - values.infinite} of {values.n}" if values.infinite else str(values.n)


def _false_alarms(count: int) -> str:
    return "false alarm" if count == 1 else "false alarms"


def _metric_label(metric: str, unit: str) -> str:
    names = {"dice": "Dice", "iou": "IoU", "hd95": f"HD95 ({unit})", "assd": f"ASSD ({unit})", "nsd": "NSD"}
    return names.get(metric, metric)
