"""Trackers: one project for all runs; figures and pictures arrive, in the real libraries where installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pytest
from accelerate import tracking

from sdseg_cli.core.engine.trackers import start_trackers, track_picture
from sdseg_cli.core.run_directory import RunDirectory

PICTURE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


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


def stand_in(kind: type, name: str):
    """A tracker that takes only the calls that Accelerate's own takes."""
    tracker = create_autospec(kind, instance=True)
    tracker.name = name
    return tracker


def test_each_tracker_is_given_pictures_in_its_own_way(tmp_path):
    board = stand_in(tracking.TensorBoardTracker, "tensorboard")
    wandb = stand_in(tracking.WandBTracker, "wandb")
    mlflow = stand_in(tracking.MLflowTracker, "mlflow")
    accelerator = SimpleNamespace(trackers=[board, wandb, mlflow])
    track_picture(accelerator, "validation", tmp_path / "step-3.png", PICTURE, 3)
    (values,), settings = board.log_images.call_args
    assert values["validation"].shape == (1, 4, 5, 3)
    assert settings == {"step": 3, "dataformats": "NHWC"}
    (values,), settings = wandb.log_images.call_args
    np.testing.assert_array_equal(values["validation"], [PICTURE])
    assert settings == {"step": 3}
    mlflow.log_artifact.assert_called_once_with(str(tmp_path / "step-3.png"), artifact_path="validation")


def watched(tiny_recipe, trained, tmp_path, name):
    changes = {"train.trackers": [name], "train.validate_every": 1, "train.steps": 2}
    return trained(tiny_recipe(changes), tmp_path / "run")


@pytest.mark.filterwarnings("default")  # those of the trackers' own libraries are none of ours
def test_mlflow_keeps_settings_figures_and_pictures(tiny_recipe, trained, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    finished = watched(tiny_recipe, trained, tmp_path, "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("sdseg")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "2"
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert [(item.step, item.value) for item in losses] == [
        (step, pytest.approx(loss)) for step, loss in enumerate(finished.losses, start=1)
    ]
    pictures = [item.path for item in client.list_artifacts(run.info.run_id, "validation")]
    assert pictures == ["validation/step-000001.png", "validation/step-000002.png"]


@pytest.mark.filterwarnings("default")
def test_wandb_keeps_pictures_without_a_network(tiny_recipe, trained, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    finished = watched(tiny_recipe, trained, tmp_path, "wandb")
    (folder,) = (finished.run.root / "wandb").glob("offline-run-*")
    assert list(folder.glob("run-*.wandb"))
    pictures = [*(folder / "files/media/images").glob("validation_*.png")]
    assert len(pictures) == 2
