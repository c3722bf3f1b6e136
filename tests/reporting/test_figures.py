"""Figures are written whole, in the format that their suffix names, also from little or odd data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdseg_cli.core.reporting.curves import convergences
from sdseg_cli.core.reporting.figures import _smoothed, convergence_curves, training_curves

RECORDS: list[dict[str, Any]] = [
    {"step": 10, "loss": 0.9, "learning_rate": 1e-4, "samples_per_second": 20.0},
    {"step": 20, "loss": 0.5, "learning_rate": 2e-4, "samples_per_second": 22.0},
    {"step": 20, "validation_dice": 0.61},
    {"step": 40, "loss": 0.3, "learning_rate": 2e-4, "validation_dice": 0.83},
]


def test_curves_are_a_picture_with_all_three_colours_in_it(tmp_path: Path) -> None:
    training_curves(RECORDS, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        pixels = {pixel for _, pixel in picture.convert("RGB").getcolors(1 << 20) or []}
    assert {(0, 114, 178), (0, 158, 115), (213, 94, 0)} <= pixels


def test_the_best_validation_is_named_with_its_step(tmp_path: Path) -> None:
    training_curves(RECORDS, tmp_path / "curves.svg")
    assert "best 0.8300 at step 40" in (tmp_path / "curves.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 1}],
        [{"step": 1, "loss": float("nan"), "validation_dice": None}],
        [{"step": 1, "loss": 0.0, "learning_rate": 0.0, "validation_dice": 0.0}],
    ],
)
def test_curves_of_a_run_that_has_hardly_begun_are_drawn(
    records: list[dict[str, Any]], tmp_path: Path
) -> None:
    training_curves(records, tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    assert "validation Dice" in text
    assert "nothing yet" in text or records == [
        {"step": 1, "loss": 0.0, "learning_rate": 0.0, "validation_dice": 0.0}
    ]


def test_the_same_numbers_give_the_same_file(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        training_curves(RECORDS, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.svg", "two.svg"]


def test_smoothing_keeps_a_constant_and_shifts_nothing() -> None:
    assert np.allclose(_smoothed(np.full(200, 0.4)), 0.4)
    assert np.allclose(_smoothed(np.arange(5.0))[1:4], [1, 2, 3])


def test_convergence_shows_every_method_once_whatever_its_seeds(tmp_path: Path) -> None:
    curve = [{"step": 10 * k, "validation_dice": 0.1 * k} for k in (1, 2, 3)]
    timed = [*curve, *({"step": 10 * k, "seconds": 60.0 * k} for k in (1, 2, 3))]
    found = convergences({"ours": [timed, curve], "other": [curve], "never validated": [[]]})
    assert [(one.method, one.minutes) for one in found] == [
        ("ours", (1.0, 2.0, 3.0)), ("ours", None), ("other", None),
    ]  # fmt: skip
    assert found[0].steps == (10.0, 20.0, 30.0)
    convergence_curves(found, tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    assert text.count(">ours<") == text.count(">other<") == 1
    assert "minutes trained" in text
    convergence_curves([], tmp_path / "none.svg")
    assert "nothing yet" in (tmp_path / "none.svg").read_text(encoding="utf-8")


def test_a_method_may_be_named_like_mathematics(tmp_path: Path) -> None:
    curve = [{"step": 1, "validation_dice": 0.1}, {"step": 2, "validation_dice": 0.2}]
    convergence_curves(convergences({r"$\frac{$": [curve], "_hidden": [curve]}), tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    assert r">$\frac{$<" in text
    assert ">_hidden<" in text
