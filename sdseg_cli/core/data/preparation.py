"""From raw cases to a prepared dataset: read, check, bring to the model grid, write, in one pass.

Cases are read in parallel and in order; nothing appears under the final name unless every case was sound
(or was excluded by an explicit wish).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import parent_process
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdseg_cli import __version__
from sdseg_cli.core.data.dicom import DicomSeries
from sdseg_cli.core.data.dicom_seg import is_label_volume
from sdseg_cli.core.data.images import encode_png, read_image, read_label_map, read_orientation
from sdseg_cli.core.data.prepared import MANIFEST_FILE, SPLITS, DatasetManifest, decode_png
from sdseg_cli.core.data.slicing import Axis
from sdseg_cli.core.data.splits import Split, split_to_yaml
from sdseg_cli.core.data.volume_files import volume_suffix
from sdseg_cli.core.data.volumes import files_of_volume
from sdseg_cli.core.errors import DataError, SdsegError
from sdseg_cli.core.files import refuse_existing, sha256_of, sum_of_files, whole_folder
from sdseg_cli.core.grid import Box, Grid, Resize

if TYPE_CHECKING:
    import pyarrow

SPLIT_FILE = "split.yaml"
SHEET_FILE = "contact_sheet.png"
_SHEET_ITEMS = 24
_SHOWN_PROBLEMS = 100
_BATCH_ROWS = 64  # of an arrow file; a prepared slice takes some 150 kB
_AHEAD = 32  # cases; a prepared volume takes some 30 MB
_SIGNALS_OF_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

SheetItem = tuple[str, np.ndarray, np.ndarray]  # title, image, label map; both on the model grid


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


@dataclass(frozen=True)
class CaseRecord:
    """What became of one case; yielded while preparing.

    Attributes:
        case_id: of the case.
        split: it belongs to.
        problem: why it cannot be used; empty if it was prepared.
        height: of a slice on the case's own grid, in pixels; 0 with a problem.
        width: likewise.
        slices: how many were prepared.
        class_pixels: pixels of every class on the case's own grid.
        notes: what was changed while reading.
    """

    case_id: str
    split: str
    problem: str
    height: int
    width: int
    slices: int
    class_pixels: tuple[int, ...]
    notes: tuple[str, ...]


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


def prepare(
    cases: Sequence[RawCase],
    split: Split,
    out: Path,
    *,
    description: Description,
    geometry: Geometry,
    problems: Sequence[Problem] = (),
    exclude_bad: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    draw_sheet: Callable[[Sequence[SheetItem]], np.ndarray] | None = None,
) -> Iterator[CaseRecord]:
    """Prepare a dataset; a generator: nothing happens until it is read to its end.

    Args:
        cases: what to prepare; every case of ``split`` must be among them.
        split: see ``splits.py``.
        out: final folder; made at the end, in one piece.
        description: goes into ``dataset.json``.
        geometry: how to read, and the model grid.
        problems: found before reading (a missing mate); they count like those found here.
        exclude_bad: leave bad cases out and record them, instead of refusing.
        overwrite: replace an existing prepared dataset.
        workers: processes; None takes the number of cores, and this process alone for a few cases.
        draw_sheet: draws the contact sheet: takes (title, image, label map) items, returns uint8
            (H, W, 3); without it there is none.

    Yields:
        One record a case, in the order of the splits.

    Raises:
        DataError: bad cases, all listed in one message; nothing was written then.
        UsageError: ``out`` exists and may not be replaced.
    """
    refuse_existing(out, overwrite=overwrite, ours=MANIFEST_FILE)
    if problems and not exclude_bad and not cases:
        raise DataError(_problem_listing(problems, total=len(problems)))
    by_id = {case.case_id: case for case in cases}
    ordered = [(name, by_id[case_id]) for name, ids in split.parts().items() for case_id in ids]
    sheet_ids = _evenly(split)
    gathered = _Gathered(geometry.num_classes, [*problems])
    with whole_folder(out, overwrite=overwrite, ours=MANIFEST_FILE) as work:
        with _Tables(work / "raw") as tables, _executor(workers, len(ordered)) as executor:
            jobs = (partial(_convert, case, geometry, name) for name, case in ordered)
            for (name, _), result in zip(ordered, _in_order(executor, jobs), strict=True):
                if isinstance(result, Problem):
                    gathered.problems.append(result)
                    yield CaseRecord(result.case_id, name, result.reason, 0, 0, 0, (), ())
                    continue
                for row in result.rows:
                    tables.add(name, row)
                gathered.add(name, result)
                # The chosen cases may all be bad ones; a sheet shows one case at least.
                is_shown = result.case_id in sheet_ids or not gathered.sheet
                if is_shown and draw_sheet is not None:
                    gathered.sheet.append(_sheet_item(name, result, geometry))
                totals = tuple(map(int, result.class_pixels.sum(axis=0)))
                yield CaseRecord(
                    result.case_id, name, "", *result.shape, len(result.rows), totals, result.notes
                )
        excluded = gathered.problems
        if excluded and not exclude_bad:
            raise DataError(_problem_listing(excluded, total=len(cases) + len(problems)))
        if not any(gathered.prepared.values()):
            raise DataError("no case is left to prepare: " + _problem_listing(excluded, total=len(excluded)))
        gathered.refuse_without_foreground(description.classes)
        tables.save(work)
        used = split.without(problem.case_id for problem in excluded)
        header = f"The split of {description.name} as prepared."
        (work / SPLIT_FILE).write_text(split_to_yaml(used, header), encoding="utf-8")
        if draw_sheet is not None:
            (work / SHEET_FILE).write_bytes(encode_png(draw_sheet(gathered.sheet)))
        manifest = gathered.manifest(description, geometry, used, _files(work))
        (work / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")


# ---- one case, in a worker process ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Converted:
    case_id: str
    group: str
    rows: tuple[dict[str, Any], ...]  # of the dataset, one a slice
    shape: tuple[int, int]
    class_pixels: np.ndarray  # int64, (slices, K)
    notes: tuple[str, ...]
    digests: tuple[str, ...]  # one a slice
    sources: dict[str, str]


def _convert(case: RawCase, geometry: Geometry, split: str) -> _Converted | Problem:
    rows, pixels, digests = [], [], []
    only_foreground = geometry.foreground_slices_only and split == "train" and case.is_volume
    try:
        slices, notes = _read_case(case, geometry)
        for index, current in enumerate(slices):
            counts = np.bincount(current.label_map.ravel(), minlength=geometry.num_classes)
            if only_foreground and not counts[1:].any():
                continue
            row, digest = _row(case, index, current, geometry)
            rows.append(row)
            pixels.append(counts)
            digests.append(digest)
        sources = _source_hashes(case)
    except SdsegError as error:
        return Problem(case.case_id, str(error))
    except OSError as error:
        return Problem(case.case_id, f"cannot be read: {error}")
    if not rows:
        return Problem(case.case_id, "not one slice holds any foreground, and only such are asked for.")
    shape = (rows[0]["height"], rows[0]["width"])
    counted = np.array(pixels, np.int64)
    return _Converted(case.case_id, case.group, tuple(rows), shape, counted, notes, tuple(digests), sources)


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


def _read_case(case: RawCase, geometry: Geometry) -> tuple[Iterable[RawSlice], tuple[str, ...]]:
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


def _source_hashes(case: RawCase) -> dict[str, str]:
    """Name -> SHA-256 of the files that hold the image, its further channels and its labels."""
    if case.image_path is None or case.label_path is None:
        return {}
    image_files = files_of_volume(case.image_path) if case.series is None else case.series.files
    return {
        case.image_name or case.image_path.name: sum_of_files(image_files),
        **{path.name: sum_of_files(files_of_volume(path)) for path in case.channel_paths},
        case.label_name or case.label_path.name: sum_of_files(files_of_volume(case.label_path)),
    }


# ---- parallel, in order, bounded ------------------------------------------------------------------------


@contextlib.contextmanager
def _executor(workers: int | None, cases: int) -> Iterator[ProcessPoolExecutor | None]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = workers if workers is not None else (min(cores, 16) if cases >= 64 else 1)
    if count <= 1:
        yield None
        return
    executor = ProcessPoolExecutor(count, mp_context=_Context(), initializer=_watch_parent)
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


class _Worker(SpawnProcess):
    """A process that leaves the signals which end a command to its parent.

    Ctrl-C, a closed terminal and a scheduler's SIGTERM reach every process of the group. A worker that acted
    on them would print of its own, or be taken for one that died for lack of memory.
    """

    def start(self) -> None:
        """Start with these signals blocked: the mask is inherited, and holds from the first moment on."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS_OF_THE_PARENT)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def terminate(self) -> None:
        """The pool ends the others so when one has died."""
        self.kill()


