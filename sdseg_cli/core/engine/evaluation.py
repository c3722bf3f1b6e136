"""Predictions against ground truth: a record per case first, every summary computed from the records."""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from sdseg_cli.core.data.geometry import VolumeGeometry
from sdseg_cli.core.data.images import list_images, natural_key, read_label_map
from sdseg_cli.core.data.slicing import SliceStack
from sdseg_cli.core.data.volume_files import volume_suffix
from sdseg_cli.core.engine.postprocessing import keep_largest_components, keep_largest_in_stack
from sdseg_cli.core.engine.report_parts import BEST, MIDDLE, MOST_VIEWS, WORST, evenly
from sdseg_cli.core.engine.volume_evaluation import is_label_volume, read_volume_pair
from sdseg_cli.core.errors import DataError, SdsegError
from sdseg_cli.core.grid import Grid
from sdseg_cli.core.metrics.calibration import count_reliability
from sdseg_cli.core.metrics.overlap import (
    Convention,
    Counts,
    count_classes,
    dice,
    draw_agreement,
    iou,
    precision,
    recall,
    sum_counts,
)
from sdseg_cli.core.metrics.summary import Summary, summarise
from sdseg_cli.core.metrics.surface import NSD_TOLERANCE, SurfaceScores, surface_scores
from sdseg_cli.core.reporting.page import Table
from sdseg_cli.core.reporting.tables import cell, interval_cell

if TYPE_CHECKING:
    from sdseg_cli.core.data.prepared import DatasetManifest, PreparedSlice, SplitView
    from sdseg_cli.core.engine.inference import Predictor, SliceInput, SlicePrediction
    from sdseg_cli.core.engine.processes import Processes

GridName = Literal["case", "model"]
METRICS: tuple[str, ...] = ("dice", "iou", "precision", "recall", "hd95", "assd", "nsd")
DISTANCES: tuple[str, ...] = ("hd95", "assd")
MEAN_OF_CLASSES = "mean of classes"
PICTURE_SIZE = 256  # pixels; the longer side of a picture kept of a case from a folder

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


@dataclass(frozen=True)
class CasePicture:
    """What is needed to show a slice: image uint8 (H, W, 3), truth and prediction uint8 (H, W).

    ``uncertainty``, where several draws gave one, is the standard deviation times 510, uint8 (H, W). ``grid``
    is the way back from the model's grid, where the arrays lie on it; ``pixel_mm`` height and width of a
    pixel of the case, where they are known; without ``has_image`` the image is blank.
    """

    image: np.ndarray
    ground_truth: np.ndarray
    prediction: np.ndarray
    uncertainty: np.ndarray | None = None
    slice_index: int = 0
    grid: Grid | None = None
    pixel_mm: tuple[float, float] | None = None
    has_image: bool = True


@dataclass(frozen=True)
class ClassScores:
    """The scores of one class of one case; NaN is undefined, infinite distances are missed structures."""

    class_name: str
    counts: Counts
    dice: float
    iou: float
    precision: float
    recall: float
    hd95: float
    assd: float
    nsd: float = math.nan

    @property
    def outcome(self) -> str:
        """``scored``, ``missed``, ``false alarm`` or ``absent``."""
        if self.counts.is_missed:
            return "missed"
        if self.counts.is_false_alarm:
            return "false alarm"
        return "absent" if self.counts.is_absent else "scored"


@dataclass(frozen=True)
class CaseScores:
    """The scores of one case: all its slices together, one entry per foreground class.

    ``draw_agreement`` is how far the draws of the prediction agree, NaN with one draw; ``reliability`` counts
    probability against truth, float64 (classes, bins, 3), where there are probabilities. ``picture`` shows
    the worst slice, ``stack`` up to MOST_VIEWS slices in order, that one among them.
    """

    case_id: str
    group: str
    slices: int
    unit: str  # of the distances: "mm" or "px"
    classes: tuple[ClassScores, ...]
    picture: CasePicture | None = None
    draw_agreement: float = math.nan
    reliability: np.ndarray | None = None
    stack: tuple[CasePicture, ...] = ()

    @property
    def dice(self) -> float:
        """Mean Dice over the classes with a defined score, NaN where there is none."""
        return _mean([scores.dice for scores in self.classes])

    @property
    def badness(self) -> float:
        """For ranking: 1 - Dice by the formula, so that a false alarm is bad under every convention."""
        value = _mean([dice(scores.counts) for scores in self.classes])
        return -1.0 if math.isnan(value) else 1.0 - value


