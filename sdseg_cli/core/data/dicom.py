"""DICOM series: found in folders, checked slice by slice, read as volumes.

pydicom reads the headers, since SimpleITK answers a missing or doubled slice with a wrong spacing. The
geometry is computed from the position of every slice, never from the slice thickness.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdseg_cli.core.data.geometry import SHEAR_DEGREES, VolumeGeometry, geometry_from_lps
from sdseg_cli.core.data.images import IMAGE_SUFFIXES, natural_key
from sdseg_cli.core.data.volume_files import MAX_VOXELS, check_affine, volume_suffix
from sdseg_cli.core.data.volumes import Volume, finite
from sdseg_cli.core.errors import DataError

DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})
_TAGS = ("SeriesInstanceUID", "SeriesDescription", "SOPClassUID", "SOPInstanceUID", "Modality", "Rows")
_NO_IMAGES = frozenset({"SEG", "SR", "RTSTRUCT", "RTPLAN", "RTDOSE", "PR", "KO", "REG", "DOC"})
_DIRECTION_TOLERANCE = 1e-3  # of the six direction cosines
_COUNTS = ("NumberOfSlices", "ImagesInAcquisition")  # where a header states how many slices there are
_IRREGULAR = 0.1  # of the spacing: slices further from a regular grid are refused
_NOTED = 0.01
_LARGEST_MM = 1e6  # between pixels or slices
_DISTANCES = f"more than 0 and less than {_LARGEST_MM:,.0f} mm"


@dataclass(frozen=True)
class DicomSeries:
    """The files of one SeriesInstanceUID in one folder.

    Attributes:
        folder: where they are.
        uid: SeriesInstanceUID.
        name: for outputs: the series description, or the UID; unique in its folder.
        files: in natural order of their names.
    """

    folder: Path
    uid: str
    name: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class FoundSeries:
    """What a folder holds: its series, and files beside them that belong to none, each with the reason."""

    series: tuple[DicomSeries, ...]
    strays: tuple[tuple[Path, str], ...]


def find_series(files: Sequence[Path]) -> FoundSeries:
    """Sort the files of one folder into DICOM series.

    Images and volumes of other formats are left out without a word; the rest of the files counts as stray
    only where the folder holds DICOM at all.

    Args:
        files: ordinary files of a single folder.
    """
    import pydicom

    members: dict[str, list[Path]] = {}
    descriptions: dict[str, str] = {}
    strays: list[tuple[Path, str]] = []
    has_dicom = False
    for path in sorted(files, key=lambda entry: natural_key(entry.name)):
        if path.suffix.lower() in IMAGE_SUFFIXES or volume_suffix(path):
            continue
        named = path.suffix.lower() in DICOM_SUFFIXES
        has_dicom |= named
        if path.name.upper() == "DICOMDIR":
            continue
        try:
            if not _is_dicom(path):
                strays.append((path, "is not a DICOM file"))
                continue
            has_dicom = True
            header: Any = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS))
            # Values are decoded when they are asked for, and a damaged one raises then.
            uid = str(header.get("SeriesInstanceUID", "") or "")
            modality = str(header.get("Modality", "unknown"))
            is_slice = modality not in _NO_IMAGES and bool(header.get("Rows"))
            description = str(header.get("SeriesDescription", "") or "")
        except Exception as error:  # a damaged header raises almost anything
            strays.append((path, f"cannot be read as DICOM ({without_values(error)})"))
            continue
        if modality in _NO_IMAGES or (uid and not is_slice):
            strays.append((path, f"holds no image slice (modality {modality})"))
        elif not uid:
            strays.append((path, "has no SeriesInstanceUID; it is cut short or not a slice"))
        else:
            members.setdefault(uid, []).append(path)
            descriptions.setdefault(uid, description)
    if not has_dicom:
        return FoundSeries((), ())
    names = _series_names(descriptions)
    series = (DicomSeries(paths[0].parent, uid, names[uid], tuple(paths)) for uid, paths in members.items())
    return FoundSeries(tuple(series), tuple(strays))


def read_series(series: DicomSeries, *, nan_fill: float | None = None) -> Volume:
    """Read a series as a volume, with slope and intercept of every slice applied.

    Args:
        series: from :func:`find_series`.
        nan_fill: as in :func:`~sdseg_cli.core.data.volumes.read_volume`.

    Returns:
        Voxels float32 (columns, rows, slices), the slices along the normal of their plane.

    Raises:
        DataError: a file is damaged; slices are missing, doubled or differ in size, direction or spacing;
            the series holds colours or files of several frames.
    """
    slices = _read_headers(series)
    notes: list[str] = []
    with _usable_headers(series):
        _refuse_odd_pixels(series, slices)
        geometry, order = _series_geometry(series, slices, notes)
        _note_absent_ends(slices, notes)
    voxels = np.empty(geometry.shape, np.float32, order="F")
    for k, index in enumerate(order):
        voxels[:, :, k] = _pixels(series.files[index], slices[index]).T
    if str(slices[0].get("PhotometricInterpretation", "")) == "MONOCHROME1":
        notes.append("MONOCHROME1 (low values are bright): values negated")
        np.negative(voxels, out=voxels)
    voxels = finite(series.folder, voxels, nan_fill, notes)
    return Volume(voxels, geometry, "dicom", series.folder, tuple(notes))


def sorted_slices(series: DicomSeries) -> tuple[list[Any], VolumeGeometry]:
    """The headers of a series (pydicom datasets without pixels) as its volume's slices, and its geometry."""
    slices = _read_headers(series)
    with _usable_headers(series):
        geometry, order = _series_geometry(series, slices, [])
    return [slices[index] for index in order], geometry


