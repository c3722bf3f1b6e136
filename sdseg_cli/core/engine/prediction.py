"""Prediction of many files: read ahead, predict in batches, write behind, lose nothing that is done.

Images go through together, volumes one by one (:mod:`~sdseg_cli.core.engine.volume_prediction`). Memory is
bounded by the number of images read ahead, and by two volumes, whatever the number of files.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sdseg_cli.core.data.images import (
    LoadedImage,
    lay_on_stored_grid,
    read_image,
    write_label_map,
    write_png,
)
from sdseg_cli.core.engine.prediction_plan import (
    PredictionTask,
    probability_files,
    readable,
    unchanged,
)
from sdseg_cli.core.errors import DataError, Interrupted, SdsegError
from sdseg_cli.core.files import sha256_of, write_whole
from sdseg_cli.core.grid import Grid
from sdseg_cli.core.metrics.overlap import draw_agreement

if TYPE_CHECKING:
    from sdseg_cli.core.engine.inference import Predictor, SliceInput, SlicePrediction
    from sdseg_cli.core.engine.volume_prediction import VolumeSettings

Status = Literal["done", "skipped", "failed"]

SUMMARY_FILE = "summary.csv"
OVERLAY_ALPHA = 0.35
# A file system in one of these states fails every later mask too: going on would only repeat the message.
FATAL_WRITE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


@dataclass(frozen=True)
class CasePrediction:
    """What became of one image or volume.

    ``width`` and ``height`` are those of the upright image or of a slice in pixels, ``slices`` is None for
    an image. ``areas_px`` are the pixels (voxels) of every foreground class, ``components`` its connected
    parts (touching corners connect), ``volumes_ml`` its millilitres in a volume. ``mean_uncertainty`` is
    the mean of the standard deviation between samples and ``draw_agreement`` how far the masks of the
    samples agree (both None with one sample; the latter also where no sample found anything), ``seconds``
    the wall-clock time since the record before.
    """

    case_id: str
    file: str
    status: Status
    width: int | None = None
    height: int | None = None
    slices: int | None = None
    areas_px: Mapping[str, int] = field(default_factory=dict)
    components: Mapping[str, int] = field(default_factory=dict)
    volumes_ml: Mapping[str, float] = field(default_factory=dict)
    mean_uncertainty: float | None = None
    draw_agreement: float | None = None
    seconds: float = 0.0
    error: str = ""
    notes: tuple[str, ...] = ()
    input_sha256: str = ""  # of the file, or of a series' files together
    outputs: tuple[Path, ...] = ()


# -------------------------------------------------------------------------------------------- predicting


@dataclass(frozen=True)
class _ReadCase:
    task: PredictionTask
    slice_input: SliceInput
    orientation: int
    notes: tuple[str, ...]
    sha256: str
    pixels: np.ndarray | None  # upright, only where an overlay is wanted


OnWritten = Callable[[CasePrediction], None]


def _ignore_written(record: CasePrediction) -> None:
    pass


def predict_files(
    tasks: Iterable[PredictionTask],
    predictor: Predictor,
    *,
    readers: int = 4,
    writers: int = 2,
    volumes: VolumeSettings | None = None,
    on_written: OnWritten = _ignore_written,
) -> Generator[CasePrediction]:
    """Predict every image, then every volume; nothing happens until the records are read.

    A case that cannot be read, or whose outputs cannot be written, is a record with status ``failed``; the
    others go on. At most ``readers`` + the predictor's batch + ``writers`` images are held in memory, or
    two volumes.

    Args:
        tasks: from :func:`plan_predictions`.
        predictor: makes label maps on the case's own grid, in order.
        readers, writers: threads that decode images ahead of the model and encode masks behind it.
        volumes: how volumes are cut and windowed; None leaves it to the model.
        on_written: told of every case at once after its files are written, in the thread that wrote them.

    Yields:
        One record an image, in the order in which they are settled.

    Raises:
        DataError: the disk is full or read-only. The records of all that was written come first.
        SdsegError, Interrupted: whatever stops the predictor itself, also after the records of what was
            written.
    """
    clock = _Clock()
    later: list[PredictionTask] = []
    images = _set_aside(tasks, later)
    yield from map(clock.stamp, _predict_images(images, predictor, readers, writers, on_written))
    if not later:
        return
    from sdseg_cli.core.engine.volume_prediction import predict_volumes

    for task, result in predict_volumes(later, predictor, volumes):
        outcome = _told(result, on_written)
        if isinstance(outcome, CasePrediction):
            yield clock.stamp(outcome)
            continue
        if isinstance(outcome, OSError) and outcome.errno in FATAL_WRITE_ERRORS:
            yield clock.stamp(_failed(task, f"cannot be written: {outcome.strerror or outcome}"))
            raise _fatal(task, outcome)
        yield clock.stamp(_failed(task, _reason(task, outcome)))


def _told(outcome: CasePrediction | Exception, on_written: OnWritten) -> CasePrediction | Exception:
    """Tell of a volume; what cannot be told of is not done, and its files are removed."""
    if not isinstance(outcome, CasePrediction):
        return outcome
    try:
        on_written(outcome)
    except BaseException as error:
        for path in outcome.outputs:
            with contextlib.suppress(OSError):
                path.unlink()
        if isinstance(error, OSError):
            return error
        raise
    return outcome


def _set_aside(tasks: Iterable[PredictionTask], volumes: list[PredictionTask]) -> Iterator[PredictionTask]:
    for task in tasks:
        if task.is_volume:
            volumes.append(task)
        else:
            yield task


def _predict_images(
    tasks: Iterable[PredictionTask], predictor: Predictor, readers: int, writers: int, on_written: OnWritten
) -> Iterator[CasePrediction]:
    reading = ThreadPoolExecutor(readers, thread_name_prefix="sdseg-read")
    writing = ThreadPoolExecutor(writers, thread_name_prefix="sdseg-write")
    stream = _ReadStream(tasks, predictor, reading, ahead=2 * readers)
    written: deque[tuple[PredictionTask, Future[CasePrediction]]] = deque()
    stop: SdsegError | Interrupted | None = None

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
            yield record

    try:
        predictions = iter(predictor(stream))
        while stop is None:
            try:
                prediction = next(predictions, None)
            except (SdsegError, Interrupted) as error:
                stop = error
                break
            yield from stream.take_failures()
            if prediction is None:
                break
            case = stream.take(prediction)
            future = writing.submit(_write_case, case, prediction, tuple(predictor.classes), on_written)
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
        self._crop = trained_with(predictor).get("crop")
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
            future = self._pool.submit(_read_case, task, self._size, self._resize, self._crop)
            self._under_way.append((task, future))


class _Clock:
    def __init__(self) -> None:
        self._last = time.monotonic()

    def stamp(self, record: CasePrediction) -> CasePrediction:
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return replace(record, seconds=seconds)


def trained_with(predictor: Predictor) -> Mapping[str, Any]:
    """What the model says of the data it was trained on: name, fingerprint, window, axis, crop."""
    config = getattr(getattr(predictor, "pipeline", None), "config", None)
    return getattr(config, "training_data", None) or {}


def grid_of(pixels: np.ndarray, size: int, resize: Literal["squeeze", "pad"], crop: str | None) -> Grid:
    """The way of an image (H, W, 3) to the model's grid; ``crop`` as the model's training data had it."""
    from sdseg_cli.core.data.fundus import around_bright_disc

    box = around_bright_disc(pixels) if crop == "bright" else None
    return Grid(pixels.shape[0], pixels.shape[1], size, resize, box)


def _read_case(
    task: PredictionTask, size: int, resize: Literal["squeeze", "pad"], crop: str | None
) -> _ReadCase:
    from sdseg_cli.core.engine.inference import SliceInput

    with unchanged(task, [task.path]):
        loaded: LoadedImage = read_image(task.path)
        digest = sha256_of(task.path)
    notes = loaded.notes
    if crop == "truth":  # which nobody has here: the user may have cropped already
        notes += ("taken as it is: the model was trained on crops around the optic disc, give it such",)
    grid = grid_of(loaded.pixels, size, resize, crop)
    slice_input = SliceInput(task.case_id, 0, grid.image_to_model(loaded.pixels), grid)
    pixels = loaded.pixels if task.overlay is not None else None
    return _ReadCase(task, slice_input, loaded.orientation, notes, digest, pixels)


def _write_case(
    case: _ReadCase, prediction: SlicePrediction, classes: Sequence[str], on_written: OnWritten
) -> CasePrediction:
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
        record = replace(_record(case, prediction, classes), input_sha256=case.sha256, outputs=tuple(done))
        on_written(record)
    except BaseException:
        for path in done:
            with contextlib.suppress(OSError):
                path.unlink()
        raise
    return record


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
    areas, components = count_pixels(prediction.label_map, classes)
    height, width = prediction.label_map.shape
    asked = case.task.uncertainty is not None
    return CasePrediction(
        case_id=case.task.case_id,
        file=case.task.file,
        status="done",
        width=width,
        height=height,
        areas_px=areas,
        components=components,
        mean_uncertainty=float(prediction.uncertainty.mean()) if asked else None,
        draw_agreement=agreement(prediction.overlaps),
        notes=case.notes,
    )


def count_pixels(labels: np.ndarray, classes: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Pixels and connected components of every foreground class.

    Args:
        labels: uint8, (H, W) or (I, J, K), class indices.
        classes: names, the background first.
    """
    from scipy.ndimage import find_objects
    from skimage.measure import label

    # np.bincount would make a copy of eight bytes a voxel.
    areas = {name: int((labels == index).sum()) for index, name in enumerate(classes) if index > 0}
    boxes = find_objects(labels, max_label=len(classes) - 1)
    components = {
        name: 0 if box is None else int(label(labels[box] == index, return_num=True)[1])
        for index, (name, box) in enumerate(zip(classes[1:], boxes, strict=True), start=1)
    }
    return areas, components


