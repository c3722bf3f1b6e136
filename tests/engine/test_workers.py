"""Several workers predict one folder: no case is lost or doubled, also when one of them is killed."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdseg_cli.core.data.images import write_png
from sdseg_cli.core.data.phantom import make_phantom
from sdseg_cli.core.engine.prediction_plan import Shard, plan_predictions
from sdseg_cli.core.errors import UsageError
from sdseg_cli.core.manifest import read_journal

IMAGES = 90
WORKERS = 3


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_case_belongs_to_one_shard_and_shards_are_of_a_size(tmp_path, count):
    for index in range(7):
        write_png(tmp_path / f"{index}.png", np.zeros((4, 4), np.uint8))
    tasks = plan_predictions([tmp_path], tmp_path / "out")
    shards = [Shard(number, count).of(tasks) for number in range(1, count + 1)]
    assert sorted((task for shard in shards for task in shard), key=tasks.index) == tasks
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("text", ["", "2", "0/4", "5/4", "a/b", "1/0", "-1/4", "1/4/2", "٣/٤"])
def test_a_shard_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match=r"--shard .*expected I/N with I from 1 to N, such as 2/4"):
        Shard.parse(text)
    assert Shard.parse("2/4") == Shard(2, 4)


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    for index in range(IMAGES):
        image, _ = make_phantom("endoscopy", seed=5, index=index, size=48)
        Image.fromarray(image).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def model(tiny_recipe, trained, tmp_path) -> Path:
    return trained(tiny_recipe(), tmp_path / "run").run.root


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "summary.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def masks(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.mark.faults
def test_a_killed_worker_loses_only_its_own_cases_and_a_rerun_completes_them(
    scans, model, sdseg_process, tmp_path
):
    out, whole = tmp_path / "masks", tmp_path / "whole"
    common = ("predict", scans, "--model", model, "--device", "cpu", "--batch-size", "1")
    alone = sdseg_process(*common, "--out", whole)
    workers = [
        sdseg_process(*common, "--out", out, "--shard", f"{number}/{WORKERS}")
        for number in range(1, WORKERS + 1)
    ]
    own = [f"{index}.png" for index in range(1, IMAGES, WORKERS)]  # of the second
    deadline = time.monotonic() + 120
    while not any((out / name).exists() for name in own):
        assert time.monotonic() < deadline, workers[1].log()
        assert workers[1].is_alive(), workers[1].log()
        time.sleep(0.001)
    os.kill(workers[1].pid, signal.SIGKILL)
    for worker in (alone, *workers):
        worker.join(240)
    assert alone.exitcode == 0, alone.log()
    assert [worker.exitcode for worker in workers] == [0, -signal.SIGKILL, 0], workers[0].log()

    expected = masks(whole)
    assert len(expected) == IMAGES
    left = expected.keys() - masks(out).keys()
    assert left, "the worker was killed too late"
    assert left < set(own)
    assert all(masks(out)[name] == expected[name] for name in masks(out))  # each whole, none half-written
    assert {row["file"] for row in rows(out)} == expected.keys() - set(own)  # it had no time to list its own
    assert json.loads((out / "prediction.json").read_text())["status"] == "running"
    said = [worker.log() for worker in (workers[0], workers[2])]
    assert any(f"of all {IMAGES} cases belong to shards that have not finished" in text for text in said)

    listed = {name for line in read_journal(out) for name in line.get("files", ())}
    assert expected.keys() - set(own) <= listed
    again = sdseg_process(*common, "--out", out, "--shard", f"2/{WORKERS}", "--skip-existing")
    again.join(120)
    assert again.exitcode == 0, again.log()
    assert masks(out) == expected
    assert sorted(row["file"] for row in rows(out)) == sorted(expected)  # each once
    # What it had listed is skipped, a mask that it had no time to list is made again, the others' rows stay.
    statuses = {name: "skipped" if name in listed and name in own else "done" for name in expected}
    assert {row["file"]: row["status"] for row in rows(out)} == statuses
    assert json.loads((out / "prediction.json").read_text())["status"] == "finished"
    assert not list(out.glob(".sdseg-*"))


@pytest.mark.faults
def test_more_shards_than_cases_leave_the_last_with_nothing_to_do(model, sdseg_process, tmp_path):
    (tmp_path / "scans").mkdir()
    write_png(tmp_path / "scans" / "a.png", np.zeros((40, 40, 3), np.uint8))
    for number in (2, 1):
        worker = sdseg_process(
            *("predict", tmp_path / "scans", "--out", tmp_path / "masks", "--model", model),
            *("--device", "cpu", "--shard", f"{number}/2"),
        )
        worker.join(120)
        assert worker.exitcode == 0, worker.log()
    assert list(masks(tmp_path / "masks")) == ["a.png"]
    assert len(rows(tmp_path / "masks")) == 1


@pytest.mark.faults
def test_a_shard_with_other_settings_is_refused(scans, model, sdseg_process, tmp_path):
    common = ("predict", scans, "--out", tmp_path / "masks", "--model", model, "--device", "cpu")
    first = sdseg_process(*common, "--shard", "1/90")
    first.join(120)
    assert first.exitcode == 0, first.log()
    second = sdseg_process(*common, "--shard", "2/90", "--seed", "5")
    second.join(120)
    assert second.exitcode == 2
    assert "were made with seed 0 (now 5)" in " ".join(second.log().split())
