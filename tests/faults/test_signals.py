"""Row 28 for every command: a signal in the middle of its work ends it, and is no failure of a case."""

from __future__ import annotations

import os
import pty
import signal
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from sdseg_cli.commands._signals import interruptible
from sdseg_cli.core.data.images import write_label_map
from sdseg_cli.core.engine.stopping import graceful_stop, stop_signals
from sdseg_cli.core.errors import Interrupted
from sdseg_cli.core.recipe import recipe_to_yaml
from sdseg_cli.core.run_directory import RunDirectory

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]

# Command -> where it is when the signal comes; {out} is what it would write, {model} a run, {data} a dataset.
MOMENTS = {
    "evaluate --model {model} --data {data} --split test --out {out} --device cpu": (
        "sdseg_cli.core.model.pipeline:SDSegPipeline.sample"
    ),
    "evaluate --predictions {masks} --ground-truth {masks} --out {out}": (
        "sdseg_cli.core.engine.folder_evaluation:_read_pair"
    ),
    "stability --model {model} --data {data} --runs 2 --limit 2 --out {out} --device cpu": (
        "sdseg_cli.core.model.pipeline:SDSegPipeline.sample"
    ),
    "compare {model} other={model} --data {data} --split test --draws 0 --out {out} --device cpu": (
        "sdseg_cli.core.model.pipeline:SDSegPipeline.sample"
    ),
    "convert {kl} --out {out}": "sdseg_cli.core.model.weights:load_published_autoencoder",
    "export {model} --out {out}": "sdseg_cli.core.engine.exporting:export",
    "autoencoder --out {out} --masks 16 --size 64 --crop 32 --device cpu": (
        "sdseg_cli.core.engine.autoencoder_training:train_mask_autoencoder"
    ),
    "verify {data}": "sdseg_cli.core.verification:sha256_of",
    "doctor": "sdseg_cli.commands.doctor:_weights",  # which takes what a check raises for its finding
    "push {model} me/mine": "sdseg_cli.commands.push:model_card",
    "runs --runs {runs}": "sdseg_cli.commands.runs:_row",
    "demo --cases 10 --out {out}": "sdseg_cli.core.engine.demonstration:write_scans",
}


@pytest.fixture
def places(tiny_model, polyps, tmp_path) -> dict[str, Path]:
    masks = tmp_path / "masks"
    masks.mkdir()
    for index in range(2):
        write_label_map(masks / f"{index}.png", np.zeros((8, 8), np.uint8), 2)
    found = {"model": tiny_model, "runs": tiny_model.parent, "data": polyps, "masks": masks}
    return {**found, "kl": tmp_path, "out": tmp_path / "place" / "out"}


@pytest.mark.faults(28)
@pytest.mark.parametrize(
    ("command", "number", "code"),
    [
        *((command, *SIGNALS[0]) for command in MOMENTS),
        *(pytest.param(command, *SIGNALS[1], marks=pytest.mark.slow) for command in MOMENTS),
        *(pytest.param(command, *SIGNALS[2], marks=pytest.mark.slow) for command in [*MOMENTS][:2]),
    ],
)
def test_a_signal_ends_every_command_with_its_code_and_nothing_is_left(
    command, number, code, hardship, wait_for, places, tmp_path
):
    sign = tmp_path / "sign"
    places["out"].parent.mkdir()
    arguments = [part.format(**places) for part in command.split()]
    process = hardship(*arguments, stuck_call=(MOMENTS[command], str(sign)))
    wait_for(sign.exists, process)
    os.killpg(process.pid, number)
    process.join(30)
    assert process.exitcode == code, process.log()
    assert "Traceback" not in process.log()
    assert "stopped" in process.log()
    if not command.startswith("demo"):  # which keeps what is done
        assert list(places["out"].parent.iterdir()) == []


