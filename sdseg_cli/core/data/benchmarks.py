"""The public data sets: where they are, what they look like unpacked, on which terms."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sdseg_cli.core.data.fundus import Crop, read_refuge
from sdseg_cli.core.data.images import natural_key
from sdseg_cli.core.data.pairs import Pairs, pair_folders
from sdseg_cli.core.data.raw_cases import Problem, RawCase
from sdseg_cli.core.data.volume_files import volume_suffix
from sdseg_cli.core.errors import DataError

CVC_SEQUENCE_ENDS = (
    *(25, 50, 67, 78, 103, 126, 151, 177, 199, 205, 227, 252, 277, 297, 317, 342, 363, 383, 408, 428),
    *(447, 466, 478, 503, 528, 546, 571, 591, 612),
)
"""Last frame of each of the 29 video sequences of CVC-ClinicDB, from the data set's own readme."""

BTCV_ORGANS: tuple[str, ...] = (
    *("spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta"),
    *("inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland"),
    "left adrenal gland",
)
"""The 13 organs of BTCV in the order of their numbers, 1 to 13."""
BTCV_EIGHT: tuple[int, ...] = (1, 2, 3, 4, 6, 7, 8, 11)
"""Numbers of the eight organs that TransUNet and its successors, SDSeg among them, score."""


