"""Which mask belongs to which image: by name, and every doubt is named."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from sdseg_cli.core.data.dicom import DicomSeries, find_series
from sdseg_cli.core.data.dicom_seg import is_label_volume
from sdseg_cli.core.data.images import list_images, natural_key
from sdseg_cli.core.data.raw_cases import Problem, RawCase
from sdseg_cli.core.data.volume_files import volume_suffix
from sdseg_cli.core.errors import DataError, UsageError
from sdseg_cli.core.files import visible_files


@dataclass(frozen=True)
class Pairs:
    """The result of pairing two folders.

    Attributes:
        cases: the pairs, in natural order of their ids; not read yet.
        problems: images without a mask, masks without an image, names that fit twice or give one case id.
    """

    cases: tuple[RawCase, ...]
    problems: tuple[Problem, ...]


def pair_folders(
    images: Path,
    masks: Path,
    *,
    root: Path | None = None,
    mask_suffix: str = "",
    group_of: Callable[[str], str] | None = None,
) -> Pairs:
    """Pair the images (or volumes) of one folder with the masks of another, subfolders included.

    ``a.jpg`` belongs to ``a.png``, ``b.nii.gz`` to ``b.nrrd``; where several files share a stem, the whole
    name decides. A DICOM series is named as ``sdseg predict`` names it, ``folder/description``, or like its
    folder where that holds no other. Accents are compared by what they mean, not by how the file system
    spells them.

    Args:
        images: folder of images.
        masks: folder of masks.
        root: folder that the recorded names are relative to; None records ``images/...``, ``masks/...``.
        mask_suffix: what mask stems carry behind the image's stem, like ``_mask``.
        group_of: case id -> group; None puts every case in a group of its own.

    Raises:
        DataError: a folder is missing or holds no image.
    """
    image_files = _list_files(images, lambda path: volume_suffix(path) is not None)
    mask_files = _list_files(masks, is_label_volume)
    series, strays = _find_series(images, masks, mask_files, mask_suffix)
    image_files = _in_order([*image_files, *series], images)
    wanted = ((images, image_files, "images", "DICOM series"), (masks, mask_files, "masks", "DICOM-SEG"))
    for folder, files, what, dicom in wanted:
        if not files:
            raise DataError(
                f"{folder}: no {what} found; expected PNG, JPEG, TIFF or BMP files, or volumes (NIfTI, "
                f"NRRD, MetaImage, {dicom}). Check the path."
            )
    image_stems = _by_stem(image_files, images, "", whole=series)
    mask_stems = _by_stem(mask_files, masks, mask_suffix)
    cases: list[RawCase] = []
    problems = [Problem(_flat(_name(path, images)), reason) for path, reason in strays]
    for stem, files in image_stems.items():
        mates = mask_stems.pop(stem, [])
        if not mates:
            reason = f"image {_name(files[0], images)} has no mask in {masks}"
            problems.append(Problem(_flat(stem), reason))
        elif len(files) == 1 and len(mates) == 1:
            cases.append(_case(_flat(stem), files[0], mates[0], images, masks, root, group_of))
        else:
            resolved = _by_whole_name(files, mates, images, masks)
            for file, mate in resolved:
                case_id = _flat(_name(file, images))
                cases.append(_case(case_id, file, mate, images, masks, root, group_of))
            if not resolved:
                names = ", ".join(file.name for file in (*files, *mates))
                problems.append(
                    Problem(_flat(stem), f"several files share this name ({names}): which belong?")
                )
    problems += [
        Problem(_flat(stem), f"mask {_name(mate, masks)} has no image in {images}")
        for stem, mates in mask_stems.items()
        for mate in mates
    ]
    if not cases:
        raise DataError(_nothing_fits(images, masks, image_stems, mask_files))
    cases = [replace(case, series=series.get(case.image_path or images)) for case in cases]
    cases.sort(key=lambda case: natural_key(case.case_id))
    counts = Counter(case.case_id for case in cases)
    problems += [
        Problem(case_id, f"{count} images lead to this case id; rename them")
        for case_id, count in counts.items()
        if count > 1
    ]
    return Pairs(tuple(case for case in cases if counts[case.case_id] == 1), tuple(problems))


def group_by_pattern(pattern: str) -> Callable[[str], str]:
    """Make a function case id -> group from a regular expression.

    The group is the first parenthesis of the match, or the whole match without one.

    Raises:
        UsageError: the expression is not valid; later, a case id does not match it.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--group-by {pattern!r}: not a regular expression ({error}).") from error

    def group_of(case_id: str) -> str:
        match = expression.search(case_id)
        if match is None or not (group := match.group(1 if expression.groups else 0)):
            raise UsageError(
                f"--group-by {pattern!r}: no group in case {case_id!r}; every case needs one. "
                "The group is the first parenthesis, like 'patient([0-9]+)_'."
            )
        return group

    return group_of


