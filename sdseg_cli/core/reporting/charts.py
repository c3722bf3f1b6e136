"""Charts as inline SVG, coloured by the page's own style sheet, so that they follow light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

CHART_WIDTH, CHART_HEIGHT = 440, 240
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 46, 14, 14, 38
TICK_CHARACTER, LABEL_CHARACTER = 7.5, 9.0  # width at most, in units of the drawing, of digits and of letters
MOST_DOTS = 200  # of one row of a dot plot; beyond them bars tell more
MOST_POINTS = 160  # of one curve: more cannot be told apart at this width
TONES, DASHES = 7, 4  # of the style sheet; curves beyond the tones are dashed


@dataclass(frozen=True)
class Series:
    """One curve: ``x`` and ``y`` of equal length; values that are not finite are left out.

    Curves of one name share a colour. ``marks`` draws a dot at every value, ``line=False`` leaves the dots
    alone.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    marks: bool = False
    line: bool = True


@dataclass(frozen=True)
class DotRow:
    """One row of a dot plot: a value per case, their mean, and its 95 % interval where known."""

    name: str
    values: Sequence[float]
    mean: float
    interval: tuple[float, float] | None = None
    highlighted: bool = field(default=False)


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    description: str,
) -> str:
    """Draw curves as SVG.

    Args:
        series: the curves; see :func:`line_legend` where there are several.
        x_label, y_label: names of the axes.
        y_range: fixed limits; by default from 0 (or the least value) to the 98th percentile.
        description: what a reader who cannot see the chart is told.
    """
    clean = [_finite(one) for one in series]
    xs = np.concatenate([x for x, _ in clean]) if clean else np.zeros(0)
    ys = np.concatenate([y for _, y in clean]) if clean else np.zeros(0)
    if not len(xs):
        return _empty_chart(description)
    low, high = y_range or (min(0.0, float(ys.min())), float(np.percentile(ys, 98)) * 1.05)
    axes = _Axes((float(xs.min()), float(xs.max())), (low, high))
    parts = [axes.draw(x_label, y_label)]
    tones = dict(line_legend(series))
    for one, (x, y) in zip(series, clean, strict=True):
        if not len(x):
            continue
        tone = tones[one.name]
        kept = _thinned(x, y) if one.line else (x, y)
        points = [(axes.x(a), axes.y(b)) for a, b in zip(*kept, strict=True)]
        if one.line:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            parts.append(f'<polyline class="curve {tone}" points="{path}"/>')
        if one.marks:
            style, radius = ("dot", 2.6) if one.line else ("dot alone", 4)
            parts += [
                f'<circle class="{style} {tone}" cx="{a:.1f}" cy="{b:.1f}" r="{radius}"/>' for a, b in points
            ]
    return _svg(parts, description)


def line_legend(series: Sequence[Series]) -> tuple[tuple[str, str], ...]:
    """Every name that is drawn, once, with the style sheet's class of its curves: ``c2``, ``c2 d1``."""
    names = dict.fromkeys(one.name for one in series)
    tones = (f"c{index % TONES} d{index // TONES % DASHES}" for index in range(len(names)))
    drawn = {one.name for one in series if len(one.x)}
    return tuple(
        (name, tone.removesuffix(" d0")) for name, tone in zip(names, tones, strict=True) if name in drawn
    )


