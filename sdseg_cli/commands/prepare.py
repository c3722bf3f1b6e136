"""``sdseg prepare``: raw downloads, own folders or phantoms -> a prepared dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sdseg_cli.core.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from sdseg_cli.core.data.benchmarks import Benchmark
    from sdseg_cli.core.data.preparation import CaseRecord, Description, Geometry, Problem, RawCase, SheetItem
    from sdseg_cli.core.data.splits import Split

Resize = Literal["squeeze", "pad"]

EXAMPLES = """
sdseg prepare kseg                                    # fetched (46 MB), made in data/kseg
sdseg prepare kseg --source kvasir-seg.zip --out data/kseg
sdseg prepare folder --images scans --masks labels --classes polyp
sdseg prepare phantom --cases 240 --out data/phantom
"""

app = typer.Typer(
    no_args_is_help=True,
    help="Turn images and masks (a download, your own, phantoms) into a prepared dataset.",
)

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


@app.command()
def kseg(
    source: SourceOption = None,
    out: OutOption = None,
    size: SizeOption = 256,
    resize: ResizeOption = "squeeze",
    split: Annotated[str, typer.Option(help="paper (800/100/100) or a split file.")] = "paper",
    exclude_bad: ExcludeOption = False,
    overwrite: OverwriteOption = False,
    workers: WorkersOption = None,
) -> None:
    """Prepare Kvasir-SEG: polyps in 1000 endoscopy images.

    Without --source the public archive (46 MB) is fetched.

    Examples:
        sdseg prepare kseg
        sdseg prepare kseg --source kvasir-seg.zip --out data/kseg128 --size 128
        sdseg prepare kseg --source Kvasir-SEG/ --split my-split.yaml --exclude-bad
    """
    from sdseg_cli.core.data.benchmarks import KSEG

    _prepare_benchmark(
        KSEG,
        source=source,
        out=out or Path("data") / KSEG.name,
        size=size,
        resize=resize,
        split=split,
        exclude_bad=exclude_bad,
        overwrite=overwrite,
        workers=workers,
    )


@app.command()
def cvc(
    source: SourceOption = None,
    out: OutOption = None,
    size: SizeOption = 256,
    resize: ResizeOption = "squeeze",
    split: Annotated[
        str,
        typer.Option(
            help="paper (492/60/60 frames), sequence (whole video sequences: the honest one) or a split file."
        ),
    ] = "paper",
    exclude_bad: ExcludeOption = False,
    overwrite: OverwriteOption = False,
    workers: WorkersOption = None,
) -> None:
    """Prepare CVC-ClinicDB: polyps in 612 frames of 29 video sequences.

    It needs a registration at https://polyp.grand-challenge.org/CVCClinicDB/; give the file as --source.

    Examples:
        sdseg prepare cvc --source CVC-ClinicDB.zip
        sdseg prepare cvc --source CVC-ClinicDB/ --split sequence --out data/cvc-sequence
    """
    from sdseg_cli.core.data.benchmarks import CVC

    _prepare_benchmark(
        CVC,
        source=source,
        out=out or Path("data") / CVC.name,
        size=size,
        resize=resize,
        split=split,
        exclude_bad=exclude_bad,
        overwrite=overwrite,
        workers=workers,
    )


@app.command()
def folder(
    images: Annotated[str, typer.Option(help="Folder of images; inside --source if that is given.")],
    masks: Annotated[str, typer.Option(help="Folder of masks; inside --source if that is given.")],
    source: SourceOption = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the dataset.", show_default="name of the --out folder")
    ] = None,
    classes: Annotated[str, typer.Option(help="Foreground classes, by comma, in the order 1, 2, ...")] = (
        "foreground"
    ),
    label_values: Annotated[
        str | None,
        typer.Option(help="What stored mask values mean: STORED=CLASS by comma; CLASS is a number or name."),
    ] = None,
    threshold: Annotated[
        int | None, typer.Option(min=0, max=65534, help="Mask values above it are foreground (one class).")
    ] = None,
    mask_suffix: Annotated[str, typer.Option(help="What mask names carry more, like _mask.")] = "",
    group_by: Annotated[
        str | None,
        typer.Option(help="Regular expression on the case id; its parenthesis is the patient or sequence."),
    ] = None,
    fractions: Annotated[
        str | None,
        typer.Option(help="Shares of train, validation and test.", show_default="0.8,0.1,0.1"),
    ] = None,
    split: Annotated[Path | None, typer.Option(help="Split file instead of --fractions.")] = None,
    seed: SeedOption = 0,
    licence: Annotated[str, typer.Option(help="Terms of use, recorded with the data.")] = "not stated",
    out: OutOption = None,
    size: SizeOption = 256,
    resize: ResizeOption = "squeeze",
    exclude_bad: ExcludeOption = False,
    overwrite: OverwriteOption = False,
    workers: WorkersOption = None,
) -> None:
    """Prepare your own images and masks: PNG, JPEG, TIFF or BMP, paired by name.

    Examples:
        sdseg prepare folder --images scans --masks labels --classes polyp
        sdseg prepare folder --images i --masks m --classes liver,kidney \
          --label-values 0=0,100=1,200=2
        sdseg prepare folder --images i --masks m --group-by 'patient([0-9]+)_'
        sdseg prepare folder --source all.zip --images img --masks seg --mask-suffix _mask
    """
    from sdseg_cli.core.data.pairs import group_by_pattern, pair_folders
    from sdseg_cli.core.data.preparation import Description, Geometry
    from sdseg_cli.core.data.splits import make_split

    if split is not None and fractions is not None:
        raise UsageError("--split and --fractions exclude each other: choose one of the two.")
    names = parse_classes(classes)
    values = parse_label_values(label_values, names)
    _check_reading(names, values, threshold)
    shares = parse_fractions(fractions or "0.8,0.1,0.1")
    group_of = group_by_pattern(group_by) if group_by is not None else None
    out = out or Path("data") / (name or "folder")
    geometry = Geometry(size, resize, len(names), threshold, values)
    _check_out(out, size, overwrite)
    with _opened(source, out) as raw:
        root = raw.root if raw is not None else Path()
        pairs = pair_folders(
            root / images,
            root / masks,
            root=raw.root if raw is not None else None,
            mask_suffix=mask_suffix,
            group_of=group_of,
        )
        groups = {case.case_id: case.group for case in pairs.cases}
        details: dict[str, Any] = {"group_by": group_by, "mask_suffix": mask_suffix}
        if split is None:
            chosen = make_split(groups, shares, seed=seed)
            details |= {"fractions": shares, "split_seed": seed}
            problems = list(pairs.problems)
        else:
            chosen, problems, _ = _fit_split(split, groups, pairs.problems, exclude_bad=exclude_bad)
        if raw is not None:
            details["archive_sha256"] = raw.sha256
        described = f"{images} and {masks}" + (f" in {raw.description}" if raw is not None else "")
        description = Description(name or out.name, names, described, licence, details)
        _run(pairs.cases, chosen, out, description, geometry, problems, exclude_bad, overwrite, workers)


@app.command()
def phantom(
    kind: Annotated[
        Literal["endoscopy", "organs"], typer.Option(help="Polyp-like, or three organ-like classes.")
    ] = "endoscopy",
    cases: Annotated[int, typer.Option(min=3, max=1_000_000, help="How many pictures.")] = 240,
    size: SizeOption = 256,
    seed: SeedOption = 0,
    fractions: Annotated[str, typer.Option(help="Shares of train, validation and test.")] = "0.8,0.1,0.1",
    resize: ResizeOption = "squeeze",
    out: OutOption = None,
    overwrite: OverwriteOption = False,
    workers: WorkersOption = None,
) -> None:
    """Draw images with exact masks from a seed: nothing to download, nothing to license.

    Examples:
        sdseg prepare phantom
        sdseg prepare phantom --kind organs --cases 300 --size 128 --out data/organs
    """
    from sdseg_cli.core.data.benchmarks import phantom_cases
    from sdseg_cli.core.data.phantom import phantom_classes
    from sdseg_cli.core.data.preparation import Description, Geometry
    from sdseg_cli.core.data.splits import make_split

    out = out or Path("data") / "phantom"
    _check_out(out, size, overwrite)
    shares = parse_fractions(fractions)
    drawn = phantom_cases(kind, cases=cases, seed=seed, size=size)
    names = phantom_classes(kind)
    split = make_split({case.case_id: case.group for case in drawn}, shares, seed=seed)
    details = {"kind": kind, "cases": cases, "seed": seed, "fractions": shares}
    description = Description("phantom", names, f"phantom {kind}, seed {seed}", "none needed", details)
    geometry = Geometry(size, resize, len(names))
    _run(drawn, split, out, description, geometry, [], False, overwrite, workers)


# ---- what the options say -------------------------------------------------------------------------------


def parse_classes(text: str) -> tuple[str, ...]:
    """Read ``--classes``: foreground names by comma; the background is put in front.

    Raises:
        UsageError: a name is empty or stands there twice.
    """
    names = [name.strip() for name in text.split(",")]
    if names[0] != "background":
        names.insert(0, "background")
    if "" in names or len(set(names)) != len(names) or not 2 <= len(names) <= 255:
        raise UsageError(
            f"--classes {text!r}: expected 1 to 254 different names by comma, like liver,kidney "
            "(the background is added)."
        )
    return tuple(names)


def parse_label_values(text: str | None, classes: Sequence[str]) -> dict[int, int] | None:
    """Read ``--label-values``: ``STORED=CLASS`` by comma, CLASS a number or a name of ``classes``.

    Raises:
        UsageError: it reads otherwise, or names a class that is not there.
    """
    if text is None:
        return None
    values: dict[int, int] = {}
    for part in text.split(","):
        stored, _, label = (piece.strip() for piece in part.partition("="))
        number = classes.index(label) if label in classes else int(label) if label.isdecimal() else -1
        if not stored.isdecimal() or not 0 <= number < len(classes) or int(stored) in values:
            known = ", ".join(f"{index} ({name})" for index, name in enumerate(classes))
            raise UsageError(
                f"--label-values {text!r}: cannot use {part!r}; expected STORED=CLASS, every stored value "
                f"once, with a class of {known}. Example: 0=0,128=1,255=2"
            )
        values[int(stored)] = number
    return values


def parse_fractions(text: str) -> list[float]:
    """Read ``--fractions``: three numbers by comma.

    Raises:
        UsageError: it reads otherwise.
    """
    try:
        fractions = [float(part) for part in text.split(",")]
    except ValueError:
        fractions = []
    if len(fractions) != 3:
        raise UsageError(f"--fractions {text!r}: expected three numbers by comma, like 0.8,0.1,0.1.")
    return fractions


def _check_reading(classes: Sequence[str], values: dict[int, int] | None, threshold: int | None) -> None:
    if threshold is not None and values is not None:
        raise UsageError("--threshold and --label-values exclude each other: choose one of the two.")
    if threshold is not None and len(classes) > 2:
        raise UsageError(
            f"--threshold makes one foreground class, --classes names {len(classes) - 1}. "
            "Use --label-values to say what the stored values mean."
        )


def _check_out(out: Path, size: int, overwrite: bool) -> None:
    """Everything that can be refused before anything is fetched or read."""
    from sdseg_cli.core.data.prepared import MANIFEST_FILE
    from sdseg_cli.core.files import refuse_existing

    if size % 8:
        raise UsageError(f"--size {size}: expected a multiple of 8, like {round(size / 8) * 8}.")
    refuse_existing(out, overwrite=overwrite, ours=MANIFEST_FILE)


# ---- the work -------------------------------------------------------------------------------------------


def _prepare_benchmark(
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
) -> None:
    from sdseg_cli.console import say, warn
    from sdseg_cli.core.data.preparation import Description, Geometry
    from sdseg_cli.core.recipe import resources_root

    _check_out(out, size, overwrite)
    given = source or benchmark.url
    if given is None:
        raise UsageError(f"--source is missing. {benchmark.how_to_get}")
    file = resources_root() / "splits" / benchmark.splits[split] if split in benchmark.splits else Path(split)
    if not file.is_file():
        words = ", ".join(benchmark.splits)
        raise UsageError(f"--split {split}: no such split file; expected {words} or the path of a file.")
    say(f"{benchmark.title}: {benchmark.licence}")
    with _opened(given, out, sha256=benchmark.sha256 if source is None else None) as raw:
        assert raw is not None  # noqa: S101  (a source was given)
        if raw.sha256 is not None and (source is None or benchmark.sha256 is None):
            say(f"archive SHA-256 {raw.sha256} (no published value to compare with; recorded)")
        pairs = benchmark.find(raw.root)
        groups = {case.case_id: case.group for case in pairs.cases}
        chosen, problems, cut = _fit_split(
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
        details = {"archive_sha256": raw.sha256, "groups_in_several_splits": len(cut)}
        description = Description(
            benchmark.name, benchmark.classes, raw.description, benchmark.licence, details
        )
        geometry = Geometry(size, resize, len(benchmark.classes), benchmark.threshold)
        _run(pairs.cases, chosen, out, description, geometry, problems, exclude_bad, overwrite, workers)


def _fit_split(
    file: Path,
    groups: dict[str, str],
    problems: Sequence[Problem],
    *,
    exclude_bad: bool,
    may_share_groups: bool = False,
) -> tuple[Split, list[Problem], list[str]]:
    """Read a split file and fit it to the cases: (split, all problems, groups it cuts)."""
    from sdseg_cli.core.data.preparation import Problem
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
def _opened(source: str | None, out: Path, *, sha256: str | None = None) -> Iterator[Any]:
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


def _run(
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
    show_table(
        ["split", "cases", *(f"with {name}" for name in manifest.classes[1:]), "foreground"],
        [
            [
                name,
                count,
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
