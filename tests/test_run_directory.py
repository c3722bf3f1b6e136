"""The run directory: what it writes, refuses, remembers and finds again."""

import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sdseg_cli.core.errors import DataError, UsageError
from sdseg_cli.core.files import atomic_folder
from sdseg_cli.core.recipe import recipe_from_values
from sdseg_cli.core.run_directory import (
    RunDirectory,
    all_runs,
    atomic_write,
    newest_finished_run,
    resolve_model,
    to_json,
)

RECIPE = recipe_from_values({"name": "tiny", "data": {"dataset": "data/tiny"}})


def finished_run(root: Path, ended: str = "2026-01-01T00:00:00+00:00") -> RunDirectory:
    run = RunDirectory.create(root, RECIPE)
    run.model.mkdir()
    (run.model / "model_index.json").write_text("{}")
    run.write_run_json(status="finished", ended=ended)
    return run


def test_a_new_run_holds_its_recipe_and_says_what_it_was_made_with(tmp_path):
    run = RunDirectory.create(None, RECIPE, runs_root=tmp_path)
    assert run.root.parent == tmp_path
    assert run.root.name.startswith("tiny-20")
    assert run.read_recipe() == RECIPE
    fields = run.read_run_json()
    assert fields["status"] == "running"
    assert fields["versions"]["python"].startswith("3.")
    assert fields["versions"]["torch"]


