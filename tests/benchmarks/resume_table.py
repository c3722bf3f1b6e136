"""Kills real trainings at random moments, resumes them, and compares the result bit for bit.

    python tests/benchmarks/resume_table.py --kills 20 --processes 1 2 --seed 0
    python tests/benchmarks/resume_table.py --kills 4 --terms 1 --changes 0 --processes 1 --device cuda

Every row is a training of its own on phantoms of 32 pixels, on the CPU unless asked: killed with SIGKILL
(every third one while a checkpoint or the model is being written), resumed with ``sdseg train
--resume``, and compared with a training that nobody killed: weights, averages, optimizer and exported
model; metrics and pictures too. Of two processes both are killed, or one, and then the other must end by
itself. Then SIGTERM, and kills after which another number of processes goes on. A GPU may add in another
order each time: there a second training that nobody killed says by how much two are apart anyway. Prints
Markdown; ``main`` gives the rows.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # sums in the same order everywhere
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
REAL_RUNS = runpy.run_path(str(Path(__file__).resolve().parents[1] / "real_runs.py"))
PATIENCE_S = 240
LONGEST_SAVE_S = 0.06  # about what writing one of these tiny checkpoints takes
RECIPE = """
name: tiny
data: {{dataset: {data}, image_size: 32, workers: 0, augmentation: {{affine: 0.0, colour: 0.5}}}}
model:
  image_encoder: kl
  image_encoder_channels: [32, 32, 32, 32]
  image_encoder_blocks: 1
  unet_channels: [32, 32]
  unet_blocks: 1
  unet_heads: 4
  unet_attention_strides: [2]
  unet_dropout: 0.2
train:
  steps: 10
  batch_size: 4
  learning_rate: 1.0e-4
  warmup_steps: 0
  ema_decay: 0.9
  validate_every: 5
  validation_cases: 1
  checkpoint_every: 2
  keep_checkpoints: 2
  log_every: 3
  trackers: []
