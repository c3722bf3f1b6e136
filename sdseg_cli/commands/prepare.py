"""``sdseg prepare``: raw downloads, own folders or phantoms -> a prepared dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sdseg_cli.commands._options import finite_or_none, parse_window
from sdseg_cli.commands._prepare_benchmarks import btcv, cvc, kseg, refuge, sts3d
from sdseg_cli.commands._preparing import (
    AxisOption,
    ExcludeOption,
    ForegroundOption,
    NanFillOption,
    OutOption,
    OverwriteOption,
    ResizeOption,
    SeedOption,
    SizeOption,
    SourceOption,
    WindowOption,
    WorkersOption,
    check_out,
    fit_split,
    opened,
    run_preparation,
)
from sdseg_cli.core.errors import UsageError

if TYPE_CHECKING:
    from sdseg_cli.core.data.raw_cases import Problem
    from sdseg_cli.core.data.splits import Split

EXAMPLES = """
sdseg prepare kseg                                    # fetched (46 MB), made in data/kseg
sdseg prepare btcv --source RawData.zip --organs 8 --out data/btcv-8
sdseg prepare nnunet nnUNet_raw/Dataset001_Mine --channels 0
sdseg prepare folder --images scans --masks labels --classes polyp
sdseg prepare phantom --cases 240 --out data/phantom
"""

app = typer.Typer(
    no_args_is_help=True,
    help="Turn images or volumes and their masks (a download, your own, phantoms) into a prepared dataset.",
)
for public in (kseg, cvc, refuge, btcv, sts3d):
    app.command()(public)


@app.command()
def nnunet(
    raw: Annotated[Path, typer.Argument(metavar="DIR", help="Raw data set of nnU-Net.")],
    channels: Annotated[
        str | None,
        typer.Option(
            help="Number of the channel to use, or of three that become red, green and blue, like 0,1,2.",
            show_default="the only one",
        ),
    ] = None,
    window: WindowOption = None,
    axis: AxisOption = "axial",
    foreground_only: ForegroundOption = False,
    nan_fill: NanFillOption = None,
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
    out: OutOption = None,
    size: SizeOption = 256,
    resize: ResizeOption = "squeeze",
    exclude_bad: ExcludeOption = False,
    overwrite: OverwriteOption = False,
    workers: WorkersOption = None,
) -> None:
    """Prepare a raw data set of nnU-Net: dataset.json, imagesTr and labelsTr, volumes or pictures.

    Both versions of dataset.json are read. Labels made of regions and labels to be ignored are refused.

    Examples:
        sdseg prepare nnunet nnUNet_raw/Dataset003_Liver --window -100,200
        sdseg prepare nnunet Dataset001_BrainTumour --channels 0,2,3 --out data/brain
        sdseg prepare nnunet Dataset120_Roads --fractions 0.9,0.1,0
    """
    from sdseg_cli.core.data.gathering import Description
    from sdseg_cli.core.data.nnunet import find_nnunet, read_nnunet
    from sdseg_cli.core.data.pairs import group_by_pattern
    from sdseg_cli.core.data.raw_cases import Geometry

    if split is not None and fractions is not None:
        raise UsageError("--split and --fractions exclude each other: choose one of the two.")
    shares = parse_fractions(fractions or "0.8,0.1,0.1")
    chosen_channels = parse_channels(channels)
    out = out or Path("data") / (raw.resolve().name or "nnunet")
    check_out(out, size, overwrite)
    dataset = read_nnunet(raw)
    group_of = group_by_pattern(group_by) if group_by is not None else None
    pairs = find_nnunet(dataset, chosen_channels, group_of)
    _refuse_volume_options(dataset.holds_volumes, window, axis, foreground_only, nan_fill)
    details: dict[str, Any] = {"channels": chosen_channels, "group_by": group_by}
    groups = {case.case_id: case.group for case in pairs.cases}
    chosen, problems = _split_of(groups, pairs.problems, shares, split, seed, exclude_bad, details)
    description = Description(dataset.name, dataset.classes, str(raw), dataset.licence, details)
    geometry = Geometry(
        size,
        resize,
        len(dataset.classes),
        # 0 and 1 are written as such, not as dark and bright.
        label_values={label: label for label in range(len(dataset.classes))},
        window=parse_window(window),
        axis=axis,
        foreground_slices_only=foreground_only,
        nan_fill=finite_or_none(nan_fill),
        holds_volumes=dataset.holds_volumes,
    )
    run_preparation(
        pairs.cases, chosen, out, description, geometry, problems, exclude_bad, overwrite, workers
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
    window: WindowOption = None,
    axis: AxisOption = "axial",
    foreground_only: ForegroundOption = False,
    nan_fill: NanFillOption = None,
    out: OutOption = None,
    size: SizeOption = 256,
    resize: ResizeOption = "squeeze",
    exclude_bad: ExcludeOption = False,
    overwrite: OverwriteOption = False,
    workers: WorkersOption = None,
) -> None:
    """Prepare your own images or volumes and masks, paired by name.

    Images are PNG, JPEG, TIFF or BMP; volumes are NIfTI, NRRD, MetaImage or DICOM series, and are cut into
    slices. Masks are images or volumes likewise; that of a DICOM series may be a DICOM-SEG.

    Examples:
        sdseg prepare folder --images scans --masks labels --classes polyp
        sdseg prepare folder --images i --masks m --classes liver,kidney \
          --label-values 0=0,100=1,200=2
        sdseg prepare folder --images i --masks m --group-by 'patient([0-9]+)_'
        sdseg prepare folder --source all.zip --images img --masks seg --mask-suffix _mask
        sdseg prepare folder --images ct --masks seg --classes liver --window -100,200
    """
    from sdseg_cli.core.data.gathering import Description
    from sdseg_cli.core.data.pairs import group_by_pattern, pair_folders
    from sdseg_cli.core.data.raw_cases import Geometry

    if split is not None and fractions is not None:
        raise UsageError("--split and --fractions exclude each other: choose one of the two.")
    names = parse_classes(classes)
    values = parse_label_values(label_values, names)
    _check_reading(names, values, threshold)
    shares = parse_fractions(fractions or "0.8,0.1,0.1")
    group_of = group_by_pattern(group_by) if group_by is not None else None
    out = out or Path("data") / (name or "folder")
    check_out(out, size, overwrite)
    with opened(source, out) as raw:
        root = raw.root if raw is not None else Path()
        pairs = pair_folders(
            root / images,
            root / masks,
            root=raw.root if raw is not None else None,
            mask_suffix=mask_suffix,
            group_of=group_of,
        )
        holds_volumes = any(case.is_volume for case in pairs.cases)
        _refuse_volume_options(holds_volumes, window, axis, foreground_only, nan_fill)
        geometry = Geometry(
            size,
            resize,
            len(names),
            threshold,
            values,
            window=parse_window(window),
            axis=axis,
            foreground_slices_only=foreground_only,
            nan_fill=finite_or_none(nan_fill),
            holds_volumes=holds_volumes,
        )
        groups = {case.case_id: case.group for case in pairs.cases}
        details: dict[str, Any] = {"group_by": group_by, "mask_suffix": mask_suffix}
        chosen, problems = _split_of(groups, pairs.problems, shares, split, seed, exclude_bad, details)
        if raw is not None:
            details["archive_sha256"] = raw.sha256
        described = f"{images} and {masks}" + (f" in {raw.description}" if raw is not None else "")
        description = Description(name or out.name, names, described, licence, details)
        run_preparation(
            pairs.cases, chosen, out, description, geometry, problems, exclude_bad, overwrite, workers
        )


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
    from sdseg_cli.core.data.gathering import Description
    from sdseg_cli.core.data.phantom import phantom_classes
    from sdseg_cli.core.data.raw_cases import Geometry
    from sdseg_cli.core.data.splits import make_split

    out = out or Path("data") / "phantom"
    check_out(out, size, overwrite)
    shares = parse_fractions(fractions)
    drawn = phantom_cases(kind, cases=cases, seed=seed, size=size)
    names = phantom_classes(kind)
    split = make_split({case.case_id: case.group for case in drawn}, shares, seed=seed)
    details = {"kind": kind, "cases": cases, "seed": seed, "fractions": shares}
    description = Description("phantom", names, f"phantom {kind}, seed {seed}", "none needed", details)
    geometry = Geometry(size, resize, len(names))
    run_preparation(drawn, split, out, description, geometry, [], False, overwrite, workers)


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


def parse_channels(text: str | None) -> tuple[int, ...] | None:
    """Read ``--channels``: numbers by comma, from 0.

    Raises:
        UsageError: it reads otherwise.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--channels {text!r}: expected one or three numbers by comma, like 0,1,2.")
    return tuple(int(part) for part in parts)


