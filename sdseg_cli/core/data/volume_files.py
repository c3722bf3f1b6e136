"""What the volume formats need beside their libraries: checks of the file before anything is allocated.

nibabel reads NIfTI (SimpleITK turns a cut NIfTI into zeros and NaN into 0 without a word), SimpleITK the
rest. A header is compared with the size of its file first, and the checksum of compressed voxels is looked
at, which neither library does reliably.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sdseg_cli.core.data.geometry import VolumeGeometry, geometry_from_lps
from sdseg_cli.core.errors import DataError

FileFormat = Literal["nifti", "nrrd", "metaimage", "dicom"]

SUFFIX_FORMATS: dict[str, FileFormat] = {
    ".nii": "nifti",
    ".nii.gz": "nifti",
    ".nrrd": "nrrd",
    ".nhdr": "nrrd",
    ".mha": "metaimage",
    ".mhd": "metaimage",
}
MAX_VOXELS = 2**31
"""Volumes with more voxels are refused by their header: two thousand slices of 1024 x 1024 are allowed."""

_DEFLATE_MOST = 1040  # no deflate stream unpacks to more than 1032 times its size
_HEADER_BYTES = 65536
_CHUNK = 1 << 20
_FORMS_TOLERANCE_MM = 1e-2


@dataclass(frozen=True)
class RawVolume:
    """A file's content: voxels (I, J, K) of any real dtype, notes, and nibabel's header where it is NIfTI."""

    voxels: np.ndarray
    geometry: VolumeGeometry
    notes: tuple[str, ...]
    header: Any = None


def volume_suffix(path: Path) -> str | None:
    """The suffix of a volume file in lower case, ``.nii.gz`` as one; None where it is another file."""
    name = path.name.lower()
    if name.startswith("."):
        return None
    # A hidden file is none of ours, and a name that is all suffix has no stem.
    return next((s for s in SUFFIX_FORMATS if name.endswith(s) and len(name) > len(s)), None)


def read_raw(path: Path, suffix: str) -> RawVolume:
    """Read the voxels of a file.

    Raises:
        DataError: the file is missing, damaged, of another format than its name says, too large, or holds
            anything but one three-dimensional volume of single numbers.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing" if not path.exists() else "no ordinary file"
        raise DataError(f"{path}: expected a volume file, found {found}.")
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes). Fetch it again or leave it out.")
    try:
        raw = _read_nifti(path, suffix, size) if suffix.startswith(".nii") else _read_itk(path, suffix)
    except DataError:
        raise
    except PermissionError as error:
        raise DataError(f"{path}: may not be read. Check the file's permissions.") from error
    except MemoryError as error:
        raise DataError(f"{path}: too large for the memory of this machine. Cut it into parts.") from error
    except Exception as error:  # readers raise almost anything on damaged files
        raise DataError(
            f"{path}: cannot be read as {suffix.lstrip('.')} ({_last_line(error)}). It is damaged, cut short "
            "or of another format: fetch it again or leave it out."
        ) from error
    return raw


