"""Pictures with exact masks, drawn from a seed: for demos, for tests, and to train a mask autoencoder."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage

from sdseg_cli.core.data.endoscopy_phantom import draw_endoscopy
from sdseg_cli.core.data.organ_phantom import ORGANS, draw_organs
from sdseg_cli.core.data.shapes import fill, smooth_field, star_outline, stroke, wandering_line
from sdseg_cli.core.errors import UsageError
from sdseg_cli.core.seeding import derive_seed

PHANTOM_KINDS = ("endoscopy", "organs")
MINIMUM_SIZE = 32  # pixels; below, a polyp's texture and a kidney's cortex vanish


def phantom_classes(kind: str) -> tuple[str, ...]:
    """Name the classes of a kind of phantom, background first.

    Raises:
        UsageError: there is no such kind.
    """
    _check_kind(kind)
    return ("background", "polyp") if kind == "endoscopy" else ("background", *ORGANS)


def make_phantom(kind: str, *, seed: int, index: int, size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Draw one picture with its exact label map.

    Args:
        kind: one of :data:`PHANTOM_KINDS`.
        seed: the series.
        index: the number in the series; every index is an independent draw.
        size: about the height and width in pixels; both vary from 0.85 to 1.3 times that, so that whatever
            brings pictures to the network's grid is exercised.

    Returns:
        The image, uint8, (height, width, 3), and the label map, uint8, (height, width), whose values are
        the indices of :func:`phantom_classes`. The same arguments give the same picture.

    Raises:
        UsageError: there is no such kind, or the size is below :data:`MINIMUM_SIZE`.
    """
    _check_kind(kind)
    if size < MINIMUM_SIZE:
        raise UsageError(f"a phantom of {size} pixels is too small. Ask for at least {MINIMUM_SIZE}.")
    rng = np.random.default_rng(derive_seed("phantom", kind, seed, index, size))
    shape = (round(size * rng.uniform(0.85, 1.1)), round(size * rng.uniform(0.95, 1.3)))
    return draw_endoscopy(rng, shape) if kind == "endoscopy" else draw_organs(rng, shape)


def otsu_dice(image: np.ndarray, label_map: np.ndarray) -> float:
    """Score what a threshold alone can do: the figure that a phantom has to keep low.

    Args:
        image: uint8, (H, W, 3).
        label_map: uint8, (H, W); everything above 0 is foreground.

    Returns:
        Dice of Otsu's threshold of the grey image, taking brighter or darker, whichever scores higher;
        NaN where there is no foreground.
    """
    grey = np.asarray(Image.fromarray(image).convert("L"))
    counts = np.bincount(grey.ravel(), minlength=256).astype(np.float64)
    below = np.cumsum(counts)
    above = below[-1] - below
    total = np.cumsum(counts * np.arange(256))
    # Otsu: the threshold that sets the two means furthest apart, weighted by the two counts.
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = below * above * (total / below - (total[-1] - total) / above) ** 2
    bright = grey > int(np.argmax(np.nan_to_num(apart)))
    foreground = label_map > 0
    if not foreground.any():
        return float("nan")
    scores = [2 * (p & foreground).sum() / (p.sum() + foreground.sum()) for p in (bright, ~bright)]
    return float(max(scores))


def _check_kind(kind: str) -> None:
    if kind not in PHANTOM_KINDS:
        raise UsageError(f"there is no phantom {kind!r}. Choose {' or '.join(PHANTOM_KINDS)}.")


def random_masks(seed: int, index: int, size: int) -> np.ndarray:
    """Draw one mask as varied as those of lesions and organs: what a mask autoencoder is trained on.

    Smooth, lobed, elongated, thin, ragged, angular and multi-component shapes, with and without holes, whole
    or cut by the border; tiny specks; now and then nothing, or nearly everything.

    Args:
        seed: the series.
        index: the number in the series; every index is an independent draw.
        size: height and width in pixels.

    Returns:
        uint8, (size, size), 0 or 1.
    """
    rng = np.random.default_rng(derive_seed("random mask", seed, index, size))
    names = list(_MASK_KINDS)
    weights = np.array([_MASK_KINDS[name][1] for name in names])
    draw = _MASK_KINDS[names[rng.choice(len(names), p=weights / weights.sum())]][0]
    mask = draw(rng, size)
    if rng.random() < 0.12:
        mask = mask & ~_inner_hole(rng, mask)
    if rng.random() < 0.15:
        mask = _ragged(rng, mask)
    if rng.random() < 0.12:
        mask = _staircase(rng, mask)
    if rng.random() < 0.03:
        mask = ~mask
    return mask.astype(np.uint8)


def _anywhere(rng: np.random.Generator) -> tuple[float, float]:
    """A centre; one in five lies near or on the border, so that the border cuts the shape."""
    low, high = (-0.05, 1.05) if rng.random() < 0.2 else (0.2, 0.8)
    return float(rng.uniform(low, high)), float(rng.uniform(low, high))


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _smooth(rng: np.random.Generator, size: int) -> np.ndarray:
    outline = star_outline(
        rng,
        _log_uniform(rng, 0.08, 0.5),
        elongation=_log_uniform(rng, 1, 2),
        roughness=rng.uniform(0, 0.25),
        harmonics=int(rng.integers(3, 9)),
    )
    return fill((size, size), [outline], _anywhere(rng))


def _long(rng: np.random.Generator, size: int) -> np.ndarray:
    outline = star_outline(
        rng, _log_uniform(rng, 0.05, 0.2), elongation=_log_uniform(rng, 2.5, 8), roughness=rng.uniform(0, 0.3)
    )
    return fill((size, size), [outline], _anywhere(rng))


