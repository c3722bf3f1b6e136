"""Prediction of many image files: read ahead, predict in batches, write behind, lose nothing that is done.

Planning (which image gives which files) is separate from predicting, needs no torch and refuses what
would overwrite anything, so that a mistake costs a second and not a night. Memory is bounded by the
number of images read ahead, whatever the number of files.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from sdseg_cli.core.data.images import (
    LoadedImage,
    lay_on_stored_grid,
    list_images,
    read_image,
    write_label_map,
    write_png,
)
from sdseg_cli.core.errors import DataError, SdsegError, UsageError
from sdseg_cli.core.files import write_whole
from sdseg_cli.core.grid import Grid
from sdseg_cli.core.metrics.overlap import predicted_dice

if TYPE_CHECKING:
    from sdseg_cli.core.engine.inference import Predictor, SliceInput, SlicePrediction

Status = Literal["done", "skipped", "failed"]

OVERLAYS, PROBABILITIES, UNCERTAINTY = "overlays", "probabilities", "uncertainty"
SUMMARY_FILE = "summary.csv"
LONGEST_NAME = 255  # bytes of one path component on every common file system
OVERLAY_ALPHA = 0.35
# A file system in one of these states fails every later mask too: going on would only repeat the message.
FATAL_WRITE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


@dataclass(frozen=True)
class PredictionTask:
    """One image and the files its prediction gives.

    ``case_id`` is the image's path inside the given folder without its suffix (with it where two images
    differ in nothing else). It names the outputs and, with the seed, decides the noise.
    ``probabilities`` has no suffix yet: the model's number of classes decides between .png and .npz.
    """

    case_id: str
    path: Path
    file: str
    mask: Path
    overlay: Path | None = None
    probabilities: Path | None = None
    uncertainty: Path | None = None

    @property
    def outputs(self) -> tuple[Path, ...]:
        """Every file that could be written, for both kinds of probability files."""
        paths: list[Path | None] = [self.mask, self.overlay, self.uncertainty]
        paths += probability_files(self.probabilities)
        return tuple(path for path in paths if path is not None)

    @property
    def is_done(self) -> bool:
        """Whether all that was asked for is there already. Files get their name only when whole."""
        single = (self.mask, self.overlay, self.uncertainty)
        if not all(path is None or path.exists() for path in single):
            return False
        files = probability_files(self.probabilities)
        return not files or any(path.exists() for path in files)


@dataclass(frozen=True)
class CasePrediction:
    """What became of one image.

    ``width`` and ``height`` are those of the upright image in pixels, ``areas_px`` the pixels of every
    foreground class, ``mean_uncertainty`` the mean over the image of the standard deviation between
    samples and ``predicted_dice`` how far the masks of the samples agree (both None with one sample; the
    latter also where no sample found anything), ``seconds`` the wall-clock time since the record before.
    """

    case_id: str
    file: str
    status: Status
    width: int | None = None
    height: int | None = None
    areas_px: Mapping[str, int] = field(default_factory=dict)
    mean_uncertainty: float | None = None
    predicted_dice: float | None = None
    seconds: float = 0.0
    error: str = ""
    notes: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------- planning


def plan_predictions(
    scans: Sequence[Path],
    out: Path,
    *,
    recursive: bool = False,
    overlays: bool = False,
    probabilities: bool = False,
    uncertainty: bool = False,
) -> list[PredictionTask]:
    """Find the images and give every output a name of its own.

    Args:
        scans: folders of images, or single images.
        out: folder of the outputs; masks lie in it directly, the rest in subfolders.
        recursive: also look into subfolders of the folders; they are kept in ``out``.
        overlays, probabilities, uncertainty: which further files are wanted.

    Returns:
        One task an image, sorted by folder as given and name.

    Raises:
        UsageError: a path does not exist, no image is found, or an output would fall onto an input
            or onto another output.
    """
    found = _find_images(scans, out, recursive=recursive)
    relatives = [relative for _, relative in found]
    twice = [str(relative) for relative, count in Counter(relatives).items() if count > 1]
    if twice:
        raise UsageError(
            f"{len(twice)} images have the same name in several of the given folders (first: "
            f"{readable(twice[0])}), so their masks would overwrite each other. Give the folder above them "
            "with --recursive, or predict each folder into its own --out."
        )
    names = _unique_names(relatives)
    tasks = []
    for (path, relative), name in zip(found, names, strict=True):
        file_name = Path(*name.parts[:-1], _fitting(f"{name.name}.png"))
        bare = file_name.with_name(file_name.name[: -len(".png")])
        tasks.append(
            PredictionTask(
                case_id=readable(name.as_posix()),
                path=path,
                file=readable(relative.as_posix()),
                mask=out / file_name,
                overlay=out / OVERLAYS / file_name if overlays else None,
                probabilities=out / PROBABILITIES / bare if probabilities else None,
                uncertainty=out / UNCERTAINTY / file_name if uncertainty else None,
            )
        )
    _refuse_collisions(tasks)
    return tasks


def split_existing(tasks: Sequence[PredictionTask]) -> tuple[list[PredictionTask], list[PredictionTask]]:
    """Separate the tasks into (to do, already done)."""
    todo: list[PredictionTask] = []
    done: list[PredictionTask] = []
    for task in tasks:
        (done if task.is_done else todo).append(task)
    return todo, done


def refuse_existing(tasks: Sequence[PredictionTask], out: Path) -> None:
    """Refuse to overwrite; UsageError names the first file that is in the way, and how many there are."""
    existing = [path for task in tasks for path in task.outputs if path.exists()]
    if existing:
        raise UsageError(
            f"{len(existing)} of the files to be written exist already in {readable(out)} (first: "
            f"{readable(existing[0].relative_to(out))}). Pass --skip-existing to predict only what is "
            "missing, --overwrite to replace them, or another --out."
        )


def remove_outputs(tasks: Iterable[PredictionTask]) -> None:
    """Remove what is to be replaced, all of it before the first new mask is written.

    Otherwise an interrupted replacement leaves masks of two models side by side, and those of the old one
    would count as done when it goes on.
    """
    for task in tasks:
        for path in task.outputs:
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                path.unlink()


def prepare_folder(out: Path) -> None:
    """Make the output folder and see that it can be written to, before any model is loaded."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".sdseg-probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"the output folder {readable(out)} cannot be written to ({error.strerror or error}). "
            "Choose another --out, or mend its permissions."
        ) from error


