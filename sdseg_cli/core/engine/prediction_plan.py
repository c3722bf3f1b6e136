"""Which files are predicted, and where every output goes; needs no torch and refuses what would overwrite.

A mistake found here costs a second and not a night.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sdseg_cli.core.data.dicom import DICOM_SUFFIXES
from sdseg_cli.core.data.images import IMAGE_SUFFIXES, natural_key
from sdseg_cli.core.data.volume_files import volume_suffix
from sdseg_cli.core.errors import DataError, UsageError
from sdseg_cli.core.files import visible_files
from sdseg_cli.core.manifest import unfinished

if TYPE_CHECKING:
    from sdseg_cli.core.data.dicom import DicomSeries

MaskFormat = Literal["same", "nifti", "nrrd", "mha", "dicom-seg"]
OVERLAYS, PROBABILITIES, UNCERTAINTY = "overlays", "probabilities", "uncertainty"
_CHANNEL = re.compile(r"(?P<case>.+)_[0-9]{4}", re.DOTALL)  # as nnU-Net names the files of a case
LONGEST_NAME = 255  # bytes of one path component on every common file system
_MASK_SUFFIXES: dict[str, str] = {"nifti": ".nii.gz", "nrrd": ".nrrd", "mha": ".mha", "dicom-seg": ".dcm"}
# A header apart from its voxels could be written by half, so such files give masks in one piece.
_SAME_SUFFIXES = {".nii": ".nii", ".nii.gz": ".nii.gz", ".nrrd": ".nrrd", ".nhdr": ".nrrd"}
_SAME_SUFFIXES |= {".mha": ".mha", ".mhd": ".mha"}


@dataclass(frozen=True)
class PredictionTask:
    """One image or volume and the files its prediction gives.

    ``case_id`` is the path inside the given folder without its suffix (with it where two files differ in
    nothing else); a DICOM series is named by its description. It names the outputs and, with the seed,
    decides the noise. ``probabilities`` has no suffix yet: the number of classes decides between .png and
    .npz for an image; those of a volume are NIfTI. ``path`` of a DICOM series is its folder. ``channels`` are
    the files of red, green and blue where the model was trained on such; ``path`` is then one that is there.
    A volume without them is a case that such a model cannot take.
    """

    case_id: str
    path: Path
    file: str
    mask: Path
    overlay: Path | None = None
    probabilities: Path | None = None
    uncertainty: Path | None = None
    is_volume: bool = False
    series: DicomSeries | None = None
    channels: tuple[Path, ...] = ()

    @property
    def probability_files(self) -> list[Path]:
        """The files the probabilities can be in."""
        return probability_files(self.probabilities, is_volume=self.is_volume)

    @property
    def outputs(self) -> tuple[Path, ...]:
        """Every file that could be written, for both kinds of probability files."""
        paths: list[Path | None] = [self.mask, self.overlay, self.uncertainty]
        paths += self.probability_files
        return tuple(path for path in paths if path is not None)

    @property
    def is_done(self) -> bool:
        """Whether all that was asked for is there already. Files get their name only when whole."""
        single = (self.mask, self.overlay, self.uncertainty)
        if not all(path is None or path.exists() for path in single):
            return False
        files = self.probability_files
        return not files or any(path.exists() for path in files)


@dataclass(frozen=True)
class _Found:
    """An input; ``relative`` to the folder it was found in, ``bare`` the same without suffix."""

    path: Path
    relative: Path
    bare: Path
    is_volume: bool = False
    series: DicomSeries | None = None
    channels: tuple[Path, ...] = ()


def _ignore_stray(path: Path, reason: str) -> None:
    pass


def plan_predictions(
    scans: Sequence[Path],
    out: Path,
    *,
    recursive: bool = False,
    overlays: bool = False,
    probabilities: bool = False,
    uncertainty: bool = False,
    mask_format: MaskFormat = "same",
    channels: Sequence[int] = (),
    on_stray: Callable[[Path, str], None] = _ignore_stray,
) -> list[PredictionTask]:
    """Find the images, volumes and DICOM series and give every output a name of its own.

    Args:
        scans: folders, or single files.
        out: folder of the outputs; masks lie in it directly, the rest in subfolders.
        recursive: also look into subfolders of the folders; they are kept in ``out``.
        overlays, probabilities, uncertainty: which further files are wanted.
        mask_format: of the masks of volumes; ``same`` is NIfTI for DICOM. Masks of images are PNG always.
        channels: numbers of the channels that the model takes as red, green and blue; where they differ,
            volumes are found as nnU-Net names them, CASE_0000.nii.gz, CASE_0001.nii.gz, ..., and joined.
        on_stray: is told of files beside DICOM series that belong to none, with the reason.

    Returns:
        One task an image, volume or series, sorted by folder as given and name.

    Raises:
        UsageError: a path does not exist, nothing to predict is found, not one volume is a channel where such
            are needed, or an output would fall onto an input or onto another output.
    """
    found = [one for scan in scans for one in _find(scan, out, recursive, on_stray)]
    if len(set(channels)) > 1:
        found = _joined_channels(found, channels)
    relatives = [one.relative for one in found]
    twice = [str(relative) for relative, count in Counter(relatives).items() if count > 1]
    if twice:
        raise UsageError(
            f"{len(twice)} images have the same name in several of the given folders (first: "
            f"{readable(twice[0])}), so their masks would overwrite each other. Give the folder above them "
            "with --recursive, or predict each folder into its own --out."
        )
    if mask_format == "dicom-seg":
        _refuse_what_is_no_series(found)
    tasks = []
    for one, name in zip(found, _unique_names(found), strict=True):
        folder = name.parent
        extra = ".nii.gz" if one.is_volume else ".png"
        numbers = folder / _fitting(name.name, extra)
        tasks.append(
            PredictionTask(
                case_id=readable(name.as_posix()),
                path=one.path,
                file=readable(one.relative.as_posix()),
                mask=out / folder / _fitting(name.name, _mask_suffix(one, mask_format)),
                overlay=out / OVERLAYS / folder / _fitting(name.name, ".png") if overlays else None,
                probabilities=(
                    out / PROBABILITIES / numbers.with_name(numbers.name[: -len(extra)])
                    if probabilities
                    else None
                ),
                uncertainty=out / UNCERTAINTY / numbers if uncertainty else None,
                is_volume=one.is_volume,
                series=one.series,
                channels=one.channels,
            )
        )
    _refuse_collisions(tasks)
    return tasks


@dataclass(frozen=True)
class Shard:
    """The part of the cases that one of several workers takes: ``number`` (from 1) of ``count``."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``I/N``.

        Raises:
            UsageError: it is none, or I is not from 1 to N.
        """
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text.strip())
        number, count = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= number <= count:
            raise UsageError(f"--shard {text!r}: expected I/N with I from 1 to N, such as 2/4.")
        return cls(number, count)

    def of(self, tasks: Sequence[PredictionTask]) -> list[PredictionTask]:
        """Every N-th task from the I-th on: with the same inputs, each task is in exactly one shard."""
        return list(tasks[self.number - 1 :: self.count])


def split_existing(
    tasks: Sequence[PredictionTask], out: Path
) -> tuple[list[PredictionTask], list[PredictionTask]]:
    """Separate the tasks into (to do, already done). A mask that a killed call did not list is not done."""
    todo: list[PredictionTask] = []
    done: list[PredictionTask] = []
    unlisted = unfinished(out)
    for task in tasks:
        is_done = task.is_done and task.mask.relative_to(out).as_posix() not in unlisted
        (done if is_done else todo).append(task)
    return todo, done


@contextlib.contextmanager
def unchanged(task: PredictionTask, files: Sequence[Path]) -> Iterator[None]:
    """Refuse a case one of whose files is written, replaced or removed while the block reads them.

    Raises:
        DataError: which one it was.
        FileNotFoundError: what the task names is gone already.
    """
    task.path.stat()
    before = [_state(path) for path in files]
    yield
    for path, state in zip(files, before, strict=True):
        if _state(path) != state:
            what = "the file" if path == task.path else f"its file {readable(path.name)}"
            raise DataError(f"{what} changed while it was read. Predict it again once it is complete.")


def _state(path: Path) -> tuple[int, int] | None:
    """Changes when a file is written; None where there is none, which reading it tells."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def refuse_existing(tasks: Sequence[PredictionTask], out: Path) -> None:
    """Refuse to overwrite; UsageError names the first file that is in the way, and how many there are."""
    existing = [path for task in tasks for path in task.outputs if path.exists()]
    if existing:
        raise UsageError(
            f"{len(existing)} of the files to be written exist already in {readable(out)} (first: "
            f"{readable(existing[0].relative_to(out))}). Pass --skip-existing to predict only what is "
            "missing, --overwrite to replace them, or another --out."
        )


