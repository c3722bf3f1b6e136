"""The page of ``sdseg predict --report``: read from the images, the written files and ``summary.csv``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sdseg_cli import __version__
from sdseg_cli.core.engine.prediction_pictures import ShownCase, read_shown_case
from sdseg_cli.core.engine.prediction_plan import PredictionTask
from sdseg_cli.core.engine.report_parts import (
    BEST,
    LEAST_BRIGHTEST,
    MIDDLE,
    MOST_ROWS,
    MOST_VIEWS,
    WORST,
    decimals,
    evenly,
    extremes,
    facts,
    legend,
)
from sdseg_cli.core.engine.volume_prediction import VolumeSettings
from sdseg_cli.core.metrics.summary import summarise
from sdseg_cli.core.reporting.charts import DotRow, dot_plot
from sdseg_cli.core.reporting.page import CaseTable, Chart, Figure, GalleryCase, Page
from sdseg_cli.core.run_directory import library_versions, now

BADGES = {"worst": "most doubtful", "middle": "middle", "best": "surest", "": ""}
FACTS = {
    "model": "Model",
    "model_sha256": "SHA-256 of the model",
    "model_of": "Trained until",
    "seed": "Seed of the noise",
    "num_inference_steps": "Reverse steps",
    "num_samples": "Noise draws",
    "flips": "Test-time flips",
    "threshold": "Threshold",
    "largest_component": "Largest component only",
    "device": "Device",
    "warnings": "Unlike the training data",
    "classes": "Classes",
    "command": "Command",
    "versions": "Versions",
    "written": "Written",
}


def prediction_page(
    tasks: Sequence[PredictionTask],
    rows: Sequence[Mapping[str, str]],
    classes: Sequence[str],
    settings: Mapping[str, Any],
    *,
    volumes: VolumeSettings | None = None,
    recipe: str = "",
) -> Page:
    """Lay out the page.

    Args:
        tasks: the images and volumes of this call and their files.
        rows: of ``summary.csv``, which may also list images of earlier calls.
        classes: names, the background first.
        settings: what decided the masks, as ``prediction.json`` has it.
        volumes: how volumes were cut and windowed, so that they are shown as the model saw them.
        recipe: text of the recipe the model was trained by.
    """
    there = [row for row in rows if row["status"] != "failed"]
    failed = len(rows) - len(there)
    doubts = {row["file"]: _number(row.get("draw_agreement", "")) for row in there}
    has_draws = any(math.isfinite(value) for value in doubts.values())
    shown = _shown_cases(tasks, doubts, len(classes), volumes, by_doubt=has_draws)
    return Page(
        title="What was found",
        lead=f"{_count(there)} segmented into {', '.join(classes[1:])}"
        + (
            f"; {failed} could not be read and {'is' if failed == 1 else 'are'} in the table."
            if failed
            else "."
        ),
        figures=_figures(there, classes, doubts, failed),
        gallery=_gallery(shown, doubts, by_doubt=has_draws),
        gallery_title=f"{_noun(there).capitalize()} to look at",
        gallery_note=_gallery_note(_noun(there), [case for _, _, case in shown], by_doubt=has_draws),
        legend=legend(classes),
        charts=tuple(_charts(there, classes, doubts)),
        charts_title="How they are spread",
        cases=_case_table(rows, classes, by_doubt=has_draws),
        facts=facts({**settings, "versions": library_versions()}, FACTS),
        recipes=(("", recipe),),
        footer=f"Written by sdseg {__version__} at {now()}. One file; nothing is fetched.",
    )


def _figures(
    rows: Sequence[Mapping[str, str]], classes: Sequence[str], doubts: Mapping[str, float], failed: int
) -> tuple[Figure, ...]:
    figures = [Figure(_noun(rows).capitalize(), str(len(rows)), f"{failed} failed")]
    known = [value for value in doubts.values() if math.isfinite(value)]
    if known:
        dice = summarise(known)
        figures.append(
            Figure(
                "Agreement of draws",
                decimals(dice.mean),
                f"mean Dice between draws; 95 % interval {decimals(dice.low)} to {decimals(dice.high)}",
            )
        )
    for name in classes[1:3]:
        shares, millilitres = _numbers(rows, f"{name}_fraction"), _numbers(rows, f"{name}_ml")
        found = sum(share > 0 for share in shares)
        if not found:
            mean = "nowhere"
        elif len(millilitres) == len(rows):
            mean = f"{sum(millilitres) / found:.1f} ml on average where it is"
        else:
            mean = f"{100 * sum(shares) / found:.1f} % of the {_noun(rows)[:-1]} where it is"
        figures.append(Figure(f"{_noun(rows).capitalize()} with {name}", str(found), mean))
    return tuple(figures)


def _numbers(rows: Sequence[Mapping[str, str]], column: str) -> list[float]:
    return [value for row in rows if math.isfinite(value := _number(row.get(column, "")))]


def _charts(
    rows: Sequence[Mapping[str, str]], classes: Sequence[str], doubts: Mapping[str, float]
) -> list[Chart]:
    charts = []
    known = [value for value in doubts.values() if math.isfinite(value)]
    if known:
        dice = summarise(known)
        row = DotRow("agreement of draws", known, dice.mean, (dice.low, dice.high), highlighted=True)
        charts.append(
            Chart(
                "How far the draws agree",
                f"Mean Dice between the masks of any two draws of {_article(rows)}: 1 where all draws are "
                "equal. It ranks by doubt and is no estimate of the Dice with the truth: draws can agree on "
                "a mistake.",
                dot_plot([row], x_label="agreement of draws", description="Agreement of draws, case by case"),
            )
        )
    areas: list[DotRow] = []
    for name in classes[1:]:
        shares = _numbers(rows, f"{name}_fraction")
        summary = summarise(shares)
        areas.append(DotRow(name, shares, summary.mean, (summary.low, summary.high), highlighted=not areas))
    noun = _noun(rows)[:-1]
    charts.append(
        Chart(
            f"How much of the {noun} it is",
            f"A dot is {_article(rows)} (bars beyond 200), the line the mean, the band its bootstrap 95 % "
            "interval.",
            dot_plot(areas, x_label=f"share of the {noun}", description=f"Share of every {noun}, by class"),
        )
    )
    return charts


# ---- pictures ----

Shown = tuple[str, PredictionTask, ShownCase]  # the badge, the case, its pictures


def _shown_cases(
    tasks: Sequence[PredictionTask],
    doubts: Mapping[str, float],
    num_classes: int,
    volumes: VolumeSettings | None,
    *,
    by_doubt: bool,
) -> list[Shown]:
    """Choose the cases to show and read their pictures, one case after another."""
    there = [task for task in tasks if task.file in doubts]
    if by_doubt:
        sure = [task for task in there if math.isfinite(doubts[task.file])]
        chosen = extremes(sorted(sure, key=lambda task: doubts[task.file]))
    else:
        chosen = [("", there[position]) for position in evenly(len(there), WORST + MIDDLE + BEST)]
    read = ((badge, task, read_shown_case(task, num_classes, volumes)) for badge, task in chosen)
    return [(badge, task, case) for badge, task, case in read if case is not None]


def _gallery(
    shown: Sequence[Shown], doubts: Mapping[str, float], *, by_doubt: bool
) -> tuple[GalleryCase, ...]:
    brightest = _brightest([case for _, _, case in shown])
    return tuple(
        GalleryCase(
            task.case_id,
            BADGES[badge],
            f"agreement {decimals(doubts[task.file])}" if by_doubt else "",
            tuple(each.view(brightest) for each in case.slices),
            case.first,
        )
        for badge, task, case in shown
    )


def _brightest(shown: Sequence[ShownCase]) -> float:
    """The uncertainty of the brightest colour: the largest that is shown."""
    spreads = [each.uncertainty for case in shown for each in case.slices]
    return max([LEAST_BRIGHTEST, *(float(spread.max()) for spread in spreads if spread is not None)])


def _gallery_note(noun: str, shown: Sequence[ShownCase], *, by_doubt: bool) -> str:
    if by_doubt and len(shown) < WORST + MIDDLE + BEST:
        text = (
            f"The {noun} whose draws agree least come first. Uncertainty is the standard deviation of the "
            f"probability between draws: dark is 0, the brightest colour {_brightest(shown):.2f}."
        )
    elif by_doubt:
        text = (
            f"The {WORST} most doubtful {noun}, {MIDDLE} around the median and the {BEST} surest, by how far "
            "the draws agree. Uncertainty is the standard deviation of the probability between draws: dark "
            f"is 0, the brightest colour {_brightest(shown):.2f}."
        )
    else:
        text = (
            f"At most {WORST + MIDDLE + BEST} {noun}, evenly chosen. With --samples or --flips the most "
            "doubtful come first."
        )
    if any(len(case.slices) > 1 for case in shown):
        text += f" Of a volume at most {MOST_VIEWS} slices through the mask, beginning with its largest."
    return text


# ---- the table of cases ----


def _case_table(rows: Sequence[Mapping[str, str]], classes: Sequence[str], *, by_doubt: bool) -> CaseTable:
    there = [row for row in rows if row["status"] != "failed"]
    measures: list[tuple[str, str, int, float]] = []  # column of summary.csv, label, decimals, factor
    if any(not row["slices"] for row in there):
        measures += [(f"{name}_fraction", f"{name} (%)", 2, 100) for name in classes[1:]]
    if any(row["slices"] for row in there):
        measures += [(f"{name}_ml", f"{name} (ml)", 2, 1) for name in classes[1:]]
    columns = ["case"]
    columns += ["agreement of draws", "mean uncertainty"] if by_doubt else []
    columns += [*(label for _, label, _, _ in measures), "size (px)", "status", "notes"]

    def doubt(row: Mapping[str, str]) -> float:
        value = _number(row.get("draw_agreement", ""))
        return math.inf if math.isnan(value) else value

    table = []
    for row in sorted(rows, key=doubt)[:MOST_ROWS]:
        cells = [row["case"]]
        if by_doubt:
            cells += [_shown(row.get("draw_agreement", ""), 3), _shown(row.get("mean_uncertainty", ""), 4)]
        cells += [_shown(row.get(key, ""), digits, factor=factor) for key, _, digits, factor in measures]
        sides = [row[side] for side in ("width", "height", "slices") if row[side]]
        cells += [" × ".join(sides) or "–", row["status"]]
        cells += [row["error"] or row["notes"]]
        table.append(tuple(cells))
    caption = "The most doubtful first: those whose draws agree least. " if by_doubt else ""
    caption += "Areas in pixels and the times are in summary.csv."
    if len(rows) > len(table):
        caption += f" The first {len(table)} of {len(rows)} are listed here."
    return CaseTable(f"All {_noun(there)}", caption, tuple(columns), tuple(table), limit_column=1)


def _shown(text: str, digits: int, *, factor: float = 1.0) -> str:
    value = _number(text) * factor
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _noun(rows: Sequence[Mapping[str, str]]) -> str:
    """What the rows are: images, volumes, or cases where there are both."""
    kinds = {bool(row["slices"]) for row in rows}
    return "cases" if len(kinds) > 1 else "volumes" if kinds == {True} else "images"


def _article(rows: Sequence[Mapping[str, str]]) -> str:
    noun = _noun(rows)[:-1]
    return f"an {noun}" if noun == "image" else f"a {noun}"


def _count(rows: Sequence[Mapping[str, str]]) -> str:
    return f"{len(rows)} {_noun(rows)[:-1] if len(rows) == 1 else _noun(rows)}"