def _refuse_volume_options(
    holds_volumes: bool, window: str | None, axis: str, foreground_only: bool, nan_fill: float | None
) -> None:
    given = {"--window": window is not None, "--axis": axis != "axial", "--foreground-only": foreground_only}
    given |= {"--nan-fill": nan_fill is not None}
    unused = [name for name, is_given in given.items() if is_given]
    if unused and not holds_volumes:
        raise UsageError(f"{' and '.join(unused)}: for volumes only, and the data holds none. Leave it out.")


def _split_of(
    groups: dict[str, str],
    problems: Sequence[Problem],
    shares: list[float],
    file: Path | None,
    seed: int,
    exclude_bad: bool,
    details: dict[str, Any],
) -> tuple[Split, list[Problem]]:
    """Take the split file, or draw by fractions and record how."""
    from sdseg_cli.core.data.splits import make_split

    if file is not None:
        chosen, found, _ = fit_split(file, groups, problems, exclude_bad=exclude_bad)
        return chosen, found
    details |= {"fractions": shares, "split_seed": seed}
    return make_split(groups, shares, seed=seed), list(problems)


def _check_reading(classes: Sequence[str], values: dict[int, int] | None, threshold: int | None) -> None:
    if threshold is not None and values is not None:
        raise UsageError("--threshold and --label-values exclude each other: choose one of the two.")
    if threshold is not None and len(classes) > 2:
        raise UsageError(
            f"--threshold makes one foreground class, --classes names {len(classes) - 1}. "
            "Use --label-values to say what the stored values mean."
        )