def _lobed(rng: np.random.Generator, size: int) -> np.ndarray:
    reach = _log_uniform(rng, 0.08, 0.3)
    outlines = [
        star_outline(rng, reach * rng.uniform(0.4, 1.1), elongation=_log_uniform(rng, 1, 2.5))
        + rng.normal(0, reach * 0.8, 2)
        for _ in range(rng.integers(2, 6))
    ]
    return fill((size, size), outlines, _anywhere(rng))


def _several(rng: np.random.Generator, size: int) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    for _ in range(rng.integers(2, 7)):
        outline = star_outline(
            rng,
            _log_uniform(rng, 0.015, 0.15),
            elongation=_log_uniform(rng, 1, 3),
            roughness=rng.uniform(0, 0.3),
        )
        mask |= fill((size, size), [outline], (float(rng.uniform(0, 1)), float(rng.uniform(0, 1))))
    return mask


def _specks(rng: np.random.Generator, size: int) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    for _ in range(rng.integers(1, 6)):
        height, width = rng.integers(1, max(2, size // 24) + 1, 2)
        top, left = rng.integers(0, size - height), rng.integers(0, size - width)
        y, x = np.mgrid[:height, :width]
        # An ellipse that touches the four sides of its box; of one or two pixels nothing is cut away.
        inside = ((y + 0.5) / height * 2 - 1) ** 2 + ((x + 0.5) / width * 2 - 1) ** 2 <= 1.01
        mask[top : top + height, left : left + width] |= inside
    return mask


def _thin(rng: np.random.Generator, size: int) -> np.ndarray:
    centre = _anywhere(rng)
    lines = [
        wandering_line(rng, rng.uniform(0.2, 1.2), rng.uniform(0.5, 8)) for _ in range(rng.integers(1, 4))
    ]
    return stroke((size, size), lines, _log_uniform(rng, 0.008, 0.1), centre)


def _polygon(rng: np.random.Generator, size: int) -> np.ndarray:
    corners = int(rng.integers(3, 12))
    # Unequal steps of the angle, each at least a little, so that the outline does not cross itself.
    angle = np.cumsum(rng.uniform(0.3, 1, corners))
    angle *= 2 * np.pi / angle[-1]
    distance = _log_uniform(rng, 0.06, 0.45) * rng.uniform(0.5, 1.3, corners)
    outline = np.stack([distance * np.cos(angle), distance * np.sin(angle)], axis=1)
    return fill((size, size), [outline], _anywhere(rng))


def _patches(rng: np.random.Generator, size: int) -> np.ndarray:
    field = smooth_field(rng, (size, size), _log_uniform(rng, 2, 14))
    if rng.random() < 0.5:
        field = field + 0.4 * smooth_field(rng, (size, size), 24)
    mask = field > rng.uniform(0.2, 1.8)
    if rng.random() < 0.5:
        mask &= fill((size, size), [star_outline(rng, rng.uniform(0.15, 0.5))], _anywhere(rng))
    return mask


def _ring(rng: np.random.Generator, size: int) -> np.ndarray:
    outline = star_outline(rng, _log_uniform(rng, 0.08, 0.4), elongation=_log_uniform(rng, 1, 1.8))
    centre = _anywhere(rng)
    inner = outline * rng.uniform(0.35, 0.92) + rng.normal(0, 0.01, 2)
    return fill((size, size), [outline], centre) & ~fill((size, size), [inner], centre)


def _region_at_the_border(rng: np.random.Generator, size: int) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size] / size - 0.5
    wave = smooth_field(rng, (size, size), rng.uniform(1, 6)) * rng.uniform(0, 0.08)
    return x * np.cos(angle) + y * np.sin(angle) + wave > rng.uniform(-0.1, 0.55)


def _empty(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.zeros((size, size), bool)


def _inner_hole(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    inside = np.argwhere(mask)
    if len(inside) == 0:
        return mask
    y, x = inside[rng.integers(len(inside))] / len(mask)
    radius = rng.uniform(0.1, 0.5) * np.sqrt(len(inside)) / len(mask)
    return fill(mask.shape, [star_outline(rng, radius)], (float(x), float(y)))


def _ragged(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """Shift the edge by a few pixels of noise, as a quick hand or a region grower does."""
    cells = _log_uniform(rng, 8, max(9.0, len(mask) / 4))
    soft = ndimage.uniform_filter(mask.astype(np.float32), max(3, round(len(mask) * rng.uniform(0.01, 0.05))))
    return soft + 0.18 * smooth_field(rng, mask.shape, cells) * ((soft > 0) & (soft < 1)) > 0.5


def _staircase(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """Go through a smaller picture without interpolation, as masks drawn on a coarser grid come."""
    small = max(4, round(len(mask) * rng.uniform(0.25, 0.8)))
    picture = Image.fromarray(mask)
    return np.asarray(picture.resize((small, small), Image.Resampling.NEAREST).resize(picture.size))


_MASK_KINDS: dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], float]] = {
    "smooth": (_smooth, 0.28),
    "lobed": (_lobed, 0.15),
    "several": (_several, 0.12),
    "long": (_long, 0.10),
    "thin": (_thin, 0.08),
    "polygon": (_polygon, 0.08),
    "patches": (_patches, 0.07),
    "ring": (_ring, 0.05),
    "specks": (_specks, 0.04),
    "region at the border": (_region_at_the_border, 0.02),
    "empty": (_empty, 0.01),
}
