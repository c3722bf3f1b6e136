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

from sdseg_cli.core.data.dicom_seg import is_label_volume
from sdseg_cli.core.data.images import read_label_map
from sdseg_cli.core.engine.comparison import Costs, ScoredRun
from sdseg_cli.core.engine.evaluation import check_fit, evaluate_split
from sdseg_cli.core.engine.evaluation_page import SelectedCases
from sdseg_cli.core.engine.evaluation_records import METRICS, CaseScores, FailedCase, GridName
from sdseg_cli.core.engine.evaluation_summary import case_rows
from sdseg_cli.core.engine.folder_evaluation import masks_by_name
from sdseg_cli.core.engine.report_parts import evenly
from sdseg_cli.core.errors import DataError, ModelError
from sdseg_cli.core.files import CASES_FILE, SUMMARY_FILE
from sdseg_cli.core.metrics.overlap import Convention
from sdseg_cli.core.metrics.similarity import PerceptualDistance, find_perceptual_trunk
from sdseg_cli.core.metrics.surface import NSD_TOLERANCE

if TYPE_CHECKING:
    from sdseg_cli.core.data.prepared import PreparedDataset, SplitView
    from sdseg_cli.core.engine.inference import Predictor, SliceInput, SlicePrediction
    from sdseg_cli.core.run_directory import RunDirectory

_FACTS = ("model", "dataset", "sampling", "predictions")  # of a summary, for the report
MOST_SLICES_DRAWN = 50  # of a split, for the stability of several draws
MOST_SLICES_TIMED = 200


# ---- runs and models ------------------------------------------------------------------------------------


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
        predictor: made with the same ``grid``; its speed is that of at most MOST_SLICES_TIMED slices.
        dataset: the prepared dataset.
        split: its split.
        convention: for empty masks.
        grid: ``case`` or ``model``.
        draws: of the noise that are compared on at most MOST_SLICES_DRAWN slices; below 2, none.

    Raises:
        DataError: model and dataset do not fit, or a slice cannot be decoded.
    """
    check_fit(predictor, dataset.manifest, dataset.root)
    view = dataset.split(split)
    yield from evaluate_split(predictor, view, dataset.manifest.classes, convention=convention, grid=grid)
    looks, predictor.looks = predictor.looks, []  # what comes now was looked at already
    costs = _time_prediction(predictor, view)
    if draws > 1:
        costs = _with_stability(costs, predictor, view, draws)
    predictor.looks = looks
    yield costs


def _time_prediction(predictor: Predictor, view: SplitView) -> Costs:
    """Predict slices once more with nothing else going on; the first batches came before."""
    import torch

    device = predictor.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    count = 0
    started = time.perf_counter()
    for _ in predictor(_inputs(view, evenly(len(view), MOST_SLICES_TIMED))):
        count += 1
    seconds = time.perf_counter() - started
    on_gpu = device.type == "cuda"
    return Costs(
        parameters=_count_weights(predictor),
        images_per_second=count / seconds,
        prediction_memory_gib=torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None,
        prediction_device=torch.cuda.get_device_name(device) if on_gpu else str(device),
        batch_size=predictor.batch_size,
        precision=predictor.precision,
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


def _with_stability(costs: Costs, predictor: Predictor, view: SplitView, draws: int) -> Costs:
    """The means of ``sdseg stability`` over slices and classes: agreement of masks, the rest of scores."""
    from sdseg_cli.core.engine.stability import measure_stability, slice_rows

    own = {"num_samples": draws, "return_samples": True, "flips": ()}
    kept = {name: getattr(predictor, name) for name in own}
    for name, value in own.items():
        setattr(predictor, name, value)
    try:
        inputs = _inputs(view, evenly(len(view), MOST_SLICES_DRAWN))
        records = measure_stability(predictor, inputs, perceptual=_perceptual(str(predictor.device)))
        rows = [row for record in records for row in slice_rows(record)]
    finally:
        for name, value in kept.items():
            setattr(predictor, name, value)

    def mean(measure: str, kind: str) -> float | None:
        values = [row[measure] for row in rows if row["kind"] == kind and math.isfinite(row[measure])]
        return sum(values) / len(values) if values else None

    return replace(
        costs,
        draws=draws,
        agreement=mean("dice_agreement", "maps"),
        lpips=mean("lpips", "scores"),
        psnr=mean("psnr", "scores"),
        ssim=mean("ssim", "scores"),
        ms_ssim=mean("ms_ssim", "scores"),
    )


def _perceptual(device: str) -> PerceptualDistance | None:
    """LPIPS, where its backbone is at hand."""
    try:
        return PerceptualDistance(find_perceptual_trunk(None), device=device)
    except ModelError:
        return None


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
    if len(set(case_ids)) < len(case_ids) or any(is_label_volume(path) for path in masks.values()):
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


def unmatched_masks(folder: Path, case_ids: Sequence[str]) -> list[str]:
    """Names of a folder's masks that are of no case."""
    known = set(case_ids)
    masks = masks_by_name(folder, "predictions")
    return [path.name for name, path in masks.items() if name not in known]


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
    except (OSError, UnicodeDecodeError, csv.Error):
        return False
    return (folder / SUMMARY_FILE).is_file() and {"case", "class", *METRICS} <= set(header)


