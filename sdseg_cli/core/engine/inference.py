"""From slices on the model's grid to predictions on the case's grid, in batches that fit the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from sdseg_cli.core.engine.familiarity import Look, observed, unfamiliar
from sdseg_cli.core.errors import OutOfMemoryError, UsageError
from sdseg_cli.core.grid import Grid, Resize
from sdseg_cli.core.model.pipeline import SDSegPipeline
from sdseg_cli.core.model.weights import load_pipeline

if TYPE_CHECKING:
    from sdseg_cli.core.run_directory import ModelReference

_BATCH_ON_CPU = 4
_BATCH_ON_GPU = 16
_PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class SliceInput:
    """One slice: ``image`` uint8 (S, S, 3) on the model's grid, ``grid`` the way back to its own."""

    case_id: str
    slice_index: int
    image: np.ndarray
    grid: Grid


@dataclass(frozen=True)
class SlicePrediction:
    """One slice's prediction on its own grid (or on the model's, if the predictor was told so).

    Attributes:
        label_map: uint8, (H, W), class indices.
        probabilities: float32, (K, H, W), mean over the samples.
        uncertainty: float32, (H, W), standard deviation over the samples; NaN for a single one.
        samples: float32, (N, K, H, W), or None.
    """

    case_id: str
    slice_index: int
    label_map: np.ndarray
    probabilities: np.ndarray
    uncertainty: np.ndarray
    samples: np.ndarray | None


class Predictor:
    """A pipeline with its settings: call it on slices, get predictions in the same order.

    Args:
        pipeline: on its device, in evaluation mode.
        batch_size: slices at a time; None chooses by device. Halved when the memory does not suffice.
        seed: names the noise.
        num_inference_steps: reverse steps.
        num_samples: draws to average.
        first_sample: index of the first draw.
        threshold: for binary masks.
        grid: ``case`` for predictions on each slice's own grid, ``model`` for the square one.
        return_samples: keep every draw's probabilities.
        precision: ``fp32``, ``bf16`` or ``fp16`` (autocast).

    Attributes:
        looks: one for each slice so far, where the model knows what it was trained on.
    """

    def __init__(
        self,
        pipeline: SDSegPipeline,
        *,
        batch_size: int | None = None,
        seed: int = 0,
        num_inference_steps: int = 1,
        num_samples: int = 1,
        first_sample: int = 0,
        threshold: float = 0.5,
        grid: Literal["case", "model"] = "case",
        return_samples: bool = False,
        precision: str = "fp32",
    ) -> None:
        self.pipeline = pipeline
        self.batch_size = batch_size or (_BATCH_ON_CPU if self.device.type == "cpu" else _BATCH_ON_GPU)
        self.seed = seed
        self.num_inference_steps = num_inference_steps
        self.num_samples = num_samples
        self.first_sample = first_sample
        self.threshold = threshold
        self.grid = grid
        self.return_samples = return_samples
        self.precision = precision
        self.looks: list[Look] = []

    @property
    def trained_on(self) -> Mapping[str, Any]:
        """Figures of the training images, see ``describe_images``; empty where the model has none."""
        return (self.pipeline.config.get("training_data") or {}).get("images") or {}

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
        """Predict lazily, a batch ahead at most; an unread iterator predicts nothing.

        Raises:
            OutOfMemoryError: not even one slice at a time fits.
        """
        stream = observed(inputs, self.looks if self.trained_on else None)
        while batch := list(islice(stream, self.batch_size)):
            yield from self._predict(batch)

    def _predict(self, batch: Sequence[SliceInput]) -> list[SlicePrediction]:
        try:
            return self._predict_at_once(batch)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise OutOfMemoryError(
                    f"one slice of {self.image_size}x{self.image_size} does not fit into the memory of "
                    f"{self.device}. Close other programs that use it, or predict with --device cpu."
                ) from error
        # Outside the handler, so that the failed batch's memory is free again.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.batch_size = half = max(1, len(batch) // 2)
        return [
            prediction
            for start in range(0, len(batch), half)
            for prediction in self._predict(batch[start : start + half])
        ]

    def _predict_at_once(self, batch: Sequence[SliceInput]) -> list[SlicePrediction]:
        size = self.image_size
        on_model = Grid(size, size, size)
        with self._autocast():
            output = self.pipeline(
                [item.image for item in batch],
                num_inference_steps=self.num_inference_steps,
                num_samples=self.num_samples,
                seed=self.seed,
                case_ids=[item.case_id for item in batch],
                slice_indices=[item.slice_index for item in batch],
                first_sample=self.first_sample,
                threshold=self.threshold,
                grids=[on_model if self.grid == "model" else item.grid for item in batch],
                return_samples=self.return_samples,
            )
        return [
            SlicePrediction(
                case_id=item.case_id,
                slice_index=item.slice_index,
                label_map=output.label_maps[i],
                probabilities=output.probabilities[i],
                uncertainty=output.uncertainty[i],
                samples=output.samples[i] if output.samples is not None else None,
            )
            for i, item in enumerate(batch)
        ]

    def _autocast(self) -> AbstractContextManager:
        dtype = _PRECISIONS[self.precision]
        if dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)


def choose_device(wanted: str) -> torch.device:
    """Choose a device: ``auto`` takes this process's GPU if there is one.

    Raises:
        UsageError: the device that was asked for is not there.
    """
    # Numbers below 1e-38 are computed in microcode on a CPU: training was seen to slow down tenfold by them.
    torch.set_flush_denormal(True)
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
    reference: ModelReference, *, device: str = "auto", precision: str = "auto", **options: object
) -> Predictor:
    """Load a model for prediction.

    Args:
        reference: where the model is.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        options: further settings of :class:`Predictor`.

    Raises:
        UsageError: device or precision cannot be had.
        ModelError: the model cannot be loaded.
    """
    chosen = choose_device(device)
    choose_precision(precision, chosen)  # what cannot be had is said before the model is read
    pipeline = load_pipeline(reference.location)
    predicts_noise = pipeline.is_diffusion and pipeline.scheduler.config["prediction_type"] == "epsilon"
    arithmetic = choose_precision(precision, chosen, predicts_noise=predicts_noise)
    pipeline.to(chosen)
    return Predictor(pipeline, precision=arithmetic, **options)  # type: ignore[arg-type]