@pytest.mark.faults(28)
@pytest.mark.parametrize(
    ("number", "code"), [SIGNALS[2], *(pytest.param(*each, marks=pytest.mark.slow) for each in SIGNALS[:2])]
)
def test_a_signal_to_all_processes_of_a_preparation_is_no_loss_of_a_worker(
    number, code, hardship, wait_for, tmp_path
):
    out = tmp_path / "place" / "out"
    process = hardship("prepare", "phantom", "--cases", 3000, "--workers", 2, "--out", out)
    of_process = psutil.Process(process.pid)

    def workers() -> list[psutil.Process]:
        return [each for each in of_process.children() if "spawn_main" in " ".join(each.cmdline())]

    wait_for(lambda: len(workers()) == 2, process)
    started = workers()
    os.killpg(process.pid, number)
    process.join(30)
    assert process.exitcode == code, process.log()
    assert "stopped; nothing was written" in process.log()
    assert "Traceback" not in process.log()
    assert list(out.parent.iterdir()) == []
    assert not any(each.is_running() for each in started)


@pytest.mark.faults(28)
def test_under_nohup_a_closed_terminal_is_outlived():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stop_signals() == (signal.SIGINT, signal.SIGTERM)
        with interruptible("not to be said"), graceful_stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal_number is None
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in stop_signals()


@pytest.mark.faults(28)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_never_taken_for_the_failure_of_a_case(number, places, monkeypatch):
    from sdseg_cli.core.engine import folder_evaluation

    pairs = folder_evaluation.pair_folders(places["masks"], places["masks"])
    monkeypatch.setattr(folder_evaluation, "_read_pair", lambda *_: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match="as asked") as stop, interruptible("as asked"):
        list(folder_evaluation.evaluate_folders(pairs, ("background", "polyp")))
    assert stop.value.exit_code == 128 + number


@pytest.mark.faults(28)
def test_a_closed_terminal_is_told_once_whoever_else_passes_it_on():
    """A shell passes on its own SIGHUP, and the kernel sends another a moment later, as things are saved."""
    before = signal.getsignal(signal.SIGHUP)
    saved = []

    def work():
        try:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGHUP)
            saved.append("all of it")

    try:
        with pytest.raises(Interrupted) as stop, interruptible("as asked"):
            work()
        os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (saved, stop.value.exit_code) == (["all of it"], 129)


@pytest.mark.slow
@pytest.mark.faults(28)
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_to_an_ablation_stops_its_training_which_saves_and_goes_on_later(
    number, code, hardship, wait_for, tiny_recipe, tmp_path
):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(recipe_to_yaml(tiny_recipe({"train.steps": 5000})))
    options = ("--variant", "a:", "--variant", "b: train.learning_rate=0.002", "--out", tmp_path / "out")
    process = hardship("ablate", "--recipe", recipe, *options, "--device", "cpu")
    run = RunDirectory(tmp_path / "out" / "runs" / "a-seed0")
    wait_for(lambda: run.metrics_file.exists() and len(run.read_metrics()) > 1, process)
    os.killpg(process.pid, number)
    process.join(60)
    assert process.exitcode == code, process.log()
    assert "Traceback" not in process.log()
    assert "stopping the training; the same command goes on where this one was" in process.log()
    assert run.status == "interrupted"
    assert run.latest_checkpoint() == run.checkpoint(run.read_run_json()["steps"])
    assert not (tmp_path / "out" / "runs" / "b-seed0").exists()


@pytest.mark.slow
@pytest.mark.faults(28)
def test_a_training_whose_terminal_is_closed_saves_its_step(tiny_recipe, tmp_path):
    """Its messages go to a terminal that is no more, which every write to it says by an error."""
    recipe, run = tmp_path / "tiny.yaml", RunDirectory(tmp_path / "run")
    recipe.write_text(recipe_to_yaml(tiny_recipe({"train.steps": 5000})))
    controller, terminal = pty.openpty()
    child = os.fork()
    if child == 0:
        try:
            os.close(controller)
            os.login_tty(terminal)
            command = ["train", "--recipe", str(recipe), "--out", str(run.root), "--device", "cpu"]
            os.execv(sys.executable, [sys.executable, "-m", "sdseg_cli", *command])  # noqa: S606  (ourselves)
        finally:
            os._exit(99)
    os.close(terminal)
    try:
        while not (run.metrics_file.exists() and len(run.read_metrics()) > 1):
            os.read(controller, 1024)
    finally:
        os.close(controller)  # the kernel sends SIGHUP to who runs in the foreground there
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    assert run.status == "interrupted"
    assert run.latest_checkpoint() == run.checkpoint(run.read_run_json()["steps"])
