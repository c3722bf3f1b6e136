"""Fundus photographs of REFUGE2: the cup from its grey masks, and the part around the optic disc.

The paper crops each photograph around the disc and segments the cup. Where the crop comes from is a choice:

* ``truth``: from the disc in the ground truth, as the paper does. At test time nobody has it, so scores on
  such crops are those of a model that is told where to look.
* ``bright``: from the photograph alone: the disc is its brightest patch. It can miss; what lies outside the
  crop is then scored as missed, since scores are on the whole photograph.
* ``none``: the whole photograph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np

from sdseg_cli.core.data.images import read_image, read_label_map
from sdseg_cli.core.data.raw_cases import RawSlice
from sdseg_cli.core.errors import DataError
from sdseg_cli.core.grid import Box

Crop = Literal["truth", "bright", "none"]
CROPS: tuple[Crop, ...] = get_args(Crop)

CROP_SCALE = 2.0
"""Side of the crop over the longer side of the disc."""
_RIM = 128
_RIM_INVERTED = 127  # what 255 - 128 comes to
_DISC_SHARE = 0.13  # a disc's diameter over the photograph's height, about
_BRIGHT_SHARE = 0.5  # of the way from the typical to the greatest brightness


def read_refuge(image_path: Path, label_path: Path, crop: Crop) -> tuple[RawSlice, tuple[str, ...]]:
    """Read a photograph and the cup in it.

    Args:
        image_path: the photograph.
        label_path: grey mask: 0 cup, 128 rim of the disc, 255 background; or 255 cup and 0 background, as
            some mirrors have it.
        crop: where the part that the model sees comes from.

    Returns:
        The whole photograph with label 1 = cup, its crop, and what was changed while reading.

    Raises:
        DataError: a file cannot be read, or the mask is neither of the two.
    """
    loaded = read_image(image_path)
    cup, disc, is_inverted = _cup_and_disc(label_path)
    if cup.shape != loaded.pixels.shape[:2]:
        raise DataError(
            f"mask {label_path.name} is {cup.shape[1]}x{cup.shape[0]} pixels, image {image_path.name} is "
            f"{loaded.pixels.shape[1]}x{loaded.pixels.shape[0]}; both must be the same."
        )
    notes = loaded.notes
    if is_inverted:
        notes += ("mask with 255 for the cup and 0 for the background, read as such",)
    box: Box | None = None
    if crop == "truth":
        box = around(disc)
    elif crop == "bright":
        box = around_bright_disc(loaded.pixels)
        top, left, height, width = box
        outside = int(cup.sum()) - int(cup[top : top + height, left : left + width].sum())
        if outside:
            notes += (f"the crop misses part of the cup from [{outside} pixels of {int(cup.sum())}]",)
    return RawSlice(loaded.pixels, cup.astype(np.uint8), crop=box), notes


def around(disc: np.ndarray, scale: float = CROP_SCALE) -> Box:
    """Give the square around a disc.

    Args:
        disc: bool, (H, W), not empty.
        scale: side of the square over the longer side of the disc.

    Returns:
        The square, moved inside the image; smaller where the image is.
    """
    rows, columns = (np.flatnonzero(disc.any(axis=axis)) for axis in (1, 0))
    longer = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    centre = (rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2
    return _square(centre, longer * scale, disc.shape)


def around_bright_disc(image: np.ndarray) -> Box:
    """Find the optic disc by its brightness alone, and give the square around where it is.

    The photograph is smoothed over the width of a disc, the field of view's shading removed, and the
    brightest patch taken; the square has the size that a crop around a typical disc would have.

    Args:
        image: uint8, (H, W, 3), a fundus photograph.
    """
    from scipy.ndimage import center_of_mass, gaussian_filter, label, zoom

    height, width = image.shape[:2]
    shrink = min(1.0, 256 / height)
    if min(height, width) * shrink < 8:
        return 0, 0, height, width  # no photograph of an eye
    # The disc stands out in green, and in red where vessels are thick; blue is mostly noise.
    grey = zoom(image[..., :2].astype(np.float32).mean(axis=-1), shrink, order=1)
    size = _DISC_SHARE * grey.shape[0]
    field = (grey > 0.15 * grey.max(initial=1.0)).astype(np.float32)
    # Means inside the field of view: its black surroundings must not make its border look bright.
    weight = np.maximum(gaussian_filter(field, 2 * size), 1e-3)
    shading = gaussian_filter(grey * field, 2 * size) / weight
    contrast = gaussian_filter((grey - shading) * field, size / 4)
    threshold = contrast.max() - (1 - _BRIGHT_SHARE) * (contrast.max() - np.median(contrast))
    patches, _ = label(contrast >= threshold)
    brightest = patches == patches[np.unravel_index(int(contrast.argmax()), contrast.shape)]
    row, column = center_of_mass(brightest)
    side = CROP_SCALE * _DISC_SHARE * height
    return _square((row / shrink, column / shrink), side, (height, width))


def _square(centre: tuple[float, float], side: float, shape: tuple[int, ...]) -> Box:
    edge = max(1, int(min(round(side), *shape)))
    top, left = (
        int(np.clip(round(middle - edge / 2), 0, length - edge))
        for middle, length in zip(centre, shape, strict=True)
    )
    return top, left, edge, edge


def _cup_and_disc(path: Path) -> tuple[np.ndarray, np.ndarray, bool]:
    """Cup and disc, bool (H, W), and whether the mask is one with the values turned round."""
    values = read_label_map(path)
    found = np.unique(values).tolist()
    if _RIM_INVERTED in found and _RIM not in found:
        values = np.where(values == _RIM_INVERTED, np.uint8(_RIM), values)
        found = np.unique(values).tolist()
    if not set(found) <= {0, _RIM, 255} or len(found) < 2:
        shown = ", ".join(map(str, found[:8]))
        raise DataError(f"{path}: mask values {shown}; expected 0 (cup), 128 (rim of the disc) and 255.")
    border = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
    outside = int(np.bincount(border, minlength=256).argmax())
    if outside == _RIM:
        raise DataError(f"{path}: the border of the mask is 128, the rim of the disc; expected background.")
    disc = values != outside
    cup = disc & (values != _RIM)
    if not cup.any() or cup.sum() > 0.95 * disc.sum():
        raise DataError(
            f"{path}: the cup has {int(cup.sum())} pixels and the disc {int(disc.sum())}; a cup lies inside "
            "its disc. Fetch the mask again, or leave the case out."
        )
    return cup, disc, outside == 0
