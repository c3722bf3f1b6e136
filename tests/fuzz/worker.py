"""A process that feeds inputs to a parser and may die of it; the parent starts another.

What it sends: ``("next", number)`` before an input, ``("end", number, outcome)`` after it, ``("done",)``; and
``("broken", traceback)`` where an input cannot even be made, which is this program's own fault.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import resource
import shutil
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.fuzz import parsers

LIMIT_BYTES = 3 * 2**30  # of address space, beyond what the imports took
OURS = "sdseg_cli"
OUTSIDE = (Path("/tmp/escaped"),)


@dataclass(frozen=True)
class Outcome:
    """What became of an input: ``kind`` is accepted, refused or what was found, ``where`` the place."""

    kind: str
    where: str = ""
    detail: str = ""

    @property
    def is_finding(self) -> bool:
        """Whether this must not happen."""
        return self.kind not in ("accepted", "refused")


def run(name: str, seed: int, numbers: range, folder: Path, answers: Connection) -> None:
    """Read the inputs of ``numbers``; the one being read lies in ``folder/input``."""
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(file=2)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    inputs = _inputs(name, seed, numbers)
    while True:
        try:
            number, files = next(inputs)
            _lay_out(files, folder)
        except StopIteration:
            break
        except Exception:
            answers.send(("broken", traceback.format_exc()))
            raise
        answers.send(("next", number))
        outcome = judge(name, folder)
        if outcome.is_finding:  # aside: the next input takes its place
            shutil.move(folder / "input", folder.with_name(f"found-{number}"))
        answers.send(("end", number, outcome))
        if number == numbers.start:
            _limit_memory()  # the first input has brought the imports
    answers.send(("done",))


def _inputs(name: str, seed: int, numbers: range) -> Iterator[tuple[int, parsers.Files]]:
    parser = parsers.PARSERS[name]
    if parser.made is None:
        for number in numbers:
            yield number, parser.make(random.Random(f"{name} {seed} {number}"))
        return
    # hypothesis calls back; its examples are kept, small as they are, and read afterwards.
    yield from zip(numbers, _made(parser.made(), f"{seed} {numbers.start}", len(numbers)), strict=False)


def _made(strategy: Any, seed: str, count: int) -> list[parsers.Files]:
    import hypothesis

    found: list[parsers.Files] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def keep(files: parsers.Files) -> None:
        found.append(files)

    keep()
    return found


def _lay_out(files: parsers.Files, folder: Path) -> None:
    parsers.clean(folder)
    for name, content in files.items():
        path = folder / "input" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def judge(name: str, folder: Path) -> Outcome:
    """Read the input in ``folder/input`` and say what came of it."""
    from sdseg_cli.core.errors import SdsegError

    before = _tree(folder / "input")
    try:
        parsers.read_with(name, folder / "input", folder / "out")
        outcome = Outcome("accepted")
    except SdsegError as error:
        outcome = Outcome("refused", type(error).__name__, str(error)[:300])
        if not str(error).strip():
            outcome = Outcome("an error without a word", type(error).__name__)
    except BaseException as error:
        outcome = Outcome(type(error).__name__, _place(error), "".join(traceback.format_exception(error)))
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in ("input", "out"))
    strangers += [str(path) for path in OUTSIDE if path.exists()]
    if strangers:
        return Outcome("written outside", str(strangers))
    if _tree(folder / "input") != before:
        return Outcome("an input was changed", str(_tree(folder / "input") ^ before))
    return outcome


def _tree(folder: Path) -> set[tuple[str, int]]:
    # The lock that a run's status looks at is made beside it.
    return {
        (str(path.relative_to(folder)), path.stat().st_size)
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


def _place(error: BaseException) -> str:
    """The last line of ours that the error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if OURS in frame.filename] or list(frames)
    last = ours[-1]
    return f"{Path(last.filename).name}:{last.name}"


def _limit_memory() -> None:
    with contextlib.suppress(ValueError, OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + LIMIT_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    sys.setrecursionlimit(1000)