def _find_series(
    images: Path, masks: Path, mask_files: Sequence[Path], mask_suffix: str
) -> tuple[dict[Path, DicomSeries], list[tuple[Path, str]]]:
    """The DICOM series below a folder by the path they are named after, and the files that belong to none."""
    stems = _by_stem(mask_files, masks, mask_suffix)
    found: dict[Path, DicomSeries] = {}
    strays: list[tuple[Path, str]] = []
    members: dict[Path, list[Path]] = {}
    for path in visible_files(images, recursive=True):
        members.setdefault(path.parent, []).append(path)
    for folder, files in sorted(members.items()):  # parents first: their series may be named like a folder
        inside = find_series(files)
        strays += inside.strays
        for one in inside.series:
            path = folder / one.name
            is_alone = len(inside.series) == 1 and folder != images
            if is_alone and folder not in found and _normal(_name(path, images)) not in stems:
                path = folder
            found[path] = one
    return found, strays


def _by_stem(
    files: Sequence[Path], folder: Path, suffix: str, whole: Collection[Path] = ()
) -> dict[str, list[Path]]:
    """Files by name without suffix; those of ``whole`` have none."""
    stems: dict[str, list[Path]] = {}
    for file in files:
        name = _name(file, folder)
        stem = _normal(name if file in whole else _without_suffix(name))
        if suffix and not stem.endswith(suffix):
            continue
        stems.setdefault(stem.removesuffix(suffix), []).append(file)
    return stems


def _by_whole_name(
    files: Sequence[Path], mates: Sequence[Path], images: Path, masks: Path
) -> list[tuple[Path, Path]]:
    """Pairs of equal whole names, or nothing unless that settles every file."""
    by_name = {_normal(_name(mate, masks)): mate for mate in mates}
    pairs = [(file, by_name.pop(_normal(_name(file, images)), None)) for file in files]
    settled = [(file, mate) for file, mate in pairs if mate is not None]
    return settled if len(settled) == len(files) and not by_name else []


def _case(
    case_id: str,
    image: Path,
    mask: Path,
    images: Path,
    masks: Path,
    root: Path | None,
    group_of: Callable[[str], str] | None,
) -> RawCase:
    names = (
        (f"images/{_name(image, images)}", f"masks/{_name(mask, masks)}")
        if root is None
        else (_name(image, root), _name(mask, root))
    )
    group = case_id if group_of is None else group_of(case_id)
    return RawCase(case_id, group, image, mask, image_name=names[0], label_name=names[1])


def _nothing_fits(
    images: Path, masks: Path, image_stems: dict[str, list[Path]], mask_files: Sequence[Path]
) -> str:
    image_stem = next(iter(image_stems))
    message = (
        f"no image in {images} has a mask in {masks}: names must be equal up to the extension "
        f"(first image {image_stem!r}, first mask {mask_files[0].name!r})."
    )
    stems = [_normal(_without_suffix(file.name)) for file in mask_files]
    endings = {stem[len(image_stem) :] for stem in stems if stem.startswith(image_stem)}
    if len(endings) == 1:
        message += f" Did you mean --mask-suffix {endings.pop()}?"
    return message


def _list_files(folder: Path, is_wanted_volume: Callable[[Path], bool]) -> list[Path]:
    """The images and volumes of a folder and its subfolders, in natural order."""
    volumes = [file for file in visible_files(folder, recursive=True) if is_wanted_volume(file)]
    return _in_order([*list_images(folder, recursive=True), *volumes], folder)


def _in_order(files: Sequence[Path], folder: Path) -> list[Path]:
    return sorted(files, key=lambda file: natural_key(_name(file, folder)))


def _without_suffix(name: str) -> str:
    """A name without its suffix; ``.nii.gz`` is one."""
    suffix = volume_suffix(Path(name))
    return name[: -len(suffix)] if suffix else PurePosixPath(name).with_suffix("").as_posix()


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _flat(name: str) -> str:
    """A case id holds no slash, since outputs are named after it."""
    return _normal(name).replace("/", "__")
