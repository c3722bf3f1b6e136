"""A model as one graph for other runtimes: ONNX Runtime and OpenVINO predict without PyTorch's overhead."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sdseg_cli.core.errors import ModelError, UsageError
from sdseg_cli.core.files import EXPORT_FILE
from sdseg_cli.core.grid import Resize
from sdseg_cli.core.integrity import refuse_altered
from sdseg_cli.core.model.pipeline import (
    NoiseKey,
    SDSegPipeline,
    mirrored_axes,
    named_noise,
    noise_keys,
    scores_to_probabilities,
)
from sdseg_cli.core.seeding import generator_for

FORMATS = {"onnx": "model.onnx", "openvino": "model.xml"}
LARGEST_DEVIATION = 1e-3  # of a probability, between the graph and the pipeline it was made from
_EXTRA = "pip install 'sdseg[export]'"


@dataclass(frozen=True)
class ExportConfig:
    """What lies beside the graph, as JSON.

    Attributes:
        format: ``onnx`` or ``openvino``.
        classes: names, the background first.
        image_size: side of the graph's images, pixels.
        resize: how images are brought to that grid.
        latent_scale: what latents are multiplied by; the graph already holds it.
        noise_shape: (C, h, w) of the noise of one image, or None for a model that takes none.
        noise: ``gaussian`` or ``zeros``.
        max_abs_deviation: of the probabilities from those of the pipeline, as measured.
        training_data: what the pipeline knows of it: name and fingerprint, window and axis of volumes.
    """

    format: str
    classes: tuple[str, ...]
    image_size: int
    resize: Resize
    latent_scale: float
    noise_shape: tuple[int, int, int] | None
    noise: str
    max_abs_deviation: float = 0.0
    training_data: dict[str, Any] | None = None


class OneStep(nn.Module):
    """A pipeline's networks as one module, from image and noise to probabilities, in one reverse step."""

    def __init__(self, pipeline: SDSegPipeline) -> None:
        super().__init__()
        self.networks = nn.ModuleList(
            part for part in pipeline.components.values() if isinstance(part, nn.Module)
        )
        self._pipeline = pipeline

    def forward(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Predict.

        Args:
            image: float32, (B, 3, S, S), in [-1, 1].
            noise: float32, (B, C, h, w); the plain U-Net takes none.

        Returns:
            float32, (B, K, S, S), probabilities of the classes.
        """
        pipeline = self._pipeline
        if noise is None:
            return pipeline.unet(image).float().softmax(dim=1)
        return scores_to_probabilities(pipeline.denoise(pipeline.image_encoder(image), noise, 1))


def export(pipeline: SDSegPipeline, folder: Path, kind: str) -> ExportConfig:
    """Write a pipeline as a graph with its JSON, and compare the two.

    Args:
        pipeline: in evaluation mode, float32, on the CPU.
        folder: exists.
        kind: ``onnx`` or ``openvino``.

    Returns:
        What was written beside the graph, with the deviation that was measured.

    Raises:
        UsageError: a library that it takes is not installed.
        ModelError: the graph does not compute what the pipeline does.
    """
    size = pipeline.config.image_size
    shape = pipeline.latent_shape() if pipeline.is_diffusion else None
    generator = generator_for("export")
    example = {"image": torch.rand(2, 3, size, size, generator=generator) * 2 - 1}
    if shape is not None:
        noise = torch.randn(2, *shape, generator=generator)
        example["noise"] = torch.zeros_like(noise) if pipeline.config.noise == "zeros" else noise
    module = OneStep(pipeline).eval()
    run = write_graph(module, example, folder, kind)
    with torch.no_grad():
        expected = module(*example.values()).numpy()
    given = {name: tensor.numpy() for name, tensor in example.items()}
    single = {name: array[:1] for name, array in given.items()}  # the batch is free
    deviation = max(
        float(np.abs(run(given) - expected).max()), float(np.abs(run(single) - expected[:1]).max())
    )
    if not deviation <= LARGEST_DEVIATION:
        raise ModelError(
            f"the {kind} graph differs from the model by {deviation:.2g} in a probability, expected at most "
            f"{LARGEST_DEVIATION:g}. Nothing was kept; try the other --format."
        )
    config = ExportConfig(
        format=kind,
        classes=pipeline.classes,
        image_size=size,
        resize=pipeline.config.resize,
        latent_scale=pipeline.config.latent_scale,
        noise_shape=shape,
        noise=pipeline.config.noise,
        max_abs_deviation=deviation,
        training_data=dict(pipeline.config.training_data),
    )
    (folder / EXPORT_FILE).write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
    return config


def write_graph(
    module: nn.Module, example: Mapping[str, torch.Tensor], folder: Path, kind: str
) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """Write a network's graph and load it.

    Args:
        module: in evaluation mode, float32, on the CPU; its output is called ``probabilities``.
        example: inputs by name, in the order of the arguments, two of each; the batch stays free.
        folder: exists.
        kind: ``onnx`` or ``openvino``.

    Returns:
        What runs the graph on inputs by name, float32.

    Raises:
        UsageError: a library that it takes is not installed.
    """
    for library in ("onnx", "onnxscript", *(["onnxruntime"] if kind == "onnx" else ["openvino"])):
        _import(library)
    path = folder / FORMATS["onnx"]
    with torch.no_grad():
        torch.onnx.export(
            module,
            tuple(example.values()),
            str(path),
            input_names=list(example),
            output_names=["probabilities"],
            dynamo=True,
            dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC} for _ in example),
            external_data=False,
            verbose=False,
        )
    if kind == "openvino":
        openvino = _import("openvino")
        openvino.save_model(
            openvino.convert_model(path), folder / FORMATS["openvino"], compress_to_fp16=False
        )
        path.unlink()
    return _session(folder, kind)


def _import(library: str) -> Any:
    if library == "openvino":
        # Its import would report itself to its makers; without this module it takes an empty one of its own.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise UsageError(f"{library} is not installed, and exported models need it. {_EXTRA}") from error


def _session(folder: Path, kind: str) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """Load a graph; the answer runs it on inputs by name and gives its only output."""
    path = folder / FORMATS[kind]
    if kind == "onnx":
        runtime = _import("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda given: session.run(None, given)[0]
    openvino = _import("openvino")
    # Without the hint a graphless core may choose bfloat16, which is another result.
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(path, "CPU", hints)
    return lambda given: compiled(given)[0]


class ExportedModel:
    """A graph in the place of a pipeline, for a predictor on a CPU."""

    device = torch.device("cpu")

    def __init__(self, config: ExportConfig, run: Callable[[dict[str, np.ndarray]], np.ndarray]) -> None:
        self.config = config
        self._run = run

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, the background first."""
        return self.config.classes

    @property
    def num_classes(self) -> int:
        """Number of classes with the background."""
        return len(self.config.classes)

    def sample(
        self,
        images: Sequence[np.ndarray],
        *,
        num_inference_steps: int = 1,
        num_samples: int = 1,
        seed: int = 0,
        case_ids: Sequence[str],
        slice_indices: Sequence[int],
        first_sample: int = 0,
        flips: Sequence[str] = (),
        pad_to: int = 0,
    ) -> np.ndarray:
        """Draw probabilities on the model's grid, as :meth:`SDSegPipeline.sample` does, with its noise.

        Raises:
            UsageError: more than one reverse step: the graph holds one.
        """
        if num_inference_steps != 1:
            raise UsageError(
                f"an exported model takes one reverse step, and {num_inference_steps} were asked for. Use "
                "--steps 1, or the model that it was exported from."
            )
        pixels = np.ascontiguousarray(np.moveaxis(np.stack(images), -1, 1))
        inputs = pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)
        draws = noise_keys(case_ids, slice_indices, seed, range(first_sample, first_sample + num_samples))
        drawn = []
        for axes in mirrored_axes(flips):
            given = {"image": np.ascontiguousarray(np.flip(inputs, axes))}
            for keys in draws:
                if self.config.noise_shape is not None:
                    given["noise"] = self._noise(keys, self.config.noise_shape)
                drawn.append(np.flip(self._run(given), axes))
        return np.stack(drawn, axis=1)

    def _noise(self, keys: Sequence[NoiseKey], shape: tuple[int, int, int]) -> np.ndarray:
        if self.config.noise == "zeros":
            return np.zeros((len(keys), *shape), np.float32)
        return named_noise(keys, shape).numpy()


def load_exported(folder: Path) -> ExportedModel:
    """Load what :func:`export` wrote.

    Raises:
        ModelError: it cannot be read, or is not as its manifest says.
        UsageError: its runtime is not installed.
    """
    refuse_altered(folder)
    try:
        fields = json.loads((folder / EXPORT_FILE).read_text(encoding="utf-8"))
        fields["classes"] = tuple(fields["classes"])
        fields["noise_shape"] = tuple(fields["noise_shape"]) if fields["noise_shape"] else None
        config = ExportConfig(**fields)
        return ExportedModel(config, _session(folder, config.format))
    except UsageError:
        raise
    except Exception as error:  # each runtime has errors of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{folder} holds no exported model that can be read: {reason[:300]}. Export it again with: "
            f"sdseg export MODEL --out {folder} --overwrite"
        ) from error