@pytest.mark.faults(19)
def test_a_run_that_is_killed_while_it_is_made_or_replaced_can_be_replaced(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_recipe", killed)
        with pytest.raises(KeyboardInterrupt):
            RunDirectory.create(tmp_path / "run", RECIPE)
    run = RunDirectory.create(tmp_path / "run", RECIPE, overwrite=True)
    for name in ("zzz.txt", "aaa.txt"):
        (run.root / name).write_text("old")
    with monkeypatch.context() as patch:
        unlink = Path.unlink
        patch.setattr(Path, "unlink", lambda p, **o: killed() if p.name == "zzz.txt" else unlink(p, **o))
        with pytest.raises(KeyboardInterrupt):
            RunDirectory.create(tmp_path / "run", RECIPE, overwrite=True)
    assert RunDirectory.create(tmp_path / "run", RECIPE, overwrite=True).read_recipe() == RECIPE
    assert not (run.root / "zzz.txt").exists()


def test_two_runs_of_the_same_second_get_two_folders(tmp_path):
    roots = {RunDirectory.create(None, RECIPE, runs_root=tmp_path).root for _ in range(3)}
    assert len(roots) == 3


@pytest.mark.faults
def test_an_existing_run_is_not_overwritten_unless_asked(tmp_path):
    run = finished_run(tmp_path / "run")
    (run.root / "keep.txt").write_text("old")
    with pytest.raises(UsageError, match=r"exists already \(finished\)\. Continue it with --resume"):
        RunDirectory.create(run.root, RECIPE)
    assert (run.root / "keep.txt").read_text() == "old"
    again = RunDirectory.create(run.root, RECIPE, overwrite=True)
    assert not (again.root / "keep.txt").exists()
    assert not again.has_model


@pytest.mark.faults
def test_a_folder_that_is_no_run_is_never_emptied(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="holds files that are not a run's"):
        RunDirectory.create(tmp_path, RECIPE, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.faults
def test_a_file_in_the_place_of_the_run_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UsageError, match="is a file, expected a folder"):
        RunDirectory.create(tmp_path / "run", RECIPE)


@pytest.mark.faults(22)
def test_a_folder_that_is_there_is_taken_though_the_one_above_it_is_not_writable(tmp_path, monkeypatch):
    mount = tmp_path / "mount"
    mount.mkdir()
    make = tempfile.TemporaryFile

    def elsewhere(*, dir, **options):  # noqa: A002
        if dir != mount:
            raise PermissionError(errno.EACCES, "Permission denied", str(dir))
        return make(dir=dir, **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", elsewhere)
    assert RunDirectory.create(mount, RECIPE).root == mount
    with pytest.raises(
        UsageError, match=rf"{tmp_path / 'new'} cannot be written: {tmp_path}: Permission denied"
    ):
        RunDirectory.create(tmp_path / "new", RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["mount"]


@pytest.mark.faults
def test_opening_a_run_that_does_not_exist_names_the_nearest(tmp_path):
    RunDirectory.create(tmp_path / "kseg-1", RECIPE)
    with pytest.raises(UsageError, match=r"does not exist\. Did you mean .*kseg-1\? Runs in .*: kseg-1\."):
        RunDirectory.open(tmp_path / "kseg-2")


@pytest.mark.faults
def test_a_damaged_run_json_is_named(tmp_path):
    run = RunDirectory.create(tmp_path / "run", RECIPE)
    run.run_file.write_text('{"status": "fin')
    with pytest.raises(DataError, match=r"run\.json cannot be read"):
        run.read_run_json()
    assert newest_finished_run(tmp_path) is None


def test_fields_of_run_json_are_merged(tmp_path):
    run = RunDirectory.create(tmp_path / "run", RECIPE)
    run.write_run_json(seed=3)
    run.finish("finished", best_dice=0.9)
    fields = run.read_run_json()
    assert (fields["seed"], fields["status"], fields["best_dice"]) == (3, "finished", 0.9)
    assert fields["ended"]


def test_metrics_are_read_as_they_were_written(tmp_path):
    run = RunDirectory.create(tmp_path / "run", RECIPE)
    assert run.read_metrics() == []
    run.append_metrics({"step": 1, "loss": 0.5})
    run.append_metrics({"step": 2, "loss": float("nan")})
    assert run.read_metrics() == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]


@pytest.mark.faults
def test_a_line_torn_by_a_crash_is_dropped(tmp_path):
    run = RunDirectory.create(tmp_path / "run", RECIPE)
    run.append_metrics({"step": 1})
    with run.metrics_file.open("a") as file:
        file.write('{"step": 2, "lo')
    assert run.read_metrics() == [{"step": 1}]
    run.append_metrics({"step": 2})
    assert run.read_metrics() == [{"step": 1}, {"step": 2}]


@pytest.mark.faults
def test_a_damaged_line_in_the_middle_is_named_by_its_number(tmp_path):
    run = RunDirectory.create(tmp_path / "run", RECIPE)
    run.metrics_file.write_text('{"step": 1}\n???\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 is damaged: found '\?\?\?'"):
        run.read_metrics()


def test_a_resumed_run_forgets_the_steps_it_repeats(tmp_path):
    run = RunDirectory.create(tmp_path / "run", RECIPE)
    for step in (1, 2, 3):
        run.append_metrics({"step": step})
    run.drop_metrics_after(2)
    assert [record["step"] for record in run.read_metrics()] == [1, 2]


def test_the_latest_checkpoint_is_the_one_of_the_highest_step(tmp_path):
    run = RunDirectory.create(tmp_path / "run", RECIPE)
    assert run.latest_checkpoint() is None
    for step in (500, 1000, 1_000_000):
        run.checkpoint(step).mkdir(parents=True)
    (run.checkpoints / ".sdseg-abc.partial").mkdir()
    (run.checkpoints / "step-2000000.tmp").mkdir()
    assert run.latest_checkpoint() == run.checkpoints / "step-1000000"
    assert run.all_checkpoints()[0].name == "step-000500"


@pytest.mark.faults(21)
def test_a_second_process_is_told_who_holds_the_run(tmp_path):
    run = RunDirectory.create(tmp_path / "run", RECIPE)
    with run.lock():
        assert run.status == "running"
        with pytest.raises(UsageError, match=rf"in use by process {os.getpid()} on .* since 20"), run.lock():
            pass
        code = (
            "import sys; from pathlib import Path; from sdseg_cli.core.run_directory import RunDirectory\n"
            "with RunDirectory(Path(sys.argv[1])).lock(): pass"
        )
        second = subprocess.run(
            [sys.executable, "-c", code, str(run.root)], capture_output=True, text=True, timeout=60
        )
        assert second.returncode == 1
        assert f"in use by process {os.getpid()}" in second.stderr
    with run.lock():
        pass


@pytest.mark.faults
def test_a_run_that_was_killed_counts_as_interrupted(tmp_path):
    run = RunDirectory.create(tmp_path / "run", RECIPE)
    assert run.status == "interrupted"
    with run.lock():
        assert run.status == "running"


@pytest.mark.faults
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a" / "recipe.yaml"
    atomic_write(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in path.parent.iterdir()] == ["recipe.yaml"]


@pytest.mark.faults
def test_a_failed_folder_leaves_the_old_one_and_nothing_else(tmp_path):
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model") as folder:  # noqa: PT012
        (folder / "weights").write_text("half")
        raise RuntimeError
    assert (tmp_path / "model" / "weights").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_folder_replaces_the_old_one_whole(tmp_path):
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "model") as folder:
            (folder / text).write_text(text)
    assert [entry.name for entry in (tmp_path / "model").iterdir()] == ["new"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_json_has_no_numbers_that_other_readers_refuse():
    assert json.loads(to_json({"a": float("nan"), "b": float("inf"), "c": (1, Path("x"))})) == {
        "a": None,
        "b": "inf",
        "c": [1, "x"],
    }


def test_without_a_model_the_newest_finished_run_is_taken(tmp_path):
    finished_run(tmp_path / "b-old", "2026-01-01T00:00:00+00:00")
    newest = finished_run(tmp_path / "a-new", "2026-01-02T00:00:00+00:00")
    unfinished = RunDirectory.create(tmp_path / "z-running", RECIPE)
    assert len(all_runs(tmp_path)) == 3
    reference = resolve_model(None, tmp_path)
    assert reference.run == newest
    assert reference.location == str(newest.model)
    assert reference.description == f"the newest finished run {newest.root} (recipe tiny, finished)"
    assert unfinished.root != newest.root


@pytest.mark.faults
def test_with_no_run_at_all_the_message_says_how_to_make_one(tmp_path):
    with pytest.raises(UsageError, match="sdseg train --recipe kseg-fast"):
        resolve_model(None, tmp_path)


def test_a_model_is_found_by_run_name_run_folder_model_folder_and_hub_id(tmp_path):
    run = finished_run(tmp_path / "runs" / "first")
    for given in ("first", str(run.root), str(run.model)):
        reference = resolve_model(given, tmp_path / "runs")
        assert reference.location == str(run.model)
        assert reference.run is not None
        assert reference.run.root.resolve() == run.root.resolve()
    hub = resolve_model("somebody/some-model", tmp_path / "runs")
    assert (hub.location, hub.run) == ("somebody/some-model", None)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("model.ckpt", "becomes a model folder with: sdseg convert model.ckpt --out"),
        ("runs/frist", "does not exist. Did you mean runs/first?"),
        ("runs/empty", "holds neither a run"),
        ("runs/unfinished", "has no exported model yet. Continue it with: sdseg train --resume"),
        ("./nowhere", "does not exist. Give a run directory"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_with_the_remedy(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    finished_run(Path("runs/first"))
    RunDirectory.create(Path("runs/unfinished"), RECIPE)
    Path("runs/empty").mkdir()
    with pytest.raises(UsageError) as caught:
        resolve_model(given)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"--model {given}")
    with pytest.raises(UsageError) as caught:  # named by an argument, where masks would do as well
        resolve_model(given, option="", also="a folder of masks")
    assert str(caught.value).startswith(given)
    assert message.partition(" Give")[0] in str(caught.value)
    named = "a folder of masks or a hub id" in str(caught.value)
    assert named == ("does not exist" in message or "neither a run" in message)