@dataclass(frozen=True)
class Benchmark:
    """A public data set and how to read it.

    Attributes:
        name: its name in sdseg.
        title: its own name.
        classes: the background first.
        threshold: stored mask values above it are foreground.
        find: unpacked folder -> pairs.
        splits: word of ``--split`` -> file in ``recipes/splits``.
        cuts_groups: words of ``--split`` whose published counts cut through groups.
        licence: terms of use, as its owners state them.
        label_values: stored label -> class; None for masks read by their threshold.
        window: of volumes: the values that become black and white.
        smallest_component: of volumes: smaller parts of the foreground are removed, in voxels.
        url: public archive, None where one must register.
        sha256: of that archive, None where it is not known; it is then recorded.
        how_to_get: what to do without a URL.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    threshold: int | None
    find: Callable[[Path], Pairs]
    splits: Mapping[str, str]
    cuts_groups: frozenset[str]
    licence: str
    url: str | None
    sha256: str | None
    how_to_get: str
    label_values: Mapping[int, int] | None = None
    window: tuple[float, float] | None = None
    smallest_component: int = 0

    @property
    def holds_volumes(self) -> bool:
        """Whether its cases are volumes."""
        return self.window is not None


def find_kseg(root: Path) -> Pairs:
    """Find the pairs of Kvasir-SEG: ``Kvasir-SEG/{images,masks}/*.jpg``.

    Raises:
        DataError: the layout is not there.
    """
    home = _home_of(root, ("images", "masks"), "Kvasir-SEG/images and Kvasir-SEG/masks")
    return pair_folders(home / "images", home / "masks", root=home)


def find_cvc(root: Path) -> Pairs:
    """Find the pairs of CVC-ClinicDB; the group of a frame is its video sequence.

    Both layouts are read: ``{Original,Ground Truth}/N.tif``, and the mirror's ``PNG/...`` beside ``TIF/...``
    (the PNG files are taken then).

    Raises:
        DataError: the layout is not there.
    """
    home = _home_of(root, ("Original", "Ground Truth"), "Original and Ground Truth", prefer="PNG")
    return pair_folders(home / "Original", home / "Ground Truth", root=home, group_of=cvc_sequence)


def cvc_sequence(frame: str) -> str:
    """Give the video sequence of a frame, ``sequence-01`` to ``sequence-29``.

    Raises:
        DataError: there is no such frame.
    """
    if not (frame.isdecimal() and 1 <= int(frame) <= CVC_SEQUENCE_ENDS[-1]):
        raise DataError(
            f"CVC-ClinicDB: unexpected frame {frame!r}; frames are numbered 1 to {CVC_SEQUENCE_ENDS[-1]}. "
            "For other data use: sdseg prepare folder"
        )
    return f"sequence-{bisect_left(CVC_SEQUENCE_ENDS, int(frame)) + 1:02d}"


KSEG = Benchmark(
    name="kseg",
    title="Kvasir-SEG",
    classes=("background", "polyp"),
    threshold=127,
    find=find_kseg,
    splits={"paper": "kseg.yaml"},
    cuts_groups=frozenset(),
    licence="Research and education only; cite Jha et al., Kvasir-SEG: A Segmented Polyp Dataset (MMM 2020).",
    url="https://datasets.simula.no/downloads/kvasir-seg.zip",
    sha256=None,
    how_to_get="Fetch https://datasets.simula.no/downloads/kvasir-seg.zip (46 MB).",
)

CVC = Benchmark(
    name="cvc",
    title="CVC-ClinicDB",
    classes=("background", "polyp"),
    threshold=127,
    find=find_cvc,
    splits={"paper": "cvc.yaml", "sequence": "cvc-sequence.yaml"},
    cuts_groups=frozenset({"paper"}),
    licence="Research and education only; cite Bernal et al., WM-DOVA maps (CMIG 2015).",
    url=None,
    sha256=None,
    how_to_get=(
        "CVC-ClinicDB needs a registration: ask for it at https://polyp.grand-challenge.org/CVCClinicDB/ "
        "or take the mirror https://www.kaggle.com/datasets/balraj98/cvcclinicdb (a Kaggle account)."
    ),
)


def find_refuge(root: Path, crop: Crop) -> Pairs:
    """Find the pairs of REFUGE2: ``train|val|test/{images,masks}``.

    Args:
        root: the unpacked data.
        crop: how the part around the disc is found, see :mod:`sdseg_cli.core.data.fundus`.

    Raises:
        DataError: the layout is not there.
    """
    home = _home_of(root, ("train", "val", "test"), "train, val and test, each with images and masks")
    cases: list[RawCase] = []
    problems: list[Problem] = []
    for part in ("train", "val", "test"):
        for name in ("images", "masks"):
            if not (home / part / name).is_dir():
                raise DataError(f"{home / part}: expected the folders images and masks.")
        pairs = pair_folders(home / part / "images", home / part / "masks", root=home)
        cases += [replace(case, reader=partial(read_refuge, crop=crop)) for case in pairs.cases]
        problems += pairs.problems
    return Pairs(tuple(cases), tuple(problems))


def find_btcv(root: Path) -> Pairs:
    """Find the pairs of BTCV: ``RawData/Training/{img,label}/{img,label}00NN.nii.gz``; ids are the numbers.

    Raises:
        DataError: the layout is not there.
    """
    home = _home_of(
        root, ("img", "label"), "RawData/Training/img and RawData/Training/label", prefer="Training"
    )
    return _pair_by_number(home, "img", "label", r"^(?:img|label)(\d{4})$")


def find_sts3d(root: Path) -> Pairs:
    """Find the pairs of STS-3D: ``labelled/{image,label}/Teeth_00NN_0000.nii.gz``; ids are the numbers.

    Raises:
        DataError: the layout is not there.
    """
    home = _home_of(root, ("image", "label"), "labelled/image and labelled/label", prefer="labelled")
    return _pair_by_number(home, "image", "label", r"^Teeth_(\d{4})(?:_0000)?$")


def _pair_by_number(home: Path, images: str, labels: str, pattern: str) -> Pairs:
    """Pair the volumes of two folders by the number in their names."""
    expression = re.compile(pattern, re.IGNORECASE)
    found: list[dict[str, Path]] = []
    problems = []
    for folder in (home / images, home / labels):
        numbers: dict[str, Path] = {}
        for path in sorted(folder.iterdir(), key=lambda path: natural_key(path.name)):
            suffix = volume_suffix(path)
            if suffix is None:
                continue
            match = expression.match(path.name[: -len(suffix)])
            if match is None:
                problems.append(Problem(path.name, f"unexpected name in {folder.name}; expected {pattern}"))
            else:
                numbers[match.group(1)] = path
        found.append(numbers)
    scans, truths = found
    if not scans and not truths:
        raise DataError(f"{home}: no volumes in {images} and {labels}; expected .nii.gz files.")
    problems += [
        Problem(n, f"image {path.name} has no label") for n, path in scans.items() if n not in truths
    ]
    problems += [
        Problem(n, f"label {path.name} has no image") for n, path in truths.items() if n not in scans
    ]
    cases = tuple(
        RawCase(
            number,
            number,
            scans[number],
            truths[number],
            image_name=f"{images}/{scans[number].name}",
            label_name=f"{labels}/{truths[number].name}",
        )
        for number in sorted(scans.keys() & truths.keys())
    )
    return Pairs(cases, tuple(problems))


def refuge(crop: Crop) -> Benchmark:
    """REFUGE2, with the crop that the model is to see."""
    return Benchmark(
        name="refuge",
        title="REFUGE2",
        classes=("background", "cup"),
        threshold=None,
        find=partial(find_refuge, crop=crop),
        splits={"paper": "refuge.yaml"},
        cuts_groups=frozenset(),
        licence="Research only, by the terms of the challenge; cite Fang et al., REFUGE2 Challenge (2022).",
        url=None,
        sha256=None,
        how_to_get=(
            "REFUGE2 needs a registration: join the challenge at https://refuge.grand-challenge.org and "
            "fetch the folders train, val and test, each with images and masks."
        ),
    )


def btcv(organs: str) -> Benchmark:
    """BTCV with all 13 organs, the 8 of TransUNet, or these 8 as one foreground (``binary``)."""
    chosen = tuple(range(1, 14)) if organs == "13" else BTCV_EIGHT
    names = tuple(BTCV_ORGANS[number - 1] for number in chosen)
    values = dict.fromkeys(range(14), 0)
    values |= {number: 1 if organs == "binary" else index for index, number in enumerate(chosen, start=1)}
    return Benchmark(
        name="btcv",
        title="BTCV",
        classes=("background", "organs") if organs == "binary" else ("background", *names),
        threshold=None,
        find=find_btcv,
        splits={"paper": "btcv.yaml"},
        cuts_groups=frozenset(),
        licence="By the terms of the challenge, accepted at Synapse; cite Landman et al. (2015).",
        url=None,
        sha256=None,
        how_to_get=(
            "BTCV needs a registration at https://www.synapse.org (project syn3193805): accept the terms and "
            "fetch Abdomen/RawData.zip; it holds RawData/Training/img and RawData/Training/label."
        ),
        label_values=values,
        window=(-175.0, 250.0),
    )


STS3D = Benchmark(
    name="sts3d",
    title="STS-3D",
    classes=("background", "teeth"),
    threshold=0,
    find=find_sts3d,
    splits={"paper": "sts3d.yaml"},
    cuts_groups=frozenset(),
    licence="By the terms of the STS tooth segmentation challenge (MICCAI 2023).",
    url=None,
    sha256=None,
    how_to_get=(
        "STS-3D (the 3-D part of the STS tooth segmentation challenge of MICCAI 2023) needs a registration "
        "with its organisers; give the folder or archive that holds labelled/image and labelled/label."
    ),
    window=(-100.0, 1100.0),
    smallest_component=64,
)

BENCHMARKS: Mapping[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (KSEG, CVC, refuge("truth"), btcv("binary"), STS3D)
}


def phantom_cases(kind: str, *, cases: int, seed: int, size: int) -> list[RawCase]:
    """List the cases of a phantom data set; each is drawn when it is prepared.

    Args:
        kind: see ``phantom.PHANTOM_KINDS``.
        cases: how many.
        seed: of the series.
        size: about the height and width of the pictures, in pixels.
    """
    from sdseg_cli.core.data.phantom import make_phantom

    digits = len(str(max(cases - 1, 0)))
    names = [f"{kind}-{index:0{digits}d}" for index in range(cases)]
    return [
        RawCase(name, name, arrays=partial(make_phantom, kind, seed=seed, index=index, size=size))
        for index, name in enumerate(names)
    ]


def _home_of(root: Path, wanted: tuple[str, ...], layout: str, prefer: str = "") -> Path:
    """The folder, at most three levels below ``root``, that holds the wanted folders."""
    homes = [
        folder
        for folder in (root, *(found for depth in range(1, 4) for found in sorted(root.glob("*/" * depth))))
        if all((folder / name).is_dir() for name in wanted)
    ]
    if not homes:
        found = ", ".join(sorted(entry.name for entry in root.iterdir())[:8]) or "nothing"
        raise DataError(
            f"{root}: the layout is not the published one: expected the folders {layout}, found {found}. "
            "Give the archive as it was published, or use: sdseg prepare folder --images A --masks B"
        )
    return next((home for home in homes if home.name == prefer), homes[0])
