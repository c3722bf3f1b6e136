"""``sdseg prepare kseg|cvc|refuge|btcv|sts3d``: the public data sets as their owners publish them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sdseg_cli.commands._options import parse_window
from sdseg_cli.commands._preparing import (
    AxisOption,
    ExcludeOption,
    ForegroundOption,
    NanFillOption,
    OutOption,
    OverwriteOption,
    ResizeOption,
    SizeOption,
    SourceOption,
    WorkersOption,
    prepare_benchmark,
)

WindowText = Annotated[
    str, typer.Option(help="LOW,HIGH: the values that become black and white, in every volume.")
]


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

    prepare_benchmark(
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

    prepare_benchmark(
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


def refuge(
    source: SourceOption = None,
    out: OutOption = None,
    size: SizeOption = 256,
    resize: ResizeOption = "squeeze",
    crop: Annotated[
        Literal["truth", "bright", "none"],
        typer.Option(
            help="What the model sees: the square around the disc of the ground truth (as the paper; nobody "
            "has it for a new photograph), around the brightest patch, or the whole photograph."
        ),
    ] = "truth",
    split: Annotated[str, typer.Option(help="paper (720/80/400) or a split file.")] = "paper",
    exclude_bad: ExcludeOption = False,
    overwrite: OverwriteOption = False,
    workers: WorkersOption = None,
) -> None:
    """Prepare REFUGE2: the optic cup in 1200 fundus photographs.

    It needs a registration at https://refuge.grand-challenge.org; give the folder or archive that holds
    train, val and test as --source. Masks with inverted values, as some mirrors have them, are recognised.

    Examples:
        sdseg prepare refuge --source REFUGE2/
        sdseg prepare refuge --source REFUGE2.zip --crop bright --out data/refuge-bright
    """
    from sdseg_cli.core.data.benchmarks import refuge as refuge_with
    from sdseg_cli.core.data.fundus import CROP_SCALE

    if crop == "truth":
        from sdseg_cli.console import warn

        warn(
            "--crop truth takes the place of the disc from the ground truth, of the test cases too, as the "
            "paper does: scores are those of a model that is told where to look. --crop bright finds it."
        )
    prepare_benchmark(
        refuge_with(crop),
        source=source,
        out=out or Path("data") / "refuge",
        size=size,
        resize=resize,
        split=split,
        exclude_bad=exclude_bad,
        overwrite=overwrite,
        workers=workers,
        details={"crop": crop, "crop_scale": None if crop == "none" else CROP_SCALE},
    )


def btcv(
    source: SourceOption = None,
    out: OutOption = None,
    size: SizeOption = 256,
    resize: ResizeOption = "squeeze",
    organs: Annotated[
        Literal["binary", "8", "13"],
        typer.Option(help="All 13 organs, the 8 that TransUNet scores, or these 8 as one foreground."),
    ] = "binary",
    window: WindowText = "-175,250",
    axis: AxisOption = "axial",
    foreground_only: ForegroundOption = False,
    nan_fill: NanFillOption = None,
    split: Annotated[str, typer.Option(help="paper (15/3/12 volumes) or a split file.")] = "paper",
    exclude_bad: ExcludeOption = False,
    overwrite: OverwriteOption = False,
    workers: WorkersOption = None,
) -> None:
    """Prepare BTCV: up to 13 organs in 30 abdominal CTs; slices for the model, scores of whole volumes.

    It needs a registration at https://www.synapse.org (project syn3193805, file RawData.zip); give the
    folder or archive that holds RawData/Training/img and RawData/Training/label as --source.

    Examples:
        sdseg prepare btcv --source RawData.zip
        sdseg prepare btcv --source RawData.zip --organs 13          # made in data/btcv-13
        sdseg prepare btcv --source RawData/ --window -125,275 --foreground-only --out data/btcv-wide
    """
    from sdseg_cli.core.data.benchmarks import btcv as btcv_of

    prepare_benchmark(
        btcv_of(organs),
        source=source,
        out=out or Path("data") / ("btcv" if organs == "binary" else f"btcv-{organs}"),
        size=size,
        resize=resize,
        split=split,
        exclude_bad=exclude_bad,
        overwrite=overwrite,
        workers=workers,
        details={"organs": organs},
        window=parse_window(window),
        axis=axis,
        foreground_only=foreground_only,
        nan_fill=nan_fill,
    )


def sts3d(
    source: SourceOption = None,
    out: OutOption = None,
    size: SizeOption = 256,
    resize: ResizeOption = "squeeze",
    window: WindowText = "-100,1100",
    axis: AxisOption = "axial",
    foreground_only: ForegroundOption = False,
    nan_fill: NanFillOption = None,
    split: Annotated[str, typer.Option(help="paper (8/1/3 volumes) or a split file.")] = "paper",
    exclude_bad: ExcludeOption = False,
    overwrite: OverwriteOption = False,
    workers: WorkersOption = None,
) -> None:
    """Prepare STS-3D: teeth in 12 labelled dental CTs; slices for the model, scores of whole volumes.

    It needs a registration with the organisers of the STS challenge; give the folder or archive that holds
    labelled/image and labelled/label as --source. Parts of a label under 64 voxels are removed.

    Examples:
        sdseg prepare sts3d --source labelled/
        sdseg prepare sts3d --source STS-3D.zip --size 512 --out data/sts3d-512
    """
    from sdseg_cli.core.data.benchmarks import STS3D

    prepare_benchmark(
        STS3D,
        source=source,
        out=out or Path("data") / STS3D.name,
        size=size,
        resize=resize,
        split=split,
        exclude_bad=exclude_bad,
        overwrite=overwrite,
        workers=workers,
        window=parse_window(window),
        axis=axis,
        foreground_only=foreground_only,
        nan_fill=nan_fill,
    )
