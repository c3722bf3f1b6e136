"""Two folders of masks against one another: label maps in pixels, label volumes in millimetres."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdseg_cli.core.data.dicom_seg import is_dicom_seg, is_label_volume, require_highdicom
from sdseg_cli.core.data.geometry import VolumeGeometry
from sdseg_cli.core.data.images import list_images, natural_key, read_label_map
from sdseg_cli.core.data.slicing import SliceStack
from sdseg_cli.core.data.volume_files import volume_suffix
from sdseg_cli.core.engine.evaluation_records import (
    PICTURE_SIZE,
    CasePicture,
    CaseScores,
    FailedCase,
    SliceScores,
    score_case,
    shown_slices,
    slice_surfaces,
    spread_stack,
)
from sdseg_cli.core.engine.volume_evaluation import read_volume_pair
from sdseg_cli.core.errors import DataError, SdsegError
from sdseg_cli.core.files import visible_files
from sdseg_cli.core.grid import Grid
from sdseg_cli.core.metrics.overlap import (
    Convention,
    count_classes,
)
from sdseg_cli.core.metrics.surface import NSD_TOLERANCE

if TYPE_CHECKING:
    from sdseg_cli.core.engine.processes import Processes


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
    files += [path for path in visible_files(folder) if is_label_volume(path)]
    files = sorted(files, key=lambda path: natural_key(path.name))
    if not files:
        raise DataError(
            f"{folder}: no masks in the folder of the {what}. Expected PNG, JPEG, TIFF or BMP files, or "
            "volumes (NIfTI, NRRD, MetaImage, DICOM-SEG). Check the path."
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

    Raises:
        UsageError: there is a DICOM-SEG among them, and nothing to read it with.
    """
    if any(path is not None and is_dicom_seg(path) for _, *both in pairs.pairs for path in both):
        require_highdicom()
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
    part = SliceScores(
        count_classes(prediction, truth, len(classes)),
        slice_surfaces(prediction, truth, len(classes), spacing, nsd_tolerance),
        has_spacing=spacing is not None,
        picture=worst,
    )
    scores = score_case(case_id, case_id, [part], classes, convention)
    count = 1 if geometry is None else SliceStack(geometry, "axial").count
    return replace(scores, slices=count, stack=spread_stack(pictures, worst))


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
    chosen = shown_slices([one.any() or other.any() for one, other in zip(*planes, strict=True)])
    return picture(int(np.argmax(errors))), [picture(index) for index in chosen]


def _size(label_map: np.ndarray) -> str:
    return f"{label_map.shape[1]}x{label_map.shape[0]}"
