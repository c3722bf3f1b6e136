"""Label volumes that are compared must lie voxel on voxel; only on request is one brought onto the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdseg_cli.core.data.geometry import VolumeGeometry
from sdseg_cli.core.data.volume_files import itk_image, itk_voxels
from sdseg_cli.core.data.volumes import Volume, is_volume, read_label_volume
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
    """Read a prediction and its truth.

    Args:
        case_id: for messages.
        prediction: the file, of any volume format; None stands for an empty mask.
        ground_truth: the file; its grid is the one that is scored on.
        num_classes: background included.
        resample: bring the prediction onto the truth's grid by nearest neighbour where they differ.

    Raises:
        DataError: a file cannot be read, holds values that are no classes, or lies elsewhere.
    """
    truth = read_label_volume(ground_truth, num_classes=num_classes)
    if prediction is None:
        return VolumePair(np.zeros_like(truth.voxels), truth.voxels, truth.geometry)
    if not is_volume(prediction):
        raise DataError(
            f"case {case_id!r}: the ground truth is a volume ({ground_truth}), the prediction an image "
            f"({prediction}). Predict the volume itself."
        )
    predicted = read_label_volume(prediction, num_classes=num_classes)
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
