"""A scan and its label volume as slices for training: windowed, checked against each other, laid upright."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sdseg_cli.core.data.dicom import DicomSeries, read_series
from sdseg_cli.core.data.dicom_seg import is_dicom_seg, read_dicom_seg
from sdseg_cli.core.data.raw_cases import Geometry, RawSlice
from sdseg_cli.core.data.slicing import SliceStack, apply_window, own_window
from sdseg_cli.core.data.volumes import Volume, read_label_volume, read_volume
from sdseg_cli.core.errors import DataError


def read_volume_pair(
    images: Sequence[Path | DicomSeries], label_path: Path, geometry: Geometry
) -> tuple[Iterator[RawSlice], tuple[str, ...]]:
    """Read a scan and its labels.

    Args:
        images: one file or DICOM series, or three files that become red, green and blue.
        label_path: the label volume; of a series also a DICOM-SEG whose segments are the classes.
        geometry: window, axis, meaning of the labels.

    Returns:
        The slices, made one by one, and what was changed on the way in.

    Raises:
        DataError: a file cannot be read, the two do not lie on one another, or labels are unknown.
    """
    channels: list[np.ndarray] = []
    notes: list[str] = []
    volumes = [_scan(image, geometry.nan_fill) for image in images]
    labels = _labels(label_path, geometry, images[0], volumes[0])
    for path, other in [*((volume.path, volume) for volume in volumes[1:]), (label_path, labels)]:
        differences = volumes[0].geometry.differences(other.geometry)
        if differences:
            raise DataError(
                f"{path.name} does not lie on {volumes[0].path.name}: {' '.join(differences)} Fetch the pair "
                "again, or leave the case out."
            )
    for volume in volumes:
        notes += volume.notes
        window = geometry.window
        if window is None:
            window = own_window(volume.voxels)
            notes.append(f"windowed from [{window[0]:g}, {window[1]:g}], its own 0.5 and 99.5 percentiles")
        channels.append(apply_window(volume.voxels, window))
    label_map = labels.voxels
    if geometry.smallest_component:
        label_map, removed = _without_specks(label_map, geometry.smallest_component)
        if removed:
            notes.append(f"specks removed from [{removed} parts of the foreground]")
    stack = SliceStack(volumes[0].geometry, geometry.axis)
    return _slices(stack, channels, label_map), tuple(notes)


def _slices(stack: SliceStack, channels: Sequence[np.ndarray], label_map: np.ndarray) -> Iterator[RawSlice]:
    cut = [stack.cut(channel) for channel in channels]
    labels = stack.cut(label_map)
    for index in range(stack.count):
        planes = [channel[index] for channel in cut]
        image = np.stack(planes if len(planes) == 3 else planes * 3, axis=-1)
        yield RawSlice(image, np.ascontiguousarray(labels[index]), stack.spacing_mm)


def _scan(image: Path | DicomSeries, nan_fill: float | None) -> Volume:
    if isinstance(image, DicomSeries):
        return read_series(image, nan_fill=nan_fill)
    return read_volume(image, nan_fill=nan_fill)


def _labels(path: Path, geometry: Geometry, image: Path | DicomSeries, scan: Volume) -> Volume:
    if is_dicom_seg(path):
        return _segments(path, geometry, image, scan)
    if geometry.threshold is None:
        return read_label_volume(path, num_classes=geometry.num_classes, label_values=geometry.label_values)
    volume = read_volume(path)
    foreground = (volume.voxels > geometry.threshold).astype(np.uint8)
    return Volume(foreground, volume.geometry, volume.file_format, path, volume.notes)


def _segments(path: Path, geometry: Geometry, image: Path | DicomSeries, scan: Volume) -> Volume:
    """The labels of a DICOM-SEG: its segments by number."""
    if not isinstance(image, DicomSeries):
        raise DataError(f"{path.name} is DICOM, its image {scan.path.name} is none. Convert one of the two.")
    labels = read_dicom_seg(path, image, num_classes=geometry.num_classes)
    return Volume(labels, scan.geometry, "dicom", path, ())


def _without_specks(label_map: np.ndarray, least: int) -> tuple[np.ndarray, int]:
    """Remove connected parts (26-connected) of the foreground with fewer voxels; and how many there were."""
    from skimage.measure import label

    parts = label(label_map > 0, connectivity=3)
    sizes = np.bincount(parts.ravel())
    small = sizes < least
    small[0] = False
    return np.where(small[parts], 0, label_map).astype(np.uint8), int(small.sum())
