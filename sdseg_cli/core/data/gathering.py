"""What ``dataset.json`` says of the cases, gathered while they go by: hashes, counts, notes, problems."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sdseg_cli import __version__
from sdseg_cli.core.data.converting import ConvertedCase
from sdseg_cli.core.data.prepared import SPLITS, DatasetManifest
from sdseg_cli.core.data.raw_cases import Geometry, Problem
from sdseg_cli.core.data.splits import Split
from sdseg_cli.core.errors import DataError
from sdseg_cli.core.files import sha256_of

SheetItem = tuple[str, np.ndarray, np.ndarray]  # title, image, label map; both on the model grid


@dataclass(frozen=True)
class Description:
    """What ``dataset.json`` says beside the numbers.

    Attributes:
        name: of the dataset.
        classes: names, the background first.
        source: where the raw data came from.
        licence: terms of use of the raw data.
        details: further parameters worth recording (seeds, fractions, checksums).
    """

    name: str
    classes: tuple[str, ...]
    source: str
    licence: str
    details: Mapping[str, Any] = field(default_factory=dict)


class Gathered:
    """Hashes, counts and sheet items of the prepared cases, and the problems of the others."""

    def __init__(self, num_classes: int, problems: list[Problem]) -> None:
        self.problems = problems
        self.sheet: list[SheetItem] = []
        self.prepared: dict[str, list[tuple[str, str, str]]] = {name: [] for name in SPLITS}
        self._sources: dict[str, str] = {}
        self._notes: Counter[str] = Counter()
        self._pixels = {name: np.zeros(num_classes, np.int64) for name in SPLITS}
        self._present = {name: np.zeros(num_classes, np.int64) for name in SPLITS}
        self._total = 0

    def add(self, split: str, case: ConvertedCase) -> None:
        """Take in what was prepared of a case."""
        self.prepared[split] += [(case.case_id, case.group, digest) for digest in case.digests]
        self._sources.update(case.sources)
        self._notes.update(_kind_of(note) for note in case.notes)
        self._pixels[split] += case.class_pixels.sum(axis=0)
        self._present[split] += (case.class_pixels > 0).sum(axis=0)
        self._total += 1

    def refuse_without_foreground(self, classes: Sequence[str]) -> None:
        """Raise a DataError where not one mask holds any foreground."""
        if self._total and not sum(pixels[1:].sum() for pixels in self._pixels.values()):
            raise DataError(
                f"not one of the {self._total} masks holds any foreground ({', '.join(classes[1:])}). "
                "Check --threshold or --label-values against the values in the mask files."
            )

    def manifest(
        self, description: Description, geometry: Geometry, split: Split, files: dict[str, Path]
    ) -> DatasetManifest:
        """Make ``dataset.json``; ``split`` is what is left of it, ``files`` those of the dataset by name."""
        meaning = {
            "classes": description.classes,
            "image_size": geometry.image_size,
            "resize": geometry.resize,
            "splits": self.prepared,
        }
        canonical = json.dumps(meaning, sort_keys=True, ensure_ascii=True).encode()
        values = geometry.label_values
        preparation = {
            "sdseg_version": __version__,
            "split": split.name,
            "threshold": geometry.threshold,
            "label_values": None if values is None else {str(key): label for key, label in values.items()},
            "image_interpolation": "bicubic",
            **geometry.of_volumes,
            **description.details,
            "excluded": {problem.case_id: problem.reason for problem in self.problems},
            "notes": dict(sorted(self._notes.items())),
            "statistics": self._statistics(description.classes),
        }
        return DatasetManifest(
            name=description.name,
            classes=description.classes,
            image_size=geometry.image_size,
            resize=geometry.resize,
            source=description.source,
            licence=description.licence,
            splits={name: len(rows) for name, rows in self.prepared.items()},
            preparation=preparation,
            sources=dict(sorted(self._sources.items())),
            fingerprint=hashlib.sha256(canonical).hexdigest(),
            files={name: path.stat().st_size for name, path in files.items()},
            checksums={name: sha256_of(path) for name, path in files.items()},
        )

    def _statistics(self, classes: Sequence[str]) -> dict[str, Any]:
        """Per split and class: share of the pixels, and the number of slices that show it."""
        return {
            split: {
                name: {
                    "pixel_fraction": round(float(pixels[label] / max(1, pixels.sum())), 6),
                    "slices": int(self._present[split][label]),
                }
                for label, name in enumerate(classes)
            }
            for split, pixels in self._pixels.items()
        }


def _kind_of(note: str) -> str:
    """A note without its numbers, so that equal kinds are counted together."""
    return note.split(" from [")[0]
