"""Whether images are like those that a model was trained on: colour, brightness, size, spacing.

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
SPACING_FACTOR = 2.0  # and so are pixels that cover this many times more or fewer millimetres
LEAST_SHARE = 0.1  # of the images must be strange, or the odd one would always warn


@dataclass(frozen=True)
class Look:
    """One image, on the model's grid without its border.

    Attributes:
        mean: in [0, 255].
        is_colour: whether its channels differ.
        side_px: its original longer side.
        channels: mean of each channel, in [0, 255].
        pixel_mm: millimetres between its original pixels, the geometric mean of both directions; None where
            that is not known.
        is_slice: whether it is one of the slices of a volume.
    """

    mean: float
    is_colour: bool
    side_px: int
    channels: tuple[float, float, float] = (0.0, 0.0, 0.0)
    pixel_mm: float | None = None
    is_slice: bool = False

    @property
    def tint(self) -> np.ndarray:
        """By how much each channel is brighter than their mean, (3,): colour whatever the brightness."""
        return np.array(self.channels) - np.mean(self.channels)


def look_at(image: np.ndarray, grid: Grid, spacing_mm: Sequence[float] | None = None) -> Look:
    """Look at one image.

    Args:
        image: uint8, (S, S, 3), range [0, 255], on the model's grid.
        grid: its way there; a border that it added is left out.
        spacing_mm: mm between its original pixels (rows, columns), or those of a volume (slices, rows,
            columns). None if unknown.
    """
    top, left, height, width = grid.content
    inside = image[top : top + height, left : left + width].astype(np.float32)
    spread = float((inside.max(axis=-1) - inside.min(axis=-1)).mean())
    red, green, blue = (float(value) for value in inside.mean(axis=(0, 1)))
    known = spacing_mm is not None and min(spacing_mm[-2:]) > 0  # a header may say 0
    pixel_mm = math.sqrt(spacing_mm[-2] * spacing_mm[-1]) if known and spacing_mm is not None else None
    side = max(grid.height, grid.width)
    is_slice = spacing_mm is not None and len(spacing_mm) == 3
    return Look(float(inside.mean()), spread > GREY_LEVELS, side, (red, green, blue), pixel_mm, is_slice)


def observed(inputs: Iterable[SliceInput], looks: list[Look] | None) -> Iterator[SliceInput]:
    """Pass slices on and add a look at each to ``looks``; None only passes them on."""
    for item in inputs:
        if looks is not None:
            looks.append(look_at(item.image, item.grid, item.spacing_mm))
        yield item


def describe_images(split: SplitView) -> dict[str, Any]:
    """Compute what a model keeps of its training images, from a bounded sample that is always the same.

    Returns:
        ``count``: slices looked at; ``colour``: share in colour; ``mean`` and ``std``: of the slices' mean
        intensities, in [0, 255]; ``channels`` and ``tint_std``: of each channel the mean, and the standard
        deviation of its distance from the mean of the channels; ``side_px``: median of the original longer
        sides; ``pixel_mm``: median of the millimetres between pixels, left out where no slice has them.
    """
    order = np.random.default_rng(derive_seed("familiarity")).permutation(len(split))[:SAMPLE]
    chosen = (split[int(i)] for i in order)
    return summarise_looks([look_at(item.image, item.grid, item.spacing_mm) for item in chosen])


def summarise_looks(looks: Sequence[Look]) -> dict[str, Any]:
    """Summarise looks as :func:`describe_images` does; deviations are of the sample (n - 1), 0 for one."""
    means = np.array([look.mean for look in looks], dtype=np.float64)
    tints = np.stack([look.tint for look in looks])
    tint_std = tints.std(axis=0, ddof=1) if len(looks) > 1 else np.zeros(3)
    channels = np.mean([look.channels for look in looks], axis=0)
    spacings = [look.pixel_mm for look in looks if look.pixel_mm is not None]
    return {
        "count": len(looks),
        "colour": round(sum(look.is_colour for look in looks) / len(looks), 4),
        "mean": round(float(means.mean()), 3),
        "std": round(float(means.std(ddof=1)) if len(looks) > 1 else 0.0, 3),
        "channels": [round(float(value), 3) for value in channels],
        "tint_std": [round(float(value), 3) for value in tint_std],
        "side_px": float(np.median([look.side_px for look in looks])),
        **({"pixel_mm": round(float(np.median(spacings)), 4)} if spacings else {}),
    }


def unfamiliar(trained_on: Mapping[str, Any], looks: Sequence[Look]) -> list[str]:
    """Say in what images are unlike those that a model was trained on, one sentence a kind.

    Args:
        trained_on: from :func:`describe_images`; of a model of an earlier version it may lack what was added.
        looks: one for each image.

    Returns:
        Sentences; none where less than a tenth of the images is strange.
    """
    mean, side = float(trained_on["mean"]), float(trained_on["side_px"])
    room = max(SPREADS * float(trained_on["std"]), LEAST_LEVELS)
    found = []

    def is_many(strange: Sequence[Look]) -> bool:
        return bool(strange) and len(strange) >= LEAST_SHARE * len(looks)

    for is_colour, share in ((False, trained_on["colour"]), (True, 1 - trained_on["colour"])):
        strange = [look for look in looks if look.is_colour == is_colour]
        if share >= ONE_KIND and is_many(strange):
            kinds = ("in colour", "grey") if is_colour else ("grey", "in colour")
            found.append(f"{_count(strange, looks)} {kinds[0]}; the model was trained on images {kinds[1]}.")
    strange = [look for look in looks if abs(look.mean - mean) > room]
    if is_many(strange):
        typical = float(np.median([look.mean for look in strange]))
        found.append(
            f"{_count(strange, looks)} darker or brighter than what the model was trained on: mean intensity "
            f"{typical:.0f}, in training {mean:.0f} +- {trained_on['std']:.0f} (of 255)."
        )
    strange = [look for look in looks if abs(math.log(look.side_px / side)) > math.log(SIZE_FACTOR)]
    if is_many(strange):
        typical = float(np.median([look.side_px for look in strange]))
        found.append(
            f"{_count(strange, looks)} of another size than what the model was trained on: longer side "
            f"{typical:.0f} pixels, in training {side:.0f}."
        )
    strange = [look for look in looks if look.is_colour and _is_tinted(trained_on, look)]
    if is_many(strange):
        typical_rgb = np.median([look.channels for look in strange], axis=0)
        found.append(
            f"{_count(strange, looks)} of another tint than what the model was trained on: red, green and "
            f"blue {_levels(typical_rgb)}, in training {_levels(trained_on['channels'])} (of 255)."
        )
    usual = trained_on.get("pixel_mm")
    strange = [look for look in looks if usual and _is_far(look.pixel_mm, float(usual))]
    if is_many(strange):
        millimetres = float(np.median([look.pixel_mm or math.nan for look in strange]))
        found.append(
            f"{_count(strange, looks)} of another spacing than what the model was trained on: "
            f"{millimetres:.2f} mm between pixels, in training {float(usual or 0):.2f} mm."
        )
    return found


def _is_tinted(trained_on: Mapping[str, Any], look: Look) -> bool:
    """Whether a colour image has other colours than those of the training, brighter or darker aside."""
    if "channels" not in trained_on or trained_on["colour"] < ONE_KIND:
        return False
    usual = np.array(trained_on["channels"], dtype=np.float64)
    room = np.maximum(SPREADS * np.array(trained_on["tint_std"]), LEAST_LEVELS)
    return bool((np.abs(look.tint - (usual - usual.mean())) > room).any())


def _is_far(pixel_mm: float | None, usual: float) -> bool:
    return pixel_mm is not None and abs(math.log(pixel_mm / usual)) > math.log(SPACING_FACTOR)


def _levels(channels: Sequence[float] | np.ndarray) -> str:
    red, green, blue = (f"{float(value):.0f}" for value in channels)
    return f"{red}, {green} and {blue}"


def _count(strange: Sequence[Look], looks: Sequence[Look]) -> str:
    word = "slice" if all(look.is_slice for look in looks) else "image"
    verb = "is" if len(strange) == 1 else "are"
    return f"{len(strange)} of {len(looks)} {word}{'s' * (len(looks) != 1)} {verb}"
