"""Trackers: one project for all runs, in which a run has the name of its directory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sdseg_cli.core.engine.trackers import start_trackers
from sdseg_cli.core.run_directory import RunDirectory


@pytest.mark.parametrize(
    ("trackers", "named"),
    [
        (["tensorboard"], {}),
        (["wandb"], {"wandb": {"name": "first", "dir": "ROOT"}}),
        (["mlflow", "tensorboard"], {"mlflow": {"run_name": "first"}}),
    ],
)
def test_every_tracker_learns_project_run_and_settings(trackers, named, tiny_recipe, tmp_path):
    started: list[tuple[str, dict[str, Any], dict[str, Any]]] = []

    def init_trackers(project, config, init_kwargs):
        started.append((project, config, init_kwargs))

    recipe = tiny_recipe({"train.trackers": trackers})
    run = RunDirectory(tmp_path / "first")
    start_trackers(SimpleNamespace(init_trackers=init_trackers), recipe, run)
    ((project, config, options),) = started
    assert project == "sdseg"
    assert config["train.learning_rate"] == 1e-4
    expected = {
        name: {key: str(run.root) if value == "ROOT" else value for key, value in values.items()}
        for name, values in named.items()
    }
    assert options == expected
