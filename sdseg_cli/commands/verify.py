"""``sdseg verify``: a folder of ours against its manifest, file by file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdseg_cli import console
from sdseg_cli.commands._options import JsonOption, complete_run

if TYPE_CHECKING:
    from sdseg_cli.core.verification import Difference, Part

MOST_LISTED = 30  # differences named on the screen; --json has them all


def verify(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="Run directory, model, exported model, prepared dataset, folder of masks or of scores, or a "
            "folder that holds such.",
            show_default=False,
            autocompletion=complete_run,
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Check that a folder is as sdseg wrote it: every file there, with its SHA-256, and no other.

    A run is checked with its checkpoints, its model and its scores, and a folder of runs with all of them.
    What is missing, truncated, altered or not listed is named, and the exit code is then 1; it is 2 for a
    folder that is none of these.
    Nothing is changed.

    Examples::

        sdseg verify runs/kseg-fast-20260131-120000
        sdseg verify runs/kseg-fast-20260131-120000/model    # the model alone
        sdseg verify data/kseg                               # a prepared dataset
        sdseg verify masks/ --json                           # what sdseg predict wrote, for a script
        sdseg verify ablation/                               # all runs and tables in it
    """
    from sdseg_cli.core.verification import find_parts

    parts = find_parts(path)
    todo = [file for part in parts for file in part.files()]
    found = [difference for part in parts for difference in part.differences]
    for part, name in console.progress(todo, len(todo), "checking", unit="files"):
        difference = part.compare(name)
        if difference is not None:
            found.append(difference)
    if as_json:
        console.show_json(_as_json(path, parts, found))
    else:
        _show(path, parts, found)
    if found:
        console.warn(
            f"{len(found)} difference{'s' if len(found) > 1 else ''}; {len(todo)} listed files were read."
        )
        raise typer.Exit(1)
    console.done(f"{path}: {len(todo)} files in {_count(parts)} are as they were written.")


def _show(path: Path, parts: list[Part], found: list[Difference]) -> None:
    rows = [
        (str(part.folder.relative_to(path)), part.kind, len(part.sums), _megabytes(part)) for part in parts
    ]
    console.show_table(("folder", "kind", "files listed", "MB"), rows, title=f"{path}")
    for difference in found[:MOST_LISTED]:
        console.warn(str(difference))
    if len(found) > MOST_LISTED:
        console.warn(f"and {len(found) - MOST_LISTED} more; --json has them all")


def _megabytes(part: Part) -> str:
    return f"{sum(part.sizes.values()) / 1e6:.1f}" if part.sizes else "-"


def _count(parts: list[Part]) -> str:
    return "1 folder" if len(parts) == 1 else f"{len(parts)} folders"


def _as_json(path: Path, parts: list[Part], found: list[Difference]) -> dict[str, Any]:
    return {
        "path": path,
        "whole": not found,
        "parts": [
            {
                "folder": part.folder,
                "kind": part.kind,
                "files": len(part.sums),
                "bytes": sum(part.sizes.values()),
            }
            for part in parts
        ],
        "differences": [
            {"path": difference.path, "fault": difference.fault, "detail": difference.detail}
            for difference in found
        ],
    }
