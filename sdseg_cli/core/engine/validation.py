"""Dice on the validation split during training: it chooses the model, and nothing else does."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sdseg_cli.core.data.images import write_png
from sdseg_cli.core.data.prepared import PreparedSlice, SplitView
from sdseg_cli.core.engine.inference import Predictor, SliceInput
from sdseg_cli.core.engine.processes import Processes
from sdseg_cli.core.metrics.overlap import Counts, count_classes, dice
from sdseg_cli.core.model.pipeline import SDSegPipeline
from sdseg_cli.core.recipe_schema import SamplingSettings
from sdseg_cli.core.reporting.overlays import prediction_grid

_PICTURED = 8


@dataclass(frozen=True)
class Validation:
    """Mean Dice over cases and classes, on the model's grid; cases without a class are left out of it."""

    dice: float
    dice_per_class: dict[str, float]
    pictures: list[tuple] = field(default_factory=list)

    def write_picture(self, path: Path) -> np.ndarray:
        """Write the grid of image, ground truth, prediction and probability; returns it, uint8 (H, W, 3)."""
        picture = prediction_grid(self.pictures)
        write_png(path, picture)
        return picture


def validate(
    pipeline: SDSegPipeline,
    split: SplitView,
    processes: Processes,
    *,
    sampling: SamplingSettings,
    seed: int,
    precision: str,
    limit: int,
    batch_size: int,
) -> Validation:
    """Predict a split and score it on the model's grid.

    Args:
        pipeline: the networks as they are now, in evaluation mode.
        split: what to predict.
        processes: cases are shared among them.
        sampling: steps, samples, threshold, flips and largest component.
        seed: names the noise.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        limit: score only the first cases; 0 for all.
        batch_size: slices at a time.

    Returns:
        The scores, the same on every process; pictures on the main one alone.
    """
    pipeline.set_progress_bar_config(disable=True)
    case_ids = split.case_ids
    chosen = list(dict.fromkeys(case_ids))[: limit or None]
    mine = set(processes.share(chosen))
    pictured = set(chosen[:_PICTURED])
    predictor = Predictor(
        pipeline,
        batch_size=batch_size,
        seed=seed,
        num_inference_steps=sampling.num_inference_steps,
        num_samples=sampling.num_samples,
        threshold=sampling.threshold,
        flips=sampling.flips,
        largest_component=sampling.largest_component,
        grid="model",
        precision=precision,
    )
    counts: dict[str, list[tuple[Counts, ...]]] = defaultdict(list)
    pictures = []
    last = {case: position for position, case in enumerate(case_ids)}
    pending: deque[tuple[int, PreparedSlice]] = deque()  # a volume's slices must not all be in memory

    def inputs() -> Iterator[SliceInput]:
        for position, case in enumerate(case_ids):
            if case in mine:
                item = split[position]
                pending.append((position, item))
                yield SliceInput(item.case_id, item.slice_index, item.image, item.grid)

    for prediction in predictor(inputs()):
        position, item = pending.popleft()
        truth = item.grid.labels_to_model(item.label_map)
        counts[item.case_id].append(count_classes(prediction.label_map, truth, pipeline.num_classes))
        if item.case_id in pictured and (truth.any() or position == last[item.case_id]):
            pictured.discard(item.case_id)
            foreground = 1 - prediction.probabilities[0]
            pictures.append((item.case_id, item.image, truth, prediction.label_map, foreground))
    gathered = processes.gather(list(counts.items()))
    names = pipeline.classes[1:]
    per_class: dict[str, list[float]] = {name: [] for name in names}
    for _, parts in gathered:
        for name, class_parts in zip(names, zip(*parts, strict=True), strict=True):
            value = dice(sum(class_parts, start=Counts(0, 0, 0)))
            if not math.isnan(value):
                per_class[name].append(value)
    means = {name: float(np.mean(values)) for name, values in per_class.items() if values}
    return Validation(float(np.mean(list(means.values()))) if means else 0.0, means, pictures)
