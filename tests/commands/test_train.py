"""``sdseg train`` as a command: what it says, what it refuses before anything is made, how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from sdseg_cli import cli
from sdseg_cli.commands.train import slow_on_cpu
from sdseg_cli.core.recipe import load_recipe, recipe_to_yaml, resources_root
from sdseg_cli.core.run_directory import RunDirectory


@pytest.fixture
def sdseg(capsys, monkeypatch):
    """Run ``sdseg`` here; its exit code, stdout and stderr (with single blanks)."""
    from accelerate.state import AcceleratorState

    def run(*arguments: object) -> tuple[int, str, str]:
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(SystemExit) as end:
            cli.main([*map(str, arguments)])
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, " ".join(printed.err.split())

    handler = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def recipe(tiny_recipe, tmp_path, monkeypatch) -> Path:
    """A recipe in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(recipe_to_yaml(tiny_recipe({"train.steps": 3})))
    return path


def made(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"tiny.yaml"}


# What it makes and says


def test_a_training_leaves_a_run_directory_with_everything(sdseg, recipe, tmp_path):
    code, out, err = sdseg("train", "--recipe", recipe, "--out", "run", "--device", "cpu")
    assert code == 0, err
    assert out == ""
    run = RunDirectory.open(tmp_path / "run")
    assert {path.name for path in run.root.iterdir()} == {
        "recipe.yaml", "run.json", "metrics.jsonl", "curves.png", "checkpoints", "model", "validation",
        "manifest.json", ".lock",
    }  # fmt: skip
    fields = run.read_run_json()
    assert fields["status"] == "finished"
    assert fields["seed"] == 0
    assert fields["versions"]["torch"] == torch.__version__.split("+")[0] or fields["versions"]["torch"]
    assert len(fields["dataset"]["fingerprint"]) == 64
    assert run.read_recipe() == load_recipe(recipe)
    assert re.search(
        r"step 3: validation Dice \d\.\d{4} \(best so far\) run/validation/step-000003\.png", err
    )
    assert "run/model: validation Dice" in err
    assert "Next: sdseg evaluate --model run --split test" in err


def test_a_recipe_for_a_gpu_says_on_a_cpu_how_to_be_done_in_minutes():
    warning = slow_on_cpu(load_recipe("kseg-fast"), "cpu", 4000)
    assert warning is not None
    assert "4,000 steps of 32 images of 256 pixels" in warning
    assert "--recipe demo" in warning
    assert slow_on_cpu(load_recipe("kseg-fast"), "cuda:0", 4000) is None
    assert slow_on_cpu(load_recipe("kseg-fast"), "cpu", 400) is None
    assert slow_on_cpu(load_recipe("demo"), "cpu", 900) is None


def test_the_run_is_named_after_recipe_and_time_unless_told_otherwise(sdseg, recipe, tmp_path):
    assert sdseg("train", "-r", recipe, "--device", "cpu")[0] == 0
    (root,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"tiny-\d{8}-\d{6}", root.name)


def test_json_is_all_that_stands_on_stdout(sdseg, recipe):
    code, out, _ = sdseg("train", "-r", recipe, "--out", "run", "--device", "cpu", "--json")
    assert code == 0
    said = json.loads(out)
    assert said["run"] == "run"
    assert said["model"] == "run/model"
    assert (said["steps"], said["ended_by"], said["best_step"]) == (3, "steps", 3)
    assert 0 <= said["best_validation_dice"] <= 1


def test_settings_change_the_recipe_that_is_trained_and_kept(sdseg, recipe, tmp_path):
    arguments = ("--set", "train.steps=1", "--set", "objective.prediction=velocity")
    assert sdseg("train", "-r", recipe, "--out", "run", "--device", "cpu", *arguments)[0] == 0
    kept = RunDirectory.open(tmp_path / "run").read_recipe()
    assert (kept.train.steps, kept.objective.prediction) == (1, "velocity")


def test_the_exported_model_can_be_used_at_once(sdseg, recipe, tmp_path, polyps):
    assert sdseg("train", "-r", recipe, "--out", "runs/a", "--device", "cpu")[0] == 0
    code, _, err = sdseg("evaluate", "--split", "test", "--device", "cpu")
    assert code == 0, err
    assert (tmp_path / "runs" / "a" / "evaluation" / "test" / "cases.csv").is_file()


