"""A slice of the long fuzzing (``python -m tests.fuzz.run``), and that it sees what it must."""

from __future__ import annotations

import ctypes
import os
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.fuzz import worker
from tests.fuzz.parsers import PARSERS
from tests.fuzz.run import fuzz, main, shares
from tests.fuzz.worker import Outcome

pytestmark = pytest.mark.faults

# Those whose imports take long are left to the long run, but for a few inputs.
QUICK = {
    **dict.fromkeys(("recipe", "recipe, made", "split", "split, made", "dataset", "dataset, made"), 25),
    **dict.fromkeys(("nnunet", "run", "zip", "tar", "tar.gz", "tar.xz", "safetensors"), 25),
    **dict.fromkeys(("png", "jpeg", "tiff", "bmp", "nii", "nii.gz", "nrrd", "mha", "mhd", "dicom"), 8),
}


@pytest.mark.parametrize("name", QUICK)
def test_damaged_files_are_read_or_refused_and_nothing_else(name, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "OUTSIDE", (tmp_path / "outside",))
    found = 0
    parser = PARSERS[name]
    inputs = worker._inputs(name, 7, range(QUICK[name]))
    for number, files in inputs:
        worker._lay_out(files, tmp_path / "work")
        outcome = worker.judge(name, tmp_path / "work")
        assert not outcome.is_finding, (number, outcome.kind, outcome.where, outcome.detail)
        found += outcome.kind == "refused"
    assert found, "not one input was damaged enough"
    assert parser.made is not None or parser.make(random.Random(3)) == parser.make(random.Random(3))


# The fuzzing itself


def hostile(name: str, seed: int, numbers: range, folder: Path, answers: Connection) -> None:
    """A worker that inputs 3 and 6 end and 5 hangs; 8 raises."""
    for number in numbers:
        (folder / "input").mkdir(parents=True, exist_ok=True)
        (folder / "input" / "a").write_text(str(number))
        answers.send(("next", number))
        if number == 3:
            ctypes.string_at(0)
        if number == 5:
            time.sleep(60)
        if number == 6:
            os._exit(7)
        answers.send(("end", number, Outcome("ValueError", "here") if number == 8 else Outcome("refused")))
    answers.send(("done",))


def test_a_parser_that_dies_or_hangs_is_found_and_the_rest_goes_on(tmp_path):
    found = fuzz("png", 9, keep=tmp_path, seconds=1.0, target=hostile)
    assert found.counts == {
        "refused": 5,
        "dies with -11": 1,
        "hangs": 1,
        "dies with 7": 1,
        "ValueError": 1,
    }
    assert found.findings == 4
    assert found.restarts == 3
    assert {number for number, _ in found.kept.values()} == {3, 5, 6, 8}
    assert (tmp_path / "png-3" / "input" / "a").read_text() == "3"
    assert "hangs" in (tmp_path / "png-5" / "outcome.txt").read_text()


def test_an_input_that_writes_outside_its_folder_is_found(tmp_path, monkeypatch):
    def escape(name: str, given: Path, out: Path) -> None:
        (out.parent / "escaped").write_text("")

    worker._lay_out({"a": b""}, tmp_path / "work")
    monkeypatch.setattr("tests.fuzz.parsers.read_with", escape)
    assert worker.judge("png", tmp_path / "work").kind == "written outside"


def test_an_error_that_is_not_ours_is_found_with_its_place(tmp_path, monkeypatch):
    def fail(name: str, given: Path, out: Path) -> None:
        raise ZeroDivisionError("by zero")

    worker._lay_out({"a": b""}, tmp_path / "work")
    monkeypatch.setattr("tests.fuzz.parsers.read_with", fail)
    outcome = worker.judge("png", tmp_path / "work")
    assert (outcome.kind, outcome.where) == ("ZeroDivisionError", "test_fuzz.py:fail")
    assert outcome.is_finding


def test_the_inputs_are_shared_out_over_the_parsers():
    counts = shares(10_000, list(PARSERS))
    assert counts.keys() == PARSERS.keys()
    assert min(counts.values()) > 50
    assert 10_000 <= sum(counts.values()) <= 10_000 + len(PARSERS)


def test_the_command_counts_and_ends_with_zero(tmp_path, capsys):
    assert main(["--inputs", "20", "--only", "split", "--json", str(tmp_path / "counts.json")]) == 0
    assert "20 inputs" in capsys.readouterr().out
    assert '"refused"' in (tmp_path / "counts.json").read_text()