def dot_plot(rows: Sequence[DotRow], *, x_label: str, description: str) -> str:
    """Draw every case as a dot on [0, 1], one row a method or class, with the mean and its interval.

    Beyond MOST_DOTS cases a row is drawn as a histogram of 40 bins, so that the drawing stays small.
    """
    left, row_height = 14, 74
    height = 16 + row_height * len(rows) + MARGIN_BOTTOM
    inner = CHART_WIDTH - left - MARGIN_RIGHT

    def place(value: float) -> float:
        return left + inner * min(max(value, 0.0), 1.0)

    bottom = height - MARGIN_BOTTOM
    parts = []
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        at = f"{place(tick):.1f}"
        parts.append(
            f'<line class="grid" x1="{at}" x2="{at}" y1="8" y2="{bottom}"/>'
            f'<text class="tick" x="{at}" y="{bottom + 15}" text-anchor="middle">{tick:.1f}</text>'
        )
    parts.append(
        f'<text class="axis" x="{place(0.5):.1f}" y="{height - 5}" text-anchor="middle">'
        f"{_escape(x_label)}</text>"
    )
    for index, row in enumerate(rows):
        middle = 16 + row_height * index + 46
        tone = "c0" if row.highlighted else "c2"
        values = [value for value in row.values if math.isfinite(value)]
        if len(values) > MOST_DOTS:
            parts += _bars(values, place, middle + 18, tone)
            values = []
        for order, value in enumerate(values):
            # A fixed zigzag keeps equal values apart; its height means nothing.
            offset = ((order * 7) % 13 - 6) * 1.7
            parts.append(
                f'<circle class="case {tone}" cx="{place(value):.1f}" cy="{middle + offset:.1f}" r="3"/>'
            )
        score = f": {row.mean:.3f}" if math.isfinite(row.mean) else ": none"
        if math.isfinite(row.mean):
            if row.interval is not None and all(map(math.isfinite, row.interval)):
                low, high = place(row.interval[0]), place(row.interval[1])
                width = max(high - low, 1.0)
                parts.append(
                    f'<rect class="interval {tone}" x="{low:.1f}" y="{middle - 16}" '
                    f'width="{width:.1f}" height="32" rx="2"/>'
                )
            at = f"{place(row.mean):.1f}"
            parts.append(
                f'<line class="mean {tone}" x1="{at}" x2="{at}" y1="{middle - 18}" y2="{middle + 18}"/>'
            )
        name = _shortened(row.name, int(inner / LABEL_CHARACTER) - len(score))
        full = "" if name == row.name else f"<title>{_escape(row.name)}</title>"
        parts.append(f'<text class="label" x="{left}" y="{middle - 26}">{full}{_escape(name + score)}</text>')
    return _svg(parts, description, height)


def reliability_plot(
    rows: Sequence[tuple[str, Sequence[tuple[float, float, int]]]], *, description: str
) -> str:
    """Draw observed frequency against predicted probability.

    Args:
        rows: at most three of (name, points), a point being (mean predicted probability, observed share,
            pixels); the area of a dot grows with the logarithm of its pixels.
        description: what a reader who cannot see the chart is told.
    """
    axes = _Axes((0.0, 1.0), (0.0, 1.0))
    parts = [axes.draw("predicted probability", "truly foreground")]
    parts.append(
        f'<line class="diagonal" x1="{axes.x(0):.1f}" y1="{axes.y(0):.1f}" x2="{axes.x(1):.1f}" '
        f'y2="{axes.y(1):.1f}"/>'
    )
    for index, (name, points) in enumerate(rows):
        if not points:
            continue
        path = " ".join(f"{axes.x(p):.1f},{axes.y(o):.1f}" for p, o, _ in points)
        parts.append(f'<polyline class="curve c{index}" points="{path}"/>')
        for predicted, observed, pixels in points:
            radius = 2 + 0.45 * math.log10(max(pixels, 1))
            parts.append(
                f'<circle class="dot c{index}" cx="{axes.x(predicted):.1f}" cy="{axes.y(observed):.1f}" '
                f'r="{radius:.1f}"><title>{_escape(name)}: predicted {predicted:.3f}, observed '
                f"{observed:.3f}, {pixels} pixels</title></circle>"
            )
        if len(rows) > 1:
            at = MARGIN_TOP + 12 + 17 * index
            parts.append(f'<circle class="dot c{index}" cx="{MARGIN_LEFT + 14}" cy="{at - 4}" r="4"/>')
            parts.append(f'<text class="tick" x="{MARGIN_LEFT + 24}" y="{at}">{_escape(name)}</text>')
    return _svg(parts, description)


