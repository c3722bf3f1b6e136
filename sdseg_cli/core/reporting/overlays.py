"""Pictures to look at: label maps laid over images, contact sheets, and rows of image, truth, prediction.

Everything is drawn with numpy and Pillow and returned as an array; writing it is the caller's.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

# Colours of the classes, row k for class k; row 0, the background, is never drawn. They stay apart for the
# colour-blind (the first seven in the manner of Okabe and Ito, brightened for dark pictures), and sky blue,
# which tissue never is, comes first.
CLASS_COLOURS: np.ndarray = np.array(
    [
        (0, 0, 0),
        (56, 190, 255),
        (255, 176, 0),
        (0, 188, 132),
        (245, 120, 200),
        (246, 236, 80),
        (232, 98, 20),
        (42, 112, 255),
        (176, 148, 255),
        (150, 230, 160),
        (170, 110, 40),
        (255, 190, 170),
        (0, 150, 160),
        (150, 60, 160),
        (190, 200, 80),
    ],
    np.uint8,
)
_TRUTH = (255, 255, 255)
_PAPER = (24, 26, 30)
_INK = (236, 238, 242)
_FAINT = (150, 156, 166)
_GAP = 8  # pixels between tiles
_TEXT = 13  # pixels, height of a title


class Labelled(NamedTuple):
    """A picture for a contact sheet."""

    title: str
    image: np.ndarray  # uint8, (H, W, 3)
    label_map: np.ndarray  # uint8, (H, W)


class Compared(NamedTuple):
    """A row of a prediction grid."""

    title: str
    image: np.ndarray  # uint8, (H, W, 3)
    truth: np.ndarray  # uint8, (H, W)
    prediction: np.ndarray  # uint8, (H, W)
    probability: np.ndarray | None = None  # float, (H, W), [0, 1]


def colour_of(label: int) -> tuple[int, int, int]:
    """Return the colour of a class; beyond the table the colours come round again."""
    red, green, blue = CLASS_COLOURS[(label - 1) % (len(CLASS_COLOURS) - 1) + 1]
    return int(red), int(green), int(blue)


def overlay(
    image: np.ndarray, label_map: np.ndarray, *, alpha: float = 0.3, contours: bool = True
) -> np.ndarray:
    """Lay a label map over its image.

    Args:
        image: uint8, (H, W, 3), or (H, W) for grey.
        label_map: uint8, (H, W); 0 is left clear.
        alpha: weight of the class's colour inside its area, [0, 1]; 0 draws contours alone.
        contours: draw the edge of each area in full colour, with a dark line around it.

    Returns:
        uint8, (H, W, 3).

    Raises:
        ValueError: the two differ in size.
    """
    _check_sizes(image, label_map)
    picture = (np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image).astype(np.float32)
    inside = label_map > 0
    colours = _colours(label_map)
    if alpha > 0:
        picture[inside] += alpha * (colours[inside] - picture[inside])
    if contours and inside.any():
        width = _line_width(label_map.shape)
        edge = _edge(label_map, width)
        # The dark line outside keeps a bright contour readable on bright tissue.
        halo = ndimage.maximum_filter(inside, 2 * max(1, width // 2) + 1) & ~inside
        picture[halo] *= 0.45
        picture[edge] = colours[edge]
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def mask_layer(label_map: np.ndarray, *, alpha: float = 0.35) -> np.ndarray:
    """Draw a label map as a layer to lay over its image: areas in the colours of their classes, with edges.

    Args:
        label_map: uint8, (H, W); 0 is left transparent.
        alpha: opacity inside the areas, [0, 1]; their edges are opaque.

    Returns:
        uint8, (H, W, 4).
    """
    inside = label_map > 0
    layer = np.zeros((*label_map.shape, 4), np.uint8)
    layer[inside, :3] = _colours(label_map)[inside]
    layer[inside, 3] = round(255 * alpha)
    layer[_edge(label_map, _line_width(label_map.shape)), 3] = 255
    return layer


def outline_layer(label_map: np.ndarray) -> np.ndarray:
    """Draw the edges of a label map in white, as a layer; uint8, (H, W, 4)."""
    layer = np.zeros((*label_map.shape, 4), np.uint8)
    layer[_edge(label_map, _line_width(label_map.shape))] = (*_TRUTH, 255)
    return layer


def contact_sheet(
    items: Sequence[tuple[str, np.ndarray, np.ndarray]],
    columns: int = 6,
    *,
    tile: int = 200,
    classes: Sequence[str] = (),
) -> np.ndarray:
    """Lay out many overlays on one sheet, each under its title.

    Args:
        items: (title, image, label map) as in :class:`Labelled`; sizes may differ from item to item.
        columns: tiles in a row.
        tile: height and width of a tile in pixels; pictures keep their shape inside it.
        classes: names of the classes, background first, for a legend below; none by default.

    Returns:
        uint8, (H, W, 3).

    Raises:
        ValueError: there are no items, or an image and its label map differ in size.
    """
    if not items:
        raise ValueError("a contact sheet needs at least one picture")
    columns = max(1, min(columns, len(items)))
    cells = []
    for title, image, label_map in items:
        _check_sizes(image, label_map)
        height, width = _fitted(label_map.shape, tile)
        cells.append((title, overlay(_resized(image, height, width), _resized(label_map, height, width))))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    return _sheet(rows, tile, columns, _legend_entries(classes))


def prediction_grid(
    items: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray] | Compared],
    *,
    tile: int = 224,
    classes: Sequence[str] = (),
) -> np.ndarray:
    """Lay out image, ground truth and prediction side by side, one row per item.

    The prediction's areas are filled in the colours of their classes, with the outline of the ground truth in
    white over them. Where an item has a probability, a fourth column shows it from dark (0) to light (1).

    Args:
        items: (title, image, truth, prediction, probability), see :class:`Compared`; the last is optional.
        tile: height and width of a tile in pixels.
        classes: names of the classes, background first, for a legend below; none by default.

    Returns:
        uint8, (H, W, 3).

    Raises:
        ValueError: there are no items, or the arrays of an item differ in size.
    """
    if not items:
        raise ValueError("a prediction grid needs at least one row")
    compared = [Compared(*item) for item in items]
    with_probability = any(item.probability is not None for item in compared)
    headings = ("image", "ground truth", "prediction", "probability")[: 3 + with_probability]
    rows = []
    for item in compared:
        for label_map in (item.truth, item.prediction):
            _check_sizes(item.image, label_map)
        height, width = _fitted(item.truth.shape, tile)
        image = _resized(item.image, height, width)
        truth = _resized(item.truth, height, width)
        predicted = overlay(image, _resized(item.prediction, height, width), alpha=0.5, contours=False)
        predicted = _outlined(predicted, truth)
        pictures = [image, overlay(image, truth), predicted]
        if item.probability is not None:
            _check_sizes(item.image, item.probability)
            pictures.append(_outlined(_heat(_resized(item.probability, height, width)), truth))
        titles = [item.title] + [""] * (len(pictures) - 1)
        rows.append(list(zip(titles, pictures, strict=True)))
    legend = [*_legend_entries(classes), ("outline of the ground truth", _TRUTH)]
    return _sheet(rows, tile, len(headings), legend, headings)


def _check_sizes(image: np.ndarray, other: np.ndarray) -> None:
    if image.shape[:2] != other.shape:
        raise ValueError(
            f"the image is {image.shape[1]}x{image.shape[0]} pixels, what is laid over it is "
            f"{'x'.join(str(side) for side in other.shape[::-1])}. Bring both to one grid first."
        )


def _colours(label_map: np.ndarray) -> np.ndarray:
    table = np.array([colour_of(label) for label in range(256)], np.float32)
    return table[label_map]


def _line_width(shape: tuple[int, ...]) -> int:
    return -(-max(shape) // 160)


def _edge(label_map: np.ndarray, width: int) -> np.ndarray:
    """Find the pixels of each area that lie within ``width`` pixels of another label; bool, (H, W)."""
    size = 2 * width + 1
    changes = ndimage.maximum_filter(label_map, size) != ndimage.minimum_filter(label_map, size)
    return changes & (label_map > 0)


def _outlined(picture: np.ndarray, label_map: np.ndarray) -> np.ndarray:
    outlined = picture.copy()
    outlined[_edge(label_map, _line_width(label_map.shape))] = _TRUTH
    return outlined


def _heat(probability: np.ndarray) -> np.ndarray:
    """Colour a probability: black, violet, orange, pale yellow, ever lighter; uint8, (H, W, 3)."""
    stops = np.array([(8, 6, 24), (96, 24, 110), (214, 72, 72), (252, 176, 60), (252, 253, 200)], np.float32)
    position = np.clip(np.nan_to_num(probability), 0, 1) * (len(stops) - 1)
    channels = [np.interp(position, np.arange(len(stops)), stops[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def _fitted(shape: tuple[int, ...], tile: int) -> tuple[int, int]:
    scale = tile / max(shape)
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _resized(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resample for display: images smoothly, label maps by nearest neighbour, probabilities linearly."""
    if array.dtype != np.uint8:
        filters, array = Image.Resampling.BILINEAR, array.astype(np.float32)
    else:
        filters = Image.Resampling.LANCZOS if array.ndim == 3 else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(array).resize((width, height), filters))


