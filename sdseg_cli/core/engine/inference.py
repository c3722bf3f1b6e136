"""From slices on the model's grid to predictions on the case's grid, in batches that fit the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from sdseg_cli.core.engine.acceleration import (
    MemoryMeter,
    fitting_batch,
    hold_in_half,
    record_graphs,
    try_compiled,
    undo_compile,
    use_channels_last,
)
from sdseg_cli.core.engine.familiarity import Look, observed, unfamiliar
from sdseg_cli.core.engine.postprocessing import keep_largest_components
from sdseg_cli.core.errors import Interrupted, OutOfMemoryError, UsageError
from sdseg_cli.core.files import EXPORT_FILE
from sdseg_cli.core.grid import Grid, Resize
from sdseg_cli.core.model.exported import ExportedModel, load_exported
from sdseg_cli.core.model.pipeline import SDSegPipeline, draw_overlaps, on_case_grid
from sdseg_cli.core.model.weights import load_pipeline, replace_decoder

if TYPE_CHECKING:
    from sdseg_cli.core.run_directory import ModelReference

_BATCH_ON_CPU = 4
_BATCH_ON_GPU = 16
_PROBED = 4  # images of the batch whose peak says how many fit at once
_HOST_THREADS = 4  # bring probabilities to the cases' grids; Pillow lets them run side by side
_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


_Drawn = Callable[[], np.ndarray]  # waits for an image's probabilities, float32 (N, K, S, S)


@dataclass(frozen=True)
class SliceInput:
    """One slice: ``image`` uint8 (S, S, 3) on the model's grid, ``grid`` the way back to its own.

    ``spacing_mm`` are the mm between its original pixels, (rows, columns) last, where they are known.
    """

    case_id: str
    slice_index: int
    image: np.ndarray
    grid: Grid
    spacing_mm: tuple[float, ...] | None = None


@dataclass(frozen=True)
class SlicePrediction:
    """One slice's prediction on its own grid (or on the model's, if the predictor was told so).

    Attributes:
        label_map: uint8, (H, W), class indices.
        probabilities: float32, (K, H, W), mean over the samples.
        uncertainty: float32, (H, W), standard deviation over the samples; NaN for a single one.
        samples: float32, (N, K, H, W), or None.
        overlaps: int64, (K - 1, N, N), pixels that the masks of two samples share; of all slices of a case
            added up, :func:`~sdseg_cli.core.metrics.overlap.draw_agreement` makes the case's score of them.
    """

    case_id: str
    slice_index: int
    label_map: np.ndarray
    probabilities: np.ndarray
    uncertainty: np.ndarray
    samples: np.ndarray | None
    overlaps: np.ndarray | None = None


class Predictor:
    """A pipeline with its settings: call it on slices, get predictions in the same order.

    Args:
        pipeline: on its device, in evaluation mode; or an exported model.
        batch_size: slices at a time; None chooses by device, on a GPU by its free memory and the peak of a
            first small batch. Halved when the memory does not suffice.
        seed: names the noise.
        num_inference_steps: reverse steps.
        num_samples: draws to average.
        first_sample: index of the first draw.
        threshold: for binary masks.
        grid: ``case`` for predictions on each slice's own grid, ``model`` for the square one.
        return_samples: keep every draw's probabilities.
        flips: ``horizontal``, ``vertical`` or both: mirrored images are predicted too, as further draws.
        largest_component: keep the largest connected component of every class of the label map, slice by
            slice (of volumes it is left to the caller); probabilities, uncertainty and draws stay as they
            are.
        precision: ``fp32``, ``bf16`` or ``fp16`` (autocast).

    Attributes:
        looks: one for each slice so far, where the model knows what it was trained on.
        recorded: whether the networks' calls become CUDA graphs, see :meth:`record`.
    """

    def __init__(
        self,
        pipeline: SDSegPipeline | ExportedModel,
        *,
        batch_size: int | None = None,
        seed: int = 0,
        num_inference_steps: int = 1,
        num_samples: int = 1,
        first_sample: int = 0,
        threshold: float = 0.5,
        grid: Literal["case", "model"] = "case",
        return_samples: bool = False,
        flips: Sequence[str] = (),
        largest_component: bool = False,
        precision: str = "fp32",
    ) -> None:
        self.pipeline = pipeline
        self.batch_size = batch_size or (_BATCH_ON_CPU if self.device.type == "cpu" else _BATCH_ON_GPU)
        self.meter = MemoryMeter(self.device) if batch_size is None and self.device.type == "cuda" else None
        self.overlap = self.device.type == "cuda"  # a CPU's cores are all busy with the networks
        self.recorded = False
        self._compiled = False
        self.seed = seed
        self.num_inference_steps = num_inference_steps
        self.num_samples = num_samples
        self.first_sample = first_sample
        self.threshold = threshold
        self.grid = grid
        self.return_samples = return_samples
        self.flips = tuple(flips)
        self.largest_component = largest_component
        self.precision = precision
        self.looks: list[Look] = []

    @property
    def trained_on(self) -> Mapping[str, Any]:
        """Figures of the training images, see ``describe_images``; empty where the model has none."""
        return (getattr(self.pipeline.config, "training_data", None) or {}).get("images") or {}

    def warnings(self, looks: Sequence[Look]) -> list[str]:
        """In what the images of ``looks`` are unlike those of the training; none if that is unknown."""
        return unfamiliar(self.trained_on, looks) if self.trained_on and looks else []

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, the background first."""
        return self.pipeline.classes

    @property
    def num_classes(self) -> int:
        """Number of classes with the background."""
        return self.pipeline.num_classes

    @property
    def image_size(self) -> int:
        """Side of the model's grid, pixels."""
        return self.pipeline.config.image_size

    @property
    def resize(self) -> Resize:
        """How images come to the model's grid."""
        return self.pipeline.config.resize

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.pipeline.device

    def __call__(self, inputs: Iterable[SliceInput]) -> Iterator[SlicePrediction]:
        """Predict lazily, two batches ahead at most; an unread iterator predicts nothing.

        Raises:
            OutOfMemoryError: not even one slice at a time fits; what was predicted before comes first.
        """
        stream = observed(inputs, self.looks if self.trained_on else None)
        with ThreadPoolExecutor(_HOST_THREADS, thread_name_prefix="sdseg-grid") as pool:
            waiting: list[Future[SlicePrediction]] = []
            while True:
                try:
                    batch = list(islice(stream, self.batch_size))
                    samples = self._sample(batch) if batch else []
                except (Exception, Interrupted):  # whatever ends this, what was predicted is not lost
                    yield from (future.result() for future in waiting)
                    raise
                if not batch:
                    break
                fresh = [pool.submit(self._finish, *pair) for pair in zip(batch, samples, strict=True)]
                # While these are brought to their grids a GPU already computes the next batch.
                yield from (future.result() for future in waiting)
                waiting = fresh
                if not self.overlap:
                    yield from (future.result() for future in waiting)
                    waiting = []
            yield from (future.result() for future in waiting)

    def choose_batch_size(self) -> None:
        """Choose the batch by the device's free memory, from the peak of a small one; else leave it."""
        if self.meter is None:
            return
        meter, self.meter = self.meter, None
        recorded = self._as_written()  # what is recorded of small batches would stay
        try:
            self._sample_at_once(self._blank(1))  # what a library sets up once is not the images' memory
            with meter.peak() as peak:
                self._sample_at_once(self._blank(_PROBED))
        finally:
            if recorded:
                self.record()
        # Each network's recording keeps memory of its own, which a call as written gives to the next one.
        bytes_per_image = peak[0] / _PROBED * (2 if recorded else 1)
        self.batch_size = fitting_batch(meter.free_bytes(), bytes_per_image)

    def record(self) -> None:
        """Replay the networks' calls as CUDA graphs from now on; the networks then only predict."""
        if self.device.type == "cuda" and isinstance(self.pipeline, SDSegPipeline):
            record_graphs(self.pipeline.computing_networks())
            self.recorded = True

    def compile(self) -> str | None:
        """Compile the networks and run them once on a full batch; the last batch is then padded to it.

        Returns:
            None, or why they run as written: there is no compiler, or it failed.
        """
        if not isinstance(self.pipeline, SDSegPipeline):
            return "an exported model is compiled already"
        networks = self.pipeline.computing_networks()
        recorded = False
        try:
            self.choose_batch_size()
            recorded = self._as_written()  # recordings are made anew, of what is compiled
            reason = try_compiled(
                networks, lambda: self._sample_at_once(self._blank(self.batch_size)), self.device
            )
        except torch.OutOfMemoryError:
            reason = f"a batch of {self.batch_size} does not fit into the memory; try --batch-size"
        self._compiled = reason is None
        if recorded:
            self.record()
        return reason

    def _as_written(self) -> bool:
        """Let the networks run as written, and say whether their calls were recorded."""
        recorded = self.recorded
        if (recorded or self._compiled) and isinstance(self.pipeline, SDSegPipeline):
            undo_compile(self.pipeline.computing_networks())
        self.recorded = self._compiled = False
        return recorded

    def _blank(self, count: int) -> list[SliceInput]:
        size = self.image_size
        image = np.zeros((size, size, 3), np.uint8)
        return [SliceInput("", index, image, Grid(size, size, size)) for index in range(count)]

    def _sample(self, batch: Sequence[SliceInput]) -> list[_Drawn]:
        """Draw the probabilities of a batch, (N, K, S, S) each, in as many parts as the memory demands."""
        try:
            self.choose_batch_size()
            return self._sample_at_once(batch)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1 and not (self.recorded or self._compiled):
                raise OutOfMemoryError(
                    f"one slice of {self.image_size}x{self.image_size} does not fit into the memory of "
                    f"{self.device}. Close other programs that use it, or predict with --device cpu."
                ) from error
        # Outside the handler, so that the failed batch's memory is free again; then that of recordings.
        recorded = self._as_written()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if recorded and len(batch) > 1:
            self.record()
        self.batch_size = half = max(1, len(batch) // 2)
        return [
            samples
            for start in range(0, len(batch), half)
            for samples in self._sample(batch[start : start + half])
        ]

    def _sample_at_once(self, batch: Sequence[SliceInput]) -> list[_Drawn]:
        with self._autocast():
            arguments: dict[str, Any] = {
                "num_inference_steps": self.num_inference_steps,
                "num_samples": self.num_samples,
                "seed": self.seed,
                "case_ids": [item.case_id for item in batch],
                "slice_indices": [item.slice_index for item in batch],
                "first_sample": self.first_sample,
                "flips": self.flips,
                "pad_to": self.batch_size if self._compiled else 0,
            }
            images = [item.image for item in batch]
            if self.device.type == "cuda" and isinstance(self.pipeline, SDSegPipeline):
                fetch = _on_their_way(list(self.pipeline.draw(images, **arguments)))
                return [partial(fetch, index) for index in range(len(batch))]
            samples = self.pipeline.sample(images, **arguments)
        return [partial(np.asarray, own) for own in samples]

    def _finish(self, item: SliceInput, drawn: _Drawn) -> SlicePrediction:
        samples = drawn()
        size = self.image_size
        grid = Grid(size, size, size) if self.grid == "model" else item.grid
        label_map, mean, uncertainty, on_case = on_case_grid(samples, grid, self.threshold)
        return SlicePrediction(
            case_id=item.case_id,
            slice_index=item.slice_index,
            label_map=self._cleaned(label_map),
            probabilities=mean,
            uncertainty=uncertainty,
            samples=on_case if self.return_samples else None,
            overlaps=draw_overlaps(on_case, self.threshold),
        )

    def _cleaned(self, label_map: np.ndarray) -> np.ndarray:
        return keep_largest_components(label_map) if self.largest_component else label_map

    def _autocast(self) -> AbstractContextManager:
        dtype = _PRECISIONS[self.precision]
        if dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)


