"""A split's predictions against ground truth: a record per case, every summary computed from the records."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdseg_cli.core.engine.evaluation_records import (
    CasePicture,
    CaseScores,
    GridName,
    Plane,
    SliceScores,
    score_case,
    slice_surfaces,
)
from sdseg_cli.core.engine.folder_evaluation import _size
from sdseg_cli.core.engine.postprocessing import keep_largest_components, keep_largest_in_stack
from sdseg_cli.core.errors import DataError
from sdseg_cli.core.grid import Grid
from sdseg_cli.core.metrics.calibration import count_reliability
from sdseg_cli.core.metrics.overlap import (
    Convention,
    count_classes,
)
from sdseg_cli.core.metrics.surface import NSD_TOLERANCE, SurfaceScores

if TYPE_CHECKING:
    from sdseg_cli.core.data.prepared import DatasetManifest, PreparedSlice, SplitView
    from sdseg_cli.core.engine.inference import Predictor, SliceInput, SlicePrediction
    from sdseg_cli.core.engine.processes import Processes


def check_fit(predictor: Predictor, manifest: DatasetManifest, root: Path) -> None:
    """Refuse a model and a dataset that were not made for each other.

    Raises:
        DataError: the number of classes, the image size or the way of resizing differs.
    """
    found = (manifest.num_classes, manifest.image_size, manifest.resize)
    wanted = (predictor.num_classes, predictor.image_size, predictor.resize)
    names = ("classes (background included)", "image size", "resize")
    differences = [
        f"{name}: dataset {a}, model {b}" for name, a, b in zip(names, found, wanted, strict=True) if a != b
    ]
    if differences:
        raise DataError(
            f"dataset {root} does not fit the model: {'; '.join(differences)}. "
            "Prepare the data with the settings the model was trained with, or choose another model."
        )


def evaluate_split(
    predictor: Predictor,
    split: SplitView,
    classes: Sequence[str],
    *,
    convention: Convention = "standard",
    grid: GridName = "case",
    processes: Processes | None = None,
    nsd_tolerance: float = NSD_TOLERANCE,
) -> Iterator[CaseScores]:
    """Predict every case of a split and score it. A generator: unread, it does nothing.

    Args:
        predictor: made with the same ``grid``.
        split: the slices; those of one case are scored together.
        classes: names in the order of the labels, the background first.
        convention: for empty masks, see :mod:`sdseg_cli.core.metrics.overlap`.
        grid: score on the case's own grid, or on the model's as the paper does.
        processes: share the cases with other processes; this one yields its own part only.
        nsd_tolerance: in mm where the spacing of a case is known, else in pixels.

    Yields:
        One record per case, in the order of the split, with a picture of its worst slice.

    Raises:
        DataError: a slice cannot be decoded.
    """
    positions: dict[str, list[int]] = {}
    for position, case_id in enumerate(split.case_ids):
        positions.setdefault(case_id, []).append(position)
    mine = list(positions) if processes is None else processes.share(list(positions))
    pending: deque[PreparedSlice] = deque()
    parts: list[SliceScores] = []
    inputs = _inputs((split[position] for case_id in mine for position in positions[case_id]), pending)
    clean = getattr(predictor, "largest_component", False)
    predictor.largest_component = False  # of a volume it is one of its parts, not one of each slice's
    try:
        for raw in predictor(inputs):
            current, prediction = pending.popleft(), raw
            is_stack = len(positions[current.case_id]) > 1
            if clean and not is_stack:
                prediction = replace(raw, label_map=keep_largest_components(raw.label_map))
            tolerance = None if is_stack else nsd_tolerance
            parts.append(_score_slice(prediction, current, len(classes), grid, tolerance))
            if len(parts) == len(positions[current.case_id]):
                if clean and is_stack:
                    parts = _with_largest_components(parts, len(classes), grid)
                parts = _with_volume_distances(parts, len(classes), nsd_tolerance)
                yield score_case(current.case_id, current.group, parts, classes, convention)
                parts = []
    finally:
        predictor.largest_component = clean


def _inputs(slices: Iterable[PreparedSlice], pending: deque[PreparedSlice]) -> Iterator[SliceInput]:
    """Pass slices on to the predictor and remember their truth until the prediction comes back."""
    from sdseg_cli.core.engine.inference import SliceInput

    for current in slices:
        pending.append(current)
        yield SliceInput(
            current.case_id, current.slice_index, current.image, current.grid, current.spacing_mm
        )


def _score_slice(
    prediction: SlicePrediction,
    current: PreparedSlice,
    num_classes: int,
    grid: GridName,
    tolerance: float | None,
) -> SliceScores:
    """Score a slice; without a tolerance it is one of a stack, whose distances are those of the volume."""
    label_map, truth, spacing = prediction.label_map, current.label_map, current.spacing_mm
    pixel_mm = None if spacing is None else (spacing[-2], spacing[-1])
    if grid == "model":
        truth = current.grid.labels_to_model(truth)
        spacing = _model_spacing(spacing, current.grid)
    if label_map.shape != truth.shape:
        raise ValueError(
            f"case {current.case_id!r}: prediction is {_size(label_map)}, ground truth {_size(truth)}"
        )
    shown = label_map if grid == "model" else current.grid.labels_to_model(label_map)
    picture = CasePicture(
        current.image,
        current.grid.labels_to_model(current.label_map),
        shown,
        _stored_spread(prediction.uncertainty, current.grid, grid),
        current.slice_index,
        current.grid,
        pixel_mm,
    )
    plane: Plane | None = None
    surfaces: tuple[SurfaceScores, ...] = ()
    if tolerance is None:  # measured when all its slices are there
        plane = Plane(label_map, truth, current.slice_index, spacing)
    else:
        in_plane = None if spacing is None else spacing[-2:]
        surfaces = slice_surfaces(label_map, truth, num_classes, in_plane, tolerance)
    return SliceScores(
        count_classes(label_map, truth, num_classes),
        surfaces,
        spacing is not None,
        picture,
        prediction.overlaps,
        _reliability(prediction.probabilities, truth),
        plane,
    )


def _stored_spread(spread: np.ndarray | None, grid: Grid, scored_on: GridName) -> np.ndarray | None:
    """The spread of the draws on the model's grid, uint8: a picture is kept for many cases."""
    if spread is None or np.isnan(spread).all():
        return None
    stored = np.rint(np.clip(spread, 0, 0.5) * 510).astype(np.uint8)
    return stored if scored_on == "model" else grid.labels_to_model(stored)