def readable(name: str | Path) -> str:
    """A path as text that can always be printed and stored: undecodable bytes become backslash escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def probability_files(stem: Path | None) -> list[Path]:
    """The two files a case's probabilities can be in: 16-bit PNG for one class, .npz for several."""
    if stem is None:
        return []
    return [stem.with_name(stem.name + suffix) for suffix in (".png", ".npz")]


def _find_images(scans: Sequence[Path], out: Path, *, recursive: bool) -> list[tuple[Path, Path]]:
    """(path, path relative to the folder it was found in) of every image, outputs of ours left out."""
    found: list[tuple[Path, Path]] = []
    for scan in scans:
        if scan.is_dir():
            if scan.resolve() == out.resolve():
                raise UsageError(
                    f"{readable(out)} is the folder of the images; masks in it would be taken for images the "
                    f"next time. Choose another --out, {readable(out / 'masks')} for instance."
                )
            inside = list_images(scan, recursive=recursive)
            if recursive and _is_inside(out, scan):
                inside = [path for path in inside if not _is_inside(path, out)]
            if not inside:
                hint = "" if recursive else " directly in it; pass --recursive to look into its subfolders"
                raise UsageError(
                    f"{readable(scan)}: no PNG, JPEG, TIFF or BMP image was found{hint}. Check the folder."
                )
            found += [(path, path.relative_to(scan)) for path in inside]
        elif scan.exists():  # by name, whatever its suffix: a file that is no image fails when it is read
            found.append((scan, Path(scan.name)))
        else:
            raise UsageError(f"{readable(scan)} does not exist. Give an image, or a folder of images.")
    return found


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _unique_names(relatives: Sequence[Path]) -> list[Path]:
    """Names without suffix; where several images would share one, each of them keeps its suffix."""
    names = [relative.with_suffix("") for relative in relatives]
    while True:
        counts = Counter(names)
        kept = [
            relative if counts[name] > 1 else name for name, relative in zip(names, relatives, strict=True)
        ]
        if kept == names:
            return names
        names = kept


