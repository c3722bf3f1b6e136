"""Two processes do what one does: the same losses, every case once, every file written once."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sdseg_cli.core.data.images import read_label_map
from sdseg_cli.core.data.phantom import make_phantom
from sdseg_cli.core.data.prepared import PreparedDataset
from sdseg_cli.core.engine.processes import Processes, is_lost
from sdseg_cli.core.engine.training import Training
from sdseg_cli.core.errors import UsageError
from sdseg_cli.core.recipe import recipe_to_yaml
from sdseg_cli.core.run_directory import RunDirectory

TIMM = {
    "model.image_encoder": "timm:test_efficientnet_gn",
    "model.image_encoder_channels": [128, 256, 512, 512],
    "model.image_encoder_blocks": 2,
    "model.image_encoder_dropout": 0.2,
    "train.steps": 3,
}
TRAININGS = {
    "kl": {
        "train.steps": 6,
        "train.validate_every": 3,
        "train.validation_cases": 0,
        "train.checkpoint_every": 4,
    },
    "parts": {"train.gradient_accumulation": 2, "train.steps": 3, "train.gradient_clip": 1.0},
    "timm": TIMM,
    "off": {**TIMM, "objective.diffusion": "off", "objective.pixel_weight": 1.0},
    "frozen": {"model.freeze_image_encoder": True, "train.trackers": ["tensorboard"]},
    "organs": {"data.dataset": "ORGANS", "model.fusion": "multiscale", "objective.pixel_weight": 1.0},
    "joint": {"data.dataset": "ORGANS", "model.fusion": "attention", "model.multiclass": "joint"},
}
IMAGES = 7


# One process


def test_one_process_has_everything_and_changes_nothing():
    processes = Processes(cpu=True)
    assert (processes.rank, processes.count, processes.is_main) == (0, 1, True)
    assert processes.share([3, 1, 2]) == [3, 1, 2]
    assert processes.gather(["a", "b"]) == ["a", "b"]
    assert processes.any(True)
    assert not processes.any(False)
    processes.wait()


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("items", [0, 1, 4, 7])
def test_every_item_belongs_to_one_process_and_comes_back_in_order(items, count, monkeypatch):
    shares = []
    for rank in range(count):
        processes = Processes(cpu=True)
        processes.rank, processes.count = rank, count
        shares.append(processes.share(list(range(items))))
    assert sorted(item for share in shares for item in share) == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    monkeypatch.setattr("sdseg_cli.core.engine.processes.gather_object", lambda own: shares)
    assert processes.gather(shares[-1]) == list(range(items))


@pytest.mark.faults
def test_a_batch_that_cannot_be_shared_out_is_refused(tiny_recipe, monkeypatch):
    made = Processes.__init__

    def three(processes, *, cpu=False):
        made(processes, cpu=cpu)
        processes.count = 3

    monkeypatch.setattr(Processes, "__init__", three)
    with pytest.raises(UsageError, match=r"batch_size 4 cannot be shared by 3 processes.*a multiple of 3"):
        Training(tiny_recipe(), device="cpu")


# Two processes


@pytest.fixture(scope="module")
def launched(tiny_recipe, organs, sdseg_process, tmp_path_factory) -> SimpleNamespace:
    """All commands on two processes at once (one launch: starting takes the longest), and what they left."""
    folder = tmp_path_factory.mktemp("two")
    scans = folder / "scans"
    scans.mkdir()
    for index in range(IMAGES):
        image, _ = make_phantom("endoscopy", seed=5, index=index, size=40 + 3 * index)
        Image.fromarray(image).save(scans / f"{index}.png")
    commands = []
    for name, changes in TRAININGS.items():
        recipe = tiny_recipe({key: str(organs) if v == "ORGANS" else v for key, v in changes.items()})
        (folder / f"{name}.yaml").write_text(recipe_to_yaml(recipe))
        commands.append(["train", "--recipe", f"{name}.yaml", "--out", f"runs/{name}", "--device", "cpu"])
    model = ("--model", "model", "--device", "cpu")
    measuring = [
        ["predict", "scans", "--out", "OUT/masks", *model, "--probabilities", "--samples", "2"],
        ["evaluate", *model, "--split", "train", "--out", "OUT/evaluation"],
        ["stability", *model, "--split", "test", "--runs", "2", "--out", "OUT/stability", "--save-runs"],
    ]
    one = [[part.replace("OUT", "one") for part in command] for command in measuring]
    two = [[part.replace("OUT", "two") for part in command] for command in measuring]

    before = Path.cwd()
    os.chdir(folder)
    try:
        alone = sdseg_process("train", "--recipe", "kl.yaml", "--out", "model", "--device", "cpu")
        alone.join(120)
        assert alone.exitcode == 0, alone.log()
        for command in one:
            alone = sdseg_process(*command)
            alone.join(120)
            assert alone.exitcode == 0, alone.log()
    finally:
        os.chdir(before)

    (folder / "commands.json").write_text(json.dumps(commands + two))
    driver = Path(__file__).with_name("two_processes.py")
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *(driver, "commands.json", "."),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    notes = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return SimpleNamespace(
        folder=folder, notes=notes, names=[*TRAININGS, "predict", "evaluate", "stability"], output=finished
    )


def test_there_are_two_processes(launched):
    assert [(note["rank"], note["count"]) for note in launched.notes] == [(0, 2), (1, 2)]
    for name in TRAININGS:
        assert RunDirectory.open(launched.folder / "runs" / name).read_run_json()["processes"] == 2


def test_every_command_ends_well_in_both(launched):
    for note in launched.notes:
        codes = {
            name: command["exit_code"] for name, command in zip(launched.names, note["commands"], strict=True)
        }
        assert codes == dict.fromkeys(launched.names, 0), launched.output.stderr[-4000:]


def test_no_file_is_written_by_both(launched):
    first, second = (note["commands"] for note in launched.notes)
    for name, of_first, of_second in zip(launched.names, first, second, strict=True):
        assert of_first["written"], name
        assert not set(of_first["written"]) & set(of_second["written"]), name
        if name in TRAININGS:
            assert of_second["written"] == [], name


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_learn_what_one_learns(name, launched, tiny_recipe, organs, trained, tmp_path):
    changes = {key: str(organs) if value == "ORGANS" else value for key, value in TRAININGS[name].items()}
    alone = trained(tiny_recipe({**changes, "train.trackers": []}), tmp_path / "run")
    together = RunDirectory.open(launched.folder / "runs" / name)
    losses = [record["loss"] for record in together.read_metrics() if "loss" in record]
    if name == "off":  # its decoder has BatchNorm, which sees the half of the batch in each process
        assert losses == pytest.approx(alone.losses, rel=0.2)
        return
    assert losses[0] == pytest.approx(alone.losses[0], rel=1e-5)
    assert losses == pytest.approx(alone.losses, rel=2e-3)
    steps = [record["step"] for record in together.read_metrics() if "loss" in record]
    assert steps == list(range(1, tiny_recipe(changes).train.steps + 1))
    dice = [record["validation_dice"] for record in together.read_metrics() if "validation_dice" in record]
    assert dice == pytest.approx([record.dice for record in alone.validated], abs=0.01)


def test_one_run_directory_is_made_with_one_set_of_files(launched):
    assert sorted(path.name for path in (launched.folder / "runs").iterdir()) == sorted(TRAININGS)
    run = RunDirectory.open(launched.folder / "runs" / "kl")
    assert run.status == "finished"
    assert [path.name for path in run.all_checkpoints()] == ["step-000004", "step-000006"]
    assert not list(run.checkpoints.glob(".*"))
    assert {path.name for path in run.validation.iterdir()} == {"step-000003.png", "step-000006.png"}
    frozen = RunDirectory.open(launched.folder / "runs" / "frozen")
    assert len(list(frozen.tensorboard.rglob("events.out.tfevents.*"))) == len(
        {path.parent for path in frozen.tensorboard.rglob("events.out.tfevents.*")}
    )


def test_what_is_said_is_said_once(launched):
    assert launched.output.stderr.count("runs/kl/model: validation Dice") == 1


def test_a_run_of_two_processes_is_resumed_by_one(launched, tiny_recipe, trained, tmp_path):
    import shutil

    root = tmp_path / "run"
    shutil.copytree(launched.folder / "runs" / "kl", root)
    shutil.rmtree(root / "checkpoints" / "step-000006")
    resumed = trained(tiny_recipe(TRAININGS["kl"]), root, resume=True)
    assert resumed.records[0].first_step == 4
    together = RunDirectory.open(launched.folder / "runs" / "kl")
    losses = [record["loss"] for record in together.read_metrics() if "loss" in record]
    assert resumed.losses == pytest.approx(losses[4:], rel=1e-3)


@pytest.mark.faults(19)
@pytest.mark.parametrize(
    ("moment", "count", "resumed_from"),
    [("before a step", 6, 4), ("half of the optimizer saved", 2, 4), ("half of the optimizer saved", 1, 0)],
)
def test_a_run_of_two_processes_that_was_killed_equals_one_that_was_not(
    moment, count, resumed_from, launched, sdseg_group, state_of, tmp_path
):
    root = tmp_path / "run"
    given = ("--recipe", launched.folder / "kl.yaml", "--device", "cpu")
    group = sdseg_group(2, "train", *given, "--out", root, moment=moment, count=count)
    for process in group:
        process.join(60)
    assert [process.exitcode for process in group] == [-signal.SIGKILL, 1]
    said = group[1].log()
    assert "error (process 1): another process of this training has ended" in said
    assert f"sdseg train --resume {root}" in said
    assert "Traceback" not in said
    group = sdseg_group(2, "train", "--resume", root, "--device", "cpu")
    for process in group:
        process.join(60)
    assert [process.exitcode for process in group] == [0, 0], group[0].log() + group[1].log()
    assert f"steps {resumed_from + 1} to 6" in group[0].log()
    assert "since the checkpoint was saved" not in group[0].log()
    assert state_of(RunDirectory.open(root)) == state_of(RunDirectory.open(launched.folder / "runs" / "kl"))


@pytest.mark.faults(19)
@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_with_the_same_batch_and_says_what_is_lost(
    first, second, launched, sdseg_group, tmp_path
):
    root = tmp_path / "run"
    given = ("--recipe", launched.folder / "kl.yaml", "--device", "cpu")
    group = sdseg_group(first, "train", *given, "--out", root, moment="before a step", count=6)
    for process in group:
        process.join(60)
    group = sdseg_group(second, "train", "--resume", root, "--device", "cpu")
    for process in group:
        process.join(60)
    assert [process.exitcode for process in group] == [0] * second, group[0].log()
    said = f"warning: since the checkpoint was saved: processes {first} -> {second}. Each step keeps its 4 "
    assert said in group[0].log()
    run, whole = RunDirectory.open(root), RunDirectory.open(launched.folder / "runs" / "kl")
    losses = [[record["loss"] for record in each.read_metrics() if "loss" in record] for each in (run, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    sessions = run.read_run_json()["sessions"]
    assert [(one["first_step"], one["processes"]) for one in sessions] == [(0, first), (4, second)]
    assert f"processes {first} -> {second}" in sessions[1]["remark"]


@pytest.mark.faults(19)
def test_sigterm_to_one_process_saves_and_ends_both_with_143(launched, sdseg_group, state_of, tmp_path):
    root = tmp_path / "run"
    given = ("--recipe", launched.folder / "kl.yaml", "--device", "cpu", "--out", root)
    group = sdseg_group(2, "train", *given, moment="SIGTERM before a step", count=3)
    for process in group:
        process.join(60)
    assert [process.exitcode for process in group] == [143, 143], group[0].log() + group[1].log()
    assert "SIGTERM: stopped after step 3, and everything is saved" in group[0].log()
    group = sdseg_group(2, "train", "--resume", root, "--device", "cpu")
    for process in group:
        process.join(60)
    assert "steps 4 to 6" in group[0].log()
    found, expected = (state_of(RunDirectory.open(path)) for path in (root, launched.folder / "runs" / "kl"))
    assert {**found, "files": []} == {**expected, "files": []}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_two_processes_predict_every_image_once_as_one_does(launched):
    one, two = launched.folder / "one" / "masks", launched.folder / "two" / "masks"
    names = [f"{index}.png" for index in range(IMAGES)]
    assert sorted(path.name for path in two.glob("*.png")) == names
    assert [row["case"] for row in rows(two / "summary.csv")] == [str(index) for index in range(IMAGES)]
    for name in names:
        first, second = (
            np.asarray(Image.open(place / "probabilities" / name), np.int64) for place in (one, two)
        )
        assert first.shape == second.shape
        assert np.abs(first - second).max() <= 2  # of 65535: 1e-5 of arithmetic, and rounding on both sides
        differ = read_label_map(one / name, num_classes=2) != read_label_map(two / name, num_classes=2)
        assert (np.abs(first[differ] / 65535 - 0.5) < 1e-4).all()
    by_rank = [
        {name for name in note["commands"][-3]["written"] if name.startswith("two/masks/probabilities")}
        for note in launched.notes
    ]
    assert sorted(map(len, by_rank)) == [3, 4]


def test_two_processes_score_every_case_once_as_one_does(launched, polyps):
    one, two = (rows(launched.folder / name / "evaluation" / "cases.csv") for name in ("one", "two"))
    cases = PreparedDataset.open(polyps).split("train").case_ids
    assert [row["case"] for row in one] == [row["case"] for row in two] == cases
    for first, second in zip(one, two, strict=True):
        assert float(first["dice"] or "nan") == pytest.approx(
            float(second["dice"] or "nan"), abs=5e-3, nan_ok=True
        )


def test_two_processes_measure_the_stability_of_every_case_once_as_one_does(launched, polyps):
    one, two = (rows(launched.folder / name / "stability" / "cases.csv") for name in ("one", "two"))
    assert len(two) == len(one)
    key = next(iter(one[0]))
    assert [row[key] for row in two] == [row[key] for row in one]
    assert {row[key] for row in one} == set(PreparedDataset.open(polyps).split("test").case_ids)
    saved = [
        sorted(str(path.relative_to(place)) for path in place.rglob("*.png"))
        for place in (launched.folder / name / "stability" for name in ("one", "two"))
    ]
    assert saved[0] == saved[1]
    assert saved[0]


def test_accelerate_launch_starts_two_processes_too(tiny_recipe, trained, tmp_path):
    recipe = tiny_recipe()
    (tmp_path / "tiny.yaml").write_text(recipe_to_yaml(recipe))
    launch = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *(
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
        ),
        *("-m", "sdseg_cli", "train", "--recipe", "tiny.yaml", "--out", "run", "--device", "cpu"),
    ]
    finished = subprocess.run(
        launch,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    run = RunDirectory.open(tmp_path / "run")
    assert run.read_run_json()["processes"] == 2
    losses = [record["loss"] for record in run.read_metrics() if "loss" in record]
    assert losses == pytest.approx(trained(recipe, tmp_path / "alone").losses, rel=1e-3)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5"), True),
        (
            torch.distributed.DistBackendError("ncclRemoteError: A call failed possibly due to a network"),
            True,
        ),
        (torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1."), True),
        (torch.distributed.DistNetworkError("failed to recv, got 0 bytes"), True),
        (torch.distributed.DistBackendError("NCCL error: ncclInvalidUsage. Duplicate GPU detected"), False),
        (RuntimeError("Distributed package doesn't have NCCL built in"), False),
        (OSError("Connection reset by peer"), False),
    ],
)
def test_an_error_is_a_lost_process_only_where_it_says_so(error, lost):
    assert is_lost(error) == lost
