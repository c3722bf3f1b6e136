"""Volumes as a model sees them: a file, or one for each channel, read and cut into windowed slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdseg_cli.core.data.dicom import read_series
from sdseg_cli.core.data.slicing import Axis, SliceStack, apply_window, own_window
from sdseg_cli.core.data.volumes import Volume, files_of_volume, read_volume
from sdseg_cli.core.engine.prediction_plan import PredictionTask, expected_channels, readable, unchanged
from sdseg_cli.core.errors import DataError
from sdseg_cli.core.files import sum_of_files


@dataclass(frozen=True)
class Scan:
    """A volume with what was read for it.

    Attributes:
        volume: geometry, format and notes; the only channel, or the red one.
        channels: voxels (I, J, K) of the only channel, or of red, green and blue.
        sha256: of the files it was read from.
    """

    volume: Volume
    channels: tuple[np.ndarray, ...]
    sha256: str


def read_scan(task: PredictionTask, nan_fill: float | None, channels: Sequence[int] = ()) -> Scan:
    """Read the volume of a task: a file, a DICOM series, or a file for each channel.

    Args:
        task: what to read.
        nan_fill: value for voxels that are not finite; None refuses them.
        channels: numbers of those the model was trained on; where they differ, the task must have them.

    Raises:
        DataError: it cannot be read, changed meanwhile, or a channel is missing or lies elsewhere.
        OSError: a file cannot be opened.
    """
    if len(set(channels)) > 1 and not task.channels:
        remedy = "Rename it" if task.series is None else "Convert the series to volumes named so"
        raise DataError(
            f"is no channel of a case by its name. {expected_channels(channels)} {remedy}, or leave it out."
        )
    paths = task.channels or (task.path,)
    missing = [path.name for path in dict.fromkeys(paths) if task.channels and not path.is_file()]
    if missing:
        raise DataError(
            f"{readable(', '.join(missing))}: missing beside {readable(task.path.name)}. The model was "
            "trained on a file for each channel of a case. Put it there, or leave the case out."
        )
    if task.series is None:
        files = [file for path in dict.fromkeys(paths) for file in files_of_volume(path)]
    else:
        files = list(task.series.files)
    with unchanged(task, files):
        if task.series is None:
            volumes = {path: read_volume(path, nan_fill=nan_fill) for path in dict.fromkeys(paths)}
        else:
            volumes = {task.path: read_series(task.series, nan_fill=nan_fill)}
        digest = sum_of_files(files)
    first = volumes[paths[0]]
    for path, volume in volumes.items():
        differences = volume.geometry.differences(first.geometry)
        if differences:
            raise DataError(
                f"channel {readable(path.name)} ({volume.geometry.describe()}) does not lie voxel on voxel "
                f"on {readable(paths[0].name)} ({first.geometry.describe()}). {' '.join(differences)} Bring "
                "the channels of a case onto one grid."
            )
    return Scan(first, tuple(volumes[path].voxels for path in paths), digest)


class ScanSlices:
    """The slices of a scan as the model sees them: cut along an axis, each channel in its window."""

    def __init__(self, scan: Scan, axis: Axis, window: Sequence[float] | None) -> None:
        self.stack = SliceStack(scan.volume.geometry, axis)
        self._cut = [self.stack.cut(voxels) for voxels in scan.channels]
        stated = None if window is None else (float(window[0]), float(window[1]))
        self.windows = [stated or own_window(voxels) for voxels in scan.channels]

    def __len__(self) -> int:
        return self.stack.count

    def __getitem__(self, index: int) -> np.ndarray:
        """One slice, uint8 (H, W, 3); a single channel is repeated."""
        planes = [
            apply_window(cut[index], window) for cut, window in zip(self._cut, self.windows, strict=True)
        ]
        return np.stack(planes if len(planes) == 3 else planes * 3, axis=-1)
