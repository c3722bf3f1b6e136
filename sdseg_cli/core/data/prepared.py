"""A prepared dataset on disk: a ``datasets`` DatasetDict, and ``dataset.json`` that says what it is.

``preparation.py`` writes it; everything else reads it through :class:`PreparedDataset`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image
from pydantic import TypeAdapter

from sdseg_cli.core.errors import DataError, UsageError
from sdseg_cli.core.grid import Grid, Resize

SPLITS: tuple[str, ...] = ("train", "validation", "test")
MANIFEST_FILE = "dataset.json"
FORMAT_VERSION = 1
_COLUMNS = {"case_id", "slice_index", "group", "image", "label_map", "height", "width", "spacing_mm"}


@dataclass(frozen=True)
class DatasetManifest:
    """What ``dataset.json`` holds.

    Attributes:
        name: of the dataset.
        classes: names in the order of the label map's numbers, the background first.
        image_size: side of the model grid, in pixels.
        resize: how images were brought to the model grid.
        source: where the raw data came from.
        licence: terms of use of the raw data, as its owners state them.
        splits: split -> number of slices.
        preparation: every parameter of the preparation, the excluded cases and statistics.
        sources: raw file -> SHA-256.
        fingerprint: SHA-256 over images, label maps, case ids, splits, classes and geometry.
        files: file of the prepared dataset -> size in bytes, to notice a torn copy.
        checksums: the same files -> SHA-256, for ``sdseg verify``; absent from datasets of older versions.
        version: of this format.
    """

    name: str
    classes: tuple[str, ...]
    image_size: int
    resize: Resize
    source: str
    licence: str
    splits: dict[str, int]
    preparation: dict[str, Any]
    sources: dict[str, str]
    fingerprint: str
    files: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    version: int = FORMAT_VERSION

    @property
    def num_classes(self) -> int:
        """Number of classes, the background included."""
        return len(self.classes)

    def to_json(self) -> str:
        """Write as JSON text, keys in the order of the class."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> DatasetManifest:
        """Read from JSON text.

        Raises:
            ValueError: not JSON, or keys are missing or of another kind, or written by a newer sdseg.
        """
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError("expected an object")  # noqa: TRY004  (every fault of the text is a ValueError)
        if record.get("version", 0) > FORMAT_VERSION:
            raise ValueError(f"format version {record['version']}, this sdseg reads up to {FORMAT_VERSION}")
        names = {entry.name for entry in fields(cls)}
        missing = sorted(names - record.keys() - {"checksums"})
        if missing:
            raise ValueError(f"missing {', '.join(missing)}")
        known = {name: record[name] for name in names & record.keys()}
        found: DatasetManifest = TypeAdapter(cls).validate_python(known)
        if set(found.splits) != set(SPLITS) or min(found.splits.values()) < 0:
            raise ValueError(f"splits are {dict(found.splits)}, expected the sizes of {', '.join(SPLITS)}")
        if found.image_size < 1 or len(found.classes) < 2:
            raise ValueError(f"image_size is {found.image_size} and there are {len(found.classes)} classes")
        return found


@dataclass(frozen=True)
class PreparedSlice:
    """One slice of a prepared case.

    Attributes:
        case_id: unique in the dataset.
        slice_index: 0 for a 2-D image.
        group: patient or sequence; the case id where there is none.
        image: uint8, (S, S, 3), range [0, 255], on the model grid.
        label_map: uint8, (H, W), class indices on the case's own grid.
        grid: from one grid to the other.
        spacing_mm: mm between the (rows, columns) of an image, or the (slices, rows, columns) of a volume;
            None if unknown.
    """

    case_id: str
    slice_index: int
    group: str
    image: np.ndarray
    label_map: np.ndarray
    grid: Grid
    spacing_mm: tuple[float, ...] | None


