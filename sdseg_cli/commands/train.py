"""``sdseg train``: a recipe in, a run directory with a model out."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdseg_cli import console
from sdseg_cli.commands._options import (
    Device,
    DeviceOption,
    JsonOption,
    OverwriteOption,
    SetOption,
    complete_recipe,
    complete_run,
)

if TYPE_CHECKING:
    from sdseg_cli.core.engine.training import Training
    from sdseg_cli.core.engine.training_records import Finished, Record
    from sdseg_cli.core.recipe import Recipe
    from sdseg_cli.core.run_directory import RunDirectory

# Pixels of all steps: the recipe demo has a tenth of it and takes minutes on two CPU cores; kseg-fast has
# eight times as many.
_MANY_PIXELS = 1_000_000_000
_CHANGEABLE_ON_RESUME = {
    "train.steps",
    "train.max_minutes",
    "train.patience",
    "train.keep_checkpoints",
    "train.checkpoint_every",
    "train.gradient_accumulation",
    "train.gradient_checkpointing",
    "train.compile",
    "data.workers",
    "data.cache",
    "data.dataset",
}


def train(
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="NAME|FILE",
            help="A shipped recipe by name, or a YAML file.",
            show_default=False,
            autocompletion=complete_recipe,
        ),
    ] = None,
    settings: SetOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="Run directory. Default: runs/RECIPE-TIME.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="RUN",
            help="Continue an interrupted run from its newest checkpoint.",
            show_default=False,
            autocompletion=complete_run,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything and show what would be trained: recipe, weights, data, memory, and the "
            "Dice that the autoencoder allows at most.",
        ),
    ] = False,
    device: DeviceOption = Device.auto,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model by a recipe.

    Makes a run directory with the resolved recipe, metrics.jsonl, checkpoints, validation pictures, curves
    and the model of the best validation Dice. Ctrl-C saves and stops; --resume goes on as if nothing had
    happened.

    Examples::

        sdseg train --recipe kseg-fast
        sdseg train -r kseg-fast --dry-run                       # look before you train
        sdseg train -r kseg-fast --set train.steps=500 --set train.batch_size=8
        sdseg train --resume runs/kseg-fast-20260131-120000
        accelerate launch --multi_gpu -m sdseg_cli train -r kseg # every GPU of this machine
    """
    from sdseg_cli.core.errors import UsageError
    from sdseg_cli.core.files import refuse_unwritable
    from sdseg_cli.core.recipe import load_recipe
    from sdseg_cli.core.run_directory import RUNS_ROOT, RunDirectory, refuse_taken

    if (recipe is None) == (resume is None):
        raise UsageError("give either --recipe (a new run) or --resume RUN (an interrupted one).")
    if resume is not None:
        run = RunDirectory.open(resume)
        chosen = _resumed_recipe(run, settings or [])
    else:
        chosen = load_recipe(str(recipe), settings or [])
    if dry_run:
        _dry_run(chosen, device, as_json)
        return
    _check_dataset(chosen)
    if resume is None:
        if console.is_main_process():
            if out is None:
                refuse_unwritable(RUNS_ROOT / chosen.name, RUNS_ROOT)
            else:
                refuse_taken(out, overwrite=overwrite)
        training = _prepared(chosen, device)
        run = _create_run(out, chosen, overwrite)
    with run.lock() if console.is_main_process() else nullcontext():
        if resume is not None:
            training = _prepared(chosen, device)
            if console.is_main_process():
                run.write_recipe(chosen)
        console.say(f"run {run.root} (recipe {chosen.name}); Ctrl-C saves and stops")
        finished = _show(training.run(run, resume=resume is not None), chosen)
    if as_json:
        console.show_json(
            {
                "run": str(run.root),
                "model": str(finished.model),
                "steps": finished.step,
                "ended_by": finished.reason,
                "best_validation_dice": finished.best_dice,
                "best_step": finished.best_step,
                "seconds": finished.seconds,
            }
        )
    console.done(
        f"{finished.model}: validation Dice {finished.best_dice:.4f} at step {finished.best_step:,} "
        f"({finished.step:,} steps, {finished.seconds / 60:.1f} min, ended by {finished.reason}).\n"
        f"Next: sdseg evaluate --model {run.root} --split test"
    )