def _on_their_way(draws: Sequence[torch.Tensor]) -> Callable[[int], np.ndarray]:
    """Start to bring draws, (B, K, S, S) each, to the host; the answer waits for an image's, (N, K, S, S).

    The GPU goes on meanwhile with what it is given next.
    """
    host = torch.empty(len(draws), *draws[0].shape, pin_memory=True)
    for place, draw in zip(host, draws, strict=True):
        place.copy_(draw, non_blocking=True)
    arrived = torch.cuda.Event(blocking=True)  # threads that wait leave the cores to others
    arrived.record(torch.cuda.current_stream(draws[0].device))

    def fetch(index: int) -> np.ndarray:
        arrived.synchronize()
        return host[:, index].numpy()

    return fetch


def choose_device(wanted: str) -> torch.device:
    """Choose a device, and make a GPU the current one: ``auto`` takes this process's GPU if there is one.

    Raises:
        UsageError: the device that was asked for is not there.
    """
    # Numbers below 1e-38 are computed in microcode on a CPU: training was seen to slow down tenfold by them.
    torch.set_flush_denormal(True)
    chosen = _find_device(wanted)
    if chosen.type == "cuda":  # streams and events are of the current one, unless they are told
        torch.cuda.set_device(chosen)
    return chosen


def _find_device(wanted: str) -> torch.device:
    if wanted == "auto":
        return _local_gpu() if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UsageError(f"--device {wanted!r} is no device. Expected auto, cpu, cuda or cuda:0.") from error
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: PyTorch finds no Apple GPU here. Use --device cpu, or auto.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {wanted}: PyTorch finds no GPU here. Use --device cpu, or auto.")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise UsageError(
            f"--device {wanted}: there are {torch.cuda.device_count()} GPUs here, numbered from 0."
        )
    return _local_gpu() if device.type == "cuda" and device.index is None else device


