"""One case brought to the model grid, as rows of a prepared dataset: the work of a single process."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdseg_cli.core.data.images import encode_png
from sdseg_cli.core.data.raw_cases import Geometry, Problem, RawCase, RawSlice, read_case, source_hashes
from sdseg_cli.core.errors import SdsegError
from sdseg_cli.core.grid import Grid


@dataclass(frozen=True)
class ConvertedCase:
    """A case on the model grid.

    Attributes:
        case_id: of the case.
        group: likewise.
        rows: of the dataset, one a slice.
        shape: of a slice on the case's own grid, in pixels.
        class_pixels: int64, (slices, K).
        notes: what was changed while reading.
        digests: SHA-256 of what each slice means.
        sources: name -> SHA-256 of the files it was read from.
    """

    case_id: str
    group: str
    rows: tuple[dict[str, Any], ...]
    shape: tuple[int, int]
    class_pixels: np.ndarray
    notes: tuple[str, ...]
    digests: tuple[str, ...]
    sources: dict[str, str]


def convert(case: RawCase, geometry: Geometry, split: str) -> ConvertedCase | Problem:
    """Read a case and bring it to the model grid, or say why it cannot be used."""
    rows, pixels, digests = [], [], []
    only_foreground = geometry.foreground_slices_only and split == "train" and case.is_volume
    try:
        slices, notes = read_case(case, geometry)
        for index, current in enumerate(slices):
            counts = np.bincount(current.label_map.ravel(), minlength=geometry.num_classes)
            if only_foreground and not counts[1:].any():
                continue
            row, digest = _row(case, index, current, geometry)
            rows.append(row)
            pixels.append(counts)
            digests.append(digest)
        sources = source_hashes(case)
    except SdsegError as error:
        return Problem(case.case_id, str(error))
    except OSError as error:
        return Problem(case.case_id, f"cannot be read: {error}")
    if not rows:
        return Problem(case.case_id, "not one slice holds any foreground, and only such are asked for.")
    shape = (rows[0]["height"], rows[0]["width"])
    counted = np.array(pixels, np.int64)
    return ConvertedCase(
        case.case_id, case.group, tuple(rows), shape, counted, notes, tuple(digests), sources
    )


def _row(case: RawCase, index: int, current: RawSlice, geometry: Geometry) -> tuple[dict[str, Any], str]:
    """A slice as a row of the dataset, and the hash of what it means."""
    height, width = current.label_map.shape
    grid = Grid(height, width, geometry.image_size, geometry.resize, current.crop)
    on_model_grid = grid.image_to_model(current.image)
    row = {
        "case_id": case.case_id,
        "slice_index": index,
        "group": case.group,
        "image": {"bytes": encode_png(on_model_grid), "path": None},
        "label_map": {"bytes": encode_png(current.label_map), "path": None},
        "height": height,
        "width": width,
        "spacing_mm": current.spacing_mm,
        "crop": current.crop,
    }
    # Pixels are hashed, not PNG bytes: another encoder version must not change the fingerprint.
    meaning = on_model_grid.tobytes() + current.label_map.tobytes()
    if current.spacing_mm is not None or current.crop is not None:
        meaning += repr((index, current.spacing_mm, current.crop)).encode()
    return row, hashlib.sha256(meaning).hexdigest()