# Dry run


def test_a_dry_run_shows_everything_and_makes_nothing(sdseg, recipe, tmp_path):
    code, out, err = sdseg("train", "-r", recipe, "--device", "cpu", "--dry-run", "--set", "train.seed=7")
    assert code == 0, err
    assert made(tmp_path) == set()
    resolved = yaml.safe_load(out[: out.index("What would be trained")])
    assert resolved["train"]["seed"] == 7
    for word in ("unet", "image_encoder", "autoencoder", "trained", "14 train", "GiB", "ceiling", "passes"):
        assert word in out
    assert "nothing was trained" in err


def test_a_dry_run_as_json_holds_recipe_counts_memory_and_ceiling(sdseg, recipe):
    code, out, _ = sdseg("train", "-r", recipe, "--device", "cpu", "--dry-run", "--json")
    assert code == 0
    said = json.loads(out)
    assert said["recipe"]["name"] == "tiny"
    assert said["parameters"]["unet"] > 0
    assert said["memory_gib"] > 0
    assert 0 <= said["ceiling_dice"] <= 1


# Resume


def test_resume_goes_on_where_a_signal_stopped_it(sdseg, recipe, tmp_path, monkeypatch, state_of):
    from sdseg_cli.core.engine import training

    def train(*how):
        return sdseg("train", *how, "--device", "cpu")

    assert train("-r", recipe, "--out", "whole")[0] == 0
    rate = training.learning_rate_at

    def signalled(step, recipe):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return rate(step, recipe)

    with monkeypatch.context() as patch:
        patch.setattr(training, "learning_rate_at", signalled)
        code, _, err = train("-r", recipe, "--out", "run")
    assert code == 143
    assert "SIGTERM: stopped after step 2, and everything is saved" in err
    assert "sdseg train --resume run" in err
    assert RunDirectory.open(tmp_path / "run").read_run_json()["status"] == "interrupted"
    code, _, err = train("--resume", "run")
    assert code == 0
    assert "steps 3 to 3" in err
    assert state_of(RunDirectory(tmp_path / "run")) == state_of(RunDirectory(tmp_path / "whole"))


def test_a_finished_run_can_be_trained_longer(sdseg, recipe, tmp_path):
    assert sdseg("train", "-r", recipe, "--out", "run", "--device", "cpu")[0] == 0
    code, _, err = sdseg("train", "--resume", "run", "--device", "cpu")
    assert code == 2
    assert "is finished; there is nothing to resume. Train it longer with --set train.steps=N" in err
    assert sdseg("train", "--resume", "run", "--device", "cpu", "--set", "train.steps=5")[0] == 0
    run = RunDirectory.open(tmp_path / "run")
    assert run.read_recipe().train.steps == 5
    assert run.latest_checkpoint().name == "step-000005"


@pytest.mark.faults
def test_what_would_make_it_another_run_cannot_be_set_on_resume(sdseg, recipe, tmp_path):
    RunDirectory.create(tmp_path / "run", load_recipe(recipe))
    code, _, err = sdseg(
        "train", "--resume", "run", "--set", "train.learning_rate=1", "--set", "train.steps=9"
    )
    assert code == 2
    assert "--set train.learning_rate cannot be changed when a run is resumed" in err


# Signals to a process of its own


