"""The page of ``sdseg stability``: its figures, and the images on which the runs differ most and least."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from sdseg_cli import __version__
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
    ranked,
    slice_view,
)
from sdseg_cli.core.engine.stability import LABELS, MEASURES, StabilitySummary, stability_table
from sdseg_cli.core.metrics.summary import summarise
from sdseg_cli.core.reporting.charts import DotRow, dot_plot
from sdseg_cli.core.reporting.page import CaseTable, Chart, Figure, GalleryCase, Page, SliceView
from sdseg_cli.core.reporting.tables import cell
from sdseg_cli.core.run_directory import now

if TYPE_CHECKING:
    from sdseg_cli.core.engine.inference import SliceInput, SlicePrediction

Place = tuple[str, int]  # case id and slice index
Predicted = tuple["SliceInput", "SlicePrediction"]
BADGES = {"worst": "least stable", "middle": "middle", "best": "most stable", "": ""}
FACTS = {
    "model": "Model",
    "images": "Images",
    "dataset": "Dataset",
    "runs": "Runs",
    "protocol_meaning": "Protocol",
    "grid": "Compared on the grid of the",
    "sampling": "Sampling",
    "precision": "Precision",
    "device": "Device",
    "processes": "Processes",
    "warnings": "Unlike the training data",
    "failed_images": "Could not be read",
    "command": "Command",
    "versions": "Versions",
    "written": "Written",
}


def agreements(rows: Sequence[Mapping[str, Any]]) -> dict[Place, float]:
    """Dice agreement of every slice's masks, the mean over its classes, from the rows of ``cases.csv``."""
    values: dict[Place, list[float]] = {}
    for row in rows:
        if row["kind"] == "maps" and not math.isnan(row["dice_agreement"]):
            values.setdefault((row["case"], row["slice"]), []).append(row["dice_agreement"])
    return {place: float(np.mean(each)) for place, each in values.items()}


def stability_page(
    rows: Sequence[Mapping[str, Any]],
    summary: StabilitySummary,
    content: Mapping[str, Any],
    classes: Sequence[str],
    predict_again: Callable[[list[Place]], Iterable[Predicted]],
    threshold: float,
    *,
    recipe: str = "",
) -> Page:
    """Lay out the page.

    Args:
        rows: of ``cases.csv``, one per slice, class and kind.
        summary: computed from them.
        content: what ``summary.json`` holds.
        classes: names, the background first.
        predict_again: predicts the few slices that are shown, with every run: which they are is known only
            when all are measured, and no picture of the others need be kept.
        threshold: of the masks.
        recipe: text of the recipe the model was trained by.
    """
    agreed = agreements(rows)
    chosen = extremes(ranked(list(agreed), agreed.__getitem__))
    predicted = {
        (prediction.case_id, prediction.slice_index): (item, _first_runs(prediction))
        for item, prediction in predict_again([place for _, place in chosen])
    }
    brightest = max(
        [LEAST_BRIGHTEST, *(float(prediction.uncertainty.max()) for _, prediction in predicted.values())]
    )
    gallery = tuple(
        GalleryCase(
            _name(place, agreed),
            BADGES[badge],
            f"agreement {decimals(agreed[place])}",
            tuple(_views(*predicted[place], brightest, threshold)),
        )
        for badge, place in chosen
        if place in predicted
    )
    runs = int(content["runs"])
    return Page(
        title="How much do the masks move?",
        lead=f"{runs} runs of {summary.slices} images from different noise, {content['model']['location']}.",
        figures=_figures(summary, agreed, runs),
        gallery=gallery,
        gallery_title="Images to look at",
        gallery_note=(
            f"The {WORST} images on which the runs agree least, {MIDDLE} around the median and the {BEST} on "
            f"which they agree best; of each at most {MOST_VIEWS} runs. Uncertainty is the standard "
            f"deviation of the probability between all runs: dark is 0, the brightest colour {brightest:.2f}."
        ),
        legend=legend(classes),
        charts=(_chart(rows, classes),),
        charts_title="How the agreement is spread",
        tables=(stability_table(summary, "Stability per class", str(content["protocol"])),),
        cases=_case_table(rows, agreed, several=len(classes) > 2),
        facts=facts(content, FACTS),
        recipes=(("", recipe),),
        footer=f"Written by sdseg {__version__} at {now()}. One file; nothing is fetched.",
    )


