"""Trackers by name, through Accelerate."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from sdseg_cli.core.errors import UsageError
from sdseg_cli.core.recipe import Recipe


def check_trackers(recipe: Recipe) -> None:
    """Refuse a tracker that is not installed; Accelerate itself would only warn.

    Raises:
        UsageError: names the package to install.
    """
    for name in recipe.train.trackers:
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"train.trackers: {name} is not installed. Install it with `pip install {name}`, or take it "
                "out with --set train.trackers=[]."
            )


def flat_settings(recipe: Recipe) -> dict[str, Any]:
    """Give the recipe as dotted keys and plain values, which is what trackers take."""

    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value if isinstance(value, bool | int | float | str) else str(value)

    return dict(walk(recipe.values(), ""))
