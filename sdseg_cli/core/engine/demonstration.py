"""The page of ``sdseg demo``: everything on it is read from the files that the commands wrote."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from sdseg_cli import __version__
from sdseg_cli.core.data.benchmarks import phantom_cases
from sdseg_cli.core.data.images import read_image, read_label_map, write_png
from sdseg_cli.core.data.phantom import otsu_dice
from sdseg_cli.core.data.prepared import PreparedDataset
from sdseg_cli.core.engine.evaluation_summary import ClassSummary, EvaluationSummary, evaluation_table
from sdseg_cli.core.engine.report_parts import (
    LEAST_BRIGHTEST,
    decimals,
    extremes,
    legend,
    rank_correlation,
    slice_view,
)
from sdseg_cli.core.engine.stability import KindSummary, StabilitySummary, stability_table
from sdseg_cli.core.errors import DataError
from sdseg_cli.core.files import CASES_FILE, SUMMARY_FILE
from sdseg_cli.core.metrics.overlap import count_classes, dice
from sdseg_cli.core.metrics.summary import Summary, summarise
from sdseg_cli.core.reporting.charts import DotRow, Series, dot_plot, line_chart
from sdseg_cli.core.reporting.curves import series
from sdseg_cli.core.reporting.page import (
    CaseTable,
    Chart,
    Figure,
    GalleryCase,
    Page,
    Picture,
    SliceView,
    Step,
    Table,
    format_duration,
    webp_source,
)
from sdseg_cli.core.run_directory import RunDirectory, library_versions, now, processor_name

KIND: Literal["endoscopy"] = "endoscopy"
SHEET_SIDE = 1400  # pixels


@dataclass(frozen=True)
class DemoFolder:
    """The files of one demonstration below ``root``."""

    root: Path

    @property
    def state(self) -> Path:
        """Settings and finished steps; the mark by which the folder is known as ours."""
        return self.root / "demo.json"

    @property
    def data(self) -> Path:
        """The prepared dataset."""
        return self.root / "data"

    @property
    def scans(self) -> Path:
        """The test images as files, as a user would have them."""
        return self.root / "scans"

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.root / "run"

    @property
    def masks(self) -> Path:
        """What was predicted for the scans."""
        return self.root / "masks"

    @property
    def page(self) -> Path:
        """The page."""
        return self.root / "index.html"


@dataclass(frozen=True)
class ShownCase:
    """One test image: the Dice of its mask and of an Otsu threshold, and its uncertainty.

    ``uncertainty`` is the standard deviation between the draws, summed over the image and divided by the
    predicted foreground pixels, NaN without draws or foreground; ``highest`` is its largest value, or 0.
    """

    case_id: str
    dice: float
    otsu: float
    uncertainty: float
    highest: float


def write_scans(folder: DemoFolder, *, cases: int, seed: int, size: int) -> int:
    """Write the test images of the phantom dataset as PNG files.

    Args:
        folder: holds the prepared dataset.
        cases, seed, size: as given to ``sdseg prepare phantom``.

    Returns:
        How many were written.
    """
    wanted = set(PreparedDataset.open(folder.data).split("test").case_ids)
    folder.scans.mkdir(parents=True, exist_ok=True)
    for case in phantom_cases(KIND, cases=cases, seed=seed, size=size):
        if case.case_id in wanted and case.arrays is not None:
            image, _ = case.arrays()
            write_png(folder.scans / f"{case.case_id}.png", image)
    return len(wanted)


def demonstration_page(folder: DemoFolder, steps: Sequence[Step]) -> Page:
    """Gather the page from the folder.

    Args:
        folder: all five commands have run in it.
        steps: what was run and how long it took.

    Raises:
        DataError: a result is missing or damaged.
    """
    run = RunDirectory.open(folder.run)
    dataset = PreparedDataset.open(folder.data)
    scores = _read_json(run.evaluation / "test" / SUMMARY_FILE)
    stability = _read_json(run.stability / "test" / SUMMARY_FILE)
    cases = score_shown_cases(folder, dataset)
    record = run.read_run_json()
    total = sum(step.seconds for step in steps)
    brightest = max([LEAST_BRIGHTEST, *(case.highest for case in cases)])
    splits = dataset.manifest.splits
    return Page(
        title="sdseg, from nothing to scores",
        lead=(
            f"Five commands on synthetic endoscopy pictures: {splits['train']} images to learn from, "
            f"{splits['validation']} to choose the checkpoint, {splits['test']} that are looked at once, at "
            "the end. The lesion differs from its look-alikes in texture, hue and rim, so brightness alone "
            "does not find it."
        ),
        figures=_figures(scores, stability, cases, record, total),
        steps=tuple(steps),
        gallery=_gallery(folder, dataset, cases, brightest),
        gallery_note=(
            "The worst, the middle and the best of the test images by the Dice of the mask shown. "
            "Uncertainty is the standard deviation of the probability between draws of the noise: dark is 0, "
            f"the brightest colour {brightest:.2f}."
        ),
        legend=legend(dataset.manifest.classes),
        pictures=(
            Picture(
                "What it learnt from",
                "The contact sheet that sdseg prepare writes, to be looked at before any training.",
                _picture_source(folder.data / "contact_sheet.png"),
            ),
        ),
        charts=_charts(run, scores, cases),
        tables=(_score_table(scores), _stability_table(stability)),
        cases=_case_table(cases),
        facts=_facts(dataset, record, scores, cases),
        recipes=(("", run.recipe_file.read_text(encoding="utf-8")),),
        footer=f"Written by sdseg {__version__} at {now()}. One file; nothing is fetched.",
    )


def score_shown_cases(folder: DemoFolder, dataset: PreparedDataset) -> list[ShownCase]:
    """Score the masks that ``sdseg predict`` wrote, and a threshold, on the same images."""
    shown = []
    for current in dataset.split("test"):
        prediction = read_label_map(folder.masks / f"{current.case_id}.png", num_classes=2)
        image = read_image(folder.scans / f"{current.case_id}.png").pixels
        (counts,) = count_classes(prediction, current.label_map, 2)
        spread = _uncertainty(folder, current.case_id)
        area = int(prediction.sum())
        shown.append(
            ShownCase(
                current.case_id,
                dice(counts),
                otsu_dice(image, current.label_map),
                math.nan if spread is None or not area else float(spread.sum()) / area,
                0.0 if spread is None else float(spread.max()),
            )
        )
    return shown


# ---- parts of the page ----


def _figures(
    scores: dict[str, Any],
    stability: dict[str, Any],
    cases: Sequence[ShownCase],
    record: Mapping[str, Any],
    total: float,
) -> tuple[Figure, ...]:
    test = _first_class(scores)["metrics"]["dice"]
    maps = _first_class(stability)["maps"]["measures"]["dice_agreement"]
    otsu = summarise([case.otsu for case in cases]).mean
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = str(record.get("device", "cpu"))
    where = f"on {cores} CPU cores, no GPU" if device.startswith("cpu") else f"on {device}"
    return (
        Figure(
            "Test Dice",
            decimals(test["mean"]),
            f"95 % interval {decimals(test['low'])} to {decimals(test['high'])}, {test['n']} unseen images",
        ),
        Figure(
            "Otsu threshold",
            decimals(otsu),
            "Dice of the better polarity on the same images: what brightness alone gives",
        ),
        Figure(
            "Agreement of runs",
            decimals(maps["mean"]),
            f"Dice between {stability['runs']} predictions from different noise",
        ),
        Figure("Time", format_duration(total), where),
    )


def _gallery(
    folder: DemoFolder, dataset: PreparedDataset, cases: Sequence[ShownCase], brightest: float
) -> tuple[GalleryCase, ...]:
    truths = {current.case_id: current.label_map for current in dataset.split("test")}
    return tuple(
        GalleryCase(
            case.case_id,
            badge,
            f"Dice {decimals(case.dice)}",
            (_view(folder, case, truths[case.case_id], brightest),),
        )
        for badge, case in chosen_cases(cases)
    )


def chosen_cases(cases: Sequence[ShownCase]) -> list[tuple[str, ShownCase]]:
    """The three worst, three in the middle and the two best, worst first; all of them if they are few."""
    ranked = sorted(cases, key=lambda case: (-1.0 if math.isnan(case.dice) else case.dice, case.case_id))
    return extremes(ranked, few="test")


def _view(folder: DemoFolder, case: ShownCase, truth: np.ndarray, brightest: float) -> SliceView:
    name = f"{case.case_id}.png"
    return slice_view(
        case.case_id,
        read_image(folder.scans / name).pixels,
        read_label_map(folder.masks / name, num_classes=2),
        truth=truth,
        uncertainty=_uncertainty(folder, case.case_id),
        brightest=brightest,
    )


def _uncertainty(folder: DemoFolder, case_id: str) -> np.ndarray | None:
    """Standard deviation between draws, float (H, W) in [0, 0.5], or None where there was one draw."""
    path = folder.masks / "uncertainty" / f"{case_id}.png"
    if not path.exists():
        return None
    with Image.open(path) as stored:
        return np.asarray(stored).astype(np.float64) / 65535 / 2


def _case_table(cases: Sequence[ShownCase]) -> CaseTable:
    ranked = sorted(cases, key=lambda case: -1.0 if math.isnan(case.dice) else case.dice)
    rows = [
        (case.case_id, decimals(case.dice), decimals(case.otsu), decimals(case.uncertainty))
        for case in ranked
    ]
    return CaseTable(
        "All test images",
        "The worst first. Uncertainty is summed over the image, per predicted foreground pixel.",
        ("case", "Dice", "Otsu threshold", "uncertainty"),
        tuple(rows),
        limit_column=1,
    )


def _charts(run: RunDirectory, scores: dict[str, Any], cases: Sequence[ShownCase]) -> tuple[Chart, ...]:
    test = _first_class(scores)["metrics"]["dice"]
    metrics = run.read_metrics()
    evaluated = _read_column(run.evaluation / "test" / CASES_FILE, "dice")
    otsu = summarise([case.otsu for case in cases])
    rows = [
        DotRow("sdseg", evaluated, test["mean"], (test["low"], test["high"]), highlighted=True),
        DotRow("Otsu threshold", [case.otsu for case in cases], otsu.mean, (otsu.low, otsu.high)),
    ]
    charts = [
        Chart(
            "Every test image",
            "A dot is an image, the line the mean, the band its bootstrap 95 % interval.",
            dot_plot(
                rows, x_label="Dice", description="Dice of every test image, of sdseg and of a threshold"
            ),
        ),
        _curve(metrics, "validation_dice", "Validation Dice", "Dice", (0.0, 1.0)),
        _curve(metrics, "loss", "Training loss", "loss", None),
    ]
    scatter = _uncertainty_chart(cases)
    return (*charts, scatter) if scatter is not None else tuple(charts)


def _curve(
    metrics: Sequence[Mapping[str, Any]],
    key: str,
    title: str,
    label: str,
    limits: tuple[float, float] | None,
) -> Chart:
    steps, values = series(metrics, key)
    captions = {
        "validation_dice": "On the validation split; the best step is the one that is kept.",
        "loss": "Mean between log lines, of the network's own target.",
    }
    curve = Series(label, steps.tolist(), values.tolist(), marks=key != "loss")
    drawing = line_chart(
        [curve], x_label="optimizer step", y_label=label, y_range=limits, description=f"{title} by step"
    )
    return Chart(title, captions[key], drawing)


def _uncertainty_chart(cases: Sequence[ShownCase]) -> Chart | None:
    known = [case for case in cases if math.isfinite(case.uncertainty) and math.isfinite(case.dice)]
    if len(known) < 4:
        return None
    x, y = [case.uncertainty for case in known], [1 - case.dice for case in known]
    rank = decimals(rank_correlation(x, y))
    drawing = line_chart(
        [Series("images", x, y, marks=True, line=False)],
        x_label="uncertainty per foreground pixel",
        y_label="1 - Dice",
        y_range=(0.0, max(max(y) * 1.1, 0.05)),
        description="Error of every test image against its uncertainty",
    )
    return Chart(
        "Does it know when it is wrong?",
        f"A dot is a test image. Rank correlation of uncertainty and error (Spearman): {rank}.",
        drawing,
    )


def _score_table(scores: dict[str, Any]) -> Table:
    entries = tuple(
        ClassSummary(
            **{name: value for name, value in entry.items() if name != "metrics"},
            metrics={metric: _summary(values) for metric, values in entry["metrics"].items()},
        )
        for entry in scores["classes"].values()
    )
    summary = EvaluationSummary(scores["cases"]["scored"], scores["distance_unit"], entries)
    return evaluation_table(summary, "Scores on the test split", scores["convention"])


def _stability_table(stability: dict[str, Any]) -> Table:
    entries = tuple(
        KindSummary(
            **{name: value for name, value in entry.items() if name != "measures"},
            measures={measure: _summary(values) for measure, values in entry["measures"].items()},
        )
        for kinds in stability["classes"].values()
        for entry in kinds.values()
    )
    summary = StabilitySummary(
        stability["images"]["measured"], entries, stability["undefined"], stability["all_runs_equal"]
    )
    title = f"Stability over {stability['runs']} runs from different noise"
    return stability_table(summary, title, stability["protocol"])


def _facts(
    dataset: PreparedDataset, record: Mapping[str, Any], scores: dict[str, Any], cases: Sequence[ShownCase]
) -> tuple[tuple[str, str], ...]:
    manifest = dataset.manifest
    best = record.get("best", {})
    parameters = record.get("parameters", {})
    versions = library_versions()
    shown = summarise([case.dice for case in cases]).mean
    side = manifest.image_size
    facts = {
        "Data": f"{manifest.source}: {_listed(manifest.splits)}; {side} x {side} pixels, {manifest.resize}",
        "Fingerprint": manifest.fingerprint,
        "Parameters": _listed({name: f"{count:,}" for name, count in parameters.items()}),
        "Checkpoint": (
            f"step {best.get('step', '?')}, validation Dice {decimals(best.get('validation_dice'))}"
        ),
        "Masks shown": (
            f"from sdseg predict, mean Dice {decimals(shown)}; the scores are from sdseg evaluate, "
            "with the recipe's number of draws"
        ),
        "Empty masks": scores["convention_meaning"],
        "Machine": (
            f"{processor_name()}, {platform.system()} {platform.machine()}; {record.get('device', '')}"
        ),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
    }
    return tuple((name, value) for name, value in facts.items() if value)


# ---- reading ----


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). Run the demo again with --overwrite.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object. Run the demo again with --overwrite.")
    return content


def _read_column(path: Path, name: str) -> list[float]:
    with path.open(encoding="utf-8", newline="") as stream:
        return [float(row[name] or "nan") for row in csv.DictReader(stream)]


def _first_class(report: dict[str, Any]) -> Any:
    return next(iter(report["classes"].values()))


def _summary(values: Mapping[str, Any]) -> Summary:
    """A summary as it was before JSON made NaN null and infinity a word."""
    known: dict[str, Any] = {}
    for each in fields(Summary):
        value = values[each.name]
        is_count = each.name in ("n", "undefined", "infinite", "interval_method")
        known[each.name] = value if is_count else _number(value)
    return Summary(**known)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _picture_source(path: Path) -> str:
    with Image.open(path) as picture:
        return webp_source(np.asarray(picture.convert("RGB")), longest=SHEET_SIDE)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