def _legend_entries(classes: Sequence[str]) -> list[tuple[str, tuple[int, int, int]]]:
    return [(name, colour_of(label)) for label, name in enumerate(classes) if label > 0]


def _sheet(
    rows: list[list[tuple[str, np.ndarray]]],
    tile: int,
    columns: int,
    legend: list[tuple[str, tuple[int, int, int]]],
    headings: Sequence[str] = (),
) -> np.ndarray:
    """Set titled pictures in rows on dark paper; each row is as high as its highest picture."""
    band = _TEXT + 9
    heights = [max(picture.shape[0] for _, picture in row) + band + _GAP for row in rows]
    width = columns * (tile + _GAP) + _GAP
    lines = _legend_lines(legend, width)
    canvas = Image.new(
        "RGB", (width, sum(heights) + _GAP + (len(lines) + bool(headings)) * (band + 2)), _PAPER
    )
    draw = ImageDraw.Draw(canvas)
    top = _GAP
    for column, heading in enumerate(headings):
        draw.text((_GAP + column * (tile + _GAP), top), heading, fill=_FAINT, font=_font())
    top += (band + 2) * bool(headings)
    for row, height in zip(rows, heights, strict=True):
        for column, (title, picture) in enumerate(row):
            left = _GAP + column * (tile + _GAP)
            draw.text((left, top + 2), _shortened(title, tile), fill=_INK, font=_font())
            canvas.paste(Image.fromarray(picture), (left, top + band))
        top += height
    for line in lines:
        for left, name, colour in line:
            draw.rounded_rectangle((left, top + 3, left + _TEXT, top + 3 + _TEXT), radius=3, fill=colour)
            draw.text((left + _TEXT + 6, top + 2), name, fill=_INK, font=_font())
        top += band + 2
    return np.asarray(canvas)


def _legend_lines(
    legend: list[tuple[str, tuple[int, int, int]]], width: int
) -> list[list[tuple[int, str, tuple[int, int, int]]]]:
    """Break a legend into lines of (left, name, colour)."""
    lines: list[list[tuple[int, str, tuple[int, int, int]]]] = []
    left = width
    for name, colour in legend:
        shown = _shortened(name, width - 2 * _GAP - _TEXT - 6)
        needed = _TEXT + 6 + int(_font().getlength(shown)) + 18
        if left + needed > width:
            lines.append([])
            left = _GAP
        lines[-1].append((left, shown, colour))
        left += needed
    return lines


def _shortened(text: str, width: int) -> str:
    """Cut the middle out of a title that is too long; names differ at their ends."""
    text = " ".join(text.split())
    if _font().getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 1, -1):
        shorter = text[: kept - kept // 2] + "…" + text[-(kept // 2) :]
        if _font().getlength(shorter) <= width:
            return shorter
    return "…"


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # matplotlib ships a font that knows more than Latin letters; it is not imported for that.
    found = importlib.util.find_spec("matplotlib")
    if found is not None and found.origin is not None:
        path = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(str(path), _TEXT)
    return ImageFont.load_default(_TEXT)
