"""Label volumes that are compared must lie voxel on voxel; only on request is one brought onto the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sdseg_cli.core.data.dicom_seg import LoneDicomSeg, is_dicom_seg, is_label_volume
from sdseg_cli.core.data.geometry import VolumeGeometry
from sdseg_cli.core.data.volume_files import MAX_VOXELS, itk_image, itk_voxels
from sdseg_cli.core.data.volumes import Volume, read_label_volume
from sdseg_cli.core.errors import DataError


@dataclass(frozen=True)
class VolumePair:
    """Two label volumes on one grid, uint8 (I, J, K), and where it lies."""

    prediction: np.ndarray
    ground_truth: np.ndarray
    geometry: VolumeGeometry


def read_volume_pair(
    case_id: str, prediction: Path | None, ground_truth: Path, num_classes: int, *, resample: bool = False
) -> VolumePair:
    """Read a prediction and its truth; either may be a DICOM-SEG.

    Args:
        case_id: for messages.
        prediction: the file, of any volume format; None stands for an empty mask.
        ground_truth: the file; its grid is the one that is scored on.
        num_classes: background included.
        resample: bring the prediction onto the truth's grid by nearest neighbour where they differ.

    Raises:
        DataError: a file cannot be read, holds values that are no classes, or lies elsewhere.
    """
    if prediction is None:
        (truth,) = _read(case_id, [ground_truth], num_classes)
        return VolumePair(np.zeros_like(truth.voxels), truth.voxels, truth.geometry)
    if not is_label_volume(prediction):
        raise DataError(
            f"case {case_id!r}: the ground truth is a volume ({ground_truth}), the prediction an image "
            f"({prediction}). Predict the volume itself."
        )
    predicted, truth = _completed(*_read(case_id, [prediction, ground_truth], num_classes))
    differences = predicted.geometry.differences(truth.geometry)
    if differences and not resample:
        raise DataError(
            f"case {case_id!r}: prediction ({prediction}: {predicted.geometry.describe()}) and ground truth "
            f"({ground_truth}: {truth.geometry.describe()}) do not lie voxel on voxel. "
            f"{' '.join(differences)} Predict the scan that the truth was drawn on, or pass --resample to "
            "bring the prediction onto the grid of the truth by nearest neighbour."
        )
    voxels = _resampled(predicted, truth) if differences else predicted.voxels
    return VolumePair(voxels, truth.voxels, truth.geometry)


def _read(case_id: str, paths: Sequence[Path], num_classes: int) -> list[Volume]:
    """Read label volumes of one scan, in this order.

    What a DICOM-SEG does not say of the distance between its slices, the other file does.
    """
    volumes = {
        index: read_label_volume(path, num_classes=num_classes)
        for index, path in enumerate(paths)
        if not is_dicom_seg(path)
    }
    segmentations = {
        index: LoneDicomSeg.open(path) for index, path in enumerate(paths) if index not in volumes
    }
    _refuse_other_frame(case_id, [*segmentations.values()])
    scan = next((volume.geometry for volume in volumes.values()), None)
    for index in sorted(segmentations, key=lambda index: _vagueness(segmentations[index])):
        volumes[index] = segmentations[index].volume(num_classes=num_classes, scan=scan)
        scan = scan or volumes[index].geometry
    return [volumes[index] for index in range(len(paths))]


def _vagueness(segmentation: LoneDicomSeg) -> tuple[bool, float]:
    """Sorts by how well the distance between slices is known: stated, or the smallest that is found."""
    geometry = segmentation.geometry
    distance = math.inf if geometry is None or geometry.shape[2] == 1 else geometry.spacing_mm[2]
    return segmentation.lacks_spacing, distance


def _refuse_other_frame(case_id: str, segmentations: Sequence[LoneDicomSeg]) -> None:
    """Places in two frames of reference cannot be compared, unless both refer to the same slices."""
    frames = {one.frame_of_reference for one in segmentations} - {""}
    if len(frames) > 1 and not frozenset.intersection(*(one.slices for one in segmentations)):
        files = " and ".join(str(one.path) for one in segmentations)
        raise DataError(
            f"case {case_id!r}: {files} differ in their FrameOfReferenceUID and refer to no slice in common: "
            "their places cannot be compared. Give segmentations of the same scan; if they are (identifiers "
            "may have been replaced), convert one to NIfTI."
        )


def _completed(predicted: Volume, truth: Volume) -> tuple[Volume, Volume]:
    """Fill up a DICOM-SEG, which lacks the slices that hold nothing, to the grid of the other volume.

    Two of them are brought onto the smallest grid that holds both. Nothing is interpolated: what lies between
    the voxels of the other, or beyond it, stays as it is.
    """
    is_seg = [volume.file_format == "dicom" for volume in (predicted, truth)]
    if not any(is_seg):
        return predicted, truth
    grid = predicted.geometry if not is_seg[0] else truth.geometry
    if all(is_seg):
        block = predicted.geometry.inside(grid)
        if block is None:
            return predicted, truth
        low = np.minimum(block.start, 0)
        shape = np.maximum(block.stop, grid.shape) - low
        if math.prod(shape.tolist()) > MAX_VOXELS:  # far apart: no grid is made that only holds air
            return predicted, truth
        moved = np.eye(4)
        moved[:3, 3] = low
        grid = VolumeGeometry((int(shape[0]), int(shape[1]), int(shape[2])), grid.affine @ moved)
    return _laid_on(predicted, grid), _laid_on(truth, grid)


def _laid_on(volume: Volume, grid: VolumeGeometry) -> Volume:
    block = volume.geometry.inside(grid) if volume.file_format == "dicom" else None
    if block is None or not block.fits(grid.shape):
        return volume
    return replace(volume, voxels=block.laid_in(grid.shape, volume.voxels), geometry=grid)


def _resampled(predicted: Volume, truth: Volume) -> np.ndarray:
    import SimpleITK as sitk  # noqa: N813

    moved = sitk.Resample(
        itk_image(predicted.voxels, predicted.geometry),
        itk_image(truth.voxels, truth.geometry),
        sitk.Transform(),
        sitk.sitkNearestNeighbor,
        0,
    )
    return itk_voxels(moved)