def _fitting(name: str) -> str:
    """Shorten a file name that the suffix made too long; a hash of the whole keeps it unique."""
    encoded = os.fsencode(name)
    if len(encoded) <= LONGEST_NAME:
        return name
    mark = "~" + hashlib.sha256(encoded).hexdigest()[:12]
    # Dropping a character cut in the middle: a broken one could not be printed.
    head = encoded[: LONGEST_NAME - len(mark) - len(".png")].decode("utf-8", "ignore")
    return f"{head}{mark}.png"


def _refuse_collisions(tasks: Sequence[PredictionTask]) -> None:
    resolved = _Resolver()
    inputs = {resolved(task.path): task.path for task in tasks}
    writer: dict[Path, str] = {}
    for task in tasks:
        for path in task.outputs:
            if resolved(path) in inputs:
                raise UsageError(
                    f"the mask of {task.file} would be written onto the input {readable(path)}. "
                    "Choose an --out that is not the folder of the images."
                )
            other = writer.setdefault(path, task.file)
            if other != task.file:
                raise UsageError(
                    f"{readable(path)} would be written for both {other} and {task.file}: the folder names "
                    f"{OVERLAYS}, {PROBABILITIES} and {UNCERTAINTY} are used for the extra outputs. Rename "
                    "that folder of images, or predict it on its own."
                )


class _Resolver:
    """Resolves the folder of a path, each folder once: with thousands of files that is what takes time."""

    def __init__(self) -> None:
        self._folders: dict[Path, Path] = {}

    def __call__(self, path: Path) -> tuple[Path, str]:
        folder = self._folders.get(path.parent)
        if folder is None:
            folder = self._folders[path.parent] = path.parent.resolve()
        return folder, path.name


# -------------------------------------------------------------------------------------------- predicting


@dataclass(frozen=True)
class _ReadCase:
    task: PredictionTask
    slice_input: SliceInput
    orientation: int
    notes: tuple[str, ...]
    pixels: np.ndarray | None  # upright, only where an overlay is wanted


def predict_files(
    tasks: Iterable[PredictionTask], predictor: Predictor, *, readers: int = 4, writers: int = 2
) -> Iterator[CasePrediction]:
    """Predict every image; nothing happens until the records are read.

    An image that cannot be read, or whose outputs cannot be written, is a record with status
    ``failed``; the others go on. At most ``readers`` + the predictor's batch + ``writers`` images are held
    in memory.

    Args:
        tasks: from :func:`plan_predictions`.
        predictor: makes label maps on the case's own grid, in order.
        readers, writers: threads that decode images ahead of the model and encode masks behind it.

    Yields:
        One record an image, in the order in which they are settled.

    Raises:
        DataError: the disk is full or read-only. The records of all that was written come first.
        SdsegError: whatever stops the predictor itself, also after the records of what was written.
    """
    reading = ThreadPoolExecutor(readers, thread_name_prefix="sdseg-read")
    writing = ThreadPoolExecutor(writers, thread_name_prefix="sdseg-write")
    stream = _ReadStream(tasks, predictor, reading, ahead=2 * readers)
    written: deque[tuple[PredictionTask, Future[CasePrediction]]] = deque()
    stop: SdsegError | None = None
    clock = _Clock()

    def settle(most: int) -> Iterator[CasePrediction]:
        """Yield what was written, oldest first, until at most ``most`` writes are under way."""
        nonlocal stop
        while len(written) > most:
            task, future = written.popleft()
            try:
                record = future.result()
            except OSError as error:
                if error.errno in FATAL_WRITE_ERRORS:
                    stop = stop or _fatal(task, error)
                record = _failed(task, f"cannot be written: {error.strerror or error}")
            yield clock.stamp(record)

    try:
        predictions = iter(predictor(stream))
        while stop is None:
            try:
                prediction = next(predictions, None)
            except SdsegError as error:
                stop = error
                break
            yield from map(clock.stamp, stream.take_failures())
            if prediction is None:
                break
            case = stream.take(prediction)
            future = writing.submit(_write_case, case, prediction, tuple(predictor.classes))
            written.append((case.task, future))
            yield from settle(most=2 * writers)
        yield from settle(most=0)
        if stop is not None:
            raise stop
    finally:
        # Writes under way are finished (a mask gets its name only when whole), the rest is dropped.
        reading.shutdown(wait=False, cancel_futures=True)
        writing.shutdown(wait=True, cancel_futures=True)


