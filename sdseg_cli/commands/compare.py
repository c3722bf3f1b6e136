"""``sdseg compare``: runs, models and other tools' masks side by side, on the same cases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdseg_cli.commands._comparing import (
    Settings,
    Source,
    compare_and_write,
    refuse_several_processes,
    show_comparison,
)
from sdseg_cli.commands._options import (
    BatchSizeOption,
    Convention,
    ConventionOption,
    DataOption,
    Device,
    DeviceOption,
    GridOption,
    JsonOption,
    OverwriteOption,
    Precision,
    PrecisionOption,
    ScoreGrid,
    SeedOption,
    Split,
    SplitOption,
    complete_run,
)
from sdseg_cli.core.errors import UsageError

DEFAULT_OUT = Path("comparison")

DrawsOption = Annotated[
    int, typer.Option("--draws", min=0, help="Draws of the noise whose masks are compared; 0 for none.")
]
BaselineOption = Annotated[
    str | None,
    typer.Option(
        "--baseline",
        metavar="NAME",
        help="Method that the differences are from. Default: the first.",
        show_default=False,
    ),
]


def compare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]RUN_OR_FOLDER...",
            help="Runs, model folders, folders of masks, or what sdseg evaluate wrote; two or more. Sources "
            "of one name are runs of one method: their scores are averaged for each case.",
            autocompletion=complete_run,
        ),
    ],
    data: DataOption = None,
    split: SplitOption = Split.test,
    baseline: BaselineOption = None,
    draws: DrawsOption = 5,
    common: Annotated[
        bool, typer.Option("--common", help="Compare on the common cases where not all have the same ones.")
    ] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Score a missing mask of a folder as empty.")
    ] = False,
    convention: ConventionOption = None,
    grid: GridOption = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the results.")
    ] = DEFAULT_OUT,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = None,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.auto,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Put runs and other tools' masks side by side: accuracy, cost and stability on the same cases.

    Writes comparison.md, .csv and .tex (means with intervals, paired differences from the baseline with
    their intervals and p-values), costs.csv (weights, training time and memory, images/s, agreement of
    draws), cases.csv, curves.png (convergence of the runs) and report.html. Runs and models predict the
    split now, one after the other, so that their speeds can be compared.

    Examples:

    sdseg compare runs/kseg runs/kseg-fast  # on the test split of their dataset

    sdseg compare ours=runs/a ours=runs/b unet=runs/unet --baseline unet  # two seeds of ours

    sdseg compare runs/kseg nnunet=predictions/ --data data/kseg  # another tool's masks

    sdseg compare one=scores-1 ten=scores-10  # of sdseg evaluate --steps 10 --out scores-10

    sdseg compare runs/btcv nnunet=scores-nnunet  # volumes: scored by sdseg evaluate before
    """
    refuse_several_processes("compare")
    methods = named(sources)
    settings = Settings(
        split.value,
        out,
        data,
        baseline,
        None if convention is None else Convention(convention).value,
        None if grid is None else ScoreGrid(grid).value,
        draws,
        common,
        allow_missing,
        {"device": device.value, "precision": precision.value, "batch_size": batch_size, "seed": seed},
        overwrite,
    )
    written = compare_and_write(methods, settings)
    show_comparison(written, settings, as_json=as_json)
    if written.comparison.left_out:
        raise typer.Exit(3)


def named(sources: list[str]) -> dict[str, list[Source]]:
    """Read ``NAME=PATH`` or ``PATH``, named after its last part; sources of one name belong together.

    Raises:
        UsageError: fewer than two methods, or two unnamed sources whose names are one.
    """
    methods: dict[str, list[Source]] = {}
    unnamed: dict[str, str] = {}
    for source in sources:
        name, equals, location = source.partition("=")
        if not equals or Path(source).exists():
            path = Path(source)
            name, location = (path.parent.name if path.name == "model" else path.name) or source, source
            if unnamed.setdefault(name, location) != location:
                raise UsageError(
                    f"{unnamed[name]} and {location} would both be called {name}. Name them: NAME={location}"
                )
        if not name or not location:
            raise UsageError(f"{source!r}: expected NAME=RUN_OR_FOLDER, or the path alone.")
        methods.setdefault(name, []).append(Source(location))
    if len(methods) < 2:
        raise UsageError(
            "compare: one method was given, expected two or more. One alone: sdseg evaluate --model RUN"
        )
    return methods