def _bars(values: Sequence[float], place: Callable[[float], float], bottom: float, tone: str) -> list[str]:
    counts, edges = np.histogram(np.clip(values, 0, 1), bins=40, range=(0.0, 1.0))
    highest = max(int(counts.max()), 1)
    return [
        f'<rect class="case {tone}" x="{place(low) + 0.5:.1f}" y="{bottom - 36 * count / highest:.1f}" '
        f'width="{place(high) - place(low) - 1:.1f}" height="{36 * count / highest:.1f}"/>'
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
        if count
    ]


class _Axes:
    """Linear axes of one chart, from values to pixels of the drawing."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float]) -> None:
        self.x_low, self.x_high = _opened(*x_range)
        self.y_low, self.y_high = _opened(*y_range)

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return MARGIN_LEFT + share * (CHART_WIDTH - MARGIN_LEFT - MARGIN_RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        inner = CHART_HEIGHT - MARGIN_TOP - MARGIN_BOTTOM
        return CHART_HEIGHT - MARGIN_BOTTOM - min(max(share, 0.0), 1.0) * inner

    def draw(self, x_label: str, y_label: str) -> str:
        right, bottom = CHART_WIDTH - MARGIN_RIGHT, CHART_HEIGHT - MARGIN_BOTTOM
        parts = []
        for tick in _ticks(self.y_low, self.y_high):
            at = self.y(tick)
            parts.append(
                f'<line class="grid" x1="{MARGIN_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
                f'<text class="tick" x="{MARGIN_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>'
            )
        for tick in _ticks(self.x_low, self.x_high):
            text = f"{tick:g}"
            at = min(self.x(tick), CHART_WIDTH - TICK_CHARACTER * len(text) / 2)  # the last one is not cut
            parts.append(
                f'<text class="tick" x="{at:.1f}" y="{bottom + 15}" text-anchor="middle">{text}</text>'
            )
        middle = (MARGIN_LEFT + right) / 2
        parts.append(
            f'<line class="base" x1="{MARGIN_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
            f'<text class="axis" x="{middle:.0f}" y="{CHART_HEIGHT - 5}" text-anchor="middle">'
            f"{_escape(x_label)}</text>"
            f'<text class="axis" transform="translate(11 {(MARGIN_TOP + bottom) / 2:.0f}) rotate(-90)" '
            f'text-anchor="middle">{_escape(y_label)}</text>'
        )
        return "".join(parts)


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers inside [low, high]: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((factor * power for factor in (1, 2, 5) if factor * power >= raw), 10 * power)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _opened(low: float, high: float) -> tuple[float, float]:
    """A range of some width, also where all values are one."""
    return (low, high) if high - low > 1e-12 else (low - 0.5, low + 0.5)


def _finite(series: Series) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(series.x, float), np.asarray(series.y, float)
    keep = np.isfinite(x) & np.isfinite(y)
    return x[keep], y[keep]


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS points: the means of equal runs of neighbours."""
    if len(x) <= MOST_POINTS:
        return x, y
    edges = np.linspace(0, len(x), MOST_POINTS + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(x)))
    return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts


def _svg(parts: Sequence[str], description: str, height: int = CHART_HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {CHART_WIDTH} {height}" role="img" aria-label="{_escape(description)}">'
        f"{''.join(parts)}</svg>"
    )


def _empty_chart(description: str) -> str:
    text = (
        f'<text class="axis" x="{CHART_WIDTH / 2}" y="{CHART_HEIGHT / 2}" text-anchor="middle">no data</text>'
    )
    return _svg([text], description)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _escape(text: str) -> str:
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;"), ("'", "&#39;")):
        text = text.replace(character, entity)
    return text
