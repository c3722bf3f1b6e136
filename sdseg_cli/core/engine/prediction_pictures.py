"""What the page of ``sdseg predict`` shows of a case, read from its files: an image, or some slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sdseg_cli.core.data.images import make_upright, read_image, read_label_map, read_orientation
from sdseg_cli.core.data.volumes import read_label_volume, read_volume
from sdseg_cli.core.engine.prediction_plan import PredictionTask
from sdseg_cli.core.engine.report_parts import MOST_VIEWS, evenly, slice_view
from sdseg_cli.core.engine.scans import ScanSlices, read_scan
from sdseg_cli.core.engine.volume_prediction import VolumeSettings
from sdseg_cli.core.errors import SdsegError
from sdseg_cli.core.reporting.page import SliceView

SHOWN_SIDE = 480  # pixels; the longer side of a slice before it is pictured


@dataclass(frozen=True)
class ShownSlice:
    """One picture: image uint8 (H, W, 3), label map uint8 (H, W), both reduced to about SHOWN_SIDE pixels.

    ``uncertainty`` is the standard deviation between draws, float (H, W) in [0, 0.5], where there is one;
    ``pixel_mm`` the height and width of a pixel, where they are known.
    """

    name: str
    image: np.ndarray
    label_map: np.ndarray
    uncertainty: np.ndarray | None = None
    pixel_mm: tuple[float, float] | None = None

    def view(self, brightest: float) -> SliceView:
        """Picture it; ``brightest`` is the uncertainty of the brightest colour."""
        return slice_view(
            self.name,
            self.image,
            self.label_map,
            uncertainty=self.uncertainty,
            brightest=brightest,
            pixel_mm=self.pixel_mm,
        )


@dataclass(frozen=True)
class ShownCase:
    """A case's pictures in order, of which the one at ``first`` is shown first."""

    slices: tuple[ShownSlice, ...]
    first: int = 0


def read_shown_case(
    task: PredictionTask, num_classes: int, volumes: VolumeSettings | None = None
) -> ShownCase | None:
    """Read what is shown of a case; a volume is read whole, and only its shown slices are kept.

    Args:
        task: a case that was predicted.
        num_classes: background included.
        volumes: how volumes were cut and windowed.

    Returns:
        The pictures; None where a file was moved or changed since, and the page does without.
    """
    try:
        if task.is_volume:
            return _of_volume(task, num_classes, volumes or VolumeSettings())
        return _of_image(task, num_classes)
    except (SdsegError, OSError, MemoryError):
        return None


def _of_image(task: PredictionTask, num_classes: int) -> ShownCase | None:
    pixels = read_image(task.path).pixels
    label_map = read_label_map(task.mask, num_classes=num_classes)
    if label_map.shape != pixels.shape[:2]:
        return None
    spread = _image_spread(task)
    if spread is not None:
        spread = _reduced(spread) if spread.shape == label_map.shape else None
    return ShownCase((ShownSlice(task.case_id, _reduced(pixels), _reduced(label_map), spread),))


def _of_volume(task: PredictionTask, num_classes: int, settings: VolumeSettings) -> ShownCase | None:
    labels = _volume_labels(task, num_classes)
    scan = read_scan(task, settings.nan_fill)
    if labels.shape != scan.volume.geometry.shape:
        return None
    slices = ScanSlices(scan, settings.axis or "axial", settings.window)
    stack = slices.stack
    spread = _volume_spread(task, labels.shape)
    label_maps = stack.cut(labels)
    spreads = None if spread is None else stack.cut(spread)
    positions, first = _chosen(label_maps)
    _, row_mm, column_mm = stack.spacing_mm
    return ShownCase(
        tuple(
            ShownSlice(
                f"slice {position}",
                _reduced(slices[position]).copy(),
                _reduced(label_maps[position]).copy(),  # a view would keep the whole volume in memory
                None if spreads is None else _reduced(spreads[position]).copy(),
                (row_mm, column_mm),
            )
            for position in positions
        ),
        first,
    )


def _chosen(label_maps: np.ndarray) -> tuple[list[int], int]:
    """Slices of a volume to show, evenly chosen from those with a mask, and the place of the fullest one."""
    sizes = np.array([np.count_nonzero(label_map) for label_map in label_maps])
    marked = np.flatnonzero(sizes)
    if not marked.size:
        shown = evenly(len(sizes), MOST_VIEWS)
        return shown, len(shown) // 2
    fullest = int(sizes.argmax())
    shown = sorted({fullest, *(int(marked[place]) for place in evenly(len(marked), MOST_VIEWS - 1))})
    return shown, shown.index(fullest)


def _volume_labels(task: PredictionTask, num_classes: int) -> np.ndarray:
    if task.series is not None and task.mask.suffix == ".dcm":
        from sdseg_cli.core.data.dicom_seg import read_dicom_seg

        return read_dicom_seg(task.mask, task.series, num_classes=num_classes)
    return read_label_volume(task.mask, num_classes=num_classes).voxels


def _volume_spread(task: PredictionTask, shape: Sequence[int]) -> np.ndarray | None:
    if task.uncertainty is None or not task.uncertainty.exists():
        return None
    spread = read_volume(task.uncertainty).voxels
    return spread if spread.shape == tuple(shape) else None


def _image_spread(task: PredictionTask) -> np.ndarray | None:
    """Standard deviation between draws, float (H, W) in [0, 0.5], upright; None without such a file."""
    if task.uncertainty is None or not task.uncertainty.exists():
        return None
    with Image.open(task.uncertainty) as stored:
        levels = np.asarray(stored).astype(np.float64)
    return make_upright(levels, read_orientation(task.uncertainty)) / 65535 / 2


def _reduced(array: np.ndarray) -> np.ndarray:
    """Leave out rows and columns so that drawing a picture of a few hundred pixels does not take seconds."""
    step = max(1, max(array.shape[:2]) // SHOWN_SIDE)
    return array[::step, ::step]
