"""Headers of NRRD and MetaImage, read and judged before SimpleITK sees the file.

Its readers believe what a header says: an absurd number of dimensions ends the process, an infinite direction
hangs it, a file name may be a printf format or lead anywhere. So a header is read here first, and what cannot
be meant is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from sdseg_cli.core.errors import DataError

MAX_BYTES = 1 << 20
"""A header that does not end within so many bytes is refused."""
MAX_DIMENSIONS = 4
_LARGEST = 1e9  # of a spacing, an origin or a direction
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_META_WHOLE = ("NDims", "ElementNumberOfChannels", "HeaderSize", "CompressedDataSize")
_META_VECTORS = ("Offset", "Position", "Origin", "CenterOfRotation", "ElementSpacing", "ElementSize")
_META_MATRICES = ("TransformMatrix", "Rotation", "Orientation")
_META_JUDGED = frozenset(
    {*_META_WHOLE, *_META_VECTORS, *_META_MATRICES}
    | {"DimSize", "ElementType", "ElementDataFile", "CompressedData", "BinaryData"}
)
_NRRD_WHOLE = ("dimension", "spacedimension", "lineskip", "byteskip")
_NRRD_NUMBERS = (*("spacings", "spacedirections", "spaceorigin", "measurementframe", "thicknesses"),)
# None and NaN stand for axes that have no such number.
_NRRD_BLANKS = frozenset({"none", "nan"})


@dataclass(frozen=True)
class ItkHeader:
    """Where the voxels of a file are.

    Attributes:
        data: the file that holds them: the one with the header, or one beside it.
        offset: where they begin in it, in bytes; only of use for packed voxels and for sizes.
        packing: raw or gzip, else another word of the format (text, bzip2).
    """

    data: Path
    offset: int
    packing: str


def read_header(path: Path, start: bytes) -> ItkHeader:
    """Judge the header of a NRRD or MetaImage file.

    Args:
        path: the file, for messages and to find voxels beside it.
        start: its first bytes, :data:`MAX_BYTES` of them or all.

    Raises:
        DataError: it does not end, holds what is no number where one belongs, or points to a file that is not
            there, or not one beside the header.
    """
    return _nrrd(path, start) if start.startswith(b"NRRD") else _metaimage(path, start)


# ---- MetaImage ------------------------------------------------------------------------------------------


def _metaimage(path: Path, start: bytes) -> ItkHeader:
    fields: dict[str, str] = {}
    offset = 0
    while "ElementDataFile" not in fields:
        end = start.find(b"\n", offset)
        if end < 0 and (len(start) >= MAX_BYTES or offset >= len(start)):
            raise _unusable(path, "it names no ElementDataFile")
        line, offset = start[offset : end if end >= 0 else len(start)], (end + 1 if end >= 0 else len(start))
        text = line.decode("utf-8", "replace").strip()
        if not text:
            continue
        # Any other key is the writer's business: ITK keeps DICOM tags so, as "0008|0060 = MR".
        match = re.match(r"([^=:]+)[=:](.*)", text)
        if match is None:
            raise _unusable(path, f"it holds the line {text[:60]!r}, expected KEY = VALUE")
        key, value = match[1].strip(), match[2].strip()
        if key in fields and key in _META_JUDGED:
            raise _unusable(path, f"it states {key} twice")
        fields[key] = value
    _check_metaimage(path, fields)
    packing = "gzip" if fields.get("CompressedData", "") in ("True", "true", "1") else "raw"
    if fields.get("BinaryData", "True") not in ("True", "true", "1"):
        packing = "text"
    name = fields["ElementDataFile"]
    if name in ("LOCAL", "Local", "local"):
        return ItkHeader(path, offset, packing)
    return ItkHeader(_beside(path, name), 0, packing)


def _check_metaimage(path: Path, fields: Mapping[str, str]) -> None:
    for key in _META_WHOLE:
        if key in fields:
            _whole(path, key, fields[key])
    dimensions = _dimensions(path, "NDims", fields.get("NDims", ""))
    _sizes(path, "DimSize", fields.get("DimSize", ""), dimensions)
    counts = dict.fromkeys(_META_VECTORS, dimensions) | dict.fromkeys(_META_MATRICES, dimensions**2)
    for key, count in counts.items():
        if key in fields:
            _numbers(path, key, fields[key].split()[:count], count)  # what follows is not read
    if int(fields.get("ElementNumberOfChannels", 1)) not in range(1, 65):
        raise _unusable(path, f"its ElementNumberOfChannels is {fields['ElementNumberOfChannels'][:20]}")


# ---- NRRD -----------------------------------------------------------------------------------------------


def _nrrd(path: Path, start: bytes) -> ItkHeader:
    match = re.search(rb"\r?\n\r?\n", start)
    if match is None and len(start) >= MAX_BYTES:
        raise _unusable(path, f"it does not end within {MAX_BYTES} bytes")
    header, offset = (start, len(start)) if match is None else (start[: match.start()], match.end())
    fields: dict[str, str] = {}
    for line in header.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")[1:]:
        is_pair = ":=" in line and line.find(":=") < (line + ": ").find(": ")
        if line.startswith("#") or not line.strip() or is_pair:
            continue  # comments, and pairs of key and value, which say nothing about the voxels
        key, found, value = line.partition(":")
        key = re.sub(r"\s+", "", key).lower()
        if not found or not key:
            raise _unusable(path, f"it holds the line {line[:60]!r}, expected KEY: VALUE")
        if key in fields:
            raise _unusable(path, f"it states {key} twice")
        fields[key] = value.strip()
    _check_nrrd(path, fields)
    packing = {"gz": "gzip"}.get(encoding := fields.get("encoding", "raw").lower(), encoding)
    name = fields.get("datafile")
    if name is None:
        return ItkHeader(path, offset, packing)
    return ItkHeader(_beside(path, name), 0, packing)


def _check_nrrd(path: Path, fields: Mapping[str, str]) -> None:
    for key in _NRRD_WHOLE:
        if key in fields:
            _whole(path, key, fields[key])
    dimensions = _dimensions(path, "dimension", fields.get("dimension", ""))
    _sizes(path, "sizes", fields.get("sizes", ""), dimensions)
    for key in _NRRD_NUMBERS:
        if key in fields:
            words = [word for word in re.split(r"[\s(),]+", fields[key]) if word.lower() not in _NRRD_BLANKS]
            _numbers(path, key, [word for word in words if word], None)


# ---- parts ----------------------------------------------------------------------------------------------


def _dimensions(path: Path, key: str, text: str) -> int:
    count = _whole(path, key, text)
    if not 1 <= count <= MAX_DIMENSIONS:
        raise DataError(f"{path}: its header claims {count} dimensions; expected a single volume of three.")
    return count


def _sizes(path: Path, key: str, text: str, dimensions: int) -> None:
    sizes = [_whole(path, key, word) for word in text.split()]
    if len(sizes) != dimensions or min(sizes) < 1:
        raise _unusable(path, f"its {key} is {text[:60]!r}, expected {dimensions} positive numbers")


def _whole(path: Path, key: str, text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise _unusable(path, f"its {key} is {text[:60]!r}, expected a whole number")
    return int(text)


def _numbers(path: Path, key: str, words: list[str], count: int | None) -> None:
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = [math.nan]
    if not all(abs(value) <= _LARGEST for value in values):
        raise _unusable(path, f"its {key} is {' '.join(words)[:60]!r}, expected finite numbers")
    if count is not None and len(values) != count:
        raise _unusable(path, f"its {key} holds {len(values)} numbers, expected {count}")


def _beside(path: Path, name: str) -> Path:
    """The file of the voxels; one file, in the header's folder or below it."""
    words = name.split()
    if "%" in name or "\0" in name or (words and words[0] == "LIST"):
        raise DataError(
            f"{path}: its voxels are spread over several files ({name[:60]}); expected a single one. Save "
            "the volume as .nrrd, .mha or .nii.gz."
        )
    parts = PurePosixPath(name).parts
    windows = PureWindowsPath(name)
    if not parts or name.startswith(("/", "~")) or windows.drive or windows.root or ".." in windows.parts:
        raise DataError(
            f"{path}: its header looks for the voxels in {name[:200]!r}, outside its own folder, where it "
            "may not lead. Put both files into one folder and state the bare name."
        )
    data = path.parent / name
    if not data.is_file():
        raise DataError(f"{path}: its voxels are in {name}, which is not there. Fetch both files.")
    return data


def _unusable(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path}: its header cannot be used: {reason}. It is damaged: fetch it again or leave it out."
    )
