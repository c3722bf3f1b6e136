"""What the commands of ``sdseg prepare`` share: their options, and the way from raw cases to a dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sdseg_cli.commands._options import finite_or_none
from sdseg_cli.core.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from sdseg_cli.core.data.benchmarks import Benchmark
    from sdseg_cli.core.data.gathering import Description, SheetItem
    from sdseg_cli.core.data.preparation import CaseRecord
    from sdseg_cli.core.data.raw_cases import Geometry, Problem, RawCase
    from sdseg_cli.core.data.slicing import Axis
    from sdseg_cli.core.data.splits import Split

Resize = Literal["squeeze", "pad"]

SourceOption = Annotated[
    str | None, typer.Option(help="Archive (zip, tar), unpacked folder or URL of the raw data.")
]
OutOption = Annotated[
    Path | None, typer.Option(help="Folder of the prepared dataset.", show_default="data/NAME")
]
SizeOption = Annotated[int, typer.Option(min=32, max=1024, help="Side of the model grid, in pixels.")]
ResizeOption = Annotated[
    Resize, typer.Option(help="squeeze to a square as the paper does, or keep the aspect ratio and pad.")
]
ExcludeOption = Annotated[
    bool, typer.Option("--exclude-bad", help="Leave bad cases out (and list them) instead of refusing.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing prepared dataset.")]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        min=1, max=256, help="Processes.", show_default="one per core, at most 16; one for few cases"
    ),
]
SeedOption = Annotated[int, typer.Option(help="Another seed, another draw.")]
WindowOption = Annotated[
    str | None,
    typer.Option(
        help="Of volumes: LOW,HIGH, the values that become black and white, like -175,250.",
        show_default="each volume's own 0.5 and 99.5 percentiles",
    ),
]
NanFillOption = Annotated[
    float | None,
    typer.Option(
        "--nan-fill",
        metavar="VALUE",
        help="Of volumes: value for voxels that are NaN or infinite; without it such a case is refused.",
        show_default=False,
    ),
]
AxisOption = Annotated[
    Literal["axial", "coronal", "sagittal"], typer.Option(help="Of volumes: how they are cut into slices.")
]
ForegroundOption = Annotated[
    bool,
    typer.Option(
        "--foreground-only",
        help="Of volumes: leave out training slices without foreground. Validation and test keep all.",
    ),
]


def check_out(out: Path, size: int, overwrite: bool) -> None:
    """Everything that can be refused before anything is fetched or read."""
    from sdseg_cli.core.data.prepared import MANIFEST_FILE
    from sdseg_cli.core.files import refuse_existing

    if size % 8:
        raise UsageError(f"--size {size}: expected a multiple of 8, like {round(size / 8) * 8}.")
    refuse_existing(out, overwrite=overwrite, ours=MANIFEST_FILE)


# ---- the work -------------------------------------------------------------------------------------------


def prepare_benchmark(
    benchmark: Benchmark,
    *,
    source: str | None,
    out: Path,
    size: int,
    resize: Resize,
    split: str,
    exclude_bad: bool,
    overwrite: bool,
    workers: int | None,
    details: Mapping[str, Any] | None = None,
    window: tuple[float, float] | None = None,
    axis: Axis = "axial",
    foreground_only: bool = False,
    nan_fill: float | None = None,
) -> None:
    """Prepare a public data set; ``details`` are recorded, the last three are for volumes."""
    from sdseg_cli.console import say, warn
    from sdseg_cli.core.data.gathering import Description
    from sdseg_cli.core.data.raw_cases import Geometry
    from sdseg_cli.core.recipe import resources_root

    check_out(out, size, overwrite)
    given = source or benchmark.url
    if given is None:
        raise UsageError(f"--source is missing. {benchmark.how_to_get}")
    file = resources_root() / "splits" / benchmark.splits[split] if split in benchmark.splits else Path(split)
    if not file.is_file():
        words = ", ".join(benchmark.splits)
        raise UsageError(f"--split {split}: no such split file; expected {words} or the path of a file.")
    say(f"{benchmark.title}: {benchmark.licence}")
    with opened(given, out, sha256=benchmark.sha256 if source is None else None) as raw:
        assert raw is not None  # noqa: S101  (a source was given)
        if raw.sha256 is not None and (source is None or benchmark.sha256 is None):
            say(f"archive SHA-256 {raw.sha256} (no published value to compare with; recorded)")
        pairs = benchmark.find(raw.root)
        groups = {case.case_id: case.group for case in pairs.cases}
        chosen, problems, cut = fit_split(
            file,
            groups,
            pairs.problems,
            exclude_bad=exclude_bad,
            may_share_groups=split in benchmark.cuts_groups,
        )
        if cut:
            warn(
                f"split {split} puts frames of {len(cut)} video sequences into several splits, as the "
                "paper's counts imply; scores on it do not tell how a new patient fares. "
                "--split sequence does."
            )
        recorded = {
            "archive_sha256": raw.sha256,
            "groups_in_several_splits": len(cut),
            **(details or {}),
        }
        description = Description(
            benchmark.name, benchmark.classes, raw.description, benchmark.licence, recorded
        )
        geometry = Geometry(
            size,
            resize,
            len(benchmark.classes),
            benchmark.threshold,
            benchmark.label_values,
            window=window or benchmark.window,
            axis=axis,
            smallest_component=benchmark.smallest_component,
            foreground_slices_only=foreground_only,
            nan_fill=finite_or_none(nan_fill),
            holds_volumes=benchmark.holds_volumes,
        )
        run_preparation(
            pairs.cases, chosen, out, description, geometry, problems, exclude_bad, overwrite, workers
        )


def fit_split(
    file: Path,
    groups: dict[str, str],
    problems: Sequence[Problem],
    *,
    exclude_bad: bool,
    may_share_groups: bool = False,
) -> tuple[Split, list[Problem], list[str]]:
    """Read a split file and fit it to the cases: (split, all problems, groups it cuts)."""
    from sdseg_cli.core.data.raw_cases import Problem
    from sdseg_cli.core.data.splits import check_split, read_split

    found = list(problems)
    # A case without its mate is a problem already, not a second one of the split.
    split = read_split(file).without(problem.case_id for problem in problems)
    if exclude_bad:
        absent = [case_id for case_id in split.of_case() if case_id not in groups]
        found += [Problem(case_id, f"listed in {file.name} but not in the data") for case_id in absent]
        split = split.without(absent)
    cut = check_split(split, groups, where=str(file), may_share_groups=may_share_groups)
    return split, found, cut


@contextmanager
def opened(source: str | None, out: Path, *, sha256: str | None = None) -> Iterator[Any]:
    """Open ``--source`` with its progress on the screen; None for none."""
    if source is None:
        yield None
        return
    import pooch

    from sdseg_cli.commands._signals import interruptible
    from sdseg_cli.console import byte_progress, say, warn
    from sdseg_cli.core.data.download import is_url
    from sdseg_cli.core.data.sources import opened_source

    verb = "fetching" if is_url(source) else "reading"
    say(f"{verb} {source}")
    with (
        interruptible("stopped; nothing was written, what was fetched is kept for the next attempt."),
        ExitStack() as stack,
    ):
        with byte_progress(
            "fetching and unpacking" if is_url(source) else "unpacking"
        ) as advance:  # closed before the next bar is drawn
            raw = stack.enter_context(
                opened_source(
                    source,
                    beside=out.absolute().parent,
                    cache=Path(pooch.os_cache("sdseg")) / "downloads",
                    sha256=sha256,
                    on_download=lambda done, total: advance(done - advance.completed, total=total),
                    on_unpack=lambda done, total: advance(done - advance.completed, total=total),
                    on_retry=warn,
                )
            )
        yield raw


def run_preparation(
    cases: Sequence[RawCase],
    split: Split,
    out: Path,
    description: Description,
    geometry: Geometry,
    problems: Sequence[Problem],
    exclude_bad: bool,
    overwrite: bool,
    workers: int | None,
) -> None:
    from sdseg_cli.commands._signals import interruptible
    from sdseg_cli.console import done, progress, show_table
    from sdseg_cli.core.data.preparation import prepare
    from sdseg_cli.core.data.prepared import PreparedDataset

    records = prepare(
        cases,
        split,
        out,
        description=description,
        geometry=geometry,
        problems=problems,
        exclude_bad=exclude_bad,
        overwrite=overwrite,
        workers=workers,
        draw_sheet=_draw_sheet,
    )
    with interruptible("stopped; nothing was written."):
        seen = list(progress(records, len(cases), f"preparing {description.name}", unit="cases"))
    manifest = PreparedDataset.open(out).manifest
    _tell_notes(seen, problems, description.classes)
    statistics = manifest.preparation["statistics"]
    slices = ["slices"] if geometry.holds_volumes else []
    cases_of = Counter(record.split for record in seen if not record.problem)
    show_table(
        ["split", "cases", *slices, *(f"with {name}" for name in manifest.classes[1:]), "foreground"],
        [
            [
                name,
                cases_of[name],
                *([count] if slices else []),
                *(statistics[name][label]["slices"] for label in manifest.classes[1:]),
                f"{sum(statistics[name][label]['pixel_fraction'] for label in manifest.classes[1:]):.1%}",
            ]
            for name, count in manifest.splits.items()
        ],
        title=f"{manifest.name}, {manifest.image_size} x {manifest.image_size}, {manifest.resize}",
        caption=f"fingerprint {manifest.fingerprint[:16]}",
    )
    done(f"{out}: look at {out / 'contact_sheet.png'} before you train on it.")


def _draw_sheet(items: Sequence[SheetItem]) -> np.ndarray:
    from sdseg_cli.core.reporting.overlays import contact_sheet

    return contact_sheet(items, columns=6)


def _tell_notes(records: Sequence[CaseRecord], problems: Sequence[Problem], classes: Sequence[str]) -> None:
    """Say what was changed while reading, what was left out, and which class never occurs."""
    from sdseg_cli.console import say, warn

    counts: dict[str, list[str]] = {}
    for record in records:
        for note in record.notes:
            counts.setdefault(note.split(" from [")[0], []).append(f"{record.case_id}: {note}")
    for kind, cases in counts.items():
        say(f"{kind}: {len(cases)} images (first {cases[0]})")
    excluded = [(problem.case_id, problem.reason) for problem in problems]
    excluded += [(record.case_id, record.problem) for record in records if record.problem]
    if excluded:
        listing = "\n".join(f"  {case_id}: {reason}" for case_id, reason in excluded)
        warn(f"{len(excluded)} cases left out (listed in dataset.json):\n{listing}")
    prepared = [record for record in records if not record.problem]
    for label, name in enumerate(classes):
        if not any(record.class_pixels[label] for record in prepared if record.split == "train"):
            warn(f"class {name!r} occurs in no training mask; a model cannot learn it.")
