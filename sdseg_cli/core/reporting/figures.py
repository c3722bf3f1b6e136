"""Figures of runs, drawn by matplotlib without a screen and without its global state."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sdseg_cli.core.files import write_whole
from sdseg_cli.core.reporting.curves import Convergence, Metrics, series

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#7a7f87"
# Told apart by people who see few colours (Okabe and Ito 2008); beyond them the line style changes.
COLOURS = (BLUE, ORANGE, GREEN, "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLES = ("-", "--", ":", "-.")


def training_curves(metrics: Metrics, path: Path) -> None:
    """Draw loss, validation Dice, learning rate and speed against the optimizer step.

    Args:
        metrics: records as in `metrics.jsonl`, each with "step" and any of "loss", "validation_dice",
            "learning_rate" and "samples_per_second"; values that are absent, null or not finite are left out.
        path: file to write, its suffix says the format (.png, .svg, .pdf); an older one is replaced.
    """
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    (loss_axes, dice_axes), (rate_axes, speed_axes) = figure.subplots(2, 2, sharex=True)

    steps, losses = series(metrics, "loss")
    _prepare(loss_axes, "training loss", empty=not len(steps))
    if len(steps):
        smooth = _smoothed(losses)
        loss_axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=0.8)
        loss_axes.plot(steps, smooth, color=BLUE, linewidth=1.6)
        if losses.min() > 0 and losses.max() > 20 * losses.min():
            loss_axes.set_yscale("log")

    steps, dices = series(metrics, "validation_dice")
    _prepare(dice_axes, "validation Dice", empty=not len(steps))
    if len(steps):
        best = int(np.argmax(dices))
        dice_axes.plot(steps, dices, color=GREEN, linewidth=1.6, marker="o", markersize=3)
        dice_axes.plot(steps[best], dices[best], "o", color=ORANGE, markersize=7)
        note = f"best {dices[best]:.4f} at step {steps[best]:.0f}"
        dice_axes.set_title(note, loc="right", fontsize=10, color=ORANGE)
        dice_axes.set_ylim(max(0, dices.min() - 0.05), min(1, max(dices.max() + 0.03, 0.1)))

    for axes, key, title, colour in (
        (rate_axes, "learning_rate", "learning rate", GREY),
        (speed_axes, "samples_per_second", "speed, samples/s", GREY),
    ):
        steps, values = series(metrics, key)
        _prepare(axes, title, empty=not len(steps))
        if len(steps):
            axes.plot(steps, values, color=colour, linewidth=1.4)
            axes.set_ylim(0, max(1.1 * values.max(), 1e-12))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    _save(figure, path)


def convergence_curves(curves: Sequence[Convergence], path: Path) -> None:
    """Draw the validation Dice of several methods, against the optimizer step and against the time trained.

    Args:
        curves: one of each run; those of one method share a colour.
        path: file to write, its suffix says the format; an older one is replaced.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    lines: dict[str, Line2D] = {}  # the first of each method, for the legend
    for curve in curves:
        index = list(lines).index(curve.method) if curve.method in lines else len(lines)
        style = {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": STYLES[index // len(COLOURS) % len(STYLES)],
        }
        (line,) = by_step.plot(curve.steps, curve.dices, marker="o", markersize=2.5, linewidth=1.4, **style)
        lines.setdefault(curve.method, line)
        if curve.minutes is not None:
            by_time.plot(curve.minutes, curve.dices, marker="o", markersize=2.5, linewidth=1.4, **style)
    for axes, x_label in ((by_step, "optimizer step"), (by_time, "minutes trained")):
        _prepare(axes, "validation Dice", empty=not curves)
        axes.set_xlabel(x_label)
        axes.set_xlim(left=0)
    if curves:
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": min(4, len(lines))}
        legend = figure.legend([*lines.values()], [*lines], frameon=False, fontsize=9, **place)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a dollar sign in a name is one
    _save(figure, path)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Average over about a fortieth of the curve, fewer at its ends, so that nothing is shifted."""
    reach = max(1, len(values) // 80)
    kernel = np.ones(2 * reach + 1)
    weights = np.convolve(np.ones(len(values)), kernel, mode="full")[reach : reach + len(values)]
    return np.convolve(values, kernel, mode="full")[reach : reach + len(values)] / weights


def _prepare(axes: Axes, title: str, *, empty: bool) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if empty:
        axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", va="center", color=GREY)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with mpl.rc_context({"svg.hashsalt": "sdseg", "svg.fonttype": "none"}):
        # Without a date the same numbers give the same file.
        metadata = {"Date": None} if path.suffix == ".svg" else None
        payload = io.BytesIO()
        figure.savefig(payload, format=path.suffix.lstrip(".") or "png", dpi=120, metadata=metadata)
    write_whole(path, payload.getvalue())
