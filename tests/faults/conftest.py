"""``sdseg`` as a user meets it when something is wrong: exit code, message, and what lies on the disk."""

from __future__ import annotations

import csv
import itertools
import multiprocessing
import runpy
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdseg_cli import cli


@dataclass(frozen=True)
class Ended:
    """How a call of the program ended; ``err`` on one line, so that messages can be looked for."""

    code: int
    out: str
    err: str

    def says(self, *parts: str) -> bool:
        """Whether all parts were told, and no traceback; a part that is missing is shown."""
        assert "Traceback" not in self.err, self.err
        for part in parts:
            assert part in self.err, f"{part!r} is not in: {self.err}"
        return True


@pytest.fixture
def sdseg(capsys) -> Iterator[Callable[..., Ended]]:
    """Run ``sdseg`` in this process."""
    from accelerate.state import AcceleratorState

    def run(*arguments: object) -> Ended:
        AcceleratorState._reset_state(reset_partial_state=True)  # one device per process otherwise
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main([*map(str, arguments)])
        printed = capsys.readouterr()
        return Ended(int(end.value.code or 0), printed.out, " ".join(printed.err.split()))

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


class BrightIsForeground:
    """A predictor that is a rule: what is brighter than the middle is foreground."""

    image_size, resize, classes, num_classes = 32, "squeeze", ("background", "polyp"), 2
    looks = ()  # as a model that does not know what it was trained on

    def __init__(self) -> None:
        self.on_case: Callable[[str], None] = lambda case_id: None

    def warnings(self, looks: object) -> list[str]:
        return []

    def __call__(self, inputs: Iterable[Any]) -> Iterator[SimpleNamespace]:
        for one in inputs:
            self.on_case(one.case_id)
            level = one.grid.probabilities_to_case(one.image.mean(axis=-1).astype(np.float32) / 255)
            yield SimpleNamespace(
                case_id=one.case_id,
                slice_index=one.slice_index,
                label_map=(level > 0.5).astype(np.uint8),
                probabilities=np.stack([1 - level, level]),
                uncertainty=np.zeros_like(level),
                samples=None,
                overlaps=None,
            )


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder that ``--model`` takes."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.fixture
def predictor(monkeypatch) -> BrightIsForeground:
    """What every model of this test is."""
    bright = BrightIsForeground()
    monkeypatch.setattr("sdseg_cli.core.engine.inference.load_predictor", lambda *_, **__: bright)
    return bright


@pytest.fixture
def predict(sdseg, model, predictor, tmp_path) -> Callable[..., Ended]:
    """``sdseg predict scans --out masks`` with the rule, on ``tmp_path / "scans"``."""
    (tmp_path / "scans").mkdir()
    return lambda *options: sdseg(
        *("predict", tmp_path / "scans", "--out", tmp_path / "masks", "--model", model, "--device", "cpu"),
        *options,
    )


@pytest.fixture
def scans(predict, tmp_path) -> Path:
    return tmp_path / "scans"


@pytest.fixture
def masks(tmp_path) -> Path:
    return tmp_path / "masks"


@pytest.fixture
def outcomes(masks) -> Callable[[], dict[str, tuple[str, str]]]:
    """Status and error of each file, as summary.csv has them."""

    def read() -> dict[str, tuple[str, str]]:
        with (masks / "summary.csv").open(encoding="utf-8", newline="") as stream:
            return {row["file"]: (row["status"], row["error"]) for row in csv.DictReader(stream)}

    return read


@pytest.fixture
def written(masks) -> Callable[[], set[str]]:
    """The masks in the output folder: its files beside the summary, the settings and the provenance."""

    def names() -> set[str]:
        found = {path.relative_to(masks).as_posix() for path in masks.rglob("*") if path.is_file()}
        return {name for name in found if not name.startswith("provenance/")} - {
            "summary.csv",
            "prediction.json",
        }

    return names


@pytest.fixture(scope="session")
def tiny_model(tiny_recipe, polyps, tmp_path_factory) -> Path:
    """A real model, of untrained networks, in a finished run."""
    from sdseg_cli.core.data.prepared import PreparedDataset
    from sdseg_cli.core.engine.networks import build_networks
    from sdseg_cli.core.run_directory import RunDirectory

    recipe = tiny_recipe()
    run = RunDirectory.create(tmp_path_factory.mktemp("runs") / "tiny", recipe)
    manifest = PreparedDataset.open(polyps).manifest
    build_networks(recipe, 2).pipeline(manifest, recipe, 1.0).save_pretrained(run.model)
    run.finish("finished")
    return run.root


@pytest.fixture(scope="session")
def hardship(tmp_path_factory) -> Callable[..., Any]:
    """Start ``sdseg`` in a process of its own under a hardship of ``process.py``.

    ``hardship("train", ..., stuck_step=(3, sign))`` gives a ``multiprocessing`` process with ``log``, what it
    printed. A server that has imported everything forks them, so that a start takes a fraction of a second.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["sdseg_cli.commands.train", "sdseg_cli.commands.predict", "sdseg_cli.core.engine.training"]
    )
    logs = tmp_path_factory.mktemp("hardships")
    numbers = itertools.count()
    script = str(Path(__file__).with_name("process.py"))

    def start(*arguments: object, **hardships: tuple[object, ...]) -> Any:
        log = logs / f"{next(numbers)}.txt"
        given = {"ARGUMENTS": [*map(str, arguments)], "LOG": str(log), "HARDSHIPS": hardships}
        process = context.Process(target=runpy.run_path, args=(script, given, "__main__"))
        process.start()
        process.log = lambda: " ".join(log.read_text().split()) if log.exists() else ""  # type: ignore[attr-defined]
        return process

    return start


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., None]:
    """Wait until a condition holds, while a process lives."""

    def wait(condition: Callable[[], object], process: Any, seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert process.is_alive(), process.log()
            assert time.monotonic() < end, process.log()
            time.sleep(0.01)

    return wait