# ---- finding --------------------------------------------------------------------------------------------


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(128)
        return file.read(4) == b"DICM"


def _series_names(descriptions: dict[str, str]) -> dict[str, str]:
    """A file name for every series: its description, with the UID where that is empty or not unique."""
    words = {uid: _file_name(text) for uid, text in descriptions.items()}
    counts = Counter(word.casefold() for word in words.values())
    marks = {uid: _file_name(uid) for uid in descriptions}
    # A UID is digits and dots; one that is not may lead anywhere, or be another's twin once it is cleaned.
    marks = {
        uid: mark if mark == uid else hashlib.sha256(uid.encode("utf-8", "replace")).hexdigest()[:16]
        for uid, mark in marks.items()
    }
    return {
        uid: marks[uid] if not word else word if counts[word.casefold()] == 1 else f"{word}_{marks[uid]}"
        for uid, word in words.items()
    }


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text).strip("._")


# ---- reading --------------------------------------------------------------------------------------------


def _read_headers(series: DicomSeries) -> list[Any]:
    import pydicom

    headers = []
    for path in series.files:
        try:
            headers.append(pydicom.dcmread(path, stop_before_pixels=True))
        except Exception as error:  # as above
            raise _damaged(path, error) from error
    return headers


@contextlib.contextmanager
def _usable_headers(series: DicomSeries) -> Iterator[None]:
    """Values that are absent, of the wrong kind or cut short make the series a DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # values are decoded when they are asked for; damaged ones raise anything
        raise DataError(
            f"{series.folder}: series {series.name!r}: its headers cannot be used ({without_values(error)}). "
            "Fetch it again."
        ) from error


def _refuse_odd_pixels(series: DicomSeries, slices: Sequence[Any]) -> None:
    where = f"{series.folder}: series {series.name!r}"
    for path, header in zip(series.files, slices, strict=True):
        if int(header.get("NumberOfFrames", 1) or 1) > 1:
            raise DataError(
                f"{where}: {path.name} holds {header.NumberOfFrames} frames; expected one slice a file. "
                "Convert it to NIfTI (dcm2niix does), or export single frames."
            )
        if int(header.get("SamplesPerPixel", 1) or 1) != 1:
            raise DataError(f"{where}: {path.name} is in colour; expected grey slices. Export it as PNG.")
        claimed = int(header.Columns) * int(header.Rows) * int(header.BitsAllocated) // 8
        size = path.stat().st_size
        if claimed > size and not _is_compressed(header):
            raise DataError(
                f"{where}: {path.name} claims {header.Columns} x {header.Rows} pixels of "
                f"{header.BitsAllocated} bits, and has only {size} bytes. It is damaged or cut short: "
                "fetch the series again."
            )
    sizes = Counter((int(header.Columns), int(header.Rows)) for header in slices)
    if len(sizes) > 1:
        found = ", ".join(f"{count} of {w}x{h}" for (w, h), count in sizes.most_common())
        raise DataError(f"{where}: its slices differ in size ({found}). Separate them into two series.")
    (columns, rows), count = sizes.most_common(1)[0]
    if columns * rows * count > MAX_VOXELS:
        raise DataError(f"{where}: claims {columns}x{rows}x{count} voxels; at most {MAX_VOXELS} are read.")


def _is_compressed(header: Any) -> bool:
    syntax = header.file_meta.get("TransferSyntaxUID")
    return syntax is not None and bool(syntax.is_compressed or syntax.is_deflated)


def _series_geometry(
    series: DicomSeries, slices: Sequence[Any], notes: list[str]
) -> tuple[VolumeGeometry, list[int]]:
    """The geometry and the order of the files along the normal of the slices."""
    where = f"{series.folder}: series {series.name!r}"
    size = (int(slices[0].Columns), int(slices[0].Rows), len(slices))
    stated = slices[0].get("PixelSpacing")
    if not stated:
        notes.append("warning: no PixelSpacing is stated; 1 mm is taken, so millilitres mean nothing")
    row_mm, column_mm = (float(value) for value in stated or (1.0, 1.0))
    if not (0 < row_mm < _LARGEST_MM and 0 < column_mm < _LARGEST_MM):
        raise DataError(
            f"{where}: PixelSpacing is {row_mm:g} x {column_mm:g} mm; expected {_DISTANCES}. Fetch the "
            "series again."
        )
    if any(not header.get("ImagePositionPatient") for header in slices):
        if len(slices) > 1:
            raise DataError(
                f"{where}: {len(slices)} slices without ImagePositionPatient; their order and distance are "
                "unknown. Export them as single images."
            )
        notes.append("the file states no position; the first pixel is taken as the origin")
        spacing = (column_mm, row_mm, 1.0)
        return geometry_from_lps(size, (0, 0, 0), spacing, tuple(np.eye(3).ravel())), [0]
    directions = np.array([[float(v) for v in header.ImageOrientationPatient] for header in slices])
    positions = np.array([[float(v) for v in header.ImagePositionPatient] for header in slices])
    if not (np.isfinite(positions).all() and np.isfinite(directions).all()):
        raise DataError(
            f"{where}: ImagePositionPatient or ImageOrientationPatient is no number. Fetch it again."
        )
    if np.abs(directions - directions[0]).max() > _DIRECTION_TOLERANCE:
        raise DataError(
            f"{where}: its slices point in different directions (a localizer, or several stacks under one "
            "UID). Separate them."
        )
    across, down = directions[0, :3], directions[0, 3:]
    normal = np.cross(across, down)
    heights = positions @ normal
    order = [int(index) for index in np.argsort(heights, kind="stable")]
    step = normal * _single_spacing(where, slices[0])
    if len(slices) > 1:
        _refuse_gaps(where, heights[order], notes)
        step = (positions[order[-1]] - positions[order[0]]) / (len(slices) - 1)
        _refuse_bent(where, positions[order], step)
    thick = float(np.linalg.norm(step))
    if not 0 < thick < _LARGEST_MM:
        raise DataError(
            f"{where}: by their ImagePositionPatient and ImageOrientationPatient the slices are {thick:g} mm "
            f"apart; expected {_DISTANCES}. Fetch the series again."
        )
    tilt = float(np.degrees(np.arccos(np.clip(step @ normal / thick, -1, 1))))
    if tilt > SHEAR_DEGREES:
        notes.append(f"warning: gantry tilt of {tilt:.2f} degrees; the sheared geometry is kept as it is")
    direction = np.stack([across, down, step / thick], axis=1)
    spacing = (column_mm, row_mm, thick)
    geometry = geometry_from_lps(size, tuple(positions[order[0]]), spacing, tuple(direction.ravel()))
    check_affine(series.folder, geometry.affine)
    return geometry, order


def _single_spacing(where: str, header: Any) -> float:
    value = abs(float(header.get("SpacingBetweenSlices") or header.get("SliceThickness") or 1.0)) or 1.0
    if not value < _LARGEST_MM:
        raise DataError(
            f"{where}: SpacingBetweenSlices or SliceThickness is {value:g} mm; expected {_DISTANCES}. "
            "Fetch the series again."
        )
    return value


def _refuse_gaps(where: str, heights: np.ndarray, notes: list[str]) -> None:
    """Refuse missing and doubled slices, with their place along the normal in mm."""
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    doubled = heights[1:][gaps < max(0.01, 0.5 * usual)]
    if doubled.size:
        raise DataError(
            f"{where}: {doubled.size} slices are doubled, the first at {doubled[0]:.2f} mm along the normal. "
            "Remove the copies, or separate the acquisitions into series of their own."
        )
    missing = np.flatnonzero(gaps > 1.5 * usual)
    if missing.size:
        places = ", ".join(f"{heights[i]:.2f} and {heights[i + 1]:.2f} mm" for i in missing[:5])
        raise DataError(
            f"{where}: slices are missing between {places} along the normal (slices are {usual:.2f} mm "
            f"apart elsewhere; {len(missing)} gaps). Fetch the whole series again."
        )
    regular = np.linspace(heights[0], heights[-1], len(heights))
    off = float(np.abs(heights - regular).max())
    spacing = float(heights[-1] - heights[0]) / (len(heights) - 1)
    if off > _IRREGULAR * spacing:
        worst = int(np.abs(heights - regular).argmax())
        raise DataError(
            f"{where}: its slices are unevenly spaced (the one at {heights[worst]:.2f} mm is {off:.2f} mm "
            f"off a regular grid of {spacing:.2f} mm). Resample it to an even spacing."
        )
    if off > _NOTED * spacing:
        notes.append(f"slices lie up to {off:.3f} mm off a regular grid of {spacing:.3f} mm")


def _note_absent_ends(slices: Sequence[Any], notes: list[str]) -> None:
    """Note where a header counts more slices than there are: at the ends a missing one leaves no gap.

    An acquisition may have given several series, so that this is no proof and nothing to refuse.
    """
    for name in _COUNTS:
        try:
            stated = max(int(header.get(name) or 0) for header in slices)
        except (ValueError, TypeError):  # damaged, or several numbers: a remark is not worth the series
            continue
        if stated > len(slices):
            found = f"{name} is {stated}, {len(slices)} are here"
            notes.append(f"warning: the first or last slices may be missing [{found}]")
            return


def _refuse_bent(where: str, positions: np.ndarray, step: np.ndarray) -> None:
    regular = positions[0] + np.arange(len(positions))[:, None] * step
    off = float(np.linalg.norm(positions - regular, axis=1).max())
    if off > max(0.1, _IRREGULAR * float(np.linalg.norm(step))):
        raise DataError(
            f"{where}: its slices are shifted sideways against each other by up to {off:.2f} mm; they form "
            "no block of voxels. Resample it."
        )


def _pixels(path: Path, header: Any) -> np.ndarray:
    """The values of a slice, float32 (rows, columns); rescaling is computed in floating point."""
    import pydicom

    try:
        dataset = pydicom.dcmread(path)
        try:
            stored = dataset.pixel_array
        except RuntimeError:  # pydicom has no decoder for JPEG Lossless, the most common one
            if not header.file_meta.TransferSyntaxUID.is_compressed:
                raise
            return _decode_with_gdcm(path, header)
        stored = stored.reshape(int(header.Rows), int(header.Columns))  # a file may decode to something else
        if "ModalityLUTSequence" in dataset:
            from pydicom.pixels import apply_modality_lut

            return np.asarray(apply_modality_lut(stored, dataset), dtype=np.float32)
        slope = float(dataset.get("RescaleSlope", 1) or 1)
        intercept = float(dataset.get("RescaleIntercept", 0) or 0)
        return (stored.astype(np.float64) * slope + intercept).astype(np.float32)
    except Exception as error:  # decoders raise almost anything on damaged files
        raise _damaged(path, error) from error


def _decode_with_gdcm(path: Path, header: Any) -> np.ndarray:
    """SimpleITK brings codecs of its own and applies slope and intercept itself."""
    import SimpleITK as sitk  # noqa: N813

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("GDCMImageIO")
    values = sitk.GetArrayFromImage(reader.Execute()).astype(np.float32)
    return values.reshape(int(header.Rows), int(header.Columns))


def _damaged(path: Path, error: BaseException) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: the file is gone since the start. Fetch the series again.")
    return DataError(
        f"{path}: cannot be read as DICOM ({without_values(error)}). It is damaged or cut short: fetch the "
        "series again."
    )


def without_values(error: BaseException) -> str:
    """What a library said, without the values it quotes: in a damaged file they may be a patient's name."""
    lines = str(error).strip().splitlines()
    return re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", lines[-1]) if lines else type(error).__name__