def flat_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The three sizes of a volume: trailing sizes of one are dropped, missing ones added.

    Raises:
        DataError: there are four real dimensions, or none, or too many voxels.
    """
    kept = list(shape)
    while len(kept) > 3 and kept[-1] == 1:
        kept.pop()
    sizes = " x ".join(map(str, shape))
    if len(kept) > 3:
        raise DataError(
            f"{path}: holds {len(shape)} dimensions ({sizes}); expected a single volume. Save each "
            "time point or channel as a file of its own."
        )
    if len(kept) < 2 or min(kept) < 1:
        raise DataError(f"{path}: its size is {sizes or 'nothing'}; expected three positive numbers.")
    kept += [1] * (3 - len(kept))
    if math.prod(kept) > MAX_VOXELS:
        raise DataError(
            f"{path}: its header claims {sizes} voxels; at most {MAX_VOXELS} are read. The header is "
            "damaged, or the volume must be cut into parts."
        )
    return kept[0], kept[1], kept[2]


def check_affine(path: Path, affine: np.ndarray) -> np.ndarray:
    """Return a float64 copy of an affine.

    Raises:
        DataError: it holds no finite numbers, or puts the volume into a plane.
    """
    affine = np.array(affine, dtype=np.float64)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or spacing.min() <= 0:
        raise DataError(f"{path}: its header has no usable spacing or orientation ({affine[:3].tolist()}).")
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise DataError(f"{path}: its header lays two array axes on one line. Mend the orientation.")
    return affine


# ---- NIfTI ----------------------------------------------------------------------------------------------


def _read_nifti(path: Path, suffix: str, size: int) -> RawVolume:
    import nibabel

    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    if is_gzip != (suffix == ".nii.gz"):
        content, name = ("gzip", ".nii.gz") if is_gzip else ("not gzip", ".nii")
        raise DataError(
            f"{path}: the name says {suffix}, but the content is {content}. Rename it to *{name}."
        )
    image: Any = nibabel.load(path, mmap=False)  # a mapped file that shrinks would end the process
    shape = flat_shape(path, image.shape)
    dtype = image.get_data_dtype()
    if dtype.names or dtype.kind not in "iuf":
        raise DataError(
            f"{path}: its voxels are {'colours' if dtype.names else dtype}; expected single real numbers. "
            "Export one grey channel."
        )
    claimed = math.prod(shape) * dtype.itemsize
    _refuse_claims(path, claimed, size, packed=is_gzip)
    notes: list[str] = []
    affine = check_affine(path, image.affine)
    _note_forms(image, notes)
    if is_gzip:
        # One pass that goes on to the end of the stream, where its checksum is.
        with gzip.open(path) as stream:
            opened = type(image).from_stream(stream)
            voxels = np.asanyarray(opened.dataobj)
            while stream.read(_CHUNK):
                pass
    else:
        voxels = np.asanyarray(image.dataobj)
    voxels = voxels.reshape(shape, order="F")
    if voxels.dtype != dtype and voxels.dtype.kind == "f":
        notes.append("voxels rescaled by the file's slope and intercept")
        voxels = voxels.astype(np.float32 if dtype.itemsize <= 2 else np.float64, copy=False)
    return RawVolume(voxels, VolumeGeometry(shape, affine), tuple(notes), image.header)


def _note_forms(image: Any, notes: list[str]) -> None:
    """Say where a NIfTI file contradicts itself about its place, or does not say it."""
    header = image.header
    if not hasattr(header, "get_qform"):
        return
    qform, qcode = header.get_qform(coded=True)
    sform, scode = header.get_sform(coded=True)
    if not qcode and not scode:
        notes.append("the header states no orientation; the array axes are taken as left, front, up")
    elif qcode and scode and float(np.abs(qform - sform).max()) > _FORMS_TOLERANCE_MM:
        notes.append("warning: sform and qform differ; the sform is used")


# ---- NRRD and MetaImage ---------------------------------------------------------------------------------


def _read_itk(path: Path, suffix: str) -> RawVolume:
    import SimpleITK as sitk  # noqa: N813  (the name everybody gives it)

    with path.open("rb") as file:
        start = file.read(_HEADER_BYTES)
    magic = start.startswith(b"NRRD") if SUFFIX_FORMATS[suffix] == "nrrd" else b"NDims" in start
    if not magic:
        packed = "gzip" if start.startswith(b"\x1f\x8b") else "something else"
        raise DataError(f"{path}: the name says {suffix}, but the content is {packed}. Rename or unpack it.")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NrrdImageIO" if SUFFIX_FORMATS[suffix] == "nrrd" else "MetaImageIO")
    reader.ReadImageInformation()
    if reader.GetNumberOfComponents() != 1:
        raise DataError(
            f"{path}: holds {reader.GetNumberOfComponents()} numbers a voxel (colours or a vector); expected "
            "one. Export a single grey channel."
        )
    shape = flat_shape(path, tuple(reader.GetSize()))
    size = _pixel_bytes(reader.GetPixelID())
    _check_itk_file(path, start, math.prod(shape) * size)
    image = reader.Execute()
    geometry = itk_geometry(path, image, shape)
    return RawVolume(itk_voxels(image).reshape(shape, order="F"), geometry, ())


def itk_voxels(image: Any) -> np.ndarray:
    """The voxels of a SimpleITK image in nibabel's axis order: a copy, the last image axis last."""
    import SimpleITK as sitk  # noqa: N813

    return sitk.GetArrayFromImage(image).T