def counted_by(summary: Mapping[str, Any]) -> dict[str, Any]:
    """How scores were counted: ``convention``, ``grid``, ``nsd_tolerance``, ``split`` (None of folders)."""
    dataset = summary.get("dataset")
    return {
        "convention": summary.get("convention"),
        "grid": summary.get("grid", "case"),
        "nsd_tolerance": summary.get("nsd_tolerance", NSD_TOLERANCE),
        "split": dataset.get("split") if isinstance(dataset, Mapping) else None,
    }


def read_summary(folder: Path) -> dict[str, Any]:
    """What ``sdseg evaluate`` wrote of its scores. Raises DataError where it is damaged."""
    try:
        summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / SUMMARY_FILE} cannot be read ({error}). Evaluate again.") from error
    if not isinstance(summary, dict):
        raise DataError(f"{folder / SUMMARY_FILE}: expected an object. Evaluate again.")
    return summary


def read_scores(folder: Path, *, convention: str, grid: str, split: str) -> ScoredRun:
    """Take the scores that ``sdseg evaluate`` wrote.

    Raises:
        DataError: they were counted otherwise, are of another split, or are damaged.
    """
    summary = read_summary(folder)
    found = counted_by(summary)
    wanted = {"convention": convention, "grid": grid, "nsd_tolerance": NSD_TOLERANCE, "split": split}
    for name, value in wanted.items():
        if found[name] != value and not (name == "split" and found[name] is None):
            option = f"--{name.replace('_', '-')}"
            raise DataError(
                f"{folder} was scored with {option} {found[name]}, this comparison counts with {value}. "
                + (
                    f"Compare with {option} {found[name]}, or evaluate"
                    if name != "nsd_tolerance"
                    else "Evaluate"
                )
                + " again."
            )
    try:
        with (folder / CASES_FILE).open(encoding="utf-8", newline="") as file:
            rows = [_typed(row) for row in csv.DictReader(file)]
        failed = {str(name): str(why) for name, why in dict(summary.get("failed_cases", {})).items()}
        expected = int(summary["cases"]["scored"])
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(
            f"{folder / CASES_FILE} cannot be read ({type(error).__name__}: {error}). Evaluate again."
        ) from error
    if (counted := len({row["case"] for row in rows})) != expected:
        raise DataError(f"{folder / CASES_FILE} holds {counted} cases, expected {expected}. Evaluate again.")
    facts = {name: value for name, value in summary.items() if name in _FACTS}
    return ScoredRun(str(folder), "scores", tuple(rows), failed, facts=facts)


def _typed(row: Mapping[str, str]) -> dict[str, Any]:
    lacking = [name for name in ("case", "class", "outcome", "distance_unit") if not row.get(name)]
    if lacking or None in row or None in row.values():
        raise ValueError(f"a row without {', '.join(lacking) or 'all columns'}")
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