@dataclass(frozen=True)
class FailedCase:
    """A case that could not be scored, and why."""

    case_id: str
    error: str


@dataclass(frozen=True)
class FolderPairs:
    """Two folders paired by file name without suffix.

    Attributes:
        pairs: (case id, prediction or None where it is missing, ground truth), in natural order.
        missing: ids of ground truths without a prediction.
        unmatched: predictions without a ground truth; they cannot be scored.
    """

    pairs: tuple[tuple[str, Path | None, Path], ...]
    missing: tuple[str, ...]
    unmatched: tuple[Path, ...]


# ---- a split of a prepared dataset ----------------------------------------------------------------------


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
            "Prepare the data with the settings the model was trained with, or choose another --model."
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
    parts: list[_SliceScores] = []
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
                yield _score_case(current.case_id, current.group, parts, classes, convention)
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


@dataclass(frozen=True)
class _Plane:
    """A slice of a stack, as its distances need it: both label maps, its place, (slice, row, column) mm."""

    label_map: np.ndarray
    truth: np.ndarray
    slice_index: int
    spacing_mm: tuple[float, ...] | None


@dataclass(frozen=True)
class _SliceScores:
    counts: tuple[Counts, ...]
    surfaces: tuple[SurfaceScores, ...]
    has_spacing: bool
    picture: CasePicture
    overlaps: np.ndarray | None = None
    reliability: np.ndarray | None = None
    plane: _Plane | None = None  # of a stack, until its distances are measured


def _score_slice(
    prediction: SlicePrediction,
    current: PreparedSlice,
    num_classes: int,
    grid: GridName,
    tolerance: float | None,
) -> _SliceScores:
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
    plane: _Plane | None = None
    surfaces: tuple[SurfaceScores, ...] = ()
    if tolerance is None:  # measured when all its slices are there
        plane = _Plane(label_map, truth, current.slice_index, spacing)
    else:
        in_plane = None if spacing is None else spacing[-2:]
        surfaces = _surfaces(label_map, truth, num_classes, in_plane, tolerance)
    return _SliceScores(
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
    parts: Sequence[_SliceScores], num_classes: int, grid: GridName
) -> list[_SliceScores]:
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
    parts: Sequence[_SliceScores], num_classes: int, tolerance: float
) -> list[_SliceScores]:
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
        surfaces = _surfaces(stacks[0], stacks[1], num_classes, spacing, tolerance)
        has_spacing = True
    return [replace(part, surfaces=surfaces, has_spacing=has_spacing, plane=None) for part in parts]


def _surfaces(
    label_map: np.ndarray,
    truth: np.ndarray,
    num_classes: int,
    spacing: tuple[float, ...] | None,
    tolerance: float,
) -> tuple[SurfaceScores, ...]:
    return tuple(
        surface_scores(label_map == k, truth == k, spacing, tolerance=tolerance)
        for k in range(1, num_classes)
    )


def _score_case(
    case_id: str, group: str, parts: Sequence[_SliceScores], classes: Sequence[str], convention: Convention
) -> CaseScores:
    scores = []
    for index, name in enumerate(classes[1:]):
        counts = sum_counts(part.counts[index] for part in parts)
        scores.append(_class_scores(name, counts, parts[0].surfaces[index], convention))
    worst = max(parts, key=lambda part: sum(c.false_positive + c.false_negative for c in part.counts))
    unit = "mm" if all(part.has_spacing for part in parts) else "px"
    overlaps = [part.overlaps for part in parts if part.overlaps is not None]
    reliable = [part.reliability for part in parts if part.reliability is not None]
    return CaseScores(
        case_id,
        group,
        len(parts),
        unit,
        tuple(scores),
        worst.picture,
        draw_agreement(np.sum(overlaps, axis=0)) if overlaps else math.nan,
        np.sum(reliable, axis=0) if reliable else None,
        _stack([part.picture for part in parts], worst.picture),
    )