def remove_outputs(tasks: Iterable[PredictionTask]) -> list[Path]:
    """Remove what is to be replaced, all of it before the first new mask is written; give what was removed.

    Otherwise an interrupted replacement leaves masks of two models side by side, and those of the old one
    would count as done when it goes on.
    """
    tasks = list(tasks)
    inputs = {path.resolve() for task in tasks for path in (task.path, *task.channels)}
    removed = []
    for task in tasks:
        for path in {*task.outputs, *_masks_of_other_formats(task)}:
            if path.resolve() in inputs:
                continue
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                path.unlink()
                removed.append(path)
    return removed


def prepare_folder(out: Path) -> None:
    """Make the output folder and see that it can be written to, before any model is loaded."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(prefix=".sdseg-", dir=out):
            pass
    except OSError as error:
        raise UsageError(
            f"the output folder {readable(out)} cannot be written to ({error.strerror or error}). "
            "Choose another --out, or mend its permissions."
        ) from error


def readable(name: str | Path) -> str:
    """A path as text that can always be printed and stored: undecodable bytes become backslash escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def probability_files(stem: Path | None, *, is_volume: bool = False) -> list[Path]:
    """The files a case's probabilities can be in.

    16-bit PNG for one class and .npz for several of an image; NIfTI for a volume.
    """
    if stem is None:
        return []
    suffixes = (".nii.gz",) if is_volume else (".png", ".npz")
    return [stem.with_name(stem.name + suffix) for suffix in suffixes]


