"""Checkpoints: whole or absent, checked before they are read, and never run as code."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

from sdseg_cli.core.engine import checkpoints
from sdseg_cli.core.errors import ModelError, SdsegError
from sdseg_cli.core.files import sha256_of
from sdseg_cli.core.recipe import recipe_to_yaml
from sdseg_cli.core.run_directory import RunDirectory

CHANGES = {
    "train.steps": 8,
    "train.log_every": 3,
    "train.validate_every": 3,
    "train.checkpoint_every": 2,
    "train.keep_checkpoints": 1,
    "model.unet_dropout": 0.2,
    "data.augmentation.affine": 0.5,
    "data.augmentation.colour": 0.5,
}


@pytest.fixture(scope="module")
def four_steps(tiny_recipe, sdseg_process, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    changes = {"train.steps": 4, "train.checkpoint_every": 2}
    (folder / "recipe.yaml").write_text(recipe_to_yaml(tiny_recipe(changes)))
    process = sdseg_process(
        "train", "--recipe", folder / "recipe.yaml", "--out", folder / "run", "--device", "cpu"
    )
    process.join(120)
    assert process.exitcode == 0, process.log()
    return folder / "run"


@pytest.fixture
def stopped(four_steps, tmp_path) -> RunDirectory:
    """A run of 4 steps with checkpoints after 2 and 4."""
    shutil.copytree(four_steps, tmp_path / "run")
    return RunDirectory.open(tmp_path / "run")


def resumed(trained, tiny_recipe, run: RunDirectory, steps: int = 5):
    return trained(tiny_recipe({"train.steps": steps}), run.root, resume=True)


# What is in them


def test_a_checkpoint_lists_its_files_by_their_sum_and_says_how_far_it_is(stopped):
    newest = stopped.latest_checkpoint()
    manifest = json.loads((newest / "manifest.json").read_text())
    assert newest.name == "step-000004"
    assert manifest["progress"]["step"] == 4
    assert set(manifest["files"]) == {path.name for path in newest.iterdir()} - {"manifest.json"}
    assert all(sha256_of(newest / name) == known for name, known in manifest["files"].items())
    assert not list(stopped.checkpoints.glob(".*"))


def test_weights_and_averages_are_no_pickles(stopped):
    newest = stopped.latest_checkpoint()
    assert {path.name for path in newest.iterdir()} == {
        "averages.safetensors", "manifest.json", "model.safetensors", "optimizer.bin", "random_states_0.pkl",
    }  # fmt: skip


def test_resuming_before_the_first_checkpoint_starts_anew(tiny_recipe, trained, tmp_path, state_of):
    whole = trained(tiny_recipe(), tmp_path / "whole").run
    RunDirectory.create(tmp_path / "run", tiny_recipe())
    again = trained(tiny_recipe(), tmp_path / "run", resume=True).run
    assert state_of(again) == state_of(whole)


# Killed at any moment


@pytest.fixture(scope="module")
def uninterrupted(tiny_recipe, sdseg_process, tmp_path_factory):
    """A run that nobody killed, and its recipe as a file."""
    folder = tmp_path_factory.mktemp("killed")
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe_to_yaml(tiny_recipe(CHANGES)))
    process = sdseg_process("train", "--recipe", recipe, "--out", folder / "whole", "--device", "cpu")
    process.join(120)
    assert process.exitcode == 0, process.log()
    return recipe, RunDirectory.open(folder / "whole")


@pytest.mark.faults(19)
@pytest.mark.parametrize(
    ("moment", "count"),
    [
        ("before a step", 6),
        ("half of the optimizer saved", 1),
        ("half of the optimizer saved", 3),
        ("before a checkpoint has its name", 2),
        ("after a checkpoint has its name", 2),
        ("before a model has its name", 1),
        ("after a model has its name", 1),
        ("half a line of metrics", 3),
        ("half of an old checkpoint removed", 2),
    ],
)
def test_a_run_that_was_killed_and_resumed_equals_an_uninterrupted_one(
    moment, count, uninterrupted, sdseg_process, state_of, tmp_path
):
    recipe, whole = uninterrupted
    root = tmp_path / "run"
    process = sdseg_process(
        "train", "--recipe", recipe, "--out", root, "--device", "cpu", moment=moment, count=count
    )
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, process.log()
    assert RunDirectory.open(root).status == "interrupted"
    process = sdseg_process("train", "--resume", root, "--device", "cpu")
    process.join(120)
    assert process.exitcode == 0, process.log()
    assert state_of(RunDirectory.open(root)) == state_of(whole)


@pytest.mark.faults(19)
def test_a_run_killed_again_and_again_equals_an_uninterrupted_one(
    uninterrupted, sdseg_process, state_of, tmp_path
):
    recipe, whole = uninterrupted
    root = tmp_path / "run"
    moments = [
        ("half of the optimizer saved", 2),
        ("half a line of metrics", 2),
        ("before a checkpoint has its name", 1),
        ("before a step", 7),
    ]
    for attempt, (moment, count) in enumerate(moments):
        how = ("--resume", root) if attempt else ("--recipe", recipe, "--out", root)
        process = sdseg_process("train", *how, "--device", "cpu", moment=moment, count=count)
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, process.log()
    process = sdseg_process("train", "--resume", root, "--device", "cpu")
    process.join(120)
    assert process.exitcode == 0, process.log()
    assert state_of(RunDirectory.open(root)) == state_of(whole)


# The disk


@pytest.mark.faults(17)
def test_a_full_disk_leaves_the_previous_checkpoint_whole(tiny_recipe, trained, tmp_path, monkeypatch):
    save, calls = torch.save, []

    def full(*args, **options):
        calls.append(args)
        if len(calls) > 3:  # the optimizer and the random states of the first checkpoint went well
            raise OSError(28, "No space left on device")
        return save(*args, **options)

    monkeypatch.setattr(torch, "save", full)
    changes = {"train.steps": 6, "train.checkpoint_every": 2}
    with pytest.raises(SdsegError, match=r"step-000004 could not be written.*No space left") as error:
        trained(tiny_recipe(changes), tmp_path / "run")
    assert error.value.exit_code == 1
    assert f"sdseg train --resume {tmp_path / 'run'}" in str(error.value)
    monkeypatch.undo()
    run = RunDirectory.open(tmp_path / "run")
    assert run.status == "failed"
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000002"]
    result = trained(tiny_recipe(changes), run.root, resume=True)
    assert result.records[0].first_step == 2
    assert result.losses == trained(tiny_recipe(changes), tmp_path / "whole").losses[2:]


@pytest.mark.faults(17)
def test_a_write_that_the_system_cuts_short_leaves_the_previous_checkpoint_whole(
    tiny_recipe, trained, tmp_path, monkeypatch
):
    """The optimizer's state does not fit under the limit on the size of files; the weights do."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = trained(tiny_recipe(), tmp_path / "measured").run.latest_checkpoint()
    weights, optimizer = ((whole / name).stat().st_size for name in ("model.safetensors", "optimizer.bin"))
    assert weights < optimizer
    save = checkpoints.save_checkpoint

    def limited(accelerator, run, progress, *args, **options):
        if progress.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (optimizer - 1000, limits[1]))
        try:
            return save(accelerator, run, progress, *args, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr("sdseg_cli.core.engine.training.save_checkpoint", limited)
    with pytest.raises(SdsegError, match="step-000004 could not be written"):
        trained(tiny_recipe({"train.steps": 6, "train.checkpoint_every": 2}), tmp_path / "run")
    run = RunDirectory.open(tmp_path / "run")
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000002"]
    monkeypatch.undo()
    assert resumed(trained, tiny_recipe, run).records[0].first_step == 2


# Torn, altered, foreign


@pytest.mark.faults(16, 26)
@pytest.mark.parametrize(
    "name", ["averages.safetensors", "model.safetensors", "optimizer.bin", "random_states_0.pkl"]
)
@pytest.mark.parametrize("damage", ["missing", "cut", "one bit"])
def test_a_torn_or_altered_checkpoint_is_refused_and_the_last_good_one_is_named(
    name, damage, stopped, tiny_recipe, trained
):
    file = stopped.latest_checkpoint() / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(ModelError) as error:
        resumed(trained, tiny_recipe, stopped)
    message = str(error.value)
    assert name in message
    assert "The last good checkpoint is" in message
    assert str(stopped.checkpoint(2)) in message
    assert f"delete {stopped.checkpoint(4)} to continue from there" in message


@pytest.mark.faults(26)
@pytest.mark.parametrize(
    "manifest", [None, "", "{", "[]", "{}", '{"progress": {"pace": 4}, "dataset": "a", "files": {}}']
)
def test_a_damaged_manifest_is_refused(manifest, stopped, tiny_recipe, trained):
    file = stopped.latest_checkpoint() / "manifest.json"
    file.unlink() if manifest is None else file.write_text(manifest)
    with pytest.raises(ModelError, match=r"cannot be used.*The last good checkpoint is"):
        resumed(trained, tiny_recipe, stopped)


@pytest.mark.faults
def test_after_deleting_the_torn_checkpoint_the_run_goes_on_from_the_last_good_one(
    stopped, tiny_recipe, trained, tmp_path
):
    shutil.rmtree(stopped.checkpoint(4))
    result = resumed(trained, tiny_recipe, stopped, steps=4)
    assert result.records[0].first_step == 2
    assert result.losses == trained(tiny_recipe({"train.steps": 4}), tmp_path / "whole").losses[2:]


@pytest.mark.faults(26)
def test_where_no_checkpoint_is_whole_the_message_says_so(stopped, tiny_recipe, trained):
    for checkpoint in stopped.all_checkpoints():
        (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="There is no other whole checkpoint: train anew with --overwrite"):
        resumed(trained, tiny_recipe, stopped)


class Evil:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.mark.faults(15)
@pytest.mark.parametrize(
    "name", ["optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "averages.safetensors"]
)
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_never_run(name, form, stopped, tiny_recipe, trained, tmp_path):
    proof = tmp_path / "executed"
    checkpoint = stopped.latest_checkpoint()
    file = checkpoint / name
    if form == "torch":
        torch.save({"state": Evil(proof)}, file)
    else:
        file.write_bytes(pickle.dumps(Evil(proof)))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = sha256_of(file)  # whoever can write the file can write the manifest
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    if name == "random_states_0.pkl":  # not needed: every draw has its own seed
        resumed(trained, tiny_recipe, stopped)
    else:
        with pytest.raises(ModelError, match="does not fit the run's recipe"):
            resumed(trained, tiny_recipe, stopped)
    assert not proof.exists()


@pytest.mark.faults
def test_a_recipe_changed_by_hand_does_not_fit_its_checkpoint(stopped, tiny_recipe, trained):
    with pytest.raises(ModelError, match=r"does not fit the run's recipe.*Restore .*recipe.yaml"):
        trained(tiny_recipe({"model.unet_channels": [32, 64]}), stopped.root, resume=True)


# Housekeeping


def test_as_many_checkpoints_are_kept_as_asked_for(tiny_recipe, trained, tmp_path):
    changes = {"train.steps": 5, "train.checkpoint_every": 1, "train.keep_checkpoints": 3}
    run = trained(tiny_recipe(changes), tmp_path / "run").run
    assert [path.name for path in run.all_checkpoints()] == ["step-000003", "step-000004", "step-000005"]


@pytest.mark.faults
def test_what_a_killed_process_left_is_removed_on_resume(stopped, tiny_recipe, trained):
    (stopped.checkpoints / ".step-000006.partial").mkdir()
    (stopped.checkpoints / ".step-000006.partial" / "model.safetensors").write_bytes(b"half")
    (stopped.root / ".sdseg-abc.partial").write_text("half a recipe")
    stopped.model.rename(stopped.root / ".sdseg-xyz.old")  # killed between its two renamings
    run = resumed(trained, tiny_recipe, stopped).run
    hidden = {path.name for place in (run.root, run.checkpoints) for path in place.glob(".*")}
    assert hidden <= {".lock"}
    assert run.has_model
