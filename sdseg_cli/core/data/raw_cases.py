"""What a case is before preparation, and how it is read and checked: slices with their label maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdseg_cli.core.data.dicom import DicomSeries
from sdseg_cli.core.data.dicom_seg import is_label_volume
from sdseg_cli.core.data.images import read_image, read_label_map, read_orientation
from sdseg_cli.core.data.slicing import Axis
from sdseg_cli.core.data.volume_files import volume_suffix
from sdseg_cli.core.data.volumes import files_of_volume
from sdseg_cli.core.errors import DataError
from sdseg_cli.core.files import sum_of_files
from sdseg_cli.core.grid import Box, Resize


@dataclass(frozen=True)
class RawSlice:
    """One slice as it was read.

    Attributes:
        image: uint8, (H, W, 3).
        label_map: uint8, (H, W), class indices.
        spacing_mm: mm between (slices, rows, columns) of a volume; None where unknown.
        crop: the part that the model sees; None is all of it.
    """

    image: np.ndarray
    label_map: np.ndarray
    spacing_mm: tuple[float, float, float] | None = None
    crop: Box | None = None


@dataclass(frozen=True)
class RawCase:
    """A case before preparation: two files (images or volumes), or a callable that makes the two arrays.

    Attributes:
        case_id: unique in the dataset.
        group: patient or sequence; the case id where there is none.
        image_path: of the image file.
        label_path: of its label map.
        arrays: instead of files: returns image uint8 (H, W, 3) and label map uint8 (H, W). Must be
            picklable (a module-level function or a partial of one), since other processes call it.
        reader: reads the two files where they are not simply an image and its label map. Picklable too.
        channel_paths: with a volume: files of its second and third channel.
        series: the DICOM series that the image is; ``image_path`` is then only its name.
        image_name: name of the image in ``dataset.json``, independent of where it was unpacked.
        label_name: likewise of the label map.
    """

    case_id: str
    group: str
    image_path: Path | None = None
    label_path: Path | None = None
    arrays: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None
    reader: Callable[[Path, Path], tuple[RawSlice, tuple[str, ...]]] | None = None
    channel_paths: tuple[Path, ...] = ()
    series: DicomSeries | None = None
    image_name: str = ""
    label_name: str = ""

    @property
    def is_volume(self) -> bool:
        """Whether the image is a volume: a DICOM series, or a file by its name."""
        named = self.image_path is not None and volume_suffix(self.image_path) is not None
        return named or self.series is not None


@dataclass(frozen=True)
class Problem:
    """Why a case cannot be used."""

    case_id: str
    reason: str


@dataclass(frozen=True)
class Geometry:
    """How cases are read and brought to the model grid.

    Attributes:
        image_size: side of the model grid, in pixels.
        resize: squeeze to a square, or keep the aspect ratio and pad.
        num_classes: background included.
        threshold: stored mask values above it are foreground; see ``read_label_map``.
        label_values: stored value -> class; see ``read_label_map``.
        window: of volumes: (low, high), the values that become black and white; None takes each volume's own
            0.5 and 99.5 percentiles.
        axis: along which volumes are sliced.
        smallest_component: of volumes: connected parts of the foreground with fewer voxels are removed.
        foreground_slices_only: of volumes: training slices without foreground are left out.
        nan_fill: of volumes: value for voxels that are not finite; None refuses them.
        holds_volumes: whether the five above are of use, and recorded.
    """

    image_size: int = 256
    resize: Resize = "squeeze"
    num_classes: int = 2
    threshold: int | None = None
    label_values: Mapping[int, int] | None = None
    window: tuple[float, float] | None = None
    axis: Axis = "axial"
    smallest_component: int = 0
    foreground_slices_only: bool = False
    nan_fill: float | None = None
    holds_volumes: bool = False

    @property
    def of_volumes(self) -> dict[str, Any]:
        """What ``dataset.json`` records where the cases are volumes."""
        if not self.holds_volumes:
            return {}
        return {
            "window": self.window,
            "axis": self.axis,
            "smallest_component": self.smallest_component,
            "foreground_slices_only": self.foreground_slices_only,
            "nan_fill": self.nan_fill,
        }


def read_case(case: RawCase, geometry: Geometry) -> tuple[Iterable[RawSlice], tuple[str, ...]]:
    """Read a case; the slices of a volume come one by one."""
    if case.arrays is not None:
        image, label_map = case.arrays()
        _check_arrays(image, label_map, geometry.num_classes)
        return [RawSlice(image, label_map)], ()
    if case.image_path is None or case.label_path is None:
        raise ValueError(f"case {case.case_id} has neither files nor arrays")
    if case.reader is not None:
        single, notes = case.reader(case.image_path, case.label_path)
        return [single], notes
    if case.is_volume or is_label_volume(case.label_path):
        if not (case.is_volume and is_label_volume(case.label_path)):
            raise DataError(
                f"{case.image_path.name} and {case.label_path.name}: a volume and a picture cannot be a pair."
            )
        from sdseg_cli.core.data.volume_pairs import read_volume_pair

        images = (case.series or case.image_path, *case.channel_paths)
        return read_volume_pair(images, case.label_path, geometry)
    image, label_map, notes = _read_pair(case.image_path, case.label_path, geometry)
    return [RawSlice(image, label_map)], notes


def source_hashes(case: RawCase) -> dict[str, str]:
    """Name -> SHA-256 of the files that hold the image, its further channels and its labels."""
    if case.image_path is None or case.label_path is None:
        return {}
    image_files = files_of_volume(case.image_path) if case.series is None else case.series.files
    return {
        case.image_name or case.image_path.name: sum_of_files(image_files),
        **{path.name: sum_of_files(files_of_volume(path)) for path in case.channel_paths},
        case.label_name or case.label_path.name: sum_of_files(files_of_volume(case.label_path)),
    }


def _read_pair(
    image_path: Path, label_path: Path, geometry: Geometry
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    loaded = read_image(image_path)
    label_map = read_label_map(
        label_path,
        num_classes=geometry.num_classes,
        label_values=geometry.label_values,
        threshold=geometry.threshold,
    )
    height, width = loaded.pixels.shape[:2]
    if label_map.shape != (height, width):
        hint = ""
        if loaded.orientation >= 5 and label_map.shape == (width, height):
            hint = (
                f" The image carries EXIF orientation {loaded.orientation} and the mask does not: it lies on "
                "the stored grid. Give the mask the same tag, or save the image upright."
            )
        raise DataError(
            f"mask {label_path.name} is {label_map.shape[1]}x{label_map.shape[0]} pixels, image "
            f"{image_path.name} is {width}x{height}; both must be the same.{hint}"
        )
    notes = loaded.notes
    if loaded.orientation != 1 and read_orientation(label_path) != loaded.orientation:
        # Drawn on the upright image, most likely; where it was not, only the contact sheet can tell.
        notes += ("turned by its EXIF orientation, its mask is not: taken as drawn on the turned image",)
    return loaded.pixels, label_map, notes


def _check_arrays(image: np.ndarray, label_map: np.ndarray, num_classes: int) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be uint8 (H, W, 3), got {image.dtype} {image.shape}")
    if label_map.dtype != np.uint8 or label_map.shape != image.shape[:2]:
        raise ValueError(
            f"label map must be uint8 {image.shape[:2]}, got {label_map.dtype} {label_map.shape}"
        )
    if int(label_map.max(initial=0)) >= num_classes:
        raise ValueError(f"label map holds {int(label_map.max())}, expected less than {num_classes}")