def _stack(pictures: Sequence[CasePicture], worst: CasePicture) -> tuple[CasePicture, ...]:
    """Slices that hold anything, evenly chosen if they are many, and the worst one in any case."""
    filled = [picture for picture in pictures if picture.ground_truth.any() or picture.prediction.any()]
    chosen = [filled[position] for position in evenly(len(filled), MOST_VIEWS - 1)]
    if not any(picture.slice_index == worst.slice_index for picture in chosen):
        chosen.append(worst)
    return tuple(sorted(chosen, key=lambda picture: picture.slice_index))


def _class_scores(name: str, counts: Counts, surface: SurfaceScores, convention: Convention) -> ClassScores:
    if counts.is_missed or counts.is_false_alarm:  # however far slices are apart
        surface = SurfaceScores(math.inf, math.inf, 0.0)
    return ClassScores(
        name,
        counts,
        dice(counts, convention),
        iou(counts, convention),
        precision(counts),
        recall(counts),
        surface.hd95,
        surface.assd,
        surface.nsd,
    )


# ---- two folders ----------------------------------------------------------------------------------------


def pair_folders(predictions: Path, ground_truth: Path, *, allow_missing: bool = False) -> FolderPairs:
    """Pair the masks of two folders by name without suffix.

    Where several files of a folder share a stem (``a.png`` and ``a.jpg``) their full names are used, which
    is how ``sdseg predict`` names the masks of such images (``a.png.png``).

    Args:
        predictions: folder of label maps.
        ground_truth: folder of label maps; it decides which cases there are.
        allow_missing: a missing prediction is a case to be scored as empty, not an error.

    Returns:
        The pairs.

    Raises:
        DataError: a folder is missing or empty, or predictions are missing (all are named).
    """
    truths = masks_by_name(ground_truth, "ground truth")
    predicted = masks_by_name(predictions, "predictions")
    pairs = tuple((name, predicted.pop(name, None), path) for name, path in truths.items())
    missing = tuple(name for name, path, _ in pairs if path is None)
    if missing and not allow_missing:
        raise DataError(
            f"{predictions}: {len(missing)} of {len(pairs)} predictions are missing: {', '.join(missing)}. "
            f"Expected one mask for every file of {ground_truth}. Predict them, or pass --allow-missing to "
            "score them as empty."
        )
    return FolderPairs(pairs, missing, tuple(predicted.values()))


def masks_by_name(folder: Path, what: str) -> dict[str, Path]:
    """The label maps and label volumes of a folder by name: without suffix, in full where stems repeat.

    Raises:
        DataError: there is none; ``what`` says what they were to be.
    """
    files = list_images(folder)
    files += [path for path in folder.iterdir() if is_label_volume(path) and path.is_file()]
    files = sorted(files, key=lambda path: natural_key(path.name))
    if not files:
        raise DataError(
            f"{folder}: no image files in the folder of the {what}, nor volumes. Expected masks, "
            "e.g. PNG or NIfTI."
        )
    stems = Counter(_stem(path) for path in files)
    return {_stem(path) if stems[_stem(path)] == 1 else path.name: path for path in files}


def _stem(path: Path) -> str:
    return path.name[: -len(volume_suffix(path) or path.suffix) or None]


def evaluate_folders(
    pairs: FolderPairs,
    classes: Sequence[str],
    *,
    convention: Convention = "standard",
    processes: Processes | None = None,
    nsd_tolerance: float = NSD_TOLERANCE,
    resample: bool = False,
) -> Iterator[CaseScores | FailedCase]:
    """Score pairs of label maps or of label volumes. A generator: unread, it does nothing.

    Args:
        pairs: from :func:`pair_folders`.
        classes: names in the order of the labels, the background first.
        convention: for empty masks.
        processes: share the cases with other processes; this one yields its own part only.
        nsd_tolerance: in pixels for label maps, in mm for volumes.
        resample: bring a predicted volume onto the grid of its truth by nearest neighbour where they differ.

    Yields:
        One record per case: its scores (distances in pixels, of volumes in mm between three-dimensional
        surfaces), or why it has none (unreadable, sizes or places differ).
    """
    mine = list(pairs.pairs) if processes is None else processes.share(list(pairs.pairs))
    for case_id, prediction_path, truth_path in mine:
        try:
            if is_label_volume(truth_path):
                pair = read_volume_pair(case_id, prediction_path, truth_path, len(classes), resample=resample)
                prediction, truth, geometry = pair.prediction, pair.ground_truth, pair.geometry
            else:
                prediction, truth = _read_pair(case_id, prediction_path, truth_path, len(classes))
                geometry = None
            yield _score_pair(case_id, prediction, truth, geometry, classes, convention, nsd_tolerance)
        except SdsegError as error:
            yield FailedCase(case_id, str(error))