def _find(scan: Path, out: Path, recursive: bool, on_stray: Callable[[Path, str], None]) -> Iterator[_Found]:
    """Everything to be predicted in a folder, outputs of ours left out, or a single file."""
    if scan.is_dir():
        if scan.resolve() == out.resolve():
            raise UsageError(
                f"{readable(out)} is the folder of the images; masks in it would be taken for images the "
                f"next time. Choose another --out, {readable(out / 'masks')} for instance."
            )
        inside = _found_in(scan, out, recursive, on_stray)
        if not inside:
            hint = "" if recursive else " directly in it; pass --recursive to look into its subfolders"
            raise UsageError(
                f"{readable(scan)}: no PNG, JPEG, TIFF or BMP image, no NIfTI, NRRD or MetaImage volume and "
                f"no DICOM series was found{hint}. Check the folder."
            )
        yield from inside
    elif scan.exists():  # by name, whatever its suffix: a file that is no image fails when it is read
        if scan.suffix.lower() in DICOM_SUFFIXES:
            series = _series_of([scan], on_stray)
            yield from series
            if series:
                return
        yield _found_file(scan, Path(scan.name))
    else:
        raise UsageError(f"{readable(scan)} does not exist. Give an image, a volume, or a folder of them.")


def _found_in(scan: Path, out: Path, recursive: bool, on_stray: Callable[[Path, str], None]) -> list[_Found]:
    holds_out = recursive and _is_inside(out, scan)
    files = [
        path for path in visible_files(scan, recursive=recursive) if not (holds_out and _is_inside(path, out))
    ]
    found: list[_Found] = []
    others: dict[Path, list[Path]] = {}
    for path in files:
        if path.suffix.lower() in IMAGE_SUFFIXES or volume_suffix(path):
            found.append(_found_file(path, path.relative_to(scan)))
        else:
            others.setdefault(path.parent, []).append(path)
    for folder, members in others.items():
        for one in _series_of(members, on_stray):
            place = folder.relative_to(scan) / one.relative
            found.append(replace(one, relative=place, bare=place))
    return sorted(found, key=lambda one: natural_key(one.relative.as_posix()))


def _found_file(path: Path, relative: Path) -> _Found:
    suffix = volume_suffix(path)
    if suffix is None:
        return _Found(path, relative, relative.with_suffix(""))
    return _Found(path, relative, relative.with_name(relative.name[: -len(suffix)]), is_volume=True)


def _series_of(files: Sequence[Path], on_stray: Callable[[Path, str], None]) -> list[_Found]:
    from sdseg_cli.core.data.dicom import find_series

    found = find_series(files)
    for path, reason in found.strays:
        on_stray(path, reason)
    return [
        _Found(series.folder, Path(series.name), Path(series.name), is_volume=True, series=series)
        for series in found.series
    ]


def _joined_channels(found: Sequence[_Found], channels: Sequence[int]) -> list[_Found]:
    """Join the volumes of a case to one, by name.

    A volume that is named otherwise gets no channels and fails when it is read, as one that lacks some does.
    """
    joined: list[_Found] = []
    cases: set[tuple[Path, str]] = set()
    for one in found:
        match = _CHANNEL.fullmatch(one.bare.name) if one.series is None else None
        if one.is_volume and match is None:
            joined.append(replace(one, bare=one.relative))  # the name without suffix may be that of a case
            continue
        if match is None or not one.is_volume:
            joined.append(one)
            continue
        suffix = one.path.name[len(one.bare.name) :]
        case = one.path.with_name(match["case"])
        if (case, suffix) not in cases:
            cases.add((case, suffix))
            files = tuple(case.with_name(f"{case.name}_{number:04d}{suffix}") for number in channels)
            joined.append(replace(one, bare=one.bare.with_name(case.name), channels=files))
    if joined and all(one.is_volume and not one.channels for one in joined):
        are_series = any(one.series is not None for one in joined)
        raise UsageError(
            f"{expected_channels(channels)} Not one of the {len(joined)} volumes is named so (first: "
            f"{readable(joined[0].relative)}). "
            + ("Convert the DICOM series to volumes named so." if are_series else "Rename them.")
        )
    return joined


