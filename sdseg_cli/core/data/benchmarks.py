"""The public data sets: where they are, what they look like unpacked, on which terms."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sdseg_cli.core.data.pairs import Pairs, pair_folders
from sdseg_cli.core.data.preparation import RawCase
from sdseg_cli.core.errors import DataError

CVC_SEQUENCE_ENDS = (
    *(25, 50, 67, 78, 103, 126, 151, 177, 199, 205, 227, 252, 277, 297, 317, 342, 363, 383, 408, 428),
    *(447, 466, 478, 503, 528, 546, 571, 591, 612),
)
"""Last frame of each of the 29 video sequences of CVC-ClinicDB, from the data set's own readme."""


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
        url: public archive, None where one must register.
        sha256: of that archive, None where it is not known; it is then recorded.
        how_to_get: what to do without a URL.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    threshold: int
    find: Callable[[Path], Pairs]
    splits: Mapping[str, str]
    cuts_groups: frozenset[str]
    licence: str
    url: str | None
    sha256: str | None
    how_to_get: str


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

BENCHMARKS: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in (KSEG, CVC)}


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


def _home_of(root: Path, wanted: tuple[str, str], layout: str, prefer: str = "") -> Path:
    """The folder, at most three levels below ``root``, that holds the two wanted folders."""
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