class _Context(SpawnContext):
    """Spawned, not forked: a fork of a process with threads (arrow's, torch's) can hang."""

    Process = _Worker


def _watch_parent() -> None:
    """End this process with its parent, which may be killed: it would wait for work for ever."""
    parent = parent_process()
    assert parent is not None  # noqa: S101  (a worker is started by somebody)

    def end() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end, daemon=True).start()


def _in_order(
    executor: ProcessPoolExecutor | None, jobs: Iterable[Callable[[], _Converted | Problem]]
) -> Iterator[_Converted | Problem]:
    """Run jobs ahead of the reader, but only so many that memory stays bounded."""
    if executor is None:
        for job in jobs:
            yield job()
        return
    ahead: deque[Future[_Converted | Problem]] = deque()
    try:
        for job in jobs:
            ahead.append(executor.submit(job))
            if len(ahead) >= _AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process ended unexpectedly, most likely for lack of memory. Try again with --workers 1."
        ) from error


# ---- what is gathered while the cases go by -------------------------------------------------------------


class _Gathered:
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

    def add(self, split: str, case: _Converted) -> None:
        self.prepared[split] += [(case.case_id, case.group, digest) for digest in case.digests]
        self._sources.update(case.sources)
        self._notes.update(_kind_of(note) for note in case.notes)
        self._pixels[split] += case.class_pixels.sum(axis=0)
        self._present[split] += (case.class_pixels > 0).sum(axis=0)
        self._total += 1

    def refuse_without_foreground(self, classes: Sequence[str]) -> None:
        if self._total and not sum(pixels[1:].sum() for pixels in self._pixels.values()):
            raise DataError(
                f"not one of the {self._total} masks holds any foreground ({', '.join(classes[1:])}). "
                "Check --threshold or --label-values against the values in the mask files."
            )

    def manifest(
        self, description: Description, geometry: Geometry, split: Split, files: dict[str, Path]
    ) -> DatasetManifest:
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