def expected_channels(channels: Sequence[int]) -> str:
    """Say how the files of a case must be named for a model that takes several channels."""
    names = ", ".join(f"CASE_{number:04d}" for number in sorted(set(channels)))
    return (
        f"The model was trained on the channels {', '.join(map(str, channels))} of every case: expected "
        f"files named {names} (and .nii.gz, .nii, .nrrd, .mha) in one folder."
    )


def _masks_of_other_formats(task: PredictionTask) -> list[Path]:
    """Where the mask of a volume would lie in the other formats that it can be asked for in."""
    if not task.is_volume:
        return []
    suffixes = {*_MASK_SUFFIXES.values(), *_SAME_SUFFIXES.values()}
    own = max((suffix for suffix in suffixes if task.mask.name.endswith(suffix)), key=len)
    return [task.mask.with_name(task.mask.name[: -len(own)] + suffix) for suffix in suffixes - {own}]


def _mask_suffix(one: _Found, mask_format: MaskFormat) -> str:
    if not one.is_volume:
        return ".png"
    if mask_format != "same":
        return _MASK_SUFFIXES[mask_format]
    return ".nii.gz" if one.series is not None else _SAME_SUFFIXES[volume_suffix(one.path) or ".nii.gz"]


def _refuse_what_is_no_series(found: Sequence[_Found]) -> None:
    from sdseg_cli.core.data.dicom_seg import require_highdicom

    require_highdicom()
    others = [one.relative for one in found if one.is_volume and one.series is None]
    if others:
        raise UsageError(
            f"--format dicom-seg needs DICOM series, and {len(others)} of the volumes are none (first: "
            f"{readable(others[0])}). Predict them on their own, with --format same."
        )


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _unique_names(found: Sequence[_Found]) -> list[Path]:
    """Names without suffix; where several inputs would share one, each of them keeps its suffix."""
    names = [one.bare for one in found]
    while True:
        counts = Counter(names)
        kept = [one.relative if counts[name] > 1 else name for name, one in zip(names, found, strict=True)]
        if kept == names:
            return names
        names = kept


def _fitting(name: str, suffix: str) -> str:
    """Shorten a file name that the suffix made too long; a hash of the whole keeps it unique."""
    encoded = os.fsencode(name + suffix)
    if len(encoded) <= LONGEST_NAME:
        return name + suffix
    mark = "~" + hashlib.sha256(encoded).hexdigest()[:12]
    # Dropping a character cut in the middle: a broken one could not be printed.
    head = encoded[: LONGEST_NAME - len(mark) - len(suffix)].decode("utf-8", "ignore")
    return f"{head}{mark}{suffix}"


def _refuse_collisions(tasks: Sequence[PredictionTask]) -> None:
    resolved = _Resolver()
    inputs = {resolved(path): path for task in tasks for path in _inputs_of(task)}
    writer: dict[Path, str] = {}
    for task in tasks:
        for path in task.outputs:
            if resolved(path) in inputs:
                raise UsageError(
                    f"the mask of {task.file} would be written onto the input {readable(path)}. "
                    "Choose an --out that is not the folder of the images."
                )
            other = writer.setdefault(path, task.file)
            if other != task.file:
                raise UsageError(
                    f"{readable(path)} would be written for both {other} and {task.file}: the folder names "
                    f"{OVERLAYS}, {PROBABILITIES} and {UNCERTAINTY} are used for the extra outputs. Rename "
                    "that folder of images, or predict it on its own."
                )


def _inputs_of(task: PredictionTask) -> tuple[Path, ...]:
    return (task.path, *task.channels) if task.series is None else task.series.files


class _Resolver:
    """Resolves the folder of a path, each folder once: with thousands of files that is what takes time."""

    def __init__(self) -> None:
        self._folders: dict[Path, Path] = {}

    def __call__(self, path: Path) -> tuple[Path, str]:
        folder = self._folders.get(path.parent)
        if folder is None:
            folder = self._folders[path.parent] = path.parent.resolve()
        return folder, path.name
