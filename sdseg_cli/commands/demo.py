"""``sdseg demo``: the five verbs one after the other on made-up data, ending with a page to look at."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from filelock import FileLock, Timeout

from sdseg_cli import __version__, console
from sdseg_cli.commands._options import Device, DeviceOption, SetOption
from sdseg_cli.commands._signals import interruptible
from sdseg_cli.core.errors import DataError, SdsegError, UsageError
from sdseg_cli.core.run_directory import RunDirectory, atomic_write, to_json

if TYPE_CHECKING:
    from sdseg_cli.core.engine.demonstration import DemoFolder
    from sdseg_cli.core.reporting.page import Step

RECIPE = "demo"
FRACTIONS = "0.8,0.1,0.1"

EXAMPLES = """
sdseg demo                                    # minutes on two CPU cores, then open demo/index.html
sdseg demo --out /tmp/first --overwrite
sdseg demo --set train.steps=100 --cases 60   # a quick look; its scores say little
"""


@dataclass(frozen=True)
class DemoSettings:
    """What a demonstration is made with. One that goes on must be given the same."""

    cases: int
    size: int
    samples: int
    runs: int
    seed: int
    overrides: tuple[str, ...]
    device: str


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for everything.")] = Path(
        "demo"
    ),
    cases: Annotated[int, typer.Option(min=10, max=100_000, help="Pictures to draw.")] = 300,
    samples: Annotated[
        int, typer.Option(min=1, max=100, help="Noise draws of the masks shown, for their uncertainty.")
    ] = 5,
    runs: Annotated[int, typer.Option(min=2, max=100, help="Runs of the stability report.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of the pictures, the training and the noise.")] = 0,
    settings: SetOption = None,
    device: DeviceOption = Device.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demonstration.")] = False,
) -> None:
    """Make data, train, predict, evaluate and measure stability; end with one page that shows it all.

    An interrupted demonstration goes on where it stopped when it is called again. Nothing is downloaded.
    """
    if console.is_launched():
        raise UsageError("sdseg demo runs in one process. Start it without accelerate or torchrun.")
    from sdseg_cli.core.recipe import load_recipe

    recipe = load_recipe(RECIPE, settings or [])
    chosen = DemoSettings(
        cases, recipe.data.image_size, samples, runs, seed, tuple(settings or ()), device.value
    )
    console.say(f"demonstration in {out}: prepare, train, predict, evaluate, stability")
    from sdseg_cli.core.engine.demonstration import DemoFolder, demonstration_page
    from sdseg_cli.core.reporting.page import format_duration, render_page

    folder = DemoFolder(out)
    again = shlex.join(["sdseg", "demo", "--out", str(out)])
    with (
        interruptible(f"stopped. What is done is kept; go on with the same command ({again} ...)."),
        _claimed(folder, chosen, overwrite=overwrite) as state,
    ):
        stages = _stages(folder, chosen)
        for number, stage in enumerate(stages, start=1):
            if stage.name in state.done:
                console.say(f"{number}/{len(stages)} {stage.name}: done already")
                continue
            console.say(f"\n{number}/{len(stages)} {stage.command}")
            with state.timed(stage.name):
                stage.run()
        with console.working("writing the page"):
            page = demonstration_page(folder, _steps(stages, state, folder))
            atomic_write(folder.page, render_page(page))
    total = format_duration(sum(state.seconds.values()))
    score, threshold = page.figures[:2]
    console.done(
        f"{score.label} {score.value} ({score.detail}), {threshold.label} {threshold.value}, {total}.\n"
        f"Open {folder.page.resolve().as_uri()}"
    )


@dataclass(frozen=True)
class _Stage:
    """One verb: its name, the command line that does the same, and what runs it."""

    name: str
    command: str
    run: Callable[[], None]


def _stages(folder: DemoFolder, chosen: DemoSettings) -> list[_Stage]:
    data, run, scans, masks = (str(path) for path in (folder.data, folder.run, folder.scans, folder.masks))
    overrides = [*chosen.overrides, f"data.dataset={data}"]
    overrides += [f"train.seed={chosen.seed}"] if chosen.seed else []
    sets = [word for override in overrides for word in ("--set", override)]
    seed = ["--seed", str(chosen.seed)] if chosen.seed else []
    device = ["--device", chosen.device] if chosen.device != "auto" else []
    lines = {
        "prepare": [
            *("phantom", "--cases", str(chosen.cases), "--size", str(chosen.size)),
            *("--fractions", FRACTIONS, *seed, "--out", data),
        ],
        "train": ["--recipe", RECIPE, *sets, *device, "--out", run],
        "predict": [
            *(scans, "--out", masks, "--model", run, "--samples", str(chosen.samples)),
            *("--overlay", *seed, *device),
        ],
        "evaluate": ["--model", run, "--split", "test", *seed, *device],
        "stability": ["--model", run, "--split", "test", "--runs", str(chosen.runs), *seed, *device],
    }
    actions: dict[str, Callable[[], None]] = {
        "prepare": lambda: _prepare(folder, chosen),
        "train": lambda: _train(folder, chosen, overrides),
        "predict": lambda: _predict(folder, chosen),
        "evaluate": lambda: _evaluate(folder, chosen),
        "stability": lambda: _stability(folder, chosen),
    }
    return [_Stage(name, shlex.join(["sdseg", name, *words]), actions[name]) for name, words in lines.items()]


def _prepare(folder: DemoFolder, chosen: DemoSettings) -> None:
    from sdseg_cli.commands import prepare
    from sdseg_cli.core.engine.demonstration import KIND, write_scans

    prepare.phantom(
        kind=KIND,
        cases=chosen.cases,
        size=chosen.size,
        seed=chosen.seed,
        fractions=FRACTIONS,
        out=folder.data,
        overwrite=True,
    )
    count = write_scans(folder, cases=chosen.cases, seed=chosen.seed, size=chosen.size)
    console.say(f"{folder.scans}: the {count} test images as files, for sdseg predict")


def _train(folder: DemoFolder, chosen: DemoSettings, overrides: list[str]) -> None:
    from sdseg_cli.commands.train import train

    run = RunDirectory(folder.run)
    if run.run_file.is_file() and run.status == "finished":
        return
    device = Device(chosen.device)
    if run.run_file.is_file() and run.latest_checkpoint() is not None:
        train(resume=folder.run, device=device)
    else:
        train(recipe=RECIPE, settings=overrides, out=folder.run, device=device, overwrite=True)


def _predict(folder: DemoFolder, chosen: DemoSettings) -> None:
    from sdseg_cli.commands.predict import predict

    predict(
        scans=[folder.scans],
        out=folder.masks,
        model=str(folder.run),
        samples=chosen.samples,
        seed=chosen.seed,
        overlay=True,
        device=Device(chosen.device),
        overwrite=True,
    )


def _evaluate(folder: DemoFolder, chosen: DemoSettings) -> None:
    from sdseg_cli.commands.evaluate import evaluate

    evaluate(model=str(folder.run), seed=chosen.seed, device=Device(chosen.device), overwrite=True)


def _stability(folder: DemoFolder, chosen: DemoSettings) -> None:
    from sdseg_cli.commands.stability import stability

    stability(
        model=str(folder.run),
        runs=chosen.runs,
        seed=chosen.seed,
        device=Device(chosen.device),
        overwrite=True,
    )


def _steps(stages: Sequence[_Stage], state: _State, folder: DemoFolder) -> list[Step]:
    from sdseg_cli.core.reporting.page import Step

    record = RunDirectory.open(folder.run).read_run_json()
    reason = record.get("reason", "steps")
    ending = "" if reason == "steps" else f", ended by {reason}"
    notes = {
        "prepare": f"The test images are also written to {folder.scans} as files, for predict.",
        "train": f"{record.get('steps', 0):,} optimizer steps{ending}.",
    }
    return [
        Step(stage.name, stage.command, state.seconds[stage.name], notes.get(stage.name, ""))
        for stage in stages
    ]


# ---- what is done already -------------------------------------------------------------------------------


class _State:
    """``demo.json``: the settings, the finished stages and the seconds each took, over all attempts."""

    def __init__(self, folder: DemoFolder, content: dict[str, Any]) -> None:
        self._file = folder.state
        self._content = content
        self.done: list[str] = content.setdefault("done", [])
        self.seconds: dict[str, float] = content.setdefault("seconds", {})

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            try:
                yield
            except typer.Exit as end:
                if end.exit_code:
                    raise DataError(f"{name} did not do all of its work; see the messages above.") from end
            self.done.append(name)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
            self.write()

    def write(self) -> None:
        atomic_write(self._file, to_json(self._content, indent=2) + "\n")


@contextmanager
def _claimed(folder: DemoFolder, chosen: DemoSettings, *, overwrite: bool) -> Iterator[_State]:
    """Hold the folder for this process, new, emptied or with what an earlier attempt left.

    Raises:
        UsageError: it holds something else, a finished demonstration, one with other settings, or is in use.
    """
    _refuse_foreign(folder)
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.root / ".lock", timeout=0)
        lock.acquire()
    except Timeout as error:
        raise UsageError(f"{folder.root} is in use by another sdseg demo. Choose another --out.") from error
    except OSError as error:
        raise UsageError(
            f"{folder.root} cannot be written to ({error.strerror or error}). Choose another --out."
        ) from error
    try:
        if overwrite:
            _clear(folder)
        state = _open_state(folder, chosen)
        state.write()
        yield state
    finally:
        lock.release()


def _refuse_foreign(folder: DemoFolder) -> None:
    root = folder.root
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file, expected a folder. Choose another --out.")
    if root.is_dir() and not folder.state.is_file():
        others = [entry.name for entry in root.iterdir() if entry.name != ".lock"]
        if others:
            raise UsageError(
                f"{root} holds files that are not a demonstration's ({sorted(others)[0]}); they are left "
                "alone. Choose another --out."
            )


def _clear(folder: DemoFolder) -> None:
    """Remove what a demonstration writes, and nothing else; the mark goes last."""
    for path in (folder.page, folder.data, folder.scans, folder.run, folder.masks, folder.state):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _open_state(folder: DemoFolder, chosen: DemoSettings) -> _State:
    settings = json.loads(to_json(vars(chosen)))
    if not folder.state.is_file():
        return _State(folder, {"sdseg": __version__, "settings": settings})
    try:
        content = json.loads(folder.state.read_text(encoding="utf-8"))
        before, finished = content["settings"], folder.page.is_file()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SdsegError(f"{folder.state} is damaged ({error}). Start afresh with --overwrite.") from error
    if finished:
        raise UsageError(
            f"{folder.root} holds a finished demonstration: open {folder.page}, make it anew with "
            "--overwrite, or choose another --out."
        )
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if changed:
        listed = ", ".join(f"{name} {before.get(name)} (now {settings[name]})" for name in changed)
        raise UsageError(
            f"{folder.root} holds an unfinished demonstration with {listed}. Repeat its settings to go on, "
            "or start afresh with --overwrite."
        )
    return _State(folder, content)