def agreement(overlaps: np.ndarray | None) -> float | None:
    """Agreement of the draws by their shared pixels (K - 1, N, N); None where there is none."""
    value = math.nan if overlaps is None else draw_agreement(overlaps)
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
        "slices": _text(record.slices),
    }
    for name in classes[1:]:
        area = record.areas_px.get(name)
        row[f"{name}_px"] = _text(area)
        size = (record.width or 0) * (record.height or 0) * (record.slices or 1)
        row[f"{name}_fraction"] = "" if area is None or not size else f"{area / size:.6f}"
        millilitres = record.volumes_ml.get(name)
        row[f"{name}_ml"] = "" if millilitres is None else f"{millilitres:.4f}"
        row[f"{name}_components"] = _text(record.components.get(name))
    uncertainty = record.mean_uncertainty
    row["mean_uncertainty"] = "" if uncertainty is None else f"{uncertainty:.6f}"
    row["draw_agreement"] = "" if record.draw_agreement is None else f"{record.draw_agreement:.6f}"
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


@contextlib.contextmanager
def summary_lock(out: Path) -> Iterator[None]:
    """Hold the summary of a folder that several calls write to; it ends with the process, however it ends."""
    from filelock import FileLock

    with FileLock(out / f".{SUMMARY_FILE}.lock"):
        yield


def read_summary(path: Path) -> dict[str, dict[str, str]]:
    """Rows of a summary by the image's file name; empty where there is none that can be read."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return {row["file"]: row for row in csv.DictReader(stream)}
    except (OSError, KeyError, UnicodeDecodeError, csv.Error):
        return {}
