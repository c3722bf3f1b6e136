"""What the pages of several commands are made of: which cases are shown, and how a case is pictured."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sdseg_cli.core.grid import Grid
from sdseg_cli.core.reporting.overlays import colour_of, mask_layer, outline_layer
from sdseg_cli.core.reporting.page import Layer, SliceView, Stage, heat_map, layer_source, webp_source

# A page embeds the pictures of at most these: 3 + 3 + 2 cases, and of each at most MOST_VIEWS slices.
WORST, MIDDLE, BEST = 3, 3, 2
MOST_VIEWS = 12
MOST_ROWS = 2000  # of a case table; beyond them the page names the CSV file
LEAST_BRIGHTEST = 0.02  # of uncertainty: noise-like differences below it stay dark

Item = TypeVar("Item")


def extremes(ranked: Sequence[Item], few: str = "") -> list[tuple[str, Item]]:
    """Of items ranked worst first, choose the WORST first, the MIDDLE around the median and the BEST last.

    Args:
        ranked: worst first.
        few: the badge where there are at most as many as would be chosen, so that all of them are.

    Returns:
        (badge, item) in the order of the ranking; the badge is worst, middle or best.
    """
    if len(ranked) < WORST + MIDDLE + BEST:
        return [(few, item) for item in ranked]
    start = min(max((len(ranked) - MIDDLE) // 2, WORST), len(ranked) - BEST - MIDDLE)
    return [
        *(("worst", item) for item in ranked[:WORST]),
        *(("middle", item) for item in ranked[start : start + MIDDLE]),
        *(("best", item) for item in ranked[-BEST:]),
    ]


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of the positions 0 .. count - 1, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(position) for position in np.linspace(0, count - 1, most)})


def slice_view(
    name: str,
    image: np.ndarray,
    prediction: np.ndarray,
    *,
    truth: np.ndarray | None = None,
    uncertainty: np.ndarray | None = None,
    brightest: float = 0.5,
    grid: Grid | None = None,
    pixel_mm: tuple[float, float] | None = None,
    has_image: bool = True,
) -> SliceView:
    """Picture one slice: the image alone, then with truth, prediction and uncertainty laid over it.

    Args:
        name: of the slice, for the slider.
        image: uint8, (H, W, 3).
        prediction: uint8, (H, W), class indices.
        truth: uint8, (H, W), class indices, where it is known.
        uncertainty: float, (H, W), standard deviation in [0, 0.5], where it is known.
        brightest: the uncertainty of the brightest colour.
        grid: given, the arrays are on this model's grid: its border is cut off, and the picture is shown in
            the proportions of the case.
        pixel_mm: height and width of a pixel of the case, where they are known: thick slices that were cut
            across are then shown as long as the body is.
        has_image: False where masks are all there is: ``image`` is then the ground they are drawn on alone.
    """
    height, width = image.shape[:2]
    cut = (slice(None), slice(None))
    if grid is not None:
        top, left, inner_height, inner_width = grid.content
        cut = (slice(top, top + inner_height), slice(left, left + inner_width))
        _, _, height, width = grid.seen
    if pixel_mm is not None:
        height, width = (round(1000 * side * mm) for side, mm in zip((height, width), pixel_mm, strict=True))
    stages = [Stage("image")] if has_image else []
    over: list[Layer] = []
    if truth is not None:
        stages.append(Stage("ground truth", (Layer("truth", layer_source(mask_layer(truth[cut]))),)))
        over.append(Layer("truth", layer_source(outline_layer(truth[cut]))))
    drawn = Layer("prediction", layer_source(mask_layer(prediction[cut])))
    stages.append(Stage("prediction, truth outlined" if over else "prediction", (drawn, *over)))
    if uncertainty is not None:
        heat = webp_source(heat_map(uncertainty[cut], highest=brightest))
        stages.append(Stage("uncertainty", (Layer("uncertainty", heat),)))
    return SliceView(name, webp_source(image[cut]), width, height, tuple(stages))


def legend(classes: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """(name, CSS colour) of every foreground class; ``classes`` begins with the background."""
    return tuple(
        (name, "rgb({}, {}, {})".format(*colour_of(label))) for label, name in enumerate(classes) if label > 0
    )


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation of the finite pairs; NaN below four of them or where a side is constant."""
    from scipy.stats import spearmanr

    pairs = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if len(pairs) < 4 or any(len(set(values)) < 2 for values in zip(*pairs, strict=True)):
        return math.nan
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def facts(content: Mapping[str, Any], names: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Choose entries of a report for the page's provenance.

    Args:
        content: what the command writes as JSON.
        names: keys of it, with the label each is shown under.

    Returns:
        (label, text); what is absent or empty is left out, a mapping becomes ``a 1, b 2``, ``command``
        what was typed.
    """
    told = {**content, "command": command_line(content.get("command") or ())}
    found = ((label, _text(told.get(key))) for key, label in names.items())
    return tuple((label, text) for label, text in found if text)


def command_line(command: Sequence[str]) -> str:
    """A recorded ``sys.argv`` as it would be typed; "" for none."""
    if not command:
        return ""
    program, *arguments = command
    is_module = Path(program).name in ("__main__.py", "sdseg")  # as under accelerate launch
    return shlex.join(["sdseg" if is_module else program, *arguments])


def _text(value: Any) -> str:
    if value is None or value in ("", [], {}):
        return ""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{name.replace('_', ' ')} {_text(each)}" for name, each in value.items() if _text(each)
        )
    if isinstance(value, list | tuple):
        return ", ".join(_text(each) for each in value)
    return str(value)


def decimals(value: float | None) -> str:
    """Three decimals, or a dash where there is no value."""
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def ranked(items: Sequence[Item], score: Callable[[Item], float]) -> list[Item]:
    """Sort by a score, the lowest first; items without one (NaN) are left out."""
    return sorted((item for item in items if not math.isnan(score(item))), key=score)
