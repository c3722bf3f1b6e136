"""Dice on the validation split during training: it chooses the model, and nothing else does."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sdseg_cli.core.data.images import write_png
from sdseg_cli.core.data.prepared import PreparedSlice, SplitView
from sdseg_cli.core.engine.inference import Predictor, SliceInput, SlicePrediction
from sdseg_cli.core.engine.postprocessing import keep_largest_in_stack
from sdseg_cli.core.engine.processes import Processes
from sdseg_cli.core.metrics.overlap import Counts, count_classes, dice
from sdseg_cli.core.model.pipeline import SDSegPipeline
from sdseg_cli.core.recipe_schema import SamplingSettings
from sdseg_cli.core.reporting.overlays import prediction_grid

_PICTURED = 8
_CaseCounts = list[tuple[Counts, ...]]  # of each slice, of each foreground class


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


@dataclass
class _Slices:
    """The slices of a case as they are predicted, on the model's grid."""

    label_maps: list[np.ndarray] = field(default_factory=list)
    truths: list[np.ndarray] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    shown: int = 0  # the first with something to find, else the last
    image: np.ndarray | None = None
    foreground: np.ndarray | None = None

    def add(self, prediction: SlicePrediction, item: PreparedSlice) -> None:
        if not (self.truths and self.truths[self.shown].any()):
            self.shown, self.image = len(self.truths), item.image
            self.foreground = 1 - prediction.probabilities[0]
        self.label_maps.append(prediction.label_map)
        self.truths.append(item.grid.labels_to_model(item.label_map))
        self.indices.append(item.slice_index)

    def keep_largest_components(self) -> None:
        """Of a volume they are parts of it, not of each slice."""
        self.label_maps = keep_largest_in_stack(self.label_maps, self.indices)

    def counts(self, num_classes: int) -> _CaseCounts:
        pairs = zip(self.label_maps, self.truths, strict=True)
        return [count_classes(label_map, truth, num_classes) for label_map, truth in pairs]

    def picture(self) -> tuple:
        return self.image, self.truths[self.shown], self.label_maps[self.shown], self.foreground


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
    predictor = Predictor(
        pipeline,
        batch_size=batch_size,
        seed=seed,
        num_inference_steps=sampling.num_inference_steps,
        num_samples=sampling.num_samples,
        threshold=sampling.threshold,
        flips=sampling.flips,
        grid="model",
        precision=precision,
    )
    chosen = list(dict.fromkeys(split.case_ids))[: limit or None]
    pictured = set(chosen[:_PICTURED])
    counts: dict[str, _CaseCounts] = {}
    pictures = []
    for case_id, case in _predicted_cases(predictor, split, set(processes.share(chosen))):
        if sampling.largest_component:
            case.keep_largest_components()
        counts[case_id] = case.counts(pipeline.num_classes)
        if case_id in pictured:
            pictures.append((case_id, *case.picture()))
    means = _mean_dices([parts for _, parts in processes.gather(list(counts.items()))], pipeline.classes[1:])
    return Validation(float(np.mean(list(means.values()))) if means else 0.0, means, pictures)


def _predicted_cases(
    predictor: Predictor, split: SplitView, wanted: set[str]
) -> Iterator[tuple[str, _Slices]]:
    """Predict the wanted cases of a split and give each as soon as its last slice is there."""
    case_ids = split.case_ids
    pending: deque[PreparedSlice] = deque()  # a volume's images must not all be in memory

    def inputs() -> Iterator[SliceInput]:
        for position, case_id in enumerate(case_ids):
            if case_id in wanted:
                item = split[position]
                pending.append(item)
                yield SliceInput(item.case_id, item.slice_index, item.image, item.grid)

    expected = Counter(case_ids)
    begun: dict[str, _Slices] = defaultdict(_Slices)
    for prediction in predictor(inputs()):
        item = pending.popleft()
        case = begun[item.case_id]
        case.add(prediction, item)
        if len(case.truths) == expected[item.case_id]:
            yield item.case_id, begun.pop(item.case_id)


def _mean_dices(cases: Sequence[_CaseCounts], names: Sequence[str]) -> dict[str, float]:
    """Mean Dice of each class over the cases that hold it; a class that none holds is left out."""
    per_class: dict[str, list[float]] = {name: [] for name in names}
    for parts in cases:
        for name, class_parts in zip(names, zip(*parts, strict=True), strict=True):
            value = dice(sum(class_parts, start=Counts(0, 0, 0)))
            if not math.isnan(value):
                per_class[name].append(value)
    return {name: float(np.mean(values)) for name, values in per_class.items() if values}