class _ReadStream:
    """Iterator of slice inputs that reads ahead and sets failures and bookkeeping aside."""

    def __init__(
        self, tasks: Iterable[PredictionTask], predictor: Predictor, pool: ThreadPoolExecutor, ahead: int
    ) -> None:
        self._tasks = iter(tasks)
        self._size = predictor.image_size
        self._resize = predictor.resize
        self._pool = pool
        self._ahead = ahead
        self._under_way: deque[tuple[PredictionTask, Future[_ReadCase]]] = deque()
        self._cases: dict[str, _ReadCase] = {}
        self._failures: deque[CasePrediction] = deque()

    def __iter__(self) -> Iterator[SliceInput]:
        return self

    def __next__(self) -> SliceInput:
        while True:
            self._fill()
            if not self._under_way:
                raise StopIteration
            task, future = self._under_way.popleft()
            try:
                case = future.result()
            except (SdsegError, OSError, MemoryError) as error:
                self._failures.append(_failed(task, _reason(task, error)))
                continue
            self._cases[task.case_id] = case
            return case.slice_input

    def take(self, prediction: SlicePrediction) -> _ReadCase:
        return self._cases.pop(prediction.case_id)

    def take_failures(self) -> Iterator[CasePrediction]:
        while self._failures:
            yield self._failures.popleft()

    def _fill(self) -> None:
        while len(self._under_way) < self._ahead:
            task = next(self._tasks, None)
            if task is None:
                return
            self._under_way.append((task, self._pool.submit(_read_case, task, self._size, self._resize)))


class _Clock:
    def __init__(self) -> None:
        self._last = time.monotonic()

    def stamp(self, record: CasePrediction) -> CasePrediction:
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return replace(record, seconds=seconds)


def _read_case(task: PredictionTask, size: int, resize: Literal["squeeze", "pad"]) -> _ReadCase:
    from sdseg_cli.core.engine.inference import SliceInput

    before = task.path.stat()
    loaded: LoadedImage = read_image(task.path)
    after = task.path.stat()
    if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
        raise DataError("the file changed while it was read. Predict it again once it is complete.")
    height, width = loaded.pixels.shape[:2]
    grid = Grid(height, width, size, resize)
    slice_input = SliceInput(task.case_id, 0, grid.image_to_model(loaded.pixels), grid)
    pixels = loaded.pixels if task.overlay is not None else None
    return _ReadCase(task, slice_input, loaded.orientation, loaded.notes, pixels)


def _write_case(case: _ReadCase, prediction: SlicePrediction, classes: Sequence[str]) -> CasePrediction:
    """Write the extras first and the mask last: a mask means that all of its case is there."""
    task = case.task
    done: list[Path] = []

    def write(path: Path, save: Callable[[Path], None]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path)
        done.append(path)

    try:
        if task.overlay is not None and case.pixels is not None:
            from sdseg_cli.core.reporting.overlays import overlay  # brings SciPy, which planning is spared

            picture = overlay(case.pixels, prediction.label_map, alpha=OVERLAY_ALPHA, contours=True)
            write(task.overlay, lambda path: write_png(path, picture))
        if task.probabilities is not None:
            _write_probabilities(write, task.probabilities, prediction, classes, case.orientation)
        if task.uncertainty is not None:
            # A standard deviation of values in [0, 1] is at most one half.
            levels = _sixteen_bit(prediction.uncertainty * 2)
            write(
                task.uncertainty,
                lambda path: write_png(path, levels, orientation=case.orientation),
            )
        write(
            task.mask,
            lambda path: write_label_map(
                path, prediction.label_map, len(classes), orientation=case.orientation
            ),
        )
    except BaseException:
        for path in done:
            with contextlib.suppress(OSError):
                path.unlink()
        raise
    return _record(case, prediction, classes)


def _write_probabilities(
    write: Callable[[Path, Callable[[Path], None]], None],
    stem: Path,
    prediction: SlicePrediction,
    classes: Sequence[str],
    orientation: int,
) -> None:
    png, npz = probability_files(stem)
    if len(classes) == 2:
        levels = _sixteen_bit(prediction.probabilities[1])
        write(png, lambda path: write_png(path, levels, orientation=orientation))
        return
    stored = np.stack([lay_on_stored_grid(plane, orientation) for plane in prediction.probabilities])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, probabilities=stored.astype(np.float16), classes=np.array(classes))
    write(npz, lambda path: write_whole(path, buffer.getvalue()))