def wait_for(condition, process, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive(), process.log()
        assert time.monotonic() < end, process.log()
        time.sleep(0.005)


def metrics(run: RunDirectory) -> int:
    return len(run.metrics_file.read_bytes().splitlines()) if run.metrics_file.exists() else 0


@pytest.mark.faults(28)
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_process_and_loaders_saves_and_ends_in_order(
    number, code, workers, recipe, sdseg_process, tmp_path
):
    process = sdseg_process(
        *("train", "-r", recipe, "--out", tmp_path / "run", "--device", "cpu"),
        *("--set", "train.steps=5000", "--set", f"data.workers={workers}"),
    )
    run = RunDirectory(tmp_path / "run")
    wait_for(lambda: metrics(run) > 3, process)
    os.killpg(process.pid, number)
    process.join(60)
    assert process.exitcode == code, process.log()
    assert "Traceback" not in process.log()
    step = run.read_run_json()["steps"]
    assert run.latest_checkpoint().name == f"step-{step:06d}"
    assert run.read_metrics()[-1]["step"] == step
    assert f"stopped after step {step}, and everything is saved" in " ".join(process.log().split())


@pytest.mark.faults(19)
def test_a_run_killed_from_outside_again_and_again_is_resumed_to_the_same_end(
    recipe, sdseg_process, state_of, tmp_path
):
    settings = [f"--set=train.{key}" for key in ("steps=30", "checkpoint_every=2", "validate_every=10")]
    common = ("--device", "cpu")
    whole = sdseg_process("train", "-r", recipe, "--out", tmp_path / "whole", *common, *settings)
    whole.join(120)
    assert whole.exitcode == 0, whole.log()
    process = sdseg_process("train", "-r", recipe, "--out", tmp_path / "run", *common, *settings)
    run = RunDirectory(tmp_path / "run")
    for lines in (2, 9, 16):
        wait_for(lambda wanted=lines: metrics(run) >= wanted, process)
        time.sleep(0.005 * lines)  # somewhere in the middle of something
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, process.log()
        assert run.status == "interrupted"
        process = sdseg_process("train", "--resume", tmp_path / "run", *common)
    process.join(120)
    assert process.exitcode == 0, process.log()
    assert state_of(run) == state_of(RunDirectory(tmp_path / "whole"))


@pytest.mark.faults(21)
def test_the_second_run_on_a_directory_leaves_at_once_and_names_the_first(
    recipe, sdseg_process, sdseg, tmp_path
):
    first = sdseg_process(
        *("train", "-r", recipe, "--out", tmp_path / "run", "--device", "cpu"),
        *("--set", "train.steps=5000", "--set", "train.checkpoint_every=2"),
    )
    run = RunDirectory(tmp_path / "run")
    wait_for(lambda: run.latest_checkpoint() is not None, first)
    for how in (("--resume", "run"), ("--recipe", recipe, "--out", "run", "--overwrite")):
        started = time.monotonic()
        code, _, err = sdseg("train", *how, "--device", "cpu")
        assert code == 2
        assert f"run directory run is in use by process {first.pid} on" in err
        assert "since 20" in err
        assert time.monotonic() - started < 5
    code, _, err = sdseg("train", "--recipe", recipe, "--out", "run", "--device", "cpu")
    assert code == 2
    assert "exists already (running)" in err
    assert first.is_alive()
    first.terminate()
    first.join(60)
    assert first.exitcode == 143, first.log()


# Refused before anything is made


def refused(sdseg, tmp_path, *arguments, code: int = 2) -> str:
    found, _, err = sdseg("train", "--device", "cpu", *arguments)
    assert found == code, err
    assert made(tmp_path) == set()
    return err


@pytest.mark.faults
def test_neither_or_both_of_recipe_and_resume_are_refused(sdseg, recipe, tmp_path):
    assert "give either --recipe" in refused(sdseg, tmp_path)
    assert "give either --recipe" in refused(sdseg, tmp_path, "--recipe", recipe, "--resume", "run")


@pytest.mark.faults
def test_a_run_that_is_not_there_cannot_be_resumed(sdseg, recipe, tmp_path):
    assert "run directory runs/none does not exist" in refused(sdseg, tmp_path, "--resume", "runs/none")


@pytest.mark.faults
def test_a_missing_dataset_names_the_command_that_makes_it(sdseg, recipe, tmp_path):
    err = refused(sdseg, tmp_path, "-r", recipe, "--set", "data.dataset=data/kseg", code=1)
    assert "data/kseg: not a prepared dataset: there is no such folder" in err
    assert "sdseg prepare kseg --out data/kseg" in err


@pytest.mark.faults
def test_a_dataset_that_does_not_match_the_recipe_is_refused(sdseg, recipe, tmp_path):
    err = refused(sdseg, tmp_path, "-r", recipe, "--set", "data.image_size=64", code=1)
    assert "is prepared at 32 pixels" in err
    assert "--set data.image_size=32" in err


@pytest.mark.faults
@pytest.mark.parametrize("name", ["kseg", "cvc"])
def test_missing_published_weights_name_file_place_and_the_recipe_that_needs_none(
    name, sdseg, recipe, tmp_path, monkeypatch, polyps
):
    """The shipped recipe of the paper, on a dataset of its size."""
    from sdseg_cli.core.engine import networks, training

    monkeypatch.setattr(training, "check_dataset", lambda *_: None)
    monkeypatch.setattr(networks, "build_unet", lambda **_: pytest.fail("a U-Net was started at random"))
    err = refused(sdseg, tmp_path, "-r", name, "--set", f"data.dataset={polyps}")
    wanted = load_recipe(resources_root() / f"{name}.yaml").model.autoencoder
    assert str(Path(wanted)) in err
    assert "diffusion_pytorch_model.safetensors" in err
    assert "--set model.autoencoder=FOLDER" in err
    assert "sdseg train --recipe kseg-fast" in err


@pytest.mark.faults
def test_missing_weights_of_the_u_net_are_never_a_random_start(sdseg, recipe, tmp_path):
    err = refused(sdseg, tmp_path, "-r", recipe, "--set", "model.unet_weights=weights/lsun_churches")
    assert "model.unet_weights" in err
    assert "weights/lsun_churches" in err
    assert "--recipe kseg-fast" in err
    err = refused(sdseg, tmp_path, "-r", recipe, "--set", "model.image_encoder_weights=./encoder.safetensors")
    assert "model.image_encoder_weights" in err
    assert "encoder.safetensors" in err


@pytest.mark.faults
def test_pretrained_weights_that_cannot_be_fetched_are_said(sdseg, recipe, tmp_path):
    err = refused(
        sdseg,
        tmp_path,
        *("-r", recipe, "--set", "model.image_encoder=timm:resnet10t"),
        *("--set", "model.image_encoder_weights=pretrained", "--set", "model.image_encoder_blocks=2"),
        *(
            "--set",
            "model.image_encoder_channels=[128,256,512,512]",
            "--set",
            "model.image_encoder_dropout=0.2",
        ),
    )
    assert "published weights of timm:resnet10t cannot be had" in err
    assert "--set model.image_encoder_weights=random" in err


@pytest.mark.faults
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.trackers=[wandb]", "wandb is not installed. Install it with `pip install wandb`"),
        ("train.precision=fp16", "fp16 needs a GPU"),
        ("model.image_encoder=timm:resnet9000", "timm has no network named 'resnet9000'"),
    ],
)
def test_what_is_not_there_is_said_before_a_run_is_made(setting, message, sdseg, recipe, tmp_path):
    others = [
        "--set=model.image_encoder_channels=[128,256,512,512]",
        "--set=model.image_encoder_blocks=2",
        "--set=model.image_encoder_dropout=0.2",
    ]
    changes = others if "timm" in setting else []
    assert message in refused(sdseg, tmp_path, "-r", recipe, "--set", setting, *changes)