def _evenly(split: Split) -> frozenset[str]:
    """The cases of the contact sheet: spread over the splits by their size, each split shown."""
    parts = {name: ids for name, ids in split.parts().items() if ids}
    total = sum(map(len, parts.values()))
    counts = {name: min(len(ids), max(3, _SHEET_ITEMS * len(ids) // total)) for name, ids in parts.items()}
    largest = max(counts, key=lambda name: counts[name], default="")
    if largest:
        counts[largest] = min(len(parts[largest]), _SHEET_ITEMS - sum(counts.values()) + counts[largest])
    chosen = [
        ids[index * len(ids) // counts[name]] for name, ids in parts.items() for index in range(counts[name])
    ]
    return frozenset(chosen)


def _sheet_item(split: str, case: _Converted, geometry: Geometry) -> SheetItem:
    """The slice of the case that shows most of the foreground."""
    row = case.rows[int(case.class_pixels[:, 1:].sum(axis=1).argmax())]
    image, label_map = decode_png(row["image"]["bytes"]), decode_png(row["label_map"]["bytes"])
    grid = Grid(*case.shape, geometry.image_size, geometry.resize, row["crop"])
    return f"{split}: {case.case_id}", image, grid.labels_to_model(label_map)


def _problem_listing(problems: Sequence[Problem], total: int) -> str:
    lines = [f"  {problem.case_id}: {problem.reason}" for problem in problems[:_SHOWN_PROBLEMS]]
    if len(problems) > _SHOWN_PROBLEMS:
        lines.append(f"  and {len(problems) - _SHOWN_PROBLEMS} more")
    return (
        f"{len(problems)} of {total} cases cannot be used; nothing was prepared:\n"
        + "\n".join(lines)
        + "\nMend them, or pass --exclude-bad to leave them out (dataset.json then lists them)."
    )


# ---- arrow files ----------------------------------------------------------------------------------------


class _Tables:
    """One arrow stream a split, written some rows at a time, then saved as a DatasetDict."""

    def __init__(self, folder: Path) -> None:
        import datasets

        self._folder = folder
        self._features = datasets.Features(
            {
                "case_id": datasets.Value("string"),
                "slice_index": datasets.Value("int32"),
                "group": datasets.Value("string"),
                "image": datasets.Image(),
                "label_map": datasets.Image(),
                "height": datasets.Value("int32"),
                "width": datasets.Value("int32"),
                "spacing_mm": datasets.Sequence(datasets.Value("float64")),
                "crop": datasets.Sequence(datasets.Value("int32")),
            }
        )
        self._writers: dict[str, pyarrow.RecordBatchStreamWriter] = {}
        self._waiting: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}

    def __enter__(self) -> _Tables:
        import pyarrow

        self._folder.mkdir()
        schema = self._features.arrow_schema
        self._writers = {
            name: pyarrow.ipc.new_stream(str(self._folder / f"{name}.arrow"), schema) for name in SPLITS
        }
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for split, writer in self._writers.items():
            if self._waiting[split] and kind is None:  # after a failure all of it is thrown away
                self._write(split)
            writer.close()

    def add(self, split: str, row: dict[str, Any]) -> None:
        # Every batch of a mapped file costs kilobytes of memory: a batch a row would be felt from 10,000 on.
        waiting = self._waiting[split]
        waiting.append(row)
        if len(waiting) >= _BATCH_ROWS:
            self._write(split)

    def _write(self, split: str) -> None:
        import pyarrow

        batch = pyarrow.RecordBatch.from_pylist(self._waiting[split], schema=self._features.arrow_schema)
        self._writers[split].write_batch(batch)
        self._waiting[split] = []

    def save(self, root: Path) -> None:
        import datasets

        parts = {name: datasets.Dataset.from_file(str(self._folder / f"{name}.arrow")) for name in SPLITS}
        bars_were_on = datasets.utils.logging.is_progress_bar_enabled()
        datasets.disable_progress_bars()  # the console draws, nobody else
        try:
            datasets.DatasetDict(parts).save_to_disk(str(root))
        finally:
            if bars_were_on:
                datasets.enable_progress_bars()
        del parts
        shutil.rmtree(self._folder)


def _files(root: Path) -> dict[str, Path]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path for path in files}