def _sixteen_bit(values: np.ndarray) -> np.ndarray:
    """float in [0, 1] -> uint16 in [0, 65535]."""
    return np.rint(np.clip(values, 0.0, 1.0) * 65535).astype(np.uint16)


def _record(case: _ReadCase, prediction: SlicePrediction, classes: Sequence[str]) -> CasePrediction:
    counts = np.bincount(prediction.label_map.ravel(), minlength=len(classes))
    height, width = prediction.label_map.shape
    asked = case.task.uncertainty is not None
    return CasePrediction(
        case_id=case.task.case_id,
        file=case.task.file,
        status="done",
        width=width,
        height=height,
        areas_px={name: int(counts[index]) for index, name in enumerate(classes) if index > 0},
        mean_uncertainty=float(prediction.uncertainty.mean()) if asked else None,
        predicted_dice=_agreement(prediction.overlaps),
        notes=case.notes,
    )


def _agreement(overlaps: np.ndarray | None) -> float | None:
    value = math.nan if overlaps is None else predicted_dice(overlaps)
    return None if math.isnan(value) else value


def _failed(task: PredictionTask, error: str) -> CasePrediction:
    return CasePrediction(task.case_id, task.file, "failed", error=error)


def _reason(task: PredictionTask, error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file is gone since the start."
    if isinstance(error, MemoryError):
        return "the image is too large for the memory of this machine."
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    # The record names the file in a field of its own.
    return readable(str(error).removeprefix(f"{task.path}: "))


def _fatal(task: PredictionTask, error: OSError) -> DataError:
    return DataError(
        f"{readable(task.mask)} cannot be written: {error.strerror or error}. No partial file was left. Free "
        "some space (or choose another --out) and run the same command with --skip-existing to go on."
    )


# ----------------------------------------------------------------------------------------------- summary


def summary_rows(records: Sequence[CasePrediction], classes: Sequence[str]) -> list[dict[str, str]]:
    """The records as table rows, all text; an unknown value is empty."""
    return [_row(record, classes) for record in records]


def _row(record: CasePrediction, classes: Sequence[str]) -> dict[str, str]:
    row = {
        "case": record.case_id,
        "file": record.file,
        "width": _text(record.width),
        "height": _text(record.height),
    }
    for name in classes[1:]:
        area = record.areas_px.get(name)
        row[f"{name}_px"] = _text(area)
        size = (record.width or 0) * (record.height or 0)
        row[f"{name}_fraction"] = "" if area is None or not size else f"{area / size:.6f}"
    uncertainty = record.mean_uncertainty
    row["mean_uncertainty"] = "" if uncertainty is None else f"{uncertainty:.6f}"
    row["predicted_dice"] = "" if record.predicted_dice is None else f"{record.predicted_dice:.6f}"
    row["status"] = record.status
    row["seconds"] = f"{record.seconds:.3f}"
    row["notes"] = "; ".join(record.notes)
    row["error"] = record.error
    return row


def _text(value: int | None) -> str:
    return "" if value is None else str(value)


def write_summary(
    path: Path, tasks: Sequence[PredictionTask], records: Iterable[CasePrediction], classes: Sequence[str]
) -> None:
    """Write ``summary.csv``, in the order of the tasks, whole or not at all.

    Rows of skipped cases, and of images that an earlier call predicted into the same folder, are taken over
    from a summary that is there already.
    """
    by_file = {record.file: record for record in records}
    earlier = read_summary(path)
    rows = []
    for task in tasks:
        record = by_file.get(task.file)
        if record is None:
            continue
        row = _row(record, classes)
        before = earlier.get(task.file)
        if record.status == "skipped" and before is not None and before.keys() == row.keys():
            row = {**before, "status": "skipped"}
        rows.append(row)
    header = _row(CasePrediction("", "", "done"), classes).keys()
    asked = {task.file for task in tasks}
    rows += [row for file, row in earlier.items() if file not in asked and row.keys() == header]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(header), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


def read_summary(path: Path) -> dict[str, dict[str, str]]:
    """Rows of a summary by the image's file name; empty where there is none that can be read."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return {row["file"]: row for row in csv.DictReader(stream)}
    except (OSError, KeyError, UnicodeDecodeError, csv.Error):
        return {}
