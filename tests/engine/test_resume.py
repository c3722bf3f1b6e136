"""Exact resume: trainings killed at random moments, on one and on two processes; minutes of work."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "resume_table.py"


@pytest.mark.faults(19)
@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_any_of_20_random_moments_equals_an_uninterrupted_one(processes):
    main = runpy.run_path(str(SCRIPT), run_name="resume_table")["main"]
    rows = main(["--kills", "20", "--terms", "3", "--changes", "2", "--processes", str(processes)])
    killed = [row for row in rows if row.ended_by.startswith("SIGKILL") and "->" not in row.processes]
    assert len(killed) == 20
    assert [row for row in killed if not row.equal] == []
    assert sum(row.where.startswith(("saving", "naming")) for row in killed) >= 3
    assert len({row.resumed_from for row in killed}) >= 3  # moments all over the training
    terminated = [row for row in rows if row.ended_by == "SIGTERM"]
    assert [row.codes for row in terminated if row.codes != [0] * processes] != []
    for row in terminated:
        if row.codes != [0] * processes:
            assert row.codes == [143] * processes
            assert {name for name, same in row.same.items() if not same} <= {"files"}
    changed = [row for row in rows if "->" in row.processes]
    for row in changed:
        assert row.resumed_from <= 0 or f"processes {processes} -> {3 - processes}" in row.remark
        assert row.deviation < 0.01