def _name(place: Place, agreed: Mapping[Place, float]) -> str:
    """The case id, with the slice where the case has several."""
    case, index = place
    several = any(other != place and other[0] == case for other in agreed)
    return f"{case}, slice {index}" if several else case


def _figures(summary: StabilitySummary, agreed: Mapping[Place, float], runs: int) -> tuple[Figure, ...]:
    dice = summarise(list(agreed.values()))
    figures = [
        Figure(
            "Dice agreement",
            decimals(dice.mean),
            f"between any two runs; 95 % interval {decimals(dice.low)} to {decimals(dice.high)}",
        )
    ]
    for measure in ("lpips", "psnr", "ms_ssim"):
        values = [entry.measures[measure].mean for entry in summary.entries if entry.kind == "maps"]
        known = [value for value in values if math.isfinite(value)]
        mean = float(np.mean(known)) if known else math.nan
        figures.append(
            Figure(
                LABELS[measure],
                cell(mean, 2 if measure == "psnr" else 4),
                "of the masks, each run with the first" if known else "not computed: see below",
            )
        )
    figures.append(Figure("Images", str(summary.slices), f"{runs} runs of each"))
    return tuple(figures)


def _first_runs(prediction: SlicePrediction) -> SlicePrediction:
    """Keep only the runs that are shown in memory."""
    if prediction.samples is None:
        raise ValueError("the predictor returned no samples; make it with return_samples=True")
    return replace(prediction, samples=prediction.samples[:MOST_VIEWS].copy())


def _views(
    item: SliceInput, prediction: SlicePrediction, brightest: float, threshold: float
) -> Iterable[SliceView]:
    from sdseg_cli.core.model.pipeline import probabilities_to_labels

    samples = cast("np.ndarray", prediction.samples)
    size = item.image.shape[:2]
    on_model = samples.shape[2:] == size and (item.grid.height, item.grid.width) != size

    def placed(array: np.ndarray) -> np.ndarray:
        return array if on_model else item.grid.labels_to_model(array)

    spread = placed(np.rint(np.clip(prediction.uncertainty, 0, 0.5) * 510).astype(np.uint8)) / 510
    for number, sample in enumerate(samples, start=1):
        label_map = placed(probabilities_to_labels(sample, threshold))
        yield slice_view(
            f"run {number}",
            item.image,
            label_map,
            uncertainty=spread,
            brightest=brightest,
            grid=item.grid,
        )


def _chart(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> Chart:
    drawn = []
    for index, name in enumerate(classes[1:]):
        values = [row["dice_agreement"] for row in rows if row["kind"] == "maps" and row["class"] == name]
        summary = summarise(values)
        drawn.append(DotRow(name, values, summary.mean, (summary.low, summary.high), highlighted=index == 0))
    return Chart(
        "Agreement of the masks, image by image",
        "Mean Dice over all pairs of runs. A dot is an image (bars beyond 200), the line the mean, the band "
        "its bootstrap 95 % interval.",
        dot_plot(
            drawn, x_label="Dice agreement", description="Dice agreement of every image, class by class"
        ),
    )


def _case_table(
    rows: Sequence[Mapping[str, Any]], agreed: Mapping[Place, float], *, several: bool
) -> CaseTable:
    columns = ["image", *(["class"] if several else []), *(LABELS[measure] for measure in reversed(MEASURES))]
    maps = [row for row in rows if row["kind"] == "maps"]
    maps.sort(key=lambda row: (agreed.get((row["case"], row["slice"]), math.inf), row["case"], row["slice"]))
    table = []
    for row in maps[:MOST_ROWS]:
        cells = [_name((row["case"], row["slice"]), agreed) if len(agreed) <= MOST_ROWS else row["case"]]
        cells += [row["class"]] if several else []
        cells += [cell(row[measure], 2 if measure == "psnr" else 4) for measure in reversed(MEASURES)]
        table.append(tuple(cells))
    caption = "Of the masks, the least stable first; those of the scores are in cases.csv."
    if len(maps) > len(table):
        caption += f" The first {len(table)} of {len(maps)} rows are listed here."
    return CaseTable("All images", caption, tuple(columns), tuple(table), limit_column=2 if several else 1)