def _read_pair(
    case_id: str, prediction_path: Path | None, truth_path: Path, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    truth = read_label_map(truth_path, num_classes=num_classes)
    if prediction_path is None:
        return np.zeros_like(truth), truth
    prediction = read_label_map(prediction_path, num_classes=num_classes)
    if prediction.shape != truth.shape:
        raise DataError(
            f"case {case_id!r}: prediction is {_size(prediction)} ({prediction_path}), ground truth "
            f"{_size(truth)} ({truth_path}). Masks must have the size of the image: predict again, or "
            "fetch the pair again."
        )
    return prediction, truth


def _score_pair(
    case_id: str,
    prediction: np.ndarray,
    truth: np.ndarray,
    geometry: VolumeGeometry | None,
    classes: Sequence[str],
    convention: Convention,
    nsd_tolerance: float,
) -> CaseScores:
    """Score two label maps, or two volumes that lie as ``geometry`` says."""
    spacing = None if geometry is None else geometry.spacing_mm
    worst, pictures = _pictures_of_pair(prediction, truth, geometry)
    part = _SliceScores(
        count_classes(prediction, truth, len(classes)),
        _surfaces(prediction, truth, len(classes), spacing, nsd_tolerance),
        has_spacing=spacing is not None,
        picture=worst,
    )
    scores = _score_case(case_id, case_id, [part], classes, convention)
    count = 1 if geometry is None else SliceStack(geometry, "axial").count
    return replace(scores, slices=count, stack=_stack(pictures, worst))


def _pictures_of_pair(
    prediction: np.ndarray, truth: np.ndarray, geometry: VolumeGeometry | None
) -> tuple[CasePicture, list[CasePicture]]:
    """The slice with the most errors, and those that may be shown; volumes axially, as viewers show them."""
    pixel_mm: tuple[float, float] | None = None
    planes = prediction[None], truth[None]
    if geometry is not None:
        stack = SliceStack(geometry, "axial")
        planes = stack.cut(prediction), stack.cut(truth)
        _, row_mm, column_mm = stack.spacing_mm
        pixel_mm = row_mm, column_mm
    height, width = planes[0].shape[1:]
    small = Grid(height, width, PICTURE_SIZE, "pad")
    blank = np.full((PICTURE_SIZE, PICTURE_SIZE, 3), 96, np.uint8)

    def picture(index: int) -> CasePicture:
        shown, true = (small.labels_to_model(np.ascontiguousarray(plane[index])) for plane in planes)
        return CasePicture(
            blank, true, shown, slice_index=index, grid=small, pixel_mm=pixel_mm, has_image=False
        )

    errors = [int(np.count_nonzero(one != other)) for one, other in zip(*planes, strict=True)]
    filled = [index for index, pair in enumerate(zip(*planes, strict=True)) if pair[0].any() or pair[1].any()]
    chosen = [filled[position] for position in evenly(len(filled), MOST_VIEWS - 1)]
    return picture(int(np.argmax(errors))), [picture(index) for index in chosen]


# ---- collecting and summing up --------------------------------------------------------------------------


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
            metric, [_mean([getattr(entry, metric) for entry in record.classes]) for record in scores], unit
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


def _mean(values: Sequence[float]) -> float:
    """Mean of the defined values; NaN without any, infinite if one is."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def _size(label_map: np.ndarray) -> str:
    return f"{label_map.shape[1]}x{label_map.shape[0]}"
