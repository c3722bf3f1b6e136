"""``sdseg ablate``: variants of one recipe, trained one after the other and compared on validation."""

from __future__ import annotations

import math
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdseg_cli import console
from sdseg_cli.commands._comparing import (
    Settings,
    Source,
    Written,
    compare_and_write,
    has_failures,
    refuse_several_processes,
    several_draws,
    show_comparison,
)
from sdseg_cli.commands._measured import dataset_evidence, file_name
from sdseg_cli.commands._options import (
    Device,
    DeviceOption,
    JsonOption,
    OverwriteOption,
    SetOption,
    complete_recipe,
)
from sdseg_cli.core.errors import Interrupted, SdsegError, UsageError
from sdseg_cli.core.files import SUMMARY_FILE, refuse_existing
from sdseg_cli.core.run_directory import RunDirectory, to_json

if TYPE_CHECKING:
    from sdseg_cli.core.recipe import Recipe

RUNS, VALIDATION, TEST = "runs", "validation", "test"


def ablate(
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            "-r",
            metavar="NAME|FILE",
            help="What is varied: a shipped recipe by name, or a YAML file.",
            autocompletion=complete_recipe,
        ),
    ],
    variants: Annotated[
        str | None,
        typer.Option(
            "--variants",
            metavar="NAME|FILE",
            help="YAML: the name of each variant with its list of KEY=VALUE; 'paper' is the paper's.",
            show_default=False,
        ),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            metavar="NAME: KEY=VALUE ...",
            help="One variant, on the command line. Repeatable.",
            show_default=False,
        ),
    ] = None,
    settings: SetOption = None,
    seeds: Annotated[
        str, typer.Option("--seeds", metavar="N,N...", help="Train every variant with each.")
    ] = "0",
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Runs and tables.")] = Path(
        "ablation"
    ),
    final_test: Annotated[
        bool,
        typer.Option(
            "--final-test",
            help="Then score the test split, once: for the first variant and the best of the others.",
        ),
    ] = False,
    draws: Annotated[
        int,
        typer.Option("--draws", min=0, help="Draws of the noise that are compared, 2 or more; 0 for none."),
    ] = 5,
    launch: Annotated[
        str | None,
        typer.Option(
            "--launch",
            metavar="COMMAND",
            help="Starts each training, as in 'accelerate launch --multi_gpu'. Default: one process.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = Device.auto,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train variants of a recipe and compare them: the paper's ablation tables by one command.

    The first variant is the baseline. Each is trained in a process of its own into OUT/runs; those that
    differ in sampling.* alone share one training, whose model is chosen with the sampling of the first of
    them. Variants are compared on the validation split (OUT/validation, as sdseg compare writes it), so that
    the test split chooses nothing. Stopped while it trains, the same command goes on where it was; a finished
    comparison is made again with --overwrite. Finished runs are kept in any case.

    Examples:

    sdseg ablate -r kseg --variants paper --seeds 0,1,2  # the paper's switches

    sdseg ablate -r kseg-fast --variant "as it is:" --variant "frozen: model.freeze_image_encoder=true"

    sdseg ablate -r kseg --variant "one:" --variant "ten: sampling.num_inference_steps=10"

    sdseg ablate -r kseg --variants mine.yaml --set train.steps=5000 --final-test
    """
    refuse_several_processes("ablate")
    table = _variants(variants, variant or [])
    jobs = _jobs(recipe, table, settings or [], _seeds(seeds), out)
    outs = [out / VALIDATION, *([out / TEST] if final_test else [])]
    for folder in outs:
        refuse_existing(folder, overwrite=overwrite, ours=SUMMARY_FILE)
    from sdseg_cli.core.data.prepared import PreparedDataset

    for dataset in dict.fromkeys(job.recipe.data.dataset for job in jobs):
        dataset_evidence(PreparedDataset.open(dataset), VALIDATION)
    command = [sys.executable] if launch is None else _words("--launch", launch)
    failed = _train_all(recipe, jobs, command, device)
    left = [job for job in jobs if job.run not in failed]
    names = list(dict.fromkeys(job.name for job in left))
    if len(names) < 2 or names[0] != jobs[0].name:
        raise SdsegError(
            f"{'; '.join(failed.values())}. Without the baseline and one more there is nothing to compare: "
            "mend them, and the same command trains what is missing."
        )
    compared = Settings(
        VALIDATION,
        outs[0],
        notes=tuple(f"{why}; it is left out." for why in failed.values()),
        draws=several_draws(draws),
        loading={"device": device.value},
        overwrite=overwrite,
        baseline=names[0],
    )
    written = {VALIDATION: compare_and_write(_methods(left, names), compared)}
    show_comparison(written[VALIDATION], compared, tables=not as_json)
    if final_test:
        best = _best(written[VALIDATION], names[1:])
        console.say(f"of the others {best} is best on validation: {names[0]} and {best} are tested")
        tested = replace(compared, split=TEST, out=outs[1], notes=())
        written[TEST] = compare_and_write(_methods(left, [names[0], best]), tested)
        show_comparison(written[TEST], tested, tables=not as_json)
    if as_json:
        console.show_json({split: one.report for split, one in written.items()})
    if failed or any(map(has_failures, written.values())):
        raise typer.Exit(3)


@dataclass(frozen=True)
class _Job:
    """One variant with one seed; ``run`` is shared by variants that are trained alike."""

    name: str
    seed: int
    recipe: Recipe
    run: Path
    settings: tuple[str, ...]  # that its run is trained by


# ---- what is to be done ---------------------------------------------------------------------------------


def _variants(file: str | None, given: Sequence[str]) -> dict[str, list[str]]:
    """The variants of the file and those of the command line, in this order."""
    table: dict[str, list[str]] = {} if file is None else _variants_of(file)
    for text in given:
        name, colon, options = text.partition(":")
        name = " ".join(name.split())  # it heads a line of a table
        if not colon or not name:
            raise UsageError(
                f"--variant {text!r}: expected 'NAME: KEY=VALUE KEY=VALUE', or 'NAME:' for no change."
            )
        if name in table:
            raise UsageError(f"--variant {name}: there are two variants of this name.")
        table[name] = _words("--variant", options)
    if len(table) < 2:
        raise UsageError(
            "ablate: expected two variants or more, from --variants FILE or --variant 'NAME: KEY=VALUE'."
        )
    return table


def _variants_of(name_or_file: str) -> dict[str, list[str]]:
    from sdseg_cli.core.recipe import shipped_ablations
    from sdseg_cli.core.strict_yaml import parse_yaml

    shipped = shipped_ablations()
    file = shipped.get(name_or_file, Path(name_or_file))
    try:
        document = parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--variants {name_or_file}: cannot be read ({error}). Give a YAML file, or one that sdseg "
            f"ships: {', '.join(shipped)}."
        ) from error
    mistakes = [f"{file}:{mistake.line or 1}: {mistake.text}" for mistake in document.mistakes]
    content = document.values if isinstance(document.values, dict) else {}
    if not content and not mistakes:
        mistakes = [f"{file}: found {type(document.values).__name__}, expected names with lists of KEY=VALUE"]
    table = {}
    for name, given in content.items():
        table[str(name)] = options = [] if given is None else given
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
            line = document.lines.get((str(name),), 1)
            mistakes.append(f"{file}:{line}: {name}: expected a list of KEY=VALUE, as in [train.steps=500]")
    if mistakes:
        raise UsageError("; ".join(mistakes) + ".")
    return table


def _words(option: str, text: str) -> list[str]:
    """Split as a shell does. Raises UsageError for nothing, or where a quotation does not end."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{option} {text!r}: {error}. Close the quotation mark.") from error
    if not words and option == "--launch":
        raise UsageError("--launch: expected a command, as in 'accelerate launch --multi_gpu'.")
    return words


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    seeds = [int(part) for part in parts if re.fullmatch(r"[0-9]{1,9}", part)]
    if len(seeds) < len(parts) or len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {text!r}: expected different whole numbers by commas, as in 0,1,2.")
    return seeds


def _jobs(
    recipe: str, table: dict[str, list[str]], shared: Sequence[str], seeds: Sequence[int], out: Path
) -> list[_Job]:
    """Every variant with every seed, checked: a mistake in the last is told before the first is trained."""
    from sdseg_cli.core.recipe import load_recipe

    for name, options in {"--set": shared, **table}.items():
        keys = [option.partition("=")[0].strip() for option in options]
        if "train.seed" in keys:
            raise UsageError(f"{name}: train.seed is said by --seeds. Leave it out.")
        if name != "--set" and any(key.startswith("evaluate.") for key in keys):
            raise UsageError(f"{name}: all variants are scored alike. Give evaluate.* by --set.")
    jobs: list[_Job] = []
    trained: dict[str, _Job] = {}
    for name, options in table.items():
        for seed in seeds:
            chosen = (*shared, *options, f"train.seed={seed}")
            run = out / RUNS / f"{file_name(name)}-seed{seed}"
            job = _Job(name, seed, load_recipe(recipe, chosen), run, chosen)
            # Who differs from another in its sampling alone is not trained again.
            first = trained.setdefault(to_json({**job.recipe.values(), "sampling": None}), job)
            jobs.append(replace(job, run=first.run, settings=first.settings))
    return jobs


def _methods(jobs: Sequence[_Job], names: Sequence[str]) -> dict[str, list[Source]]:
    sampling = {job.name: job.recipe.sampling.model_dump() for job in jobs}
    return {
        name: [Source(str(job.run), sampling[name]) for job in jobs if job.name == name] for name in names
    }


def _best(written: Written, names: Sequence[str]) -> str:
    comparison = written.comparison
    means = {name: comparison.find(name, comparison.overall, "dice").summary.mean for name in names}
    return max(names, key=lambda name: -math.inf if math.isnan(means[name]) else means[name])


# ---- doing it -------------------------------------------------------------------------------------------


def _train_all(recipe: str, jobs: Sequence[_Job], command: list[str], device: Device) -> dict[Path, str]:
    """Train what is not trained yet. Returns run -> why it failed; the others are finished."""
    failed: dict[Path, str] = {}
    first = {job.run: job for job in reversed(jobs)}  # of those that share a run
    order = list(dict.fromkeys(job.run for job in jobs))
    for number, run in enumerate(order, start=1):
        job = first[run]
        arguments = _arguments(recipe, job)
        where = f"training {number} of {len(order)}: {job.name}, seed {job.seed}"
        if arguments is None:
            console.say(f"{where}: {run} is finished already")
            continue
        console.say(where)
        code = _run([*command, "-m", "sdseg_cli", "train", *arguments, "--device", device.value])
        if code in (129, 130, 143):
            raise Interrupted("stopped; the same command goes on where this one was.", code - 128)
        if code != 0:
            failed[run] = (
                f"{job.name}, seed {job.seed}: its training failed (exit code {code}); it is left out."
            )
    return failed


def _arguments(recipe: str, job: _Job) -> list[str] | None:
    """What ``sdseg train`` is asked: to begin, or to go on; None where the run is finished.

    Raises:
        UsageError: the folder holds a run of other settings.
    """
    begin = ["--recipe", recipe, "--out", str(job.run)]
    begin += [part for setting in job.settings for part in ("--set", setting)]
    directory = RunDirectory(job.run)
    if not directory.run_file.is_file():
        return begin
    if not directory.recipe_file.is_file():  # killed in its first moment
        return [*begin, "--overwrite"]
    made, wanted = directory.read_recipe().values(), job.recipe.values()
    if {**made, "sampling": None} != {**wanted, "sampling": None}:
        raise UsageError(
            f"{job.run} was trained by other settings than variant {job.name} has now. Remove that folder to "
            "train it again, or choose another --out."
        )
    if directory.status == "finished" and directory.has_model:
        return None
    if directory.latest_checkpoint() is None:
        return [*begin, "--overwrite"]
    return ["--resume", str(job.run)]


def _run(command: list[str]) -> int:
    """Run a training on this terminal. Being stopped, stop it first, and wait until it has saved."""
    # In a group of its own it is told once, by us, whether Ctrl-C or a SIGTERM to this process came.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)  # noqa: S603  (our own)
    try:
        return process.wait()
    except (KeyboardInterrupt, Interrupted) as stop:
        console.say("stopping the training; the same command goes on where this one was")
        # A launcher would not pass it on. Of a terminal that is gone the training must know itself.
        number = getattr(stop, "signal_number", signal.SIGINT)
        os.killpg(process.pid, signal.SIGINT if number == signal.SIGTERM else number)
        try:
            process.wait()
        except (KeyboardInterrupt, Interrupted):  # a second Ctrl-C is meant
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise
