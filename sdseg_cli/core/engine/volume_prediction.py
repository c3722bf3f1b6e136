"""Prediction of volumes: slices stream through the predictor, the mask comes back in the same geometry.

At most two scans are in memory at once: the one that is predicted and the one read ahead of it; besides
them the label volume (one byte a voxel), and float probabilities or uncertainty only where they are asked
for. The slices on the model's grid are made one by one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from sdseg_cli.core.data.dicom_codes import SegmentCode, codes_of
from sdseg_cli.core.data.images import write_png
from sdseg_cli.core.data.slicing import AXES, Axis
from sdseg_cli.core.data.volumes import write_label_volume, write_probability_volume
from sdseg_cli.core.engine.postprocessing import keep_largest_components
from sdseg_cli.core.engine.prediction import (
    FATAL_WRITE_ERRORS,
    CasePrediction,
    agreement,
    count_pixels,
    trained_with,
)
from sdseg_cli.core.engine.prediction_plan import PredictionTask
from sdseg_cli.core.engine.scans import Scan, ScanSlices, read_scan
from sdseg_cli.core.errors import DataError, ModelError, SdsegError
from sdseg_cli.core.grid import Grid

if TYPE_CHECKING:
    from sdseg_cli.core.engine.inference import Predictor, SliceInput

_MONTAGE = 12  # slices shown of a volume
_MONTAGE_COLUMNS = 4


@dataclass(frozen=True)
class VolumeSettings:
    """How volumes become slices. What is None is left to the model, and then to the volume.

    Attributes:
        window: values that become black and white.
        axis: anatomical direction that is sliced along.
        nan_fill: value for voxels that are not finite; None refuses them.
        segment_codes: what classes are called in DICOM, where the user says so.
    """

    window: Sequence[float] | None = None
    axis: Axis | None = None
    nan_fill: float | None = None
    segment_codes: Mapping[str, SegmentCode] = field(default_factory=dict)

    def completed(self, predictor: Predictor) -> VolumeSettings:
        """Fill in what the model was trained with.

        Raises:
            ModelError: the model states a window or an axis that is none.
        """
        stated = trained_with(predictor)
        window, axis = self.window, self.axis or stated.get("axis") or "axial"
        if window is None and stated.get("window") is not None:
            try:
                low, high = (float(value) for value in stated["window"])
            except (TypeError, ValueError) as error:
                raise ModelError(
                    f"the model states the window {stated['window']!r}; give --window."
                ) from error
            window = (low, high)
        if axis not in AXES:
            raise ModelError(f"the model states the axis {axis!r}; expected {', '.join(AXES)}. Give --axis.")
        return replace(self, window=window, axis=cast("Axis", axis))


def predict_volumes(
    tasks: Sequence[PredictionTask], predictor: Predictor, settings: VolumeSettings | None = None
) -> Iterator[tuple[PredictionTask, CasePrediction | Exception]]:
    """Predict volumes one after another; the next is read while one is predicted.

    Args:
        tasks: volumes only.
        predictor: makes label maps on the slice's own grid, in order.
        settings: what is not stated comes from the model.

    Yields:
        Each task with its record, or with the error that made it fail: the others go on.

    Raises:
        SdsegError: whatever stops the predictor itself.
    """
    chosen = (settings or VolumeSettings()).completed(predictor)
    channels = trained_with(predictor).get("channels") or ()
    read = partial(read_scan, nan_fill=chosen.nan_fill, channels=channels)
    with ThreadPoolExecutor(1, thread_name_prefix="sdseg-read") as pool:
        ahead: Future[Scan] | None = None
        try:
            for position, task in enumerate(tasks):
                current = ahead or pool.submit(read, task)
                scan: Scan | None
                try:
                    scan = current.result()
                except (SdsegError, OSError, MemoryError) as error:
                    scan, failure = None, error
                del current
                upcoming = tasks[position + 1 : position + 2]
                ahead = pool.submit(read, upcoming[0]) if upcoming else None
                if scan is None:
                    yield task, failure
                    continue
                outcome: CasePrediction | Exception
                case: _Case | None = None
                try:
                    case = _Case(task, scan, chosen, predictor)
                    case.predict()
                    outcome = case.write()
                    if isinstance(outcome, CasePrediction):
                        outcome = replace(outcome, input_sha256=scan.sha256)
                except MemoryError as error:
                    outcome = error
                del scan
                case = None  # before the one after next is read
                yield task, outcome
        finally:
            if ahead is not None:
                ahead.cancel()


class _Case:
    """One volume with what its slices give."""

    def __init__(
        self, task: PredictionTask, scan: Scan, settings: VolumeSettings, predictor: Predictor
    ) -> None:
        self.task = task
        self.volume = scan.volume
        self.predictor = predictor
        self.classes = tuple(predictor.classes)
        self.pictures = ScanSlices(scan, settings.axis or "axial", settings.window)
        self.stack = self.pictures.stack
        self.notes = list(scan.volume.notes)
        if settings.window is None:
            own = ", ".join(f"[{low:g}, {high:g}]" for low, high in dict.fromkeys(self.pictures.windows))
            self.notes.append(
                "no window is stated by the model or by --window; the volume's own 0.5 to 99.5 percentile "
                f"was taken {own}"
            )
        self.segment_codes = settings.segment_codes
        shape = (self.stack.count, *self.stack.shape)
        self.labels = np.zeros(shape, np.uint8)
        channels = 1 if len(self.classes) == 2 else len(self.classes)
        self.probabilities = (
            np.zeros((*shape, channels), np.float32) if task.probabilities is not None else None
        )
        self.uncertainty = np.zeros(shape, np.float32) if task.uncertainty is not None else None
        self.overlaps: np.ndarray | None = None

    def predict(self) -> None:
        """Fill the label volume, slice by slice; predictions come back in the order of the slices."""
        whole = getattr(self.predictor, "largest_component", False)
        self.predictor.largest_component = False  # it is a part of the volume, not of a slice
        try:
            self._predict_slices()
        finally:
            self.predictor.largest_component = whole
        if whole:
            self.labels = keep_largest_components(self.labels)

    def _predict_slices(self) -> None:
        for index, prediction in enumerate(self.predictor(self._inputs())):
            self.labels[index] = prediction.label_map
            if prediction.overlaps is not None:  # counts of pixels: those of the slices add up
                self.overlaps = prediction.overlaps + (0 if self.overlaps is None else self.overlaps)
            if self.probabilities is not None:
                kept = prediction.probabilities[1:] if len(self.classes) == 2 else prediction.probabilities
                self.probabilities[index] = np.moveaxis(kept, 0, -1)
            if self.uncertainty is not None:
                self.uncertainty[index] = prediction.uncertainty

    def write(self) -> CasePrediction | Exception:
        """Write the extras first and the mask last: a mask means that all of its case is there."""
        done: list[Path] = []

        def write(path: Path, save: Callable[[Path], None]) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save(path)
            done.append(path)

        try:
            self._write(write)
        except (SdsegError, MemoryError) as error:
            self._remove(done)
            return error
        except OSError as error:
            self._remove(done)
            if error.errno in FATAL_WRITE_ERRORS:
                return error
            return DataError(f"cannot be written: {error.strerror or error}")
        except BaseException:
            self._remove(done)
            raise
        return replace(self._record(), outputs=tuple(done))

    def _inputs(self) -> Iterator[SliceInput]:
        from sdseg_cli.core.engine.inference import SliceInput

        height, width = self.stack.shape
        grid = Grid(height, width, self.predictor.image_size, self.predictor.resize)
        for index in range(self.stack.count):
            image = grid.image_to_model(self.pictures[index])
            yield SliceInput(self.task.case_id, index, image, grid, self.stack.spacing_mm)

    def _write(self, write: Callable[[Path, Callable[[Path], None]], None]) -> None:
        task, geometry = self.task, self.volume.geometry
        if task.overlay is not None:
            sheet = self._montage()
            write(task.overlay, lambda path: write_png(path, sheet))
        for stem, values in ((task.probabilities, self.probabilities), (task.uncertainty, self.uncertainty)):
            if stem is None or values is None:
                continue
            path = task.probability_files[0] if stem is task.probabilities else stem
            joined = self._joined(values)
            write(path, lambda target, v=joined: self._write_numbers(target, v))  # type: ignore[misc]
        labels = self.stack.join(self.labels)
        if task.series is not None and task.mask.suffix == ".dcm":
            from sdseg_cli.core.data.dicom_seg import write_dicom_seg

            series = task.series
            codes = codes_of(self.classes, self.segment_codes)
            write(task.mask, lambda path: write_dicom_seg(path, labels, series, codes))
        else:
            write(task.mask, lambda path: write_label_volume(path, labels, geometry, like=self.volume))

    def _write_numbers(self, path: Path, values: np.ndarray) -> None:
        write_probability_volume(path, values, self.volume.geometry, like=self.volume)

    def _joined(self, values: np.ndarray) -> np.ndarray:
        if values.ndim == 3:
            return self.stack.join(values)
        channels = [self.stack.join(values[..., channel]) for channel in range(values.shape[-1])]
        return channels[0] if len(channels) == 1 else np.stack(channels, axis=-1)

    def _montage(self) -> np.ndarray:
        """Slices at equal distances through the foreground, or through the volume where there is none."""
        from sdseg_cli.core.reporting.overlays import contact_sheet

        marked = np.flatnonzero(self.labels.reshape(len(self.labels), -1).any(axis=1))
        first, last = (marked[0], marked[-1]) if marked.size else (0, len(self.labels) - 1)
        shown = np.unique(np.linspace(first, last, _MONTAGE).round().astype(int))
        items = [(f"slice {index}", self.pictures[index], self.labels[index]) for index in shown]
        return contact_sheet(items, columns=_MONTAGE_COLUMNS, classes=self.classes)

    def _record(self) -> CasePrediction:
        areas, components = count_pixels(self.labels, self.classes)
        height, width = self.stack.shape
        voxel_ml = self.volume.geometry.voxel_ml
        return CasePrediction(
            case_id=self.task.case_id,
            file=self.task.file,
            status="done",
            width=width,
            height=height,
            slices=self.stack.count,
            areas_px=areas,
            components=components,
            volumes_ml={name: count * voxel_ml for name, count in areas.items()},
            mean_uncertainty=None if self.uncertainty is None else float(self.uncertainty.mean()),
            draw_agreement=agreement(self.overlaps),
            notes=tuple(self.notes),
        )

    @staticmethod
    def _remove(paths: Sequence[Path]) -> None:
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink()