@pytest.mark.faults
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_said_before_a_run_is_made(sdseg, recipe, tmp_path):
    code, _, err = sdseg("train", "-r", recipe, "--device", "cuda")
    assert code == 2
    assert "PyTorch finds no GPU here" in err
    assert made(tmp_path) == set()


@pytest.mark.faults
@pytest.mark.skipif(os.geteuid() == 0, reason="the root user may write everywhere")
def test_a_folder_that_cannot_be_written_is_said(sdseg, recipe, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    code, _, err = sdseg("train", "-r", recipe, "--out", "locked/run", "--device", "cpu")
    assert code == 2
    assert "locked/run cannot be made" in err


@pytest.mark.faults
def test_an_out_that_cannot_be_a_folder_is_refused(sdseg, recipe, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, _, err = sdseg("train", "-r", recipe, "--out", "file", "--device", "cpu")
    assert (code, "file is a file, expected a folder for the run" in err) == (2, True)
    code, _, err = sdseg("train", "-r", recipe, "--out", "file/run", "--device", "cpu")
    assert (code, "file/run cannot be written: file: Not a directory" in err) == (2, True)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.faults
def test_overwrite_keeps_the_old_run_until_the_new_one_can_begin(sdseg, recipe, tmp_path):
    assert sdseg("train", "-r", recipe, "--out", "run", "--device", "cpu")[0] == 0
    before = sorted((tmp_path / "run").rglob("*"))
    again = ("train", "-r", recipe, "--out", "run", "--device", "cpu")
    code, _, err = sdseg(*again)
    assert code == 2
    assert "exists already (finished). Continue it with --resume run, replace it with --overwrite" in err
    code, _, err = sdseg(*again, "--overwrite", "--set", "model.unet_weights=weights/none")
    assert code == 2
    assert sorted((tmp_path / "run").rglob("*")) == before
    assert sdseg(*again, "--overwrite", "--set", "train.steps=1")[0] == 0
    assert [path.name for path in RunDirectory(tmp_path / "run").all_checkpoints()] == ["step-000001"]


@pytest.mark.faults(15)
@pytest.mark.parametrize("name", ["model.ckpt", "weights.pth", "folder.safetensors"])
@pytest.mark.parametrize("command", ["predict", "evaluate", "stability"])
def test_a_checkpoint_file_given_as_a_model_is_never_executed(name, command, sdseg, recipe, tmp_path, polyps):
    proof = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(proof),)

    torch.save({"state_dict": Evil(), "callbacks": Evil()}, tmp_path / name)
    where = ("scans", "--out", "masks") if command == "predict" else ("--data", polyps)
    (tmp_path / "scans").mkdir()
    code, _, err = sdseg(command, *where, "--model", name, "--device", "cpu")
    assert code == 2
    assert f"--model {name}" in err
    assert "run directory" in err
    assert not proof.exists()


# Faults on the way


@pytest.mark.faults(20)
def test_out_of_memory_is_a_message_with_the_setting_to_change(sdseg, recipe, tmp_path, monkeypatch):
    from sdseg_cli.core.engine import learner

    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(learner, "diffusion_loss", too_much)
    code, _, err = sdseg("train", "-r", recipe, "--out", "run", "--device", "cpu")
    assert code == 1
    assert "--set train.gradient_accumulation=2" in err
    assert "Traceback" not in err
    assert RunDirectory.open(tmp_path / "run").status == "failed"


@pytest.mark.faults(20)
def test_out_of_memory_in_the_validation_makes_smaller_batches(sdseg, recipe, monkeypatch):
    from sdseg_cli.core.model.pipeline import SDSegPipeline

    sample, sizes = SDSegPipeline.sample, []

    def small_device(pipeline, images, **options):
        sizes.append(len(images))
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sample(pipeline, images, **options)

    monkeypatch.setattr(SDSegPipeline, "sample", small_device)
    several = ("--set", "train.validation_cases=2")
    code, _, err = sdseg("train", "-r", recipe, "--out", "run", "--device", "cpu", *several)
    assert code == 0, err
    assert sizes[:3] == [2, 1, 1]


@pytest.mark.faults(17)
@pytest.mark.parametrize("place", ["checkpoint", "model", "metrics", "picture"])
def test_a_full_disk_ends_with_a_message_and_exit_code_1(place, sdseg, recipe, tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline

    from sdseg_cli.core.engine import validation

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    target = {
        "checkpoint": (torch, "save"),
        "model": (DiffusionPipeline, "save_pretrained"),
        "metrics": (RunDirectory, "append_metrics"),
        "picture": (validation, "write_png"),
    }[place]
    monkeypatch.setattr(*target, full)
    code, _, err = sdseg("train", "-r", recipe, "--out", "run", "--device", "cpu")
    assert code == 1
    assert "No space left on device" in err
    assert "Traceback" not in err
    assert RunDirectory.open(tmp_path / "run").status == "failed"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    code, _, err = sdseg("train", "--resume", "run", "--device", "cpu")
    assert code == 0, err


def test_help_ends_with_examples_and_imports_no_torch():
    code = (
        "import sys\nfrom sdseg_cli.cli import main\n"
        "try: main(['train', '--help'])\n"
        "finally: sys.stderr.write(str('torch' in sys.modules))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0
    assert finished.stderr == "False"
    assert "sdseg train --resume" in finished.stdout[finished.stdout.index("Examples") :]
