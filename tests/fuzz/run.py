"""Fuzzes everything that reads a file: ``python -m tests.fuzz.run --inputs 10000 --seed 0``.

Inputs are read by a process of their own, which is started anew when it dies or hangs. What may come out is a
result or one of sdseg's own errors; anything else is a finding, kept with its files under ``--keep``.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz import worker
from tests.fuzz.parsers import PARSERS
from tests.fuzz.worker import Outcome

SECONDS = 30.0  # for one input, on a machine that does other things too
START_SECONDS = 180.0  # for the first one, which brings the imports


@dataclass
class Findings:
    """What a parser did with its inputs.

    Attributes:
        counts: kind of outcome -> inputs.
        kept: (kind, where) -> number and detail of the first input that showed it.
        restarts: of the worker.
    """

    counts: Counter[str] = field(default_factory=Counter)
    kept: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)
    restarts: int = 0

    @property
    def findings(self) -> int:
        """Inputs that had an outcome which must not be."""
        return sum(count for kind, count in self.counts.items() if Outcome(kind).is_finding)


def fuzz(
    name: str,
    inputs: int,
    seed: int = 0,
    *,
    keep: Path | None = None,
    seconds: float = SECONDS,
    target: Callable[..., None] = worker.run,
) -> Findings:
    """Read ``inputs`` damaged inputs of one parser.

    Args:
        name: of the parser.
        inputs: how many.
        seed: with the parser's name and the number, decides an input.
        keep: folder for the files of each kind of finding.
        seconds: before a worker counts as hanging.
        target: what runs in the worker.
    """
    found = Findings()
    with tempfile.TemporaryDirectory(prefix="sdseg-fuzz-") as folder:
        place = Path(folder) / "work"
        first = 0
        while first < inputs:
            for number, outcome in _watched(name, seed, range(first, inputs), place, seconds, target):
                found.counts[outcome.kind] += 1
                first = number + 1
                if outcome.is_finding and (outcome.kind, outcome.where) not in found.kept:
                    found.kept[outcome.kind, outcome.where] = number, outcome.detail
                    _keep(place, keep, name, number, outcome)
            found.restarts += first < inputs
    return found


def _watched(
    name: str, seed: int, numbers: range, place: Path, seconds: float, target: Callable[..., None]
) -> Iterator[tuple[int, Outcome]]:
    """Give outcomes until the worker has done all, or has died: its last input's outcome says of what."""
    context = multiprocessing.get_context("spawn")
    answers, theirs = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(name, seed, numbers, place, theirs))
    process.start()
    theirs.close()
    current, patience = numbers.start, START_SECONDS
    try:
        while True:
            if not answers.poll(patience):
                yield current, Outcome("hangs", f"after {patience:g} s")
                return
            message = answers.recv()
            if message[0] == "done":
                return
            if message[0] == "broken":
                raise RuntimeError(message[1])
            current = message[1]
            if message[0] == "next":
                patience = seconds if current > numbers.start else START_SECONDS
            else:
                yield current, message[2]
                current += 1
    except EOFError:
        process.join()
        log = place.with_suffix(".log")
        words = log.read_text(errors="replace")[-3000:] if log.exists() else ""
        yield current, Outcome(f"dies with {process.exitcode}", _stack(words), words)
    finally:
        process.kill()
        process.join()
        answers.close()


def _stack(words: str) -> str:
    """The innermost line of ours in a trace of faulthandler's, which tells crashes apart."""
    lines = [line for line in words.splitlines() if worker.OURS in line]
    return lines[0].strip() if lines else ""


def _keep(place: Path, keep: Path | None, name: str, number: int, outcome: Outcome) -> None:
    if keep is None:
        return
    folder = keep / f"{name.replace(', ', '-')}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    aside = place.with_name(f"found-{number}")
    source = aside if aside.is_dir() else place / "input"
    if source.is_dir():
        shutil.copytree(source, folder / "input")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "outcome.txt").write_text(f"{outcome.kind} {outcome.where}\n\n{outcome.detail}\n")


def shares(inputs: int, names: Sequence[str]) -> dict[str, int]:
    """How many inputs each parser gets of all."""
    whole = sum(PARSERS[name].share for name in names)
    return {name: math.ceil(inputs * PARSERS[name].share / whole) for name in names}


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz and print a table; the exit code is 1 where anything was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=10_000, help="over all parsers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(PARSERS), default=list(PARSERS))
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="folder for what is found")
    parser.add_argument("--json", type=Path, help="also write the counts here")
    options = parser.parse_args(arguments)
    print(_HEAD)
    every: dict[str, Findings] = {}
    for name, inputs in shares(options.inputs, options.only).items():
        started = time.monotonic()
        found = every[name] = fuzz(name, inputs, options.seed, keep=options.keep)
        _tell(name, inputs, found, time.monotonic() - started)
    print(f"{sum(found.counts.total() for found in every.values())} inputs")
    if options.json:
        counts = {name: {**found.counts, "restarts": found.restarts} for name, found in every.items()}
        options.json.write_text(json.dumps(counts, indent=2) + "\n")
    return int(any(found.findings for found in every.values()))


_HEAD = f"{'parser':16} {'inputs':>6} {'accepted':>9} {'refused':>8} {'findings':>9} {'restarts':>9} {'s':>6}"


def _tell(name: str, inputs: int, found: Findings, seconds: float) -> None:
    counts = found.counts
    line = f"{name:16} {inputs:6} {counts['accepted']:9} {counts['refused']:8} {found.findings:9}"
    print(f"{line} {found.restarts:9} {seconds:6.0f}", flush=True)
    for (kind, where), (number, detail) in found.kept.items():
        last = detail.strip().splitlines()[-1] if detail.strip() else ""
        print(f"    {kind} at {where}, first number {number}: {last[:200]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