class SplitView(Sequence[PreparedSlice]):
    """The slices of one split, decoded on access; can be sent to loader processes."""

    def __init__(self, root: Path, name: str, length: int, image_size: int, resize: Resize) -> None:
        self.root = root
        self.name = name
        self._length = length
        self._image_size = image_size
        self._resize = resize
        self._table: Any = None

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> PreparedSlice: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PreparedSlice]: ...
    def __getitem__(self, index: int | slice) -> PreparedSlice | Sequence[PreparedSlice]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"split {self.name} has {len(self)} slices, asked for number {index}")
        row = self._rows()[position]
        try:
            return self._slice(row)
        except Exception as error:  # decoders raise almost anything on damaged bytes
            raise DataError(
                f"{self.root}: slice {row['case_id']} of split {self.name} is damaged ({error}). "
                "Prepare the dataset again."
            ) from error

    def _slice(self, row: Mapping[str, Any]) -> PreparedSlice:
        image, label_map = decode_png(row["image"]["bytes"]), decode_png(row["label_map"]["bytes"])
        spacing, crop = row["spacing_mm"], row.get("crop")
        height, width, size = row["height"], row["width"], self._image_size
        if image.shape != (size, size, 3) or label_map.shape != (height, width):
            raise ValueError(f"its image is {image.shape}, its label map {label_map.shape}")
        return PreparedSlice(
            case_id=row["case_id"],
            slice_index=row["slice_index"],
            group=row["group"],
            image=image,
            label_map=label_map,
            grid=Grid(height, width, size, self._resize, tuple(crop) if crop else None),
            spacing_mm=None if spacing is None else tuple(spacing),
        )

    @property
    def case_ids(self) -> list[str]:
        """The case id of every slice, in order; nothing is decoded."""
        return list(self._rows()["case_id"]) if len(self) else []

    @property
    def groups(self) -> list[str]:
        """The group of every slice, in order; nothing is decoded."""
        return list(self._rows()["group"]) if len(self) else []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}  # each process maps the file itself

    def _rows(self) -> Any:
        if self._table is None:
            self._table = _load_split(self.root, self.name, self._length)
        return self._table


class PreparedDataset:
    """A prepared dataset, opened for reading.

    Attributes:
        root: its folder.
        manifest: its ``dataset.json``.
    """

    def __init__(self, root: Path, manifest: DatasetManifest) -> None:
        self.root = root
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> PreparedDataset:
        """Open a prepared dataset and check that it is whole.

        Raises:
            DataError: there is none, or it is torn; the message holds the command that makes it.
        """
        root = Path(path)
        manifest = _read_manifest(root)
        for name, expected in manifest.files.items():
            file = root / name
            found = file.stat().st_size if file.is_file() else None
            if found != expected:
                state = "is missing" if found is None else f"has {found} bytes"
                raise DataError(
                    f"{root}: the dataset is torn: {name} {state}, expected {expected} bytes. {_remedy(root)}"
                )
        return cls(root, manifest)

    def split(self, name: str) -> SplitView:
        """Give a split by name: train, validation or test.

        Raises:
            UsageError: there is no split of that name.
        """
        counts = self.manifest.splits
        if name not in counts:
            raise UsageError(f"{self.root}: no split {name!r}; there are {', '.join(counts)}.")
        return SplitView(self.root, name, counts[name], self.manifest.image_size, self.manifest.resize)


def _read_manifest(root: Path) -> DatasetManifest:
    file = root / MANIFEST_FILE
    try:
        return DatasetManifest.from_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        found = f"the folder has no {MANIFEST_FILE}" if root.is_dir() else "there is no such folder"
        raise DataError(f"{root}: not a prepared dataset: {found}. {_remedy(root)}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{file}: cannot be read ({error}). {_remedy(root)}") from error


def _remedy(root: Path) -> str:
    known = {"kseg", "cvc", "refuge", "btcv", "sts3d", "phantom"}
    benchmark = next((name for name in known if root.name == name), None)
    command = (
        f"prepare {benchmark}" if benchmark else "prepare kseg|cvc|refuge|btcv|sts3d|nnunet|folder|phantom"
    )
    if (root / MANIFEST_FILE).is_file():
        return f"Make it with: sdseg {command} --out {root} --overwrite"
    if root.exists():  # somebody's files, which prepare would not replace
        return f"Give the folder that sdseg prepare made, or make one: sdseg {command} --out FOLDER"
    return f"Make it with: sdseg {command} --out {root}"


def _load_split(root: Path, name: str, length: int) -> Any:
    import datasets

    try:
        table = datasets.Dataset.load_from_disk(str(root / name))
        for column in ("image", "label_map"):
            # The bytes as they are: decoding here spares the detour over the library's image objects.
            table = table.cast_column(column, datasets.Image(decode=False))
        # Offsets that lead outside the file would end the process; the bytes they lead to are not read here.
        table.data.table.validate(full=True)
        absent = _COLUMNS - table[0].keys() if len(table) else set()  # as its own description has them
    except Exception as error:  # arrow and json raise their own families on damaged files
        raise DataError(f"{root / name}: the split cannot be read ({error}). {_remedy(root)}") from error
    if absent:
        raise DataError(f"{root / name}: has no column {', '.join(sorted(absent))}. {_remedy(root)}")
    if len(table) != length:
        raise DataError(f"{root / name}: holds {len(table)} slices, expected {length}. {_remedy(root)}")
    return table


def decode_png(payload: bytes) -> np.ndarray:
    """Decode the PNG bytes of one cell; uint8 (H, W) or (H, W, 3)."""
    with Image.open(io.BytesIO(payload)) as picture:
        return np.array(picture)
