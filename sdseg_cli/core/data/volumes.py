"""The one door for volume files: NIfTI, NRRD and MetaImage in, label volumes in the same geometry out.

Voxels are always in nibabel's axis order, with the values they stand for (slope and intercept applied).
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sdseg_cli.core.data.geometry import SHEAR_DEGREES, VolumeGeometry
from sdseg_cli.core.data.itk_headers import MAX_BYTES, read_header
from sdseg_cli.core.data.volume_files import (
    SUFFIX_FORMATS,
    FileFormat,
    itk_image,
    itk_voxels,
    read_raw,
    volume_suffix,
)
from sdseg_cli.core.errors import DataError
from sdseg_cli.core.files import write_whole

__all__ = [
    "VOLUME_SUFFIXES",
    "WRITABLE_SUFFIXES",
    "Volume",
    "VolumeGeometry",
    "files_of_volume",
    "read_label_volume",
    "read_volume",
    "write_label_volume",
    "write_probability_volume",
]

VOLUME_SUFFIXES: tuple[str, ...] = tuple(SUFFIX_FORMATS)
WRITABLE_SUFFIXES: tuple[str, ...] = (".nii", ".nii.gz", ".nrrd", ".mha")
"""Formats of a single file: a header apart from its voxels could be written by half."""

_MOST_LISTED = 8


@dataclass(frozen=True)
class Volume:
    """A volume as it came from its file.

    Attributes:
        voxels: (I, J, K) in nibabel's axis order, real values: the file's own number type, or float where
            the file states a slope and an intercept. Label volumes are uint8.
        geometry: size and place.
        file_format: what it came from.
        path: the file, or the folder of a DICOM series.
        notes: what a reader should know, for the log.
        header: nibabel's header of a NIfTI file, else None.
    """

    voxels: np.ndarray
    geometry: VolumeGeometry
    file_format: FileFormat
    path: Path
    notes: tuple[str, ...]
    header: Any = field(default=None, repr=False, compare=False)


def files_of_volume(path: Path) -> list[Path]:
    """The files that a volume lies in: itself, and the one its header names for the voxels."""
    suffix = volume_suffix(path)
    if suffix is None or SUFFIX_FORMATS[suffix] == "nifti" or not path.is_file():
        return [path]
    try:
        with path.open("rb") as file:
            voxels = read_header(path, file.read(MAX_BYTES)).data
    except DataError:  # which reading it tells better
        return [path]
    return [path] if voxels == path else [path, voxels]


def read_volume(path: str | Path, *, nan_fill: float | None = None) -> Volume:
    """Read a volume of numbers.

    Args:
        path: NIfTI, NRRD or MetaImage, known by its suffix.
        nan_fill: value for voxels that are NaN or infinite; None refuses them.

    Raises:
        DataError: the file is missing, damaged, mislabelled, too large, holds several volumes, colours, or
            voxels that are not finite.
    """
    path = Path(path)
    suffix = volume_suffix(path)
    if suffix is None:
        raise DataError(f"{path}: not a volume by its name; expected {', '.join(VOLUME_SUFFIXES)}.")
    raw = read_raw(path, suffix)
    notes = list(raw.notes)
    voxels = finite(path, raw.voxels, nan_fill, notes)
    shear = raw.geometry.shear_degrees
    if shear > SHEAR_DEGREES:
        notes.append(
            f"warning: the array axes are sheared by {shear:.2f} degrees; the geometry is kept as it is"
        )
    return Volume(voxels, raw.geometry, SUFFIX_FORMATS[suffix], path, tuple(notes), raw.header)


def finite(path: Path, voxels: np.ndarray, nan_fill: float | None, notes: list[str]) -> np.ndarray:
    """Refuse or fill voxels that are NaN or infinite; native byte order."""
    voxels = voxels.astype(voxels.dtype.newbyteorder("="), copy=False)
    if voxels.dtype.kind != "f":
        return voxels
    is_finite = np.isfinite(voxels)
    bad = int(voxels.size - np.count_nonzero(is_finite))
    if not bad:
        return voxels
    if nan_fill is None:
        raise DataError(
            f"{path}: {bad} of {voxels.size} voxels are NaN or infinite. Mend the volume, or say with "
            "--nan-fill which value they get (predict and prepare; labels must be mended)."
        )
    notes.append(f"{bad} voxels that are NaN or infinite were set to {nan_fill:g}")
    return np.where(is_finite, voxels, voxels.dtype.type(nan_fill))


def read_label_volume(
    path: str | Path,
    *,
    num_classes: int | None = None,
    label_values: Mapping[int, int] | None = None,
) -> Volume:
    """Read a volume of labels.

    Args:
        path: the file.
        num_classes: classes that may occur, background included; None accepts any value up to 255.
        label_values: stored value -> class; a value that is not listed is an error.

    Returns:
        The volume with uint8 class indices as voxels.

    Raises:
        DataError: the file cannot be read, or holds values that are no classes; all are listed.
    """
    volume = read_volume(path)
    present = np.unique(volume.voxels)
    if label_values is not None:
        known = set(label_values)
        expected = ", ".join(str(value) for value in sorted(known))
    else:
        known = set(range(256 if num_classes is None else num_classes))
        expected = f"0 to {max(known)}"
    unknown = [value for value in present.tolist() if value not in known]
    if unknown:
        shown = ", ".join(f"{value:g}" for value in unknown[:_MOST_LISTED])
        more = f" and {len(unknown) - _MOST_LISTED} more" if len(unknown) > _MOST_LISTED else ""
        raise DataError(
            f"{volume.path}: unexpected label values {shown}{more}; expected {expected}. "
            "State the meaning of every stored value, or mend the file."
        )
    if label_values is None:
        return replace(volume, voxels=volume.voxels.astype(np.uint8))
    labels = np.zeros(volume.voxels.shape, np.uint8, order="F")
    for value in present.tolist():
        if label_values[int(value)]:
            labels[volume.voxels == value] = label_values[int(value)]
    return replace(volume, voxels=labels)


def write_label_volume(
    path: str | Path, labels: np.ndarray, geometry: VolumeGeometry, *, like: Volume | None = None
) -> None:
    """Write labels as a volume, compressed, whole or not at all.

    Args:
        path: the file; its suffix (``.nii``, ``.nii.gz``, ``.nrrd``, ``.mha``) decides the format.
        labels: uint8, (I, J, K), class indices.
        geometry: where they lie.
        like: where it is NIfTI and so is the output, its qform, sform, their codes and the description
            are kept.

    Raises:
        OSError: the file cannot be written; nothing is left under its name.
    """
    if labels.dtype != np.uint8 or labels.shape != geometry.shape:
        raise ValueError(f"labels must be uint8 {geometry.shape}, got {labels.dtype} {labels.shape}")
    _write(Path(path), labels, geometry, like)


def write_probability_volume(
    path: str | Path, values: np.ndarray, geometry: VolumeGeometry, *, like: Volume | None = None
) -> None:
    """Write numbers as a float32 NIfTI volume, whole or not at all.

    Args:
        path: the file, ``.nii`` or ``.nii.gz``.
        values: float, (I, J, K), or (I, J, K, C) with a channel for each class.
        geometry: where they lie.
        like: as in :func:`write_label_volume`.

    Raises:
        OSError: the file cannot be written; nothing is left under its name.
    """
    if values.shape[:3] != geometry.shape or values.ndim not in (3, 4):
        raise ValueError(f"values must be {geometry.shape} with or without channels, got {values.shape}")
    if SUFFIX_FORMATS.get(volume_suffix(Path(path)) or "") != "nifti":
        raise ValueError(f"{path}: expected a name that ends in .nii or .nii.gz")
    _write_nifti(Path(path), values.astype(np.float32, copy=False), geometry, like)


def _write(path: Path, voxels: np.ndarray, geometry: VolumeGeometry, like: Volume | None) -> None:
    suffix = volume_suffix(path)
    if suffix not in WRITABLE_SUFFIXES:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(WRITABLE_SUFFIXES)}")
    if SUFFIX_FORMATS[suffix] == "nifti":
        _write_nifti(path, voxels, geometry, like)
    else:
        _write_itk(path, suffix, voxels, geometry)


def _write_nifti(path: Path, voxels: np.ndarray, geometry: VolumeGeometry, like: Volume | None) -> None:
    import nibabel

    affine = geometry.affine
    image: Any
    if like is not None and like.header is not None and np.allclose(like.geometry.affine, affine, atol=1e-5):
        header = like.header.copy()
        if hasattr(header, "extensions"):
            header.extensions.clear()  # they may hold a patient's name
        for name in ("db_name", "aux_file", "intent_name"):  # and so may these
            if name in header:
                header[name] = b""
        kind = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
        image = kind(voxels, affine, header)
        image.header["cal_min"] = image.header["cal_max"] = 0  # the window of the scan, not of a mask
    else:
        fits = max(voxels.shape) <= np.iinfo(np.int16).max
        image = (nibabel.Nifti1Image if fits else nibabel.Nifti2Image)(voxels, affine)
        image.header.set_xyzt_units("mm")
        image.set_sform(affine, code="scanner")
        # A qform holds no shear; a second, contradicting statement would be worse than none.
        image.set_qform(affine, code="scanner" if geometry.shear_degrees <= SHEAR_DEGREES else "unknown")
    image.set_data_dtype(voxels.dtype)
    image.header.set_slope_inter(1, 0)
    payload = image.to_bytes()
    write_whole(path, gzip.compress(payload, 6, mtime=0) if path.name.lower().endswith(".gz") else payload)


def _write_itk(path: Path, suffix: str, voxels: np.ndarray, geometry: VolumeGeometry) -> None:
    import SimpleITK as sitk  # noqa: N813

    descriptor, name = tempfile.mkstemp(prefix=".sdseg-", suffix=f".partial{suffix}", dir=path.parent)
    temporary = Path(name)
    try:
        os.close(descriptor)
        try:
            sitk.WriteImage(itk_image(voxels, geometry), name, True)
            # The library was seen to report success on a full disk: believe the file only.
            written = np.array_equal(itk_voxels(sitk.ReadImage(name)), voxels)
        except RuntimeError as error:
            raise _unwritten(path) from error
        if not written:
            raise _unwritten(path)
        write_whole(path, temporary.read_bytes())
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _unwritten(path: Path) -> OSError:
    free = os.statvfs(path.parent).f_bavail
    code = errno.EIO if free else errno.ENOSPC
    return OSError(code, os.strerror(code), str(path))
