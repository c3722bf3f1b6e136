"""Trackers by name, through Accelerate."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from sdseg_cli.core.errors import UsageError
from sdseg_cli.core.recipe import Recipe
from sdseg_cli.core.run_directory import RunDirectory


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


def start_trackers(accelerator: Accelerator, recipe: Recipe, run: RunDirectory) -> None:
    """Start the recipe's trackers: one project named sdseg, in which this run has its directory's name."""
    named = {
        "wandb": {"name": run.root.name, "dir": str(run.root)},
        "mlflow": {"run_name": run.root.name},
    }
    accelerator.init_trackers(
        "sdseg",
        config=flat_settings(recipe),
        init_kwargs={name: named[name] for name in recipe.train.trackers if name in named},
    )


def track_picture(accelerator: Accelerator, name: str, path: Path, picture: np.ndarray, step: int) -> None:
    """Show a picture in the recipe's trackers, each in its own way; on the main process alone.

    Args:
        accelerator: with started trackers.
        name: of the series of pictures.
        path: the file it was written to.
        picture: uint8, (H, W, 3).
        step: optimiser step it belongs to.
    """
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: picture[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [picture]}, step=step)
        elif tracker.name == "mlflow":  # has no pictures by step, but keeps files
            tracker.log_artifact(str(path), artifact_path=name)


def flat_settings(recipe: Recipe) -> dict[str, Any]:
    """Give the recipe as dotted keys and plain values, which is what trackers take."""

    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value if isinstance(value, bool | int | float | str) else str(value)

    return dict(walk(recipe.values(), ""))
