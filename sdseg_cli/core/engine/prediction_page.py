"""The page of ``sdseg predict --report``: read from the images, the written files and ``summary.csv``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from sdseg_cli import __version__
from sdseg_cli.core.data.images import make_upright, read_image, read_label_map, read_orientation
from sdseg_cli.core.engine.prediction import PredictionTask
from sdseg_cli.core.engine.report_parts import (
    BEST,
    LEAST_BRIGHTEST,
    MIDDLE,
    MOST_ROWS,
    WORST,
    decimals,
    evenly,
    extremes,
    facts,
    legend,
    slice_view,
)
from sdseg_cli.core.errors import SdsegError
from sdseg_cli.core.metrics.summary import summarise
from sdseg_cli.core.reporting.charts import DotRow, dot_plot
from sdseg_cli.core.reporting.page import CaseTable, Chart, Figure, GalleryCase, Page
from sdseg_cli.core.run_directory import library_versions, now

SHOWN_SIDE = 480  # pixels; the longer side of a case before it is pictured
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
    recipe: str = "",
) -> Page:
    """Lay out the page.

    Args:
        tasks: the images of this call and their files.
        rows: of ``summary.csv``, which may also list images of earlier calls.
        classes: names, the background first.
        settings: what decided the masks, as ``prediction.json`` has it.
        recipe: text of the recipe the model was trained by.
    """
    there = [row for row in rows if row["status"] != "failed"]
    failed = len(rows) - len(there)
    doubts = {row["file"]: _number(row.get("predicted_dice", "")) for row in there}
    has_draws = any(math.isfinite(value) for value in doubts.values())
    return Page(
        title="What was found",
        lead=f"{_count(len(there))} segmented into {', '.join(classes[1:])}"
        + (f"; {failed} could not be read and are in the table." if failed else "."),
        figures=_figures(there, classes, doubts, failed),
        gallery=_gallery(tasks, doubts, classes, by_doubt=has_draws),
        gallery_title="Images to look at",
        gallery_note=_gallery_note(by_doubt=has_draws),
        legend=legend(classes),
        charts=tuple(_charts(there, classes, doubts)),
        charts_title="How they are spread",
        cases=_case_table(rows, classes, by_doubt=has_draws),
        facts=facts({**settings, "versions": library_versions()}, FACTS),
        recipe=recipe,
        footer=f"Written by sdseg {__version__} at {now()}. One file; nothing is fetched.",
    )


def _figures(
    rows: Sequence[Mapping[str, str]], classes: Sequence[str], doubts: Mapping[str, float], failed: int
) -> tuple[Figure, ...]:
    figures = [Figure("Images", str(len(rows)), f"{failed} failed")]
    known = [value for value in doubts.values() if math.isfinite(value)]
    if known:
        dice = summarise(known)
        figures.append(
            Figure(
                "Predicted Dice",
                decimals(dice.mean),
                f"how far the draws agree; 95 % interval {decimals(dice.low)} to {decimals(dice.high)}",
            )
        )
    for name in classes[1:3]:
        shares = _fractions(rows, name)
        found = sum(share > 0 for share in shares)
        mean = f"{100 * sum(shares) / found:.1f} % of the image where it is" if found else "nowhere"
        figures.append(Figure(f"Images with {name}", str(found), mean))
    return tuple(figures)


def _fractions(rows: Sequence[Mapping[str, str]], name: str) -> list[float]:
    return [share for row in rows if math.isfinite(share := _number(row.get(f"{name}_fraction", "")))]


def _charts(
    rows: Sequence[Mapping[str, str]], classes: Sequence[str], doubts: Mapping[str, float]
) -> list[Chart]:
    charts = []
    known = [value for value in doubts.values() if math.isfinite(value)]
    if known:
        dice = summarise(known)
        row = DotRow("predicted Dice", known, dice.mean, (dice.low, dice.high), highlighted=True)
        charts.append(
            Chart(
                "How sure it is",
                "Mean Dice between the masks of any two draws of an image: 1 where all draws are equal.",
                dot_plot([row], x_label="predicted Dice", description="Predicted Dice of every image"),
            )
        )
    areas: list[DotRow] = []
    for name in classes[1:]:
        shares = _fractions(rows, name)
        summary = summarise(shares)
        areas.append(DotRow(name, shares, summary.mean, (summary.low, summary.high), highlighted=not areas))
    charts.append(
        Chart(
            "How much of the image it is",
            "A dot is an image (bars beyond 200), the line the mean, the band its bootstrap 95 % interval.",
            dot_plot(areas, x_label="share of the image", description="Share of every image, class by class"),
        )
    )
    return charts


# ---- pictures ----


def _gallery(
    tasks: Sequence[PredictionTask], doubts: Mapping[str, float], classes: Sequence[str], *, by_doubt: bool
) -> tuple[GalleryCase, ...]:
    there = [task for task in tasks if task.file in doubts]
    if by_doubt:
        sure = [task for task in there if math.isfinite(doubts[task.file])]
        chosen = extremes(sorted(sure, key=lambda task: doubts[task.file]))
    else:
        chosen = [("", there[position]) for position in evenly(len(there), WORST + MIDDLE + BEST)]
    spreads = [_spread(task) for _, task in chosen]
    brightest = max([LEAST_BRIGHTEST, *(float(spread.max()) for spread in spreads if spread is not None)])
    cases = []
    for (badge, task), spread in zip(chosen, spreads, strict=True):
        try:
            pixels = read_image(task.path).pixels
            mask = read_label_map(task.mask, num_classes=len(classes))
        except (SdsegError, OSError):
            continue  # moved or changed since it was predicted: the page does without its picture
        if mask.shape != pixels.shape[:2]:
            continue
        view = slice_view(
            task.case_id,
            _reduced(pixels),
            _reduced(mask),
            uncertainty=None if spread is None or spread.shape != mask.shape else _reduced(spread),
            brightest=brightest,
        )
        score = f"predicted Dice {decimals(doubts[task.file])}" if by_doubt else ""
        cases.append(GalleryCase(task.case_id, BADGES[badge], score, (view,)))
    return tuple(cases)


def _reduced(array: np.ndarray) -> np.ndarray:
    """Leave out rows and columns so that drawing a picture of a few hundred pixels does not take seconds."""
    step = max(1, max(array.shape[:2]) // SHOWN_SIDE)
    return array[::step, ::step]


def _spread(task: PredictionTask) -> np.ndarray | None:
    """Standard deviation between draws, float (H, W) in [0, 0.5], upright; None without such a file."""
    if task.uncertainty is None or not task.uncertainty.exists():
        return None
    try:
        with Image.open(task.uncertainty) as stored:
            levels = np.asarray(stored).astype(np.float64)
        return make_upright(levels, read_orientation(task.uncertainty)) / 65535 / 2
    except (SdsegError, OSError):
        return None


def _gallery_note(*, by_doubt: bool) -> str:
    if not by_doubt:
        return (
            f"At most {WORST + MIDDLE + BEST} images, evenly chosen. With --samples or --flips the most "
            "doubtful come first."
        )
    return (
        f"The {WORST} most doubtful images, {MIDDLE} around the median and the {BEST} surest, by how far the "
        "draws agree. Uncertainty is the standard deviation of the probability between draws, dark is 0."
    )


# ---- the table of cases ----


def _case_table(rows: Sequence[Mapping[str, str]], classes: Sequence[str], *, by_doubt: bool) -> CaseTable:
    shares = [(f"{name}_fraction", f"{name} (%)") for name in classes[1:]]
    columns = ["case"]
    columns += ["predicted Dice", "mean uncertainty"] if by_doubt else []
    columns += [*(label for _, label in shares), "size (px)", "status", "notes"]

    def doubt(row: Mapping[str, str]) -> float:
        value = _number(row.get("predicted_dice", ""))
        return math.inf if math.isnan(value) else value

    table = []
    for row in sorted(rows, key=doubt)[:MOST_ROWS]:
        cells = [row["case"]]
        if by_doubt:
            cells += [_shown(row.get("predicted_dice", ""), 3), _shown(row.get("mean_uncertainty", ""), 4)]
        cells += [_shown(row.get(key, ""), 2, factor=100) for key, _ in shares]
        cells += [f"{row['width']} × {row['height']}" if row["width"] else "–", row["status"]]
        cells += [row["error"] or row["notes"]]
        table.append(tuple(cells))
    caption = "The most doubtful first: those whose draws agree least. " if by_doubt else ""
    caption += "Areas in pixels and the times are in summary.csv."
    if len(rows) > len(table):
        caption += f" The first {len(table)} of {len(rows)} are listed here."
    return CaseTable("All images", caption, tuple(columns), tuple(table), limit_column=1)


def _shown(text: str, digits: int, *, factor: float = 1.0) -> str:
    value = _number(text) * factor
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _count(images: int) -> str:
    return f"{images} image" + ("s" if images != 1 else "")
