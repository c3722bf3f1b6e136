"""How much predictions of the same image differ from one draw of the noise to another.

A run is one draw: run r uses sample r of every slice's noise, so the runs are those that
``sdseg predict`` would make one after the other, and the image encoder works once for all of them.

Two kinds of pictures are compared, each class on its own, every run with the first: the **maps**
(the mask after the threshold, 0 and 255) and the **scores** (the probability before it, 0 to 255).
Dice agreement is the mean over all pairs of runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sdseg_cli.core.errors import UsageError
from sdseg_cli.core.metrics.overlap import dice_agreement
from sdseg_cli.core.metrics.similarity import (
    LPIPS_MIN_SIDE,
    MS_SSIM_MIN_SIDE,
    SSIM_MIN_SIDE,
    PairScores,
    PerceptualDistance,
    Protocol,
    pair_scores,
)
from sdseg_cli.core.metrics.summary import Summary, mean_of_defined, summarise
from sdseg_cli.core.reporting.page import Table
from sdseg_cli.core.reporting.tables import cell, interval_cell

if TYPE_CHECKING:
    from sdseg_cli.core.engine.inference import Predictor, SliceInput

KINDS: tuple[str, ...] = ("maps", "scores")
MEASURES: tuple[str, ...] = ("lpips", "psnr", "ssim", "ms_ssim", "dice_agreement")
LABELS = {
    "lpips": "LPIPS",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "dice_agreement": "Dice agreement",
}
PROTOCOL_TEXTS: dict[str, str] = {
    "standard": "Range 255; a pair of identical pictures has no PSNR.",
    "sdseg": "The published protocol: ranges inferred from each pair, pairs whose first picture is black "
    "skipped, identical pairs skipped for PSNR.",
}


@dataclass(frozen=True)
class Stability:
    """One class of one slice, maps or scores: means over pairs of runs.

    ``lpips``, ``psnr`` (dB), ``ssim`` and ``ms_ssim`` are means over the pairs (first run, run r) that
    have the figure, NaN where none has; ``dice_agreement`` over all pairs of runs. ``pairs`` counts the
    former, ``identical`` those that do not differ at all, ``skipped`` those the protocol leaves out.
    """

    kind: str
    class_name: str
    lpips: float
    psnr: float
    ssim: float
    ms_ssim: float
    dice_agreement: float
    pairs: int
    identical: int
    skipped: int


@dataclass(frozen=True)
class SliceStability:
    """One slice: its figures, and the runs they come from.

    Attributes:
        figures: one entry per foreground class and kind.
        label_maps: uint8, (runs, H, W).
        scores: uint8, (runs, K - 1, H, W), foreground probabilities times 255.
    """

    case_id: str
    slice_index: int
    figures: tuple[Stability, ...]
    label_maps: np.ndarray
    scores: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures compared, pixels."""
        return int(self.label_maps.shape[1]), int(self.label_maps.shape[2])


def measure_stability(
    predictor: Predictor,
    slices: Iterable[SliceInput],
    *,
    protocol: Protocol = "standard",
    perceptual: PerceptualDistance | None = None,
) -> Iterator[SliceStability]:
    """Predict every slice with each draw and compare the draws. A generator: unread, it does nothing.

    Args:
        predictor: with ``num_samples`` = number of runs (at least 2) and ``return_samples=True``; its
            ``grid`` decides the size of the pictures.
        slices: this process's part.
        protocol: see :mod:`sdseg_cli.core.metrics.similarity`.
        perceptual: LPIPS; None leaves it undefined.

    Yields:
        One record per slice, in the order given.

    Raises:
        UsageError: fewer than two runs.
    """
    from sdseg_cli.core.model.pipeline import probabilities_to_labels

    if predictor.num_samples < 2:
        raise UsageError(f"--runs is {predictor.num_samples}; stability compares runs, so give at least 2.")
    for prediction in predictor(slices):
        samples = prediction.samples
        if samples is None:
            raise ValueError("the predictor returned no samples; make it with return_samples=True")
        label_maps = np.stack([probabilities_to_labels(sample, predictor.threshold) for sample in samples])
        scores = np.rint(samples[:, 1:] * 255).astype(np.uint8)
        figures = []
        for index, name in enumerate(predictor.classes[1:]):
            masks = label_maps == index + 1
            maps = masks.astype(np.uint8) * np.uint8(255)
            figures += [
                _compare("maps", name, maps, masks, protocol, perceptual),
                _compare("scores", name, scores[:, index], samples[:, index + 1], protocol, perceptual),
            ]
        yield SliceStability(prediction.case_id, prediction.slice_index, tuple(figures), label_maps, scores)


def _compare(
    kind: str,
    class_name: str,
    pictures: np.ndarray,
    values: np.ndarray,
    protocol: Protocol,
    perceptual: PerceptualDistance | None,
) -> Stability:
    """Compare the runs of one class: ``pictures`` uint8 (runs, H, W), ``values`` masks or probabilities."""
    target = pictures[0]
    pairs = [pair_scores(picture, target, protocol) for picture in pictures[1:]]
    counted = [index for index, pair in enumerate(pairs) if not pair.skipped]
    distances: list[float] = []
    if perceptual is not None and counted:
        others = pictures[1:][counted]
        distances = perceptual(others, np.broadcast_to(target, others.shape))
    agreements = [dice_agreement(first, second) for first, second in itertools.combinations(values, 2)]
    return Stability(
        kind,
        class_name,
        lpips=mean_of_defined(distances),
        psnr=mean_of_defined([pair.psnr for pair in pairs]),
        ssim=mean_of_defined([pair.ssim for pair in pairs]),
        ms_ssim=mean_of_defined([pair.ms_ssim for pair in pairs]),
        dice_agreement=mean_of_defined(agreements),
        pairs=len(pairs),
        identical=_count(pairs, "identical"),
        skipped=_count(pairs, "skipped"),
    )