def _resumed_recipe(run: RunDirectory, settings: list[str]) -> Recipe:
    from sdseg_cli.core.errors import UsageError
    from sdseg_cli.core.recipe import load_recipe

    refused = [
        key for setting in settings if (key := setting.partition("=")[0].strip()) not in _CHANGEABLE_ON_RESUME
    ]
    if refused:
        raise UsageError(
            f"--set {', '.join(refused)} cannot be changed when a run is resumed, or it would no longer be "
            f"that run. Can be changed: {', '.join(sorted(_CHANGEABLE_ON_RESUME))}. For other changes start "
            f"a new run with --recipe {run.recipe_file}."
        )
    if run.status == "finished" and not settings:
        raise UsageError(
            f"run {run.root} is finished; there is nothing to resume. "
            "Train it longer with --set train.steps=N, or start a new run."
        )
    return load_recipe(run.recipe_file, settings)


def _check_dataset(recipe: Recipe) -> None:
    """Find out before a run directory is made, and before torch is imported."""
    from sdseg_cli.core.data.prepared import PreparedDataset

    PreparedDataset.open(recipe.data.dataset)


def _prepared(recipe: Recipe, device: str) -> Training:
    """Build the networks; what cannot be had is refused here, before a run directory is made or changed."""
    with console.working("loading the networks"):
        from sdseg_cli.core.engine.training import Training

        return Training(recipe, device=device)


def _create_run(out: Path | None, recipe: Recipe, overwrite: bool) -> RunDirectory:
    """Make the run directory once: with several processes the main one makes it and tells the others."""
    from sdseg_cli.core.run_directory import RunDirectory

    if not console.is_launched():
        return RunDirectory.create(out, recipe, overwrite=overwrite)
    from accelerate.utils import broadcast_object_list

    from sdseg_cli.core.engine.processes import Processes

    Processes()
    told: list[str | None] = [None]
    if console.is_main_process():
        told = [str(RunDirectory.create(out, recipe, overwrite=overwrite).root)]
    return RunDirectory(Path(str(broadcast_object_list(told)[0])))


def slow_on_cpu(recipe: Recipe, device: str, steps: int) -> str | None:
    """Warn of a recipe for a GPU that is about to run on a CPU for a day; None where it is not."""
    pixels = steps * recipe.train.batch_size * recipe.data.image_size**2
    if device != "cpu" or pixels < _MANY_PIXELS:
        return None
    return (
        f"{steps:,} steps of {recipe.train.batch_size} images of {recipe.data.image_size} pixels take many "
        "hours without a GPU. On a CPU prepare the data with --size 128 and train with --recipe demo, which "
        "takes minutes, or shorten this with --set train.steps=N."
    )


def _show(records: object, recipe: Recipe) -> Finished:
    from collections.abc import Iterator
    from typing import cast

    from sdseg_cli.core.engine.training_records import (
        Checkpointed,
        Finished,
        Started,
        StepRecord,
        Validated,
    )

    stream = cast("Iterator[Record]", records)
    with console.working("preparing the data"):
        started = next(stream)
    if not isinstance(started, Started):
        raise TypeError(f"the first record is {type(started).__name__}, expected Started")
    console.say(
        f"{started.device}, {started.precision}, {started.processes} "
        f"process{'es' if started.processes > 1 else ''}; "
        f"steps {started.first_step + 1:,} to {started.steps:,} of {recipe.train.batch_size} images; "
        f"latent scale {started.latent_scale:.4f}"
    )
    if started.remark:
        console.warn(started.remark)
    if (warning := slow_on_cpu(recipe, started.device, started.steps - started.first_step)) is not None:
        console.warn(warning)
    finished: Finished | None = None
    ends_in = started.seconds_left
    with console.training_progress(started.steps, start=started.first_step, seconds=ends_in) as bar:
        for record in stream:
            if isinstance(record, StepRecord):
                bar.update(
                    record.step,
                    loss=record.loss,
                    samples_per_second=record.samples_per_second,
                    memory_gib=record.memory_gib,
                )
            elif isinstance(record, Validated):
                mark = " (best so far)" if record.is_best else ""
                bar.update(record.step, dice=record.dice)
                bar.say(f"step {record.step:,}: validation Dice {record.dice:.4f}{mark}  {record.picture}")
            elif isinstance(record, Checkpointed):
                bar.update(record.step)
            elif isinstance(record, Finished):
                finished = record
    if finished is None:
        raise RuntimeError("the training ended without saying so")
    return finished


def _dry_run(recipe: Recipe, device: str, as_json: bool) -> None:
    from sdseg_cli.core.recipe import recipe_to_yaml

    with console.working("building the networks"):
        from sdseg_cli.core.engine.dry_run import examine

        report = examine(recipe, device=device)
    if as_json:
        console.show_json({"recipe": recipe.values(), **report.values()})
        return
    console.show_text(recipe_to_yaml(recipe))
    console.show_facts(report.facts(), title="What would be trained")
    console.done("nothing was trained (--dry-run)")
