"""Random outlines and smooth random fields: the strokes that the phantoms and their masks are drawn with.

Lengths are fractions of the shorter side of the picture unless a name says pixels; points are (x, y).
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

Shape = tuple[int, int]  # (height, width) in pixels


def smooth_field(rng: np.random.Generator, shape: Shape, cells: float) -> np.ndarray:
    """Draw a smooth random field: white noise on a coarse grid, brought up by cubic interpolation.

    Args:
        rng: source of the draw.
        shape: (height, width) in pixels.
        cells: number of grid cells along the shorter side; the larger, the finer the structure.

    Returns:
        float32, (height, width), about standard normal.
    """
    step = max(1.0, min(shape) / cells)
    # Three cells of margin: near its border an upscaled picture is flatter than inside.
    rows, columns = (int(np.ceil(side / step)) + 3 for side in shape)
    noise = Image.fromarray(rng.standard_normal((rows, columns), dtype=np.float32))
    box = (1.5, 1.5, 1.5 + shape[1] / step, 1.5 + shape[0] / step)
    field = np.asarray(noise.resize((shape[1], shape[0]), Image.Resampling.BICUBIC, box=box))
    # Interpolation lowers the variance between the nodes; 0.75 is its mean effect on the deviation.
    return field / np.float32(0.75)


def star_outline(
    rng: np.random.Generator,
    radius: float,
    *,
    elongation: float = 1.0,
    roughness: float = 0.15,
    smoothness: float = 1.5,
    harmonics: int = 6,
    points: int = 160,
) -> np.ndarray:
    """Draw a closed outline around the origin whose radius is a random Fourier series of the angle.

    Args:
        rng: source of the draw.
        radius: mean radius.
        elongation: length over breadth; the area stays about the same.
        roughness: deviation of the radius from a circle, as a fraction of it.
        smoothness: decay of the amplitude with the harmonic's number, as a power.
        harmonics: the highest harmonic; the first one drawn is the second.
        points: number of points.

    Returns:
        float64, (points, 2), turned by a random angle.
    """
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    orders = np.arange(2, harmonics + 1)
    weights = (orders - 1.0) ** -smoothness
    amplitudes = rng.standard_normal(len(orders)) * weights * roughness / np.sqrt((weights**2).sum() / 2)
    phases = rng.uniform(0, 2 * np.pi, len(orders))
    wave = (amplitudes[:, None] * np.cos(orders[:, None] * angle + phases[:, None])).sum(0)
    distance = radius * np.clip(1 + wave / np.sqrt(2), 0.15, 2.5)
    stretch = np.sqrt(elongation)
    x, y = distance * np.cos(angle) * stretch, distance * np.sin(angle) / stretch
    return rotated(np.stack([x, y], axis=1), rng.uniform(0, 2 * np.pi))


def rotated(points: np.ndarray, angle: float) -> np.ndarray:
    """Turn (n, 2) points about the origin by ``angle`` radians."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return points @ np.array([[cosine, sine], [-sine, cosine]])


def wandering_line(rng: np.random.Generator, length: float, bend: float, points: int = 24) -> np.ndarray:
    """Draw an open curve that starts at the origin and turns smoothly at random.

    Args:
        rng: source of the draw.
        length: its length.
        bend: deviation of its direction over the whole length, in radians.
        points: number of points.

    Returns:
        float64, (points, 2).
    """
    turns = np.convolve(rng.standard_normal(points + 4), np.ones(5) / np.sqrt(5), mode="valid")
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(turns) * bend / points
    steps = np.stack([np.cos(heading), np.sin(heading)], axis=1) * length / points
    return np.cumsum(steps, axis=0)


def fill(shape: Shape, outlines: list[np.ndarray], centre: tuple[float, float] | None = None) -> np.ndarray:
    """Fill closed outlines.

    Args:
        shape: (height, width) in pixels.
        outlines: each (n, 2), in fractions of the shorter side, relative to ``centre``.
        centre: (x, y) as fractions of width and height; the middle by default.

    Returns:
        bool, (height, width).
    """
    canvas = Image.new("L", (shape[1], shape[0]))
    draw = ImageDraw.Draw(canvas)
    for outline in outlines:
        draw.polygon(_pixels(outline, shape, centre), fill=1)
    return np.asarray(canvas).astype(bool)


def stroke(
    shape: Shape, lines: list[np.ndarray], width: float, centre: tuple[float, float] | None = None
) -> np.ndarray:
    """Draw open curves with a round pen; arguments as in :func:`fill`, ``width`` that of the pen.

    Returns:
        bool, (height, width).
    """
    canvas = Image.new("L", (shape[1], shape[0]))
    draw = ImageDraw.Draw(canvas)
    pen = max(1, round(width * min(shape)))
    for line in lines:
        pixels = _pixels(line, shape, centre)
        draw.line(pixels, fill=1, width=pen, joint="curve")
        for x, y in (pixels[0], pixels[-1]):
            draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=1)
    return np.asarray(canvas).astype(bool)


def _pixels(
    points: np.ndarray, shape: Shape, centre: tuple[float, float] | None
) -> list[tuple[float, float]]:
    middle = np.array(centre or (0.5, 0.5)) * (shape[1], shape[0])
    return [(float(x), float(y)) for x, y in points * min(shape) + middle]
