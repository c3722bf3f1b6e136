"""``sdseg compare``: runs, models and other tools' masks side by side, on the same cases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdseg_cli import console
from sdseg_cli.commands._comparing import (
    Settings,
    Source,
    compare_and_write,
    has_failures,
    refuse_several_processes,
    several_draws,
    show_comparison,
)
from sdseg_cli.commands._options import (
    BatchSizeOption,
    ConventionOption,
    DataOption,
    Device,
    DeviceOption,
    GridOption,
    JsonOption,
    OverwriteOption,
    Precision,
    PrecisionOption,
    SeedOption,
    Split,
    SplitOption,
    complete_run,
)
from sdseg_cli.core.errors import UsageError

DEFAULT_OUT = Path("comparison")

DrawsOption = Annotated[
    int, typer.Option("--draws", min=0, help="Draws of the noise that are compared, 2 or more; 0 for none.")
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
    their intervals and p-values), costs.csv (weights, training time and memory, images/s, stability),
    cases.csv, curves.png (convergence of the runs) and report.html. Runs and models predict the
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
        data=data,
        baseline=baseline,
        convention=None if convention is None else convention.value,
        grid=None if grid is None else grid.value,
        draws=several_draws(draws),
        common=common,
        allow_missing=allow_missing,
        loading={
            "device": device.value,
            "precision": precision.value,
            "batch_size": batch_size,
            "seed": seed,
        },
        overwrite=overwrite,
    )
    written = compare_and_write(methods, settings)
    show_comparison(written, settings, tables=not as_json)
    if as_json:
        console.show_json(written.report)
    if has_failures(written):
        raise typer.Exit(3)


def named(sources: list[str]) -> dict[str, list[Source]]:
    """Read ``NAME=PATH`` or ``PATH``, named after its last part; sources of one given name belong together.

    Raises:
        UsageError: fewer than two methods, a source given twice, or a name that means two things.
    """
    methods: dict[str, list[Source]] = {}
    by_path: set[str] = set()
    for source in sources:
        name, equals, location = source.partition("=")
        is_named = bool(equals) and not Path(source).exists()
        if not is_named:
            path = Path(source)
            name, location = (path.parent.name if path.name == "model" else path.name) or source, source
        name = " ".join(name.split())  # it heads a line of a table
        if not name or not location:
            raise UsageError(f"{source!r}: expected NAME=RUN_OR_FOLDER, or the path alone.")
        same = methods.setdefault(name, [])
        if Path(location).resolve() in [Path(one.location).resolve() for one in same]:
            raise UsageError(f"{location} was given twice for {name}. Give each run once.")
        if same and (not is_named or name in by_path):
            raise UsageError(
                f"{same[0].location} and {location} would both be called {name}. Name them: NAME={location}"
            )
        same.append(Source(location))
        by_path |= set() if is_named else {name}
    if len(methods) < 2:
        raise UsageError(
            "compare: one method was given, expected two or more. One alone: sdseg evaluate --model RUN"
        )
    return methods
