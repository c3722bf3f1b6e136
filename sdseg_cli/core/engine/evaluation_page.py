"""The page of ``sdseg evaluate``, made from the records that its tables are made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import numpy as np

from sdseg_cli import __version__
from sdseg_cli.core.data.prepared import PreparedSlice, SplitView
from sdseg_cli.core.engine.evaluation_records import (
    DISTANCES,
    MEAN_OF_CLASSES,
    METRICS,
    CasePicture,
    CaseScores,
    ClassScores,
    FailedCase,
)
from sdseg_cli.core.engine.evaluation_summary import (
    ClassSummary,
    EvaluationSummary,
    evaluation_table,
    summarise_cases,
)
from sdseg_cli.core.engine.report_parts import (
    BEST,
    LEAST_BRIGHTEST,
    MIDDLE,
    MOST_ROWS,
    MOST_VIEWS,
    WORST,
    decimals,
    extremes,
    facts,
    legend,
    rank_correlation,
    slice_view,
)
from sdseg_cli.core.metrics.calibration import BINS, expected_calibration_error, reliability
from sdseg_cli.core.metrics.summary import Summary
from sdseg_cli.core.reporting.charts import DotRow, Series, dot_plot, line_chart, reliability_plot
from sdseg_cli.core.reporting.page import CaseTable, Chart, Figure, GalleryCase, Page
from sdseg_cli.core.reporting.tables import cell
from sdseg_cli.core.run_directory import now

MOST_SCATTERED = 500  # dots of a scatter plot
MOST_CURVES = 3  # of one chart: more cannot be told apart
FACTS = {
    "model": "Model",
    "predictions": "Predictions",
    "ground_truth": "Ground truth",
    "dataset": "Dataset",
    "grid": "Scored on the grid of the",
    "sampling": "Sampling",
    "precision": "Precision",
    "device": "Device",
    "processes": "Processes",
    "warnings": "Unlike the training data",
    "missing_scored_as_empty": "Missing, scored as empty",
    "convention": "Convention for empty masks",
    "nsd_tolerance": "NSD tolerance, in the unit of the distances",
    "command": "Command",
    "versions": "Versions",
    "written": "Written",
}


class SelectedCases(Sequence[PreparedSlice]):
    """The slices of some cases of a split, in its order; decoded on access."""

    def __init__(self, split: SplitView, case_ids: Sequence[str]) -> None:
        self._split = split
        wanted = set(case_ids)
        self._positions = [at for at, case_id in enumerate(split.case_ids) if case_id in wanted]
        self.case_ids = [case_id for case_id in split.case_ids if case_id in wanted]

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> PreparedSlice: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PreparedSlice]: ...
    def __getitem__(self, index: int | slice) -> PreparedSlice | Sequence[PreparedSlice]:
        if isinstance(index, slice):
            return [self._split[position] for position in self._positions[index]]
        return self._split[self._positions[index]]


def chosen_cases(scores: Sequence[CaseScores]) -> list[tuple[str, CaseScores]]:
    """The cases whose pictures the page shows, worst first; cases with nothing to find are left out."""
    shown = [record for record in scores if record.badness >= 0]
    return extremes(sorted(shown, key=lambda record: -record.badness))


def with_middle_pictures(
    scores: Sequence[CaseScores], score_again: Callable[[list[str]], Iterable[CaseScores | FailedCase]]
) -> list[CaseScores]:
    """Give the shown cases that have no pictures theirs, by scoring those few once more.

    Args:
        scores: all records; the worst and the best have kept their pictures.
        score_again: scores the cases of these ids. A case that fails now stays as it is.

    Returns:
        The records, in the order given.
    """
    bare = [record.case_id for _, record in chosen_cases(scores) if not record.stack]
    again = {
        record.case_id: record
        for record in (score_again(bare) if bare else ())
        if isinstance(record, CaseScores)
    }
    return [again.get(record.case_id, record) for record in scores]


def evaluation_page(
    title: str,
    classes: Sequence[str],
    scores: Sequence[CaseScores],
    failed: Sequence[FailedCase],
    content: Mapping[str, Any],
    *,
    recipe: str = "",
) -> Page:
    """Lay out the page.

    Args:
        title: what was scored.
        classes: names, the background first.
        scores: a record per case; those of :func:`chosen_cases` with pictures.
        failed: cases without scores.
        content: what ``summary.json`` holds.
        recipe: text of the recipe the model was trained by.
    """
    summary = summarise_cases(scores, classes)
    counts = [record.reliability for record in scores if record.reliability is not None]
    reliable = np.sum(counts, axis=0) if counts else None
    has_draws = any(math.isfinite(record.draw_agreement) for record in scores)
    return Page(
        title="How good are the masks?",
        lead=title,
        figures=_figures(summary, scores, failed, reliable),
        gallery=_gallery(scores),
        gallery_title="Cases to look at",
        gallery_note=_gallery_note(scores),
        legend=legend(classes),
        charts=tuple(_charts(summary, classes, scores, reliable)),
        charts_title="How the scores are spread" if reliable is None else "Scores, and how far to trust them",
        tables=(evaluation_table(summary, "Scores per class", str(content["convention"])),),
        cases=_case_table(classes, scores, failed, by_doubt=has_draws),
        facts=facts(content, FACTS),
        recipes=(("", recipe),),
        footer=f"Written by sdseg {__version__} at {now()}. One file; nothing is fetched.",
    )


def _overall(summary: EvaluationSummary) -> ClassSummary:
    """The mean of the classes, or the only class."""
    return summary.classes[-1]


def _figures(
    summary: EvaluationSummary,
    scores: Sequence[CaseScores],
    failed: Sequence[FailedCase],
    reliable: np.ndarray | None,
) -> tuple[Figure, ...]:
    overall = _overall(summary)
    what = "mean of classes, " if overall.class_name == MEAN_OF_CLASSES else f"{overall.class_name}, "
    dice, distance = overall.metrics["dice"], overall.metrics["hd95"]
    missed = f"{overall.missed} missed, {overall.false_alarms} invented structures"
    figures = [
        Figure("Dice", decimals(dice.mean), what + _interval(dice)),
        Figure("IoU", decimals(overall.metrics["iou"].mean), _interval(overall.metrics["iou"])),
        Figure(
            f"HD95 ({summary.unit})",
            cell(distance.mean, 1),
            f"over {distance.n - distance.infinite} of {distance.n} cases with both outlines",
        ),
        Figure("Cases", str(summary.cases), f"{missed}; {len(failed)} could not be scored"),
    ]
    agreements = [record.draw_agreement for record in scores if math.isfinite(record.draw_agreement)]
    if agreements:
        detail = f"mean Dice between draws; {_excess_text(scores)}"
        figures.append(Figure("Agreement of draws", decimals(float(np.mean(agreements))), detail))
    if reliable is not None:
        foreground = expected_calibration_error(reliable.sum(axis=0), least=0.5)
        figures.append(
            Figure(
                "Calibration error",
                decimals(foreground),
                "of pixels with a probability of one half or more; "
                f"over all pixels {cell(expected_calibration_error(reliable.sum(axis=0)), 4)}",
            )
        )
    return tuple(figures)


def _excess_text(scores: Sequence[CaseScores]) -> str:
    """By how much agreement exceeds the Dice with the truth, over the cases that have both."""
    differences = [record.draw_agreement - record.dice for record in scores]
    known = [difference for difference in differences if math.isfinite(difference)]
    if not known:
        return "not comparable with the Dice, which no case has"
    excess = float(np.mean(known))
    return f"{decimals(abs(excess))} {'above' if excess >= 0 else 'below'} the Dice with the truth on average"


def _interval(values: Summary) -> str:
    if math.isnan(values.low):
        return f"{values.n} cases"
    return f"95 % interval {decimals(values.low)} to {decimals(values.high)}, {values.n} cases"


# ---- pictures ----


def _brightest(shown: Sequence[CasePicture]) -> float:
    spreads = [int(picture.uncertainty.max()) / 510 for picture in shown if picture.uncertainty is not None]
    return max([LEAST_BRIGHTEST, *spreads])


def _gallery(scores: Sequence[CaseScores]) -> tuple[GalleryCase, ...]:
    chosen = [(badge, record) for badge, record in chosen_cases(scores) if record.stack]
    brightest = _brightest([picture for _, record in chosen for picture in record.stack])
    return tuple(
        GalleryCase(
            record.case_id,
            badge,
            _score_text(record),
            tuple(
                slice_view(
                    f"slice {picture.slice_index}",
                    picture.image,
                    picture.prediction,
                    truth=picture.ground_truth,
                    uncertainty=None if picture.uncertainty is None else picture.uncertainty / 510,
                    brightest=brightest,
                    grid=picture.grid,
                    pixel_mm=picture.pixel_mm,
                    has_image=picture.has_image,
                )
                for picture in record.stack
            ),
            _first_view(record),
        )
        for badge, record in chosen
    )


def _first_view(record: CaseScores) -> int:
    """The position of the worst slice, with which the slider begins."""
    worst = record.picture.slice_index if record.picture is not None else -1
    indices = [picture.slice_index for picture in record.stack]
    return indices.index(worst) if worst in indices else 0


def _score_text(record: CaseScores) -> str:
    text = f"Dice {decimals(record.dice)}"
    if math.isfinite(record.draw_agreement):
        text += f", draws agree {decimals(record.draw_agreement)}"
    return text


def _gallery_note(scores: Sequence[CaseScores]) -> str:
    chosen = [record for _, record in chosen_cases(scores) if record.stack]
    text = (
        f"The {WORST} worst cases, {MIDDLE} around the median and the {BEST} best by Dice"
        if len(scores) > len(chosen) == WORST + MIDDLE + BEST
        else "All cases, the worst first"
    )
    if any(len(record.stack) > 1 for record in chosen):
        text += f"; of each at most {MOST_VIEWS} slices, beginning with its worst"
    elif any(record.slices > 1 for record in chosen):
        text += "; of a volume the slice with the most errors"
    text += ". "
    pictures = [picture for record in chosen for picture in record.stack]
    if any(picture.uncertainty is not None for picture in pictures):
        text += (
            "Uncertainty is the standard deviation of the probability between draws: dark is 0, the "
            f"brightest colour {_brightest(pictures):.2f}."
        )
    return text


# ---- charts ----


def _charts(
    summary: EvaluationSummary,
    classes: Sequence[str],
    scores: Sequence[CaseScores],
    reliable: np.ndarray | None,
) -> Iterable[Chart]:
    rows = []
    for index, entry in enumerate(summary.classes):
        means = entry.class_name == MEAN_OF_CLASSES
        values = [record.dice if means else record.classes[index].dice for record in scores]
        dice = entry.metrics["dice"]
        rows.append(DotRow(entry.class_name, values, dice.mean, (dice.low, dice.high), highlighted=not means))
    yield Chart(
        "Dice of every case",
        "A dot is a case (bars beyond 200), the line the mean, the band its bootstrap 95 % interval.",
        dot_plot(rows, x_label="Dice", description="Dice of every case, class by class"),
    )
    if reliable is not None:
        yield _reliability_chart(classes, reliable)
    scatter = _doubt_chart(scores)
    if scatter is not None:
        yield scatter


def _reliability_chart(classes: Sequence[str], reliable: np.ndarray) -> Chart:
    rows = [
        (name, [(one.predicted, one.observed, one.pixels) for one in reliability(counts) if one.pixels])
        for name, counts in zip(classes[1:], reliable, strict=True)
    ]
    if len(rows) > MOST_CURVES:
        pooled = reliability(reliable.sum(axis=0))
        rows = [("all classes", [(one.predicted, one.observed, one.pixels) for one in pooled if one.pixels])]
    total = int(reliable[0, :, 0].sum())
    return Chart(
        "Are the probabilities honest?",
        "Of the pixels given a probability, the share that is truly foreground: on the dashed line the two "
        f"are equal, below it the model is too sure. {BINS} bins of equal width over all {total:,} pixels; "
        "the calibration error is the mean distance from the line, weighted by pixels.",
        reliability_plot(rows, description="Observed share of foreground against predicted probability"),
    )


def _doubt_chart(scores: Sequence[CaseScores]) -> Chart | None:
    known = [r for r in scores if math.isfinite(r.draw_agreement) and math.isfinite(r.dice)]
    if len(known) < 4:
        return None
    agreement, true = [r.draw_agreement for r in known], [r.dice for r in known]
    shown = np.linspace(0, len(known) - 1, min(len(known), MOST_SCATTERED)).astype(int)
    drawing = line_chart(
        [Series("cases", [agreement[i] for i in shown], [true[i] for i in shown], marks=True, line=False)],
        x_label="agreement of the draws (mean Dice between them)",
        y_label="Dice with the truth",
        y_range=(0.0, 1.0),
        description="Dice of every case against the agreement of its draws",
    )
    rank = rank_correlation(agreement, true)
    note = f" {MOST_SCATTERED} of {len(known)} cases are drawn." if len(known) > MOST_SCATTERED else ""
    return Chart(
        "Does it know when it is wrong?",
        f"A dot is a case. Rank correlation (Spearman) {decimals(rank)}: 1 where the least agreed are the "
        f"worst. Agreement is no estimate of the Dice: it is {_excess_text(scores)}.{note}",
        drawing,
    )


# ---- the table of cases ----


def _case_table(
    classes: Sequence[str], scores: Sequence[CaseScores], failed: Sequence[FailedCase], *, by_doubt: bool
) -> CaseTable:
    several = len(classes) > 2
    with_group = any(record.group != record.case_id for record in scores)
    with_slices = any(record.slices > 1 for record in scores)
    units = {record.unit for record in scores}
    unit = units.pop() if len(units) == 1 else ""  # where they differ, every row says its own
    columns = ["case", "Dice"]
    columns += ["agreement of draws"] if by_doubt else []
    columns += classes[1:] if several else _metric_columns(unit)
    columns += [] if several or unit else ["unit"]
    columns += ["outcome"]
    columns += ["slices"] if with_slices else []
    columns += ["group"] if with_group else []

    def key(record: CaseScores) -> float:
        value = record.draw_agreement if by_doubt else record.dice
        return math.inf if math.isnan(value) else value

    rows = []
    for record in sorted(scores, key=key)[:MOST_ROWS]:
        row = [record.case_id, cell(record.dice, 3)]
        row += [cell(record.draw_agreement, 3)] if by_doubt else []
        row += (
            [cell(entry.dice, 3) for entry in record.classes] if several else _metric_cells(record.classes[0])
        )
        row += [] if several or unit else [record.unit]
        row += [_outcomes(record, several=several)]
        row += [str(record.slices)] if with_slices else []
        row += [record.group] if with_group else []
        rows.append(tuple(row))
    rows += [(case.case_id, *("–",) * (len(columns) - 1)) for case in failed[: MOST_ROWS - len(rows)]]
    caption = (
        "The most doubtful first: those whose draws agree least. " if by_doubt else "The worst first. "
    ) + "Every figure of every class is in cases.csv."
    if len(scores) + len(failed) > len(rows):
        caption += f" The first {len(rows)} of {len(scores) + len(failed)} are listed here."
    return CaseTable("All cases", caption, tuple(columns), tuple(rows), limit_column=1)


def _metric_columns(unit: str) -> list[str]:
    of_unit = f" ({unit})" if unit else ""
    names = {"iou": "IoU", "nsd": "NSD", "hd95": f"HD95{of_unit}", "assd": f"ASSD{of_unit}"}
    return [names.get(metric, metric) for metric in METRICS if metric != "dice"]


def _metric_cells(entry: ClassScores) -> list[str]:
    shown = [metric for metric in METRICS if metric != "dice"]
    return [cell(getattr(entry, metric), 1 if metric in DISTANCES else 3) for metric in shown]


def _outcomes(record: CaseScores, *, several: bool) -> str:
    if not several:
        return record.classes[0].outcome
    odd = [
        f"{entry.class_name} {entry.outcome}"
        for entry in record.classes
        if entry.outcome in ("missed", "false alarm")
    ]
    return "; ".join(odd) or "scored"
