"""Whether images are like those that a model was trained on: colour, brightness, size.

A model answers on any image, and says nothing about having never seen its like. So a model keeps a few
figures of its training images, and what is predicted later is compared with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sdseg_cli.core.grid import Grid
from sdseg_cli.core.seeding import derive_seed

if TYPE_CHECKING:
    from sdseg_cli.core.data.prepared import SplitView
    from sdseg_cli.core.engine.inference import SliceInput

SAMPLE = 128  # training slices at most that the figures are computed from
GREY_LEVELS = (
    2.0  # mean difference of the channels up to which an image is grey: JPEG colours a grey one a little
)
ONE_KIND = 0.95  # share of training images from which on they are all called colour, or all grey
SPREADS = 4.0  # standard deviations of the image means, beyond which a brightness is strange ...
LEAST_LEVELS = 20.0  # ... but never less than so many grey levels of 255
SIZE_FACTOR = 3.0  # a longer side this many times larger or smaller is strange
LEAST_SHARE = 0.1  # of the images must be strange, or the odd one would always warn


@dataclass(frozen=True)
class Look:
    """One image: mean in [0, 255] on the model's grid without its border, and its original longer side."""

    mean: float
    is_colour: bool
    side_px: int


def look_at(image: np.ndarray, grid: Grid) -> Look:
    """Look at one image.

    Args:
        image: uint8, (S, S, 3), range [0, 255], on the model's grid.
        grid: its way there; a border that it added is left out.
    """
    top, left, height, width = grid.content
    inside = image[top : top + height, left : left + width].astype(np.float32)
    spread = float((inside.max(axis=-1) - inside.min(axis=-1)).mean())
    return Look(float(inside.mean()), spread > GREY_LEVELS, max(grid.height, grid.width))


def observed(inputs: Iterable[SliceInput], looks: list[Look] | None) -> Iterator[SliceInput]:
    """Pass slices on and add a look at each to ``looks``; None only passes them on."""
    for item in inputs:
        if looks is not None:
            looks.append(look_at(item.image, item.grid))
        yield item


def describe_images(split: SplitView) -> dict[str, Any]:
    """Compute what a model keeps of its training images, from a bounded sample that is always the same.

    Returns:
        ``count``: slices looked at; ``colour``: share in colour; ``mean`` and ``std``: of the slices' mean
        intensities, in [0, 255]; ``side_px``: median of the original longer sides.
    """
    order = np.random.default_rng(derive_seed("familiarity")).permutation(len(split))[:SAMPLE]
    return summarise_looks([look_at(item.image, item.grid) for item in (split[int(i)] for i in order)])


def summarise_looks(looks: Sequence[Look]) -> dict[str, Any]:
    """Summarise looks as :func:`describe_images` does; ``std`` is that of the sample (n - 1), 0 for one."""
    means = np.array([look.mean for look in looks], dtype=np.float64)
    return {
        "count": len(looks),
        "colour": round(sum(look.is_colour for look in looks) / len(looks), 4),
        "mean": round(float(means.mean()), 3),
        "std": round(float(means.std(ddof=1)) if len(looks) > 1 else 0.0, 3),
        "side_px": float(np.median([look.side_px for look in looks])),
    }


def unfamiliar(trained_on: Mapping[str, Any], looks: Sequence[Look]) -> list[str]:
    """Say in what images are unlike those that a model was trained on, one sentence a kind.

    Args:
        trained_on: from :func:`describe_images`.
        looks: one for each image.

    Returns:
        Sentences; none where less than a tenth of the images is strange.
    """
    total = len(looks)
    mean, side = float(trained_on["mean"]), float(trained_on["side_px"])
    room = max(SPREADS * float(trained_on["std"]), LEAST_LEVELS)
    found = []

    def is_many(strange: Sequence[Look]) -> bool:
        return bool(strange) and len(strange) >= LEAST_SHARE * total

    for is_colour, share in ((False, trained_on["colour"]), (True, 1 - trained_on["colour"])):
        strange = [look for look in looks if look.is_colour == is_colour]
        if share >= ONE_KIND and is_many(strange):
            kinds = ("in colour", "grey") if is_colour else ("grey", "in colour")
            found.append(f"{_count(strange, total)} {kinds[0]}; the model was trained on images {kinds[1]}.")
    strange = [look for look in looks if abs(look.mean - mean) > room]
    if is_many(strange):
        typical = float(np.median([look.mean for look in strange]))
        found.append(
            f"{_count(strange, total)} darker or brighter than what the model was trained on: mean intensity "
            f"{typical:.0f}, in training {mean:.0f} +- {trained_on['std']:.0f} (of 255)."
        )
    strange = [look for look in looks if abs(math.log(look.side_px / side)) > math.log(SIZE_FACTOR)]
    if is_many(strange):
        typical = float(np.median([look.side_px for look in strange]))
        found.append(
            f"{_count(strange, total)} of another size than what the model was trained on: longer side "
            f"{typical:.0f} pixels, in training {side:.0f}."
        )
    return found


def _count(strange: Sequence[Look], total: int) -> str:
    return f"{len(strange)} of {total} image{'s' * (total != 1)} {'is' if len(strange) == 1 else 'are'}"
