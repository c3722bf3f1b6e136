"""Options that several commands share, declared once so that they read and check alike."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sdseg_cli.core.errors import UsageError


class Split(StrEnum):
    """Named list of cases of a prepared dataset."""

    train = "train"
    validation = "validation"
    test = "test"


class Device(StrEnum):
    """Where the networks run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Precision(StrEnum):
    """Arithmetic of the networks; ``auto`` is bf16 on a GPU that has it, else fp32.

    With a model that predicts the noise ``auto`` is always fp32.
    """

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Convention(StrEnum):
    """How empty masks are scored."""

    standard = "standard"
    sdseg = "sdseg"


def flip_words(flips: str | None) -> list[str] | None:
    """Read ``--flips``: the words by commas, none of them for ``none``; None where it was not given.

    Raises:
        UsageError: a word is unknown or given twice.
    """
    if flips is None:
        return None
    words = [] if flips.strip() == "none" else [word.strip() for word in flips.split(",")]
    if not {*words} <= {"horizontal", "vertical"} or len({*words}) < len(words):
        raise UsageError(f"--flips {flips!r}: expected horizontal, vertical, horizontal,vertical or none.")
    return words


def parse_window(text: str | None) -> tuple[float, float] | None:
    """Read ``--window``: two numbers by comma, the lower one first.

    Raises:
        UsageError: it reads otherwise.
    """
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UsageError(
            f"--window {text!r}: expected two numbers LOW,HIGH, the lower first: --window=-175,250"
        )
    return low, high


def finite_or_none(nan_fill: float | None) -> float | None:
    """Check ``--nan-fill``.

    Raises:
        UsageError: it is not finite itself.
    """
    if nan_fill is not None and not math.isfinite(nan_fill):
        raise UsageError(f"--nan-fill {nan_fill}: expected a finite number, such as 0.")
    return nan_fill


class ScoreGrid(StrEnum):
    """Where masks are compared."""

    case = "case"
    model = "model"


def complete_recipe(incomplete: str) -> list[str]:
    """Shipped recipes that begin as typed, for the shell."""
    from sdseg_cli.core.recipe import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(incomplete)]


def complete_setting(incomplete: str) -> list[str]:
    """Keys of a recipe that begin as typed, for the shell."""
    from sdseg_cli.core.recipe import recipe_keys

    dotted = [".".join(path) for path in recipe_keys()]
    return [f"{name}=" for name in dotted if name.startswith(incomplete)]


def complete_run(incomplete: str) -> list[str]:
    """Runs of the working directory that begin as typed, for the shell."""
    from sdseg_cli.core.run_directory import all_runs

    return [str(run.root) for run in all_runs() if str(run.root).startswith(incomplete)]


SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a key of the recipe, as in train.steps=500. Repeatable.",
        autocompletion=complete_setting,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="Run directory, model folder or hub id. Default: the newest finished run.",
        show_default=False,
        autocompletion=complete_run,
    ),
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DATASET",
        help="Prepared dataset. Default: the one the model was trained on.",
        show_default=False,
    ),
]
SplitOption = Annotated[Split, typer.Option("--split", help="Cases of the prepared dataset.")]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the results.", show_default=False),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of the noise.")]
StepsOption = Annotated[
    int | None,
    typer.Option(
        "--steps",
        min=1,
        help="Reverse steps; 1 = one-step. Default: the recipe's.",
        show_default=False,
    ),
]
SamplesOption = Annotated[
    int | None,
    typer.Option(
        "--samples",
        min=1,
        help="Noise draws to average. Default: the recipe's.",
        show_default=False,
    ),
]
ThresholdOption = Annotated[
    float | None,
    typer.Option(
        "--threshold",
        min=0.0,
        max=1.0,
        help="Probability above which a pixel is foreground. Default: the recipe's.",
        show_default=False,
    ),
]
FlipsOption = Annotated[
    str | None,
    typer.Option(
        "--flips",
        metavar="WORDS",
        help="Also predict mirrored images and average: horizontal, vertical, both by comma, or none. "
        "Default: the recipe's.",
        show_default=False,
    ),
]
LargestComponentOption = Annotated[
    bool | None,
    typer.Option(
        "--largest-component/--all-components",
        help="Keep the largest piece of every class, or all. Default: the recipe's.",
        show_default=False,
    ),
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        help="Slices at once; fewer where the memory is short. Default: by device.",
        show_default=False,
    ),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where the networks run.")]
PrecisionOption = Annotated[Precision, typer.Option("--precision", help="Arithmetic of the networks.")]
CompileOption = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Compile the networks first, for a minute or two. Default: on a GPU with 10,000 images or more.",
        show_default=False,
    ),
]
DecoderOption = Annotated[
    Path | None,
    typer.Option(
        "--decoder",
        metavar="FOLDER",
        help="Small decoder in place of the autoencoder's (sdseg autoencoder --distill).",
        show_default=False,
    ),
]
ConventionOption = Annotated[
    Convention | None,
    typer.Option(
        "--convention",
        help="Scores of empty masks: undefined and counted, or as the official code. Default: the recipe's.",
        show_default=False,
    ),
]
GridOption = Annotated[
    ScoreGrid | None,
    typer.Option(
        "--grid",
        help="Compare in the case's own pixels or on the model's grid. Default: the recipe's.",
        show_default=False,
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace existing results.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout.")]