def _reliability(probabilities: np.ndarray | None, truth: np.ndarray) -> np.ndarray | None:
    if probabilities is None:
        return None
    return np.stack([count_reliability(probabilities[k], truth == k) for k in range(1, len(probabilities))])


def _model_spacing(spacing_mm: tuple[float, ...] | None, grid: Grid) -> tuple[float, ...] | None:
    if spacing_mm is None:
        return None
    _, _, rows, columns = grid.seen
    _, _, height, width = grid.content
    *between, row, column = spacing_mm
    return *between, row * rows / height, column * columns / width


def _with_largest_components(
    parts: Sequence[SliceScores], num_classes: int, grid: GridName
) -> list[SliceScores]:
    """Keep the largest component of every class of a stack, as one volume, and count again."""
    planes = [part.plane for part in parts if part.plane is not None]
    if len({plane.label_map.shape for plane in planes}) > 1:
        return list(parts)  # slices of several sizes lie on no common grid
    kept = keep_largest_in_stack(
        [plane.label_map for plane in planes], [plane.slice_index for plane in planes]
    )
    cleaned = []
    for part, plane, label_map in zip(parts, planes, kept, strict=True):
        way = part.picture.grid
        shown = label_map if grid == "model" or way is None else way.labels_to_model(label_map)
        cleaned.append(
            replace(
                part,
                counts=count_classes(label_map, plane.truth, num_classes),
                picture=replace(part.picture, prediction=shown),
                plane=replace(plane, label_map=label_map),
            )
        )
    return cleaned


def _with_volume_distances(
    parts: Sequence[SliceScores], num_classes: int, tolerance: float
) -> list[SliceScores]:
    """Give the slices of a stack the distances of their volume; other cases have theirs already.

    Slices that were left out of the data are empty on both sides: every slice lies at its own height.
    """
    planes = [part.plane for part in parts if part.plane is not None]
    if not planes:
        return list(parts)
    spacing = planes[0].spacing_mm
    if spacing is None or len(spacing) != 3 or len({plane.truth.shape for plane in planes}) > 1:
        # The distance between slices is not known: no figure is better than a wrong one.
        surfaces = (SurfaceScores(math.nan, math.nan),) * (num_classes - 1)
        has_spacing = False
    else:
        first = min(plane.slice_index for plane in planes)
        count = max(plane.slice_index for plane in planes) - first + 1
        stacks = np.zeros((2, count, *planes[0].truth.shape), np.uint8)
        for plane in planes:
            stacks[:, plane.slice_index - first] = plane.label_map, plane.truth
        surfaces = slice_surfaces(stacks[0], stacks[1], num_classes, spacing, tolerance)
        has_spacing = True
    return [replace(part, surfaces=surfaces, has_spacing=has_spacing, plane=None) for part in parts]
