"""What an evaluation says of one case: scores of every class, and the pictures that a page may show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sdseg_cli.core.engine.report_parts import MOST_VIEWS, evenly
from sdseg_cli.core.grid import Grid
from sdseg_cli.core.metrics.overlap import (
    Convention,
    Counts,
    dice,
    draw_agreement,
    iou,
    precision,
    recall,
    sum_counts,
)
from sdseg_cli.core.metrics.summary import mean_of_defined
from sdseg_cli.core.metrics.surface import SurfaceScores, surface_scores

GridName = Literal["case", "model"]
METRICS: tuple[str, ...] = ("dice", "iou", "precision", "recall", "hd95", "assd", "nsd")
DISTANCES: tuple[str, ...] = ("hd95", "assd")
MEAN_OF_CLASSES = "mean of classes"
PICTURE_SIZE = 256  # pixels; the longer side of a picture kept of a case from a folder


@dataclass(frozen=True)
class CasePicture:
    """What is needed to show a slice: image uint8 (H, W, 3), truth and prediction uint8 (H, W).

    ``uncertainty``, where several draws gave one, is the standard deviation times 510, uint8 (H, W). ``grid``
    is the way back from the model's grid, where the arrays lie on it; ``pixel_mm`` height and width of a
    pixel of the case, where they are known; without ``has_image`` the image is blank.
    """

    image: np.ndarray
    ground_truth: np.ndarray
    prediction: np.ndarray
    uncertainty: np.ndarray | None = None
    slice_index: int = 0
    grid: Grid | None = None
    pixel_mm: tuple[float, float] | None = None
    has_image: bool = True


@dataclass(frozen=True)
class ClassScores:
    """The scores of one class of one case; NaN is undefined, infinite distances are missed structures."""

    class_name: str
    counts: Counts
    dice: float
    iou: float
    precision: float
    recall: float
    hd95: float
    assd: float
    nsd: float = math.nan

    @property
    def outcome(self) -> str:
        """``scored``, ``missed``, ``false alarm`` or ``absent``."""
        if self.counts.is_missed:
            return "missed"
        if self.counts.is_false_alarm:
            return "false alarm"
        return "absent" if self.counts.is_absent else "scored"


@dataclass(frozen=True)
class CaseScores:
    """The scores of one case: all its slices together, one entry per foreground class.

    ``draw_agreement`` is how far the draws of the prediction agree, NaN with one draw; ``reliability`` counts
    probability against truth, float64 (classes, bins, 3), where there are probabilities. ``picture`` shows
    the worst slice, ``stack`` up to MOST_VIEWS slices in order, that one among them.
    """

    case_id: str
    group: str
    slices: int
    unit: str  # of the distances: "mm" or "px"
    classes: tuple[ClassScores, ...]
    picture: CasePicture | None = None
    draw_agreement: float = math.nan
    reliability: np.ndarray | None = None
    stack: tuple[CasePicture, ...] = ()

    @property
    def dice(self) -> float:
        """Mean Dice over the classes with a defined score, NaN where there is none."""
        return mean_of_defined([scores.dice for scores in self.classes])

    @property
    def badness(self) -> float:
        """For ranking: 1 - Dice by the formula, so that a false alarm is bad under every convention."""
        value = mean_of_defined([dice(scores.counts) for scores in self.classes])
        return -1.0 if math.isnan(value) else 1.0 - value


@dataclass(frozen=True)
class FailedCase:
    """A case that could not be scored, and why."""

    case_id: str
    error: str


@dataclass(frozen=True)
class Plane:
    """A slice of a stack, as its distances need it: both label maps, its place, (slice, row, column) mm."""

    label_map: np.ndarray
    truth: np.ndarray
    slice_index: int
    spacing_mm: tuple[float, ...] | None


@dataclass(frozen=True)
class SliceScores:
    """Counts of a slice, or of a whole volume of a folder, with what its case sums up."""

    counts: tuple[Counts, ...]
    surfaces: tuple[SurfaceScores, ...]
    has_spacing: bool
    picture: CasePicture
    overlaps: np.ndarray | None = None
    reliability: np.ndarray | None = None
    plane: Plane | None = None  # of a stack, until its distances are measured


def slice_surfaces(
    label_map: np.ndarray,
    truth: np.ndarray,
    num_classes: int,
    spacing: tuple[float, ...] | None,
    tolerance: float,
) -> tuple[SurfaceScores, ...]:
    """Distances between the outlines of every foreground class; in pixels where there is no spacing in mm."""
    return tuple(
        surface_scores(label_map == k, truth == k, spacing, tolerance=tolerance)
        for k in range(1, num_classes)
    )


def score_case(
    case_id: str, group: str, parts: Sequence[SliceScores], classes: Sequence[str], convention: Convention
) -> CaseScores:
    """Add up the slices of a case; its distances are those of the first part."""
    scores = []
    for index, name in enumerate(classes[1:]):
        counts = sum_counts(part.counts[index] for part in parts)
        scores.append(_class_scores(name, counts, parts[0].surfaces[index], convention))
    worst = max(parts, key=lambda part: sum(c.false_positive + c.false_negative for c in part.counts))
    unit = "mm" if all(part.has_spacing for part in parts) else "px"
    overlaps = [part.overlaps for part in parts if part.overlaps is not None]
    reliable = [part.reliability for part in parts if part.reliability is not None]
    return CaseScores(
        case_id,
        group,
        len(parts),
        unit,
        tuple(scores),
        worst.picture,
        draw_agreement(np.sum(overlaps, axis=0)) if overlaps else math.nan,
        np.sum(reliable, axis=0) if reliable else None,
        spread_stack([part.picture for part in parts], worst.picture),
    )


def shown_slices(filled: Sequence[bool]) -> list[int]:
    """Positions of the slices that hold anything, evenly chosen if they are many; one view is left free."""
    positions = [position for position, is_filled in enumerate(filled) if is_filled]
    return [positions[chosen] for chosen in evenly(len(positions), MOST_VIEWS - 1)]


def spread_stack(pictures: Sequence[CasePicture], worst: CasePicture) -> tuple[CasePicture, ...]:
    """Slices that hold anything, evenly chosen if they are many, and the worst one in any case."""
    filled = [bool(picture.ground_truth.any() or picture.prediction.any()) for picture in pictures]
    chosen = [pictures[position] for position in shown_slices(filled)]
    if not any(picture.slice_index == worst.slice_index for picture in chosen):
        chosen.append(worst)
    return tuple(sorted(chosen, key=lambda picture: picture.slice_index))


def _class_scores(name: str, counts: Counts, surface: SurfaceScores, convention: Convention) -> ClassScores:
    if counts.is_missed or counts.is_false_alarm:  # however far slices are apart
        surface = SurfaceScores(math.inf, math.inf, 0.0)
    return ClassScores(
        name,
        counts,
        dice(counts, convention),
        iou(counts, convention),
        precision(counts),
        recall(counts),
        surface.hd95,
        surface.assd,
        surface.nsd,
    )
