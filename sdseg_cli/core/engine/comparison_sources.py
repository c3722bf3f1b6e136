"""What can be compared, and how it becomes scores: models predict, masks are read, scores are taken."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdseg_cli.core.data.images import read_label_map
from sdseg_cli.core.data.volumes import is_volume
from sdseg_cli.core.engine.comparison import Costs, ScoredRun
from sdseg_cli.core.engine.evaluation import (
    METRICS,
    CaseScores,
    FailedCase,
    GridName,
    case_rows,
    check_fit,
    evaluate_split,
    masks_by_name,
)
from sdseg_cli.core.engine.evaluation_page import SelectedCases
from sdseg_cli.core.engine.report_parts import evenly
from sdseg_cli.core.errors import DataError
from sdseg_cli.core.metrics.overlap import Convention

if TYPE_CHECKING:
    from sdseg_cli.core.data.prepared import PreparedDataset, SplitView
    from sdseg_cli.core.engine.inference import Predictor, SliceInput, SlicePrediction
    from sdseg_cli.core.run_directory import RunDirectory

SUMMARY_FILE, CASES_FILE = "summary.json", "cases.csv"
MOST_SLICES_DRAWN = 50  # of a split, for the agreement of several draws


# ---- runs and models ------------------------------------------------------------------------------------


class TimedPredictor:
    """A predictor that notes how long its predictions took, the reading of their images included."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self.seconds = 0.0
        self.slices = 0

    @property
    def largest_component(self) -> bool:
        """Whether the predictor cleans its masks."""
        return self._predictor.largest_component

    @largest_component.setter
    def largest_component(self, value: bool) -> None:
        self._predictor.largest_component = value

    def __call__(self, inputs: Iterable[SliceInput]) -> Iterator[SlicePrediction]:
        """Predict as the predictor does; time between two predictions in which nobody asks does not count."""
        stream = iter(self._predictor(inputs))
        while True:
            started = time.perf_counter()
            prediction = next(stream, None)
            self.seconds += time.perf_counter() - started
            if prediction is None:
                return
            self.slices += 1
            yield prediction


def score_model(
    predictor: Predictor,
    dataset: PreparedDataset,
    split: str,
    *,
    convention: Convention,
    grid: GridName,
    draws: int,
) -> Iterator[CaseScores | Costs]:
    """Predict a split, score it and measure what that costs; the costs come last.

    Args:
        predictor: made with the same ``grid``; a first batch of it is predicted before the clock starts.
        dataset: the prepared dataset.
        split: its split.
        convention: for empty masks.
        grid: ``case`` or ``model``.
        draws: of the noise whose masks are compared on at most MOST_SLICES_DRAWN slices; below 2, none.

    Raises:
        DataError: model and dataset do not fit, or a slice cannot be decoded.
    """
    check_fit(predictor, dataset.manifest, dataset.root)
    view = dataset.split(split)
    list(predictor(_inputs(view, range(min(len(view), predictor.batch_size)))))
    predictor.looks.clear()
    on_gpu = predictor.device.type == "cuda"
    if on_gpu:
        import torch

        torch.cuda.reset_peak_memory_stats(predictor.device)
    timed = TimedPredictor(predictor)
    yield from evaluate_split(
        timed,  # type: ignore[arg-type]  # what is asked of a predictor, it answers
        view,
        dataset.manifest.classes,
        convention=convention,
        grid=grid,
    )
    yield Costs(
        parameters=_count_weights(predictor),
        images_per_second=timed.slices / timed.seconds if timed.seconds else None,
        prediction_memory_gib=torch.cuda.max_memory_allocated(predictor.device) / 2**30 if on_gpu else None,
        prediction_device=str(predictor.device),
        agreement=_agreement(predictor, view, draws) if draws > 1 else None,
        draws=draws if draws > 1 else None,
    )


def training_costs(run: RunDirectory, known: Costs) -> Costs:
    """Add to ``known`` what the run's own files tell of its training."""
    fields, metrics = run.read_run_json(), run.read_metrics()
    rates = [value for record in metrics if (value := _number(record.get("samples_per_second"))) is not None]
    memory = [value for record in metrics if (value := _number(record.get("memory_gib"))) is not None]
    counts = fields.get("parameters")
    return replace(
        known,
        parameters=sum(counts.values()) if isinstance(counts, Mapping) else known.parameters,
        training_seconds=_number(fields.get("trained_seconds")),
        training_steps=fields.get("steps"),
        training_samples_per_second=float(np.median(rates)) if rates else None,
        training_memory_gib=max(memory, default=None),
        training_device=fields.get("device"),
    )


def _inputs(view: SplitView, positions: Iterable[int]) -> Iterator[SliceInput]:
    from sdseg_cli.core.engine.inference import SliceInput

    for position in positions:
        current = view[position]
        yield SliceInput(current.case_id, current.slice_index, current.image, current.grid)


def _agreement(predictor: Predictor, view: SplitView, draws: int) -> float | None:
    """Mean Dice between the masks of single draws over slices and classes, as ``sdseg stability`` has it."""
    from sdseg_cli.core.engine.stability import measure_stability

    own = {"num_samples": draws, "return_samples": True, "flips": (), "looks": []}  # looked at already
    kept = {name: getattr(predictor, name) for name in own}
    for name, value in own.items():
        setattr(predictor, name, value)
    try:
        inputs = _inputs(view, evenly(len(view), MOST_SLICES_DRAWN))
        found = [
            figure.dice_agreement
            for record in measure_stability(predictor, inputs)
            for figure in record.figures
            if figure.kind == "maps" and not math.isnan(figure.dice_agreement)
        ]
    finally:
        for name, value in kept.items():
            setattr(predictor, name, value)
    return sum(found) / len(found) if found else None


