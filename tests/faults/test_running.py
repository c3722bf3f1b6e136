"""Rows 21 and 28: two programs on one folder, and Ctrl-C once and twice."""

from __future__ import annotations

import csv
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdseg_cli.core.data.images import read_label_map
from sdseg_cli.core.recipe import recipe_to_yaml
from sdseg_cli.core.run_directory import RunDirectory


@pytest.fixture
def recipe(tiny_recipe, tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(recipe_to_yaml(tiny_recipe({"train.steps": 5000, "train.checkpoint_every": 2})))
    return path


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(30):
        noise = np.random.default_rng(index).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{index:02}.png")
    return folder


def finished(folder: Path) -> set[str]:
    """The masks that the summary says are done."""
    with (folder / "summary.csv").open(encoding="utf-8", newline="") as stream:
        return {f"{row['case']}.png" for row in csv.DictReader(stream) if row["status"] == "done"}


@pytest.mark.faults(21)
def test_a_second_training_in_a_run_directory_leaves_at_once_and_names_the_first(
    hardship, wait_for, sdseg, recipe, tmp_path
):
    root, sign = tmp_path / "run", tmp_path / "sign"
    common = ("--out", root, "--device", "cpu")
    first = hardship("train", "--recipe", recipe, *common, stuck_step=(3, str(sign)))
    wait_for(sign.exists, first)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for how in (("--resume", root), ("--recipe", recipe, "--out", root, "--overwrite")):
        ended = sdseg("train", *how, "--device", "cpu")
        assert ended.code == 2
        assert ended.says(
            f"run directory {root} is in use by process {first.pid} on", "Wait for it to end, stop it, or"
        )
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    assert first.is_alive()
    os.kill(first.pid, signal.SIGKILL)
    first.join(30)


@pytest.mark.faults(28)
def test_ctrl_c_in_training_waits_for_the_step_and_a_second_one_ends_at_once(
    hardship, wait_for, sdseg, recipe, tmp_path
):
    run, sign = RunDirectory(tmp_path / "run"), tmp_path / "sign"
    process = hardship(
        *("train", "--recipe", recipe, "--out", run.root, "--device", "cpu"), stuck_step=(4, str(sign))
    )
    wait_for(sign.exists, process)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.is_alive()  # the step is to be finished and saved
    os.killpg(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == 130, process.log()
    assert "Traceback" not in process.log()
    assert "stopped by Ctrl-C." in process.log()
    assert run.status == "interrupted"
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000002"]
    ended = sdseg("train", "--resume", run.root, "--device", "cpu", "--set", "train.steps=4")
    assert ended.code == 0, ended.err
    assert ended.says("steps 3 to 4")


@pytest.mark.faults(28)
def test_ctrl_c_once_in_training_saves_the_step_and_says_how_to_go_on(hardship, wait_for, recipe, tmp_path):
    run = RunDirectory(tmp_path / "run")
    process = hardship("train", "--recipe", recipe, "--out", run.root, "--device", "cpu")
    wait_for(lambda: run.metrics_file.exists() and len(run.read_metrics()) > 2, process)
    os.killpg(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130, process.log()
    step = run.read_run_json()["steps"]
    assert f"SIGINT: stopped after step {step}, and everything is saved." in process.log()
    assert f"Continue with: sdseg train --resume {run.root}" in process.log()
    assert run.latest_checkpoint() == run.checkpoint(step)
    assert run.read_metrics()[-1]["step"] == step
    assert run.status == "interrupted"


@pytest.mark.faults(28)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_prediction_finishes_what_is_being_written_and_lists_it(
    number, code, hardship, wait_for, sdseg, pictures, tiny_model, tmp_path
):
    out = tmp_path / "masks"
    options = ("--out", out, "--model", tiny_model, "--device", "cpu")
    process = hardship("predict", pictures, *options, "--batch-size", 1, slow_predictions=(0.1,))
    wait_for(lambda: len(list(out.glob("*.png"))) > 2, process)
    os.killpg(process.pid, number)
    process.join(30)
    assert process.exitcode == code, process.log()
    assert "Traceback" not in process.log()
    assert f"Masks written so far are whole and listed in {out / 'summary.csv'}" in process.log()
    assert "go on with the same command and --skip-existing" in process.log()
    masks = {path.name for path in out.glob("*.png")}
    assert 3 <= len(masks) < 30
    assert finished(out) == masks
    assert all(read_label_map(out / name, num_classes=2).shape == (30, 40) for name in masks)
    assert not list(out.glob(".sdseg-*"))
    ended = sdseg("predict", pictures, *options, "--skip-existing")
    assert ended.code == 0, ended.err
    assert len(list(out.glob("*.png"))) == 30


@pytest.mark.faults(28)
def test_a_second_ctrl_c_in_prediction_ends_at_once_and_leaves_whole_masks(
    hardship, wait_for, sdseg, pictures, tiny_model, tmp_path
):
    out, sign = tmp_path / "masks", tmp_path / "sign"
    options = ("--out", out, "--model", tiny_model, "--device", "cpu")
    process = hardship("predict", pictures, *options, stuck_write=(str(sign),))
    wait_for(sign.exists, process)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.is_alive()  # what is being written is to be finished
    os.killpg(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode in (130, -signal.SIGINT), process.log()  # a shell says 130 for both
    assert "Traceback" not in process.log()
    masks = {path.name for path in out.glob("*.png")}
    assert all(read_label_map(out / name, num_classes=2).shape == (30, 40) for name in masks)
    ended = sdseg("predict", pictures, *options, "--skip-existing")
    assert ended.code == 0, ended.err
    assert len(list(out.glob("*.png"))) == 30


@pytest.mark.faults(28)
def test_ctrl_c_before_the_first_step_ends_without_a_traceback(hardship, wait_for, recipe, tmp_path):
    process = hardship("train", "--recipe", recipe, "--out", tmp_path / "run", "--device", "cpu")
    wait_for(lambda: "loading the networks" in process.log(), process)
    os.killpg(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130, process.log()
    assert "Traceback" not in process.log()


@pytest.mark.faults(28)
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_a_dataset_is_prepared_leaves_nothing(
    number, code, workers, hardship, wait_for, tmp_path
):
    place = tmp_path / "place"
    place.mkdir()
    process = hardship(
        *("prepare", "phantom", "--cases", 5000, "--size", 64, "--workers", workers, "--out", place / "out")
    )
    wait_for(lambda: "/5,000 cases" in process.log(), process)
    assert any(place.iterdir())
    os.killpg(process.pid, number)
    process.join(30)
    assert process.exitcode == code, process.log()
    assert "Traceback" not in process.log()
    assert list(place.iterdir()) == []