def _local_gpu() -> torch.device:
    import os

    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def choose_precision(wanted: str, device: torch.device, *, predicts_noise: bool = False) -> str:
    """Choose a precision: ``auto`` is bf16 on a GPU that has it, fp32 elsewhere.

    Args:
        wanted: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        device: where the networks run.
        predicts_noise: ``auto`` is then fp32 on a GPU too: one step multiplies the error of a predicted noise
            by 38.67, and bf16's would move the clean latent by a good part of its own spread.

    Raises:
        UsageError: the device cannot compute in the precision asked for.
    """
    if wanted == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return "bf16" if has_bf16 and not predicts_noise else "fp32"
    if wanted == "fp16" and device.type == "cpu":
        raise UsageError("--precision fp16 needs a GPU; on a CPU use fp32 or bf16.")
    return wanted


def load_predictor(
    reference: ModelReference,
    *,
    device: str = "auto",
    precision: str = "auto",
    decoder: str | None = None,
    **options: object,
) -> Predictor:
    """Load a model for prediction.

    Args:
        reference: where the model is.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        decoder: folder of a small decoder to put in the autoencoder's place.
        options: further settings of :class:`Predictor`.

    Raises:
        UsageError: device or precision cannot be had.
        ModelError: the model cannot be loaded.
    """
    if (Path(reference.location) / EXPORT_FILE).is_file():
        return _load_exported(Path(reference.location), device, precision, decoder, options)
    chosen = choose_device(device)
    choose_precision(precision, chosen)  # what cannot be had is said before the model is read
    pipeline = load_pipeline(reference.location)
    predicts_noise = pipeline.is_diffusion and pipeline.scheduler.config["prediction_type"] == "epsilon"
    arithmetic = choose_precision(precision, chosen, predicts_noise=predicts_noise)
    if decoder is not None:
        replace_decoder(pipeline, decoder)
    pipeline.to(chosen)
    networks = pipeline.computing_networks()
    use_channels_last(networks, chosen)
    half = _PRECISIONS[arithmetic]
    if half is not None:
        hold_in_half(networks, half)
    predictor = Predictor(pipeline, precision=arithmetic, **options)  # type: ignore[arg-type]
    predictor.record()
    return predictor


def _load_exported(
    folder: Path, device: str, precision: str, decoder: str | None, options: dict[str, object]
) -> Predictor:
    if device not in ("auto", "cpu") or precision not in ("auto", "fp32") or decoder is not None:
        raise UsageError(
            f"{folder} is an exported model: it runs on the CPU, in fp32, with its own decoder. Leave out "
            "--device, --precision and --decoder, or name the model it was exported from."
        )
    choose_device("cpu")
    return Predictor(load_exported(folder), **options)  # type: ignore[arg-type]
