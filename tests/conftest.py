"""What several tests share: tiny phantom datasets, tiny recipes, and a training that takes a second."""

from __future__ import annotations

import functools
import os
import runpy
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.tiny_recipe import SIZE, tiny_values

# One thread: sums do not depend on the machine's cores, and tiny tensors are faster so.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may fetch anything
# Started in the background, a shell has its children ignore Ctrl-C, and theirs: not here.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # and under nohup a closed terminal
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

REAL_RUNS = runpy.run_path(str(Path(__file__).with_name("real_runs.py")))


def _prepare(out: Path, kind: str, cases: int) -> Path:
    from sdseg_cli.commands.prepare import phantom

    phantom(kind=kind, cases=cases, size=SIZE, seed=0, fractions="0.6,0.2,0.2", out=out, workers=1)
    return out


@pytest.fixture(scope="session")
def polyps(tmp_path_factory) -> Path:
    """A prepared dataset of 24 endoscopy phantoms of 32 pixels, two classes."""
    return _prepare(tmp_path_factory.mktemp("polyps") / "polyps", "endoscopy", 24)


@pytest.fixture(scope="session")
def organs(tmp_path_factory) -> Path:
    """A prepared dataset of 15 organ phantoms of 32 pixels, four classes."""
    return _prepare(tmp_path_factory.mktemp("organs") / "organs", "organs", 15)


@pytest.fixture(scope="session")
def tiny_recipe(polyps) -> Callable[..., Any]:
    """Make a recipe that trains in a second; dotted keys change it, ``tiny_recipe({"train.steps": 4})``."""
    from sdseg_cli.core.recipe import recipe_from_values

    lengths = {
        "steps": 2,
        "validate_every": 1000,
        "checkpoint_every": 1000,
        "log_every": 1,
        "validation_cases": 1,
    }

    def make(changes: Mapping[str, Any] | None = None) -> Any:
        values = tiny_values(polyps)
        values["train"] |= lengths
        for dotted, value in (changes or {}).items():
            *sections, last = dotted.split(".")
            place = values
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = value
        return recipe_from_values(values)

    return make


@pytest.fixture
def trained(monkeypatch) -> Callable[..., Any]:
    """Train a recipe into a folder: ``trained(recipe, root)`` gives its run, records and losses."""
    from accelerate.state import AcceleratorState

    from sdseg_cli.core.engine import run_keeping, training
    from sdseg_cli.core.engine.training_records import StepRecord, Validated
    from sdseg_cli.core.run_directory import RunDirectory

    # The curves take twice as long as all the rest; tests of the command draw them.
    monkeypatch.setattr(run_keeping, "training_curves", lambda metrics, path: None)

    def run_training(recipe: Any, root: Path, *, resume: bool = False) -> SimpleNamespace:
        AcceleratorState._reset_state(reset_partial_state=True)  # one precision per process otherwise
        prepared = training.Training(recipe, device="cpu")
        run = RunDirectory.open(root) if resume else RunDirectory.create(root, recipe)
        records = list(prepared.run(run, resume=resume))
        return SimpleNamespace(
            run=run,
            records=records,
            losses=[record.loss for record in records if isinstance(record, StepRecord)],
            validated=[record for record in records if isinstance(record, Validated)],
            finished=records[-1],
        )

    return run_training


@pytest.fixture(scope="session")
def state_of() -> Callable[..., dict[str, Any]]:
    """Everything a run arrived at, times excepted; see ``real_runs.py``."""
    return REAL_RUNS["state_of"]


@pytest.fixture(scope="session")
def sdseg_process(tmp_path_factory) -> Callable[..., Any]:
    """Start ``sdseg`` in a process of its own, ``sdseg_process("train", "--recipe", ...)``; likewise."""
    return REAL_RUNS["starter"](tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="session")
def sdseg_group(sdseg_process) -> Callable[..., list[Any]]:
    """Start a command in a group of processes, ``sdseg_group(2, "train", "--recipe", ...)``; likewise."""
    return functools.partial(REAL_RUNS["start_group"], sdseg_process)


# The table of faults ---------------------------------------------------------------------------------


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # a report carries the rows of its test to the process that prints the table
        rows = sorted({row for mark in item.iter_markers("faults") for row in mark.args})
        if rows:
            item.user_properties.append(("rows of docs/faults.md", rows))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """With ``-m faults``, print what became of each row of docs/faults.md."""
    if not (config.option.markexpr or "").startswith("faults"):
        return
    outcomes: dict[int, Counter[str]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            for row in dict(report.user_properties).get("rows of docs/faults.md", []):
                outcomes.setdefault(row, Counter())[outcome] += 1
    terminalreporter.section("faults, by the rows of docs/faults.md")
    for row, counts in sorted(outcomes.items()):
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        terminalreporter.write_line(f"{row:3}  {told}")