def _count(pairs: Sequence[PairScores], name: str) -> int:
    return sum(getattr(pair, name) for pair in pairs)


# ---- rows and summary -----------------------------------------------------------------------------------

ROW_COLUMNS: tuple[str, ...] = (
    "case",
    "slice",
    "height",
    "width",
    "class",
    "kind",
    *MEASURES,
    "pairs",
    "identical_pairs",
    "skipped_pairs",
)


def slice_rows(record: SliceStability) -> list[dict[str, Any]]:
    """The rows of one slice for ``cases.csv``: one per class and kind."""
    height, width = record.size
    return [
        {
            "case": record.case_id,
            "slice": record.slice_index,
            "height": height,
            "width": width,
            "class": entry.class_name,
            "kind": entry.kind,
            **{measure: getattr(entry, measure) for measure in MEASURES},
            "pairs": entry.pairs,
            "identical_pairs": entry.identical,
            "skipped_pairs": entry.skipped,
        }
        for entry in record.figures
    ]


@dataclass(frozen=True)
class KindSummary:
    """One kind of one class over all slices."""

    kind: str
    class_name: str
    measures: dict[str, Summary]
    pairs: int
    identical_pairs: int
    skipped_pairs: int


@dataclass(frozen=True)
class StabilitySummary:
    """All kinds and classes, and in ``reasons`` why a measure is undefined somewhere."""

    slices: int
    entries: tuple[KindSummary, ...]
    reasons: dict[str, str]
    all_runs_equal: bool


def summarise_rows(
    rows: Sequence[dict[str, Any]], *, lpips_reason: str = "", protocol: Protocol = "standard"
) -> StabilitySummary:
    """Compute the summary from the rows of ``cases.csv`` alone.

    Args:
        rows: from :func:`slice_rows`.
        lpips_reason: why LPIPS was not computed, empty if it was.
        protocol: under which the rows were made.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["class"], row["kind"]), []).append(row)
    entries = tuple(
        KindSummary(
            kind,
            class_name,
            {measure: summarise([row[measure] for row in group]) for measure in MEASURES},
            *(sum(row[name] for row in group) for name in ("pairs", "identical_pairs", "skipped_pairs")),
        )
        for (class_name, kind), group in groups.items()
    )
    slices = {(row["case"], row["slice"]) for row in rows}
    equal = bool(rows) and all(row["identical_pairs"] == row["pairs"] for row in rows)
    return StabilitySummary(len(slices), entries, _reasons(rows, lpips_reason, protocol), equal)


def _reasons(rows: Sequence[dict[str, Any]], lpips_reason: str, protocol: Protocol) -> dict[str, str]:
    """Measure -> why some of its cells are empty."""
    reasons: dict[str, str] = {}
    sides = {(row["case"], row["slice"]): min(row["height"], row["width"]) for row in rows}

    def too_small(least: int) -> str:
        small = [side for side in sides.values() if side < least]
        if not small:
            return ""
        return (
            f"{len(small)} of {len(sides)} pictures have a side below {least} pixels (least: {min(small)}), "
            "which it needs"
        )

    for measure, least in (("ssim", SSIM_MIN_SIDE), ("ms_ssim", MS_SSIM_MIN_SIDE), ("lpips", LPIPS_MIN_SIDE)):
        if text := too_small(least):
            reasons[measure] = text
    unreal = sum(
        math.isnan(row["ms_ssim"])
        and min(row["height"], row["width"]) >= MS_SSIM_MIN_SIDE
        and row["pairs"] > row["skipped_pairs"]
        for row in rows
    )
    if unreal:
        text = f"{unreal} of {len(rows)} comparisons have a negative contrast term, which has no real power"
        reasons["ms_ssim"] = "; ".join(filter(None, [reasons.get("ms_ssim"), text]))
    if lpips_reason:
        reasons["lpips"] = lpips_reason
    if identical := sum(row["identical_pairs"] for row in rows):
        pairs = sum(row["pairs"] for row in rows)
        reasons["psnr"] = f"{identical} of {pairs} pairs are identical and have no PSNR"
    if skipped := sum(row["skipped_pairs"] for row in rows):
        reasons["pairs"] = (
            f"{skipped} pairs are skipped by protocol {protocol!r}: the first run's picture is black"
        )
    return reasons


def stability_table(summary: StabilitySummary, title: str, protocol: str) -> Table:
    """The summary as a table: one row per class, kind and measure."""
    rows = []
    for entry in summary.entries:
        for measure, values in entry.measures.items():
            digits = 2 if measure == "psnr" else 4
            rows.append(
                (
                    entry.class_name,
                    entry.kind,
                    LABELS[measure],
                    cell(values.mean, digits),
                    interval_cell(values.low, values.high, digits),
                    cell(values.median, digits),
                    str(values.n),
                )
            )
    reasons = [
        f"{LABELS.get(measure, 'Pairs')}: {text.removesuffix('.')}."
        for measure, text in summary.reasons.items()
    ]
    if summary.all_runs_equal:
        reasons.append("All runs are equal to the last bit: this model draws no noise, or ignores it.")
    caption = " ".join([f"Protocol {protocol!r}: {PROTOCOL_TEXTS[protocol]}", *reasons])
    columns = ("class", "kind", "measure", "mean", "95 % interval", "median", "n")
    return Table(title, caption, columns, tuple(rows))