def _count_weights(predictor: Predictor) -> int | None:
    networks = getattr(predictor.pipeline, "components", None)
    if not isinstance(networks, Mapping):
        return None  # an exported graph
    modules = [part for part in networks.values() if hasattr(part, "parameters")]
    return sum(weights.numel() for module in modules for weights in module.parameters())


# ---- folders of masks -----------------------------------------------------------------------------------


@dataclass
class _StoredMask:
    """Gives a mask that was predicted elsewhere as if it were predicted now."""

    label_map: np.ndarray
    grid: GridName
    largest_component: bool = False

    def __call__(self, inputs: Iterable[SliceInput]) -> Iterator[SlicePrediction]:
        from sdseg_cli.core.engine.inference import SlicePrediction

        for item in inputs:
            label_map = item.grid.labels_to_model(self.label_map) if self.grid == "model" else self.label_map
            yield SlicePrediction(
                item.case_id,
                item.slice_index,
                label_map,
                probabilities=None,  # type: ignore[arg-type]  # masks know none
                uncertainty=None,  # type: ignore[arg-type]
                samples=None,
            )


def score_masks(
    folder: Path,
    dataset: PreparedDataset,
    split: str,
    *,
    convention: Convention,
    grid: GridName,
    allow_missing: bool,
) -> Iterator[CaseScores | FailedCase]:
    """Score another tool's masks on a split of images, each mask by the name of its case.

    Raises:
        DataError: masks are missing (all are named), or the split holds volumes, whose slices have no file.
    """
    view = dataset.split(split)
    case_ids = view.case_ids
    masks = masks_by_name(folder, "predictions")
    if len(set(case_ids)) < len(case_ids) or any(is_volume(path) for path in masks.values()):
        raise DataError(
            f"{folder}: {dataset.root} holds volumes in slices, or the masks are volumes. Score them first, "
            f"against the true volumes: sdseg evaluate --predictions {folder} --ground-truth TRUTH --out "
            "SCORES; then give SCORES in place of the folder."
        )
    missing = [case_id for case_id in case_ids if case_id not in masks]
    if missing and not allow_missing:
        raise DataError(
            f"{folder}: {len(missing)} of {len(case_ids)} masks are missing: {', '.join(missing[:20])}"
            f"{' ...' if missing[20:] else ''}. Expected one for every case of {dataset.root}, split "
            f"{split}. Predict them, or pass --allow-missing to score them as empty."
        )
    for case_id in case_ids:
        selected = SelectedCases(view, [case_id])
        try:
            yield from evaluate_split(
                _StoredMask(_mask_of(masks.get(case_id), selected, dataset.manifest.num_classes), grid),  # type: ignore[arg-type]
                selected,  # type: ignore[arg-type]
                dataset.manifest.classes,
                convention=convention,
                grid=grid,
            )
        except DataError as error:
            yield FailedCase(case_id, str(error))


def _mask_of(path: Path | None, selected: SelectedCases, num_classes: int) -> np.ndarray:
    grid = selected[0].grid
    if path is None:
        return np.zeros((grid.height, grid.width), np.uint8)
    label_map = read_label_map(path, num_classes=num_classes)
    if label_map.shape != (grid.height, grid.width):
        raise DataError(
            f"{path}: the mask is {label_map.shape[1]}x{label_map.shape[0]}, its image "
            f"{grid.width}x{grid.height}. Masks must have the size of the image."
        )
    return label_map


# ---- scores that are there already ----------------------------------------------------------------------


def holds_scores(folder: Path) -> bool:
    """Whether ``sdseg evaluate`` wrote the folder."""
    try:
        with (folder / CASES_FILE).open(encoding="utf-8", newline="") as file:
            header = next(csv.reader(file), [])
    except OSError:
        return False
    return (folder / SUMMARY_FILE).is_file() and {"case", "class", *METRICS} <= set(header)


def read_scores(folder: Path, *, convention: str, grid: str) -> ScoredRun:
    """Take the scores that ``sdseg evaluate`` wrote.

    Raises:
        DataError: they were counted under another convention or on another grid, or are damaged.
    """
    try:
        summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        with (folder / CASES_FILE).open(encoding="utf-8", newline="") as file:
            rows = [_typed(row) for row in csv.DictReader(file)]
        failed = {str(name): str(why) for name, why in summary.get("failed_cases", {}).items()}
        found = {"convention": summary["convention"], "grid": summary.get("grid", "case")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder}: the scores cannot be read ({type(error).__name__}: {error}). Evaluate again."
        ) from error
    wanted = {"convention": convention, "grid": grid}
    for name, value in wanted.items():
        if found[name] != value:
            raise DataError(
                f"{folder} was scored with --{name} {found[name]}, this comparison counts with {value}. "
                f"Compare with --{name} {found[name]}, or evaluate again."
            )
    return ScoredRun(str(folder), "scores", tuple(rows), failed)


def _typed(row: Mapping[str, str]) -> dict[str, Any]:
    lacking = {"case", "class", "outcome", "distance_unit"} - set(row)
    if lacking:
        raise ValueError(f"{CASES_FILE} has no column {', '.join(sorted(lacking))}")
    numbers = {name: float(row[name]) if row[name] else math.nan for name in METRICS}
    return {**row, **numbers}


def scored(records: Sequence[CaseScores | FailedCase]) -> tuple[tuple[dict[str, Any], ...], dict[str, str]]:
    """Rows of the scored cases, and the reasons of the others."""
    rows = case_rows([record for record in records if isinstance(record, CaseScores)])
    failed = {record.case_id: record.error for record in records if isinstance(record, FailedCase)}
    return tuple(rows), failed


def _number(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None