def itk_image(voxels: np.ndarray, geometry: VolumeGeometry) -> Any:
    """Make a SimpleITK image of an array (I, J, K): the other direction of :func:`itk_voxels`."""
    import SimpleITK as sitk  # noqa: N813

    from sdseg_cli.core.data.geometry import lps_from_geometry

    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
    origin, spacing, direction = lps_from_geometry(geometry)
    image.SetOrigin(origin)
    image.SetSpacing(spacing)
    image.SetDirection(direction)
    return image


def itk_geometry(path: Path, image: Any, shape: tuple[int, int, int]) -> VolumeGeometry:
    """The geometry of a SimpleITK image of two to four dimensions; dimensions beyond are left out."""
    count = image.GetDimension()
    direction = np.eye(max(3, count))
    direction[:count, :count] = np.reshape(image.GetDirection(), (count, count))
    spacing = (*image.GetSpacing(), 1.0)[:3]
    origin = (*image.GetOrigin(), 0.0)[:3]
    geometry = geometry_from_lps(shape, origin, spacing, tuple(direction[:3, :3].ravel()))
    check_affine(path, geometry.affine)
    return geometry


def _pixel_bytes(pixel_id: int) -> int:
    import SimpleITK as sitk  # noqa: N813

    return sitk.Image([1, 1], pixel_id).GetSizeOfPixelComponent()


def _check_itk_file(path: Path, start: bytes, claimed: int) -> None:
    """Compare what the header claims with the file, and look at the checksum of compressed voxels."""
    if start.startswith(b"NRRD"):
        header, _, _ = start.replace(b"\r\n", b"\n").partition(b"\n\n")
        offset = start.find(b"\r\n\r\n") + 4 if b"\r\n\r\n" in start[: len(header) + 999] else len(header) + 2
        encoding = _field(header, rb"encoding: *(\S+)") or "raw"
        detached = _field(header, rb"data ?file: *(.+)")
    else:
        match = re.search(rb"ElementDataFile *= *[^\n]*\n", start)
        offset = match.end() if match else len(start)
        header = start[:offset]
        encoding = "gzip" if _field(header, rb"CompressedData *= *(\w+)") in ("True", "true", "1") else "raw"
        detached = _field(header, rb"ElementDataFile *= *(.+)")
        detached = None if detached in ("LOCAL", "Local", "local") else detached
    data = path
    if detached is not None:
        if re.match(r"LIST|.*%", detached):  # voxels spread over several files; the reader counts them
            return
        data, offset = path.parent / detached, 0
        if not data.is_file():
            raise DataError(f"{path}: its voxels are in {detached}, which is not there. Fetch both files.")
    packed = encoding in ("gzip", "gz")
    if packed or encoding == "raw":
        _refuse_claims(path, claimed, data.stat().st_size - offset, packed=packed)
    if packed:
        _check_deflated(path, data, offset, claimed)


def _field(header: bytes, pattern: bytes) -> str | None:
    match = re.search(rb"^" + pattern, header, re.MULTILINE | re.IGNORECASE)
    return match.group(1).decode("utf-8", "replace").strip() if match else None


def _check_deflated(path: Path, data: Path, offset: int, claimed: int) -> None:
    """Unpack once for the checksum: MetaImage's own reader was seen to return wrong voxels instead."""
    unpacker = zlib.decompressobj(wbits=47)  # zlib or gzip
    total = 0
    with data.open("rb") as file:
        file.seek(offset)
        while not unpacker.eof and (chunk := file.read(_CHUNK)):
            while chunk and not unpacker.eof and total <= claimed:
                total += len(unpacker.decompress(chunk, 4 * _CHUNK))
                chunk = unpacker.unconsumed_tail
    if not unpacker.eof or total != claimed:
        raise DataError(
            f"{path}: holds {total} bytes of voxels where its header promises {claimed}. It is cut short or "
            "damaged: fetch it again or leave it out."
        )


def _refuse_claims(path: Path, claimed: int, size: int, *, packed: bool) -> None:
    if claimed > size * (_DEFLATE_MOST if packed else 1):
        raise DataError(
            f"{path}: its header promises {claimed} bytes of voxels, but the file has only {size}. It is cut "
            "short or its header is damaged: fetch it again or leave it out."
        )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