"""


@dataclass
class Row:
    """One training that was ended and resumed."""

    processes: str
    ended_by: str
    moment_s: float  # since its run directory was there
    where: str
    codes: list[int | None]
    resumed_from: int = -1
    same: dict[str, bool] = field(default_factory=dict)
    deviation: float = 0.0  # largest of a weight
    remark: str = ""

    @property
    def equal(self) -> bool:
        return bool(self.same) and all(self.same.values())


class Experiment:
    def __init__(self, folder: Path, seed: int, device: str = "cpu") -> None:
        from sdseg_cli.commands.prepare import phantom

        self.device = device
        self.folder = folder
        self.random = random.Random(seed)
        self.number = 0
        data = folder / "phantoms"
        phantom(kind="endoscopy", cases=24, size=32, seed=0, fractions="0.6,0.2,0.2", out=data, workers=1)
        self.recipe = folder / "tiny.yaml"
        self.recipe.write_text(RECIPE.format(data=data))
        (folder / "logs").mkdir()
        self.start = REAL_RUNS["starter"](folder / "logs")
        self.whole: dict[int, Any] = {}
        self.seconds: dict[int, float] = {}

    def train(self, processes: int, root: Path) -> list[Any]:
        given = ("train", "--recipe", self.recipe, "--out", root, "--device", self.device)
        return self._begin(processes, root, given)

    def resume(self, processes: int, root: Path) -> list[Any]:
        given = ("train", "--resume", root, "--device", self.device)
        return self._begin(processes, root, given)

    def _begin(self, processes: int, root: Path, given: Sequence[Any]) -> list[Any]:
        group = REAL_RUNS["start_group"](self.start, processes, *given)
        wait_for((root / "run.json").exists, group)
        return group

    def run_uninterrupted(self, processes: int, name: str = "whole") -> Any:
        from sdseg_cli.core.run_directory import RunDirectory

        root = self.folder / f"{name}-{processes}"
        group = self.train(processes, root)
        began = time.monotonic()
        codes = end_of(group)
        assert codes == [0] * processes, group[0].log()
        self.seconds[processes] = time.monotonic() - began
        return RunDirectory.open(root)

    def noise(self, processes: int) -> float:
        """How far apart two trainings are that nobody killed, in the largest difference of a weight."""
        again = self.run_uninterrupted(processes, "again")
        return largest_deviation(again.latest_checkpoint(), self.whole[processes].latest_checkpoint())

    def killed(self, processes: int, *, in_a_save: bool, go_on_with: int = 0) -> Row:
        """Kill a training, then resume it with as many processes, or with ``go_on_with``."""
        from sdseg_cli.core.run_directory import RunDirectory

        victims = self.random.choice([[0, 1], [0], [1]]) if processes == 2 else [0]
        while True:
            root = self._next()
            group = self.train(processes, root)
            began = time.monotonic()
            if in_a_save:
                skipped = self.random.randrange(4)
                if not wait_for_save(root, group, skipped):
                    continue  # it ended first: another moment
                time.sleep(self.random.uniform(0, LONGEST_SAVE_S))
            else:
                time.sleep(self.random.uniform(0, self.seconds[processes]))
            if any(process.exitcode is not None for process in group):
                end_of(group)
                continue
            moment = time.monotonic() - began
            before = where_it_was(root)
            for victim in victims:
                os.kill(group[victim].pid, signal.SIGKILL)
            codes = end_of(group)
            if RunDirectory.open(root).status != "finished":  # it was on its way out: another moment
                break
        who = "SIGKILL" if processes == 1 else f"SIGKILL to {' and '.join(str(v) for v in victims)}"
        # The one that was left removes what was half-written.
        where = before if len(victims) < processes and is_save(before) else where_it_was(root)
        row = Row(str(processes), who, moment, where, codes)
        for index, process in enumerate(group):
            if index not in victims:
                assert "Traceback" not in process.log(), process.log()
        self._compare(row, root, processes, go_on_with or processes)
        return row

    def terminated(self, processes: int) -> Row:
        """Ask every process of a training to end, as a scheduler does, then resume it."""
        root = self._next()
        group = self.train(processes, root)
        began = time.monotonic()
        wait_for(lambda: "steps 1 to" in group[0].log(), group)
        time.sleep(self.random.uniform(0, 0.7 * self.seconds[processes]))
        moment = time.monotonic() - began
        for process in group:
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGTERM)
        codes = end_of(group)
        row = Row(str(processes), "SIGTERM", moment, where_it_was(root), codes)
        if codes != [0] * processes:  # else it had ended before it could hear
            self._compare(row, root, processes, processes)
        return row

    def _compare(self, row: Row, root: Path, processes: int, go_on_with: int) -> None:
        from sdseg_cli.core.run_directory import RunDirectory

        if go_on_with != processes:
            row.processes = f"{processes} -> {go_on_with}"
        run = RunDirectory.open(root)
        assert run.status == "interrupted" or row.codes.count(1), run.status
        again = self.resume(go_on_with, root)
        codes = end_of(again)
        log = again[0].log()
        assert codes == [0] * go_on_with, log
        row.resumed_from = int(re.search(r"steps ([\d,]+) to", log)[1].replace(",", "")) - 1
        remark = re.search(r"warning: (since the checkpoint was saved: .*)", log)
        row.remark = remark[1] if remark else ""
        expected = REAL_RUNS["state_of"](self.whole[processes])
        found = REAL_RUNS["state_of"](run)
        row.same = {name: found[name] == expected[name] for name in expected}
        row.deviation = largest_deviation(run.latest_checkpoint(), self.whole[processes].latest_checkpoint())
        shutil.rmtree(root)

    def _next(self) -> Path:
        self.number += 1
        return self.folder / f"run-{self.number:03d}"


def wait_for(condition: Any, group: Sequence[Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, group[0].log()
        assert any(process.exitcode is None for process in group), group[0].log()
        time.sleep(0.001)


def wait_for_save(root: Path, group: Sequence[Any], skipped: int) -> bool:
    """Wait until the next but ``skipped`` folder is being written; False where the training ended first."""
    seen: set[str] = set()
    while any(process.exitcode is None for process in group):
        for place in (root, root / "checkpoints"):
            seen |= {path.name for path in place.glob(".*.partial") if path.is_dir()}
        if len(seen) > skipped:
            return True
        time.sleep(0.0005)
    return False


def end_of(group: Sequence[Any]) -> list[int | None]:
    """Exit codes once all have ended; one that does not end is a failure."""
    deadline = time.monotonic() + PATIENCE_S
    for process in group:
        process.join(max(0.1, deadline - time.monotonic()))
        assert process.exitcode is not None, f"a process goes on:\n{process.log()}"
    return [process.exitcode for process in group]


def is_save(where: str) -> bool:
    return where.startswith(("saving", "naming", "replacing"))


def where_it_was(root: Path) -> str:
    """What a killed training was doing, from what it left; or what one that goes on is about."""
    try:
        return _where(root)
    except FileNotFoundError:  # it got its name while it was looked at
        return _where(root)


def _where(root: Path) -> str:
    checkpoints = sorted((root / "checkpoints").glob("step-*"))
    for partial in sorted((root / "checkpoints").glob(".*.partial")):
        files = len(list(partial.iterdir()))
        named = partial.name.startswith(".step-")
        return f"saving a checkpoint, {files} files" if named else f"naming a checkpoint, {files} files"
    partials = sorted(root.glob(".*.partial"))
    if partials and partials[0].is_dir():
        return f"saving the model, {len(list(partials[0].rglob('*.*')))} files"
    if partials:
        return "writing a file"
    if list(root.glob("**/.*.old")):
        return "replacing a folder"
    last = int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else 0
    return f"after checkpoint {last}" if last else "before the first checkpoint"


def largest_deviation(first: Path, second: Path) -> float:
    from safetensors.torch import load_file

    one, two = (load_file(folder / "model.safetensors") for folder in (first, second))
    return max(float((one[name].double() - two[name].double()).abs().max()) for name in one)


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    titles = ("processes", "ended by", "after", "it was", "exit codes", "resumed from", "weights", "all else")
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    for row in rows:
        weights = all(row.same.get(name) for name in ("weights", "averages", "optimizer", "model"))
        rest = all(row.same.values())
        said = "equal" if weights else f"differ by {row.deviation:.1e} at most"
        if not row.same:
            said = "(it had ended before it could hear)"
        cells = (
            row.processes,
            row.ended_by,
            f"{row.moment_s:.2f} s",
            row.where,
            ", ".join(map(str, row.codes)),
            f"step {row.resumed_from}" if row.resumed_from > 0 else "the start" if row.same else "-",
            said,
            "-"
            if not row.same
            else "equal"
            if rest
            else ", ".join(name for name, same in row.same.items() if not same),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="for each number of processes")
    parser.add_argument("--terms", type=int, default=3, help="SIGTERMs for each number of processes")
    parser.add_argument("--changes", type=int, default=2, help="kills after which another number goes on")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    given = parser.parse_args(arguments)
    print(f"seed of the moments: {given.seed}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="sdseg-resume-") as folder:
        experiment = Experiment(Path(folder), given.seed, given.device)

        def note(row: Row) -> None:
            rows.append(row)
            print(table([row]).splitlines()[-1], flush=True)

        for processes in given.processes:
            experiment.whole[processes] = experiment.run_uninterrupted(processes)
            print(f"{processes} uninterrupted: {experiment.seconds[processes]:.1f} s", flush=True)
            if given.device != "cpu":
                print(f"two uninterrupted differ by {experiment.noise(processes):.1e} at most", flush=True)
            for index in range(given.kills):
                note(experiment.killed(processes, in_a_save=index % 3 == 2))
            for _ in range(given.terms):
                note(experiment.terminated(processes))
            for _ in range(given.changes):
                note(experiment.killed(processes, in_a_save=False, go_on_with=3 - processes))
    print("\n" + table(rows))
    for remark in sorted({row.remark for row in rows if row.remark}):
        print(f"\nsaid on resume: {remark}")
    return rows


if __name__ == "__main__":
    exact = [row for row in main() if "->" not in row.processes]
    sys.exit(not all(row.equal for row in exact if row.same))
