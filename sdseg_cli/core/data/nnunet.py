"""nnU-Net's raw data sets: ``dataset.json``, ``imagesTr`` and ``labelsTr``, of both its versions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdseg_cli.core.data.images import IMAGE_SUFFIXES, natural_key
from sdseg_cli.core.data.pairs import Pairs
from sdseg_cli.core.data.raw_cases import Problem, RawCase
from sdseg_cli.core.data.volume_files import SUFFIX_FORMATS
from sdseg_cli.core.errors import DataError, UsageError
from sdseg_cli.core.files import visible_files

_CHANNEL_DIGITS = 4


@dataclass(frozen=True)
class NNUNetDataset:
    """What ``dataset.json`` says.

    Attributes:
        root: the folder that holds it.
        name: of the data set.
        classes: names, the background first.
        channels: names of the channels.
        ending: of the files, with its dot.
        licence: terms as far as they are stated.
    """

    root: Path
    name: str
    classes: tuple[str, ...]
    channels: tuple[str, ...]
    ending: str
    licence: str

    @property
    def holds_volumes(self) -> bool:
        """Whether the files are volumes."""
        return self.ending in SUFFIX_FORMATS


def read_nnunet(root: Path) -> NNUNetDataset:
    """Read ``dataset.json`` of nnU-Net, version 1 or 2.

    Raises:
        UsageError: the folder holds none.
        DataError: it cannot be read, or asks for what sdseg cannot do (regions, an ignored label).
    """
    file = root / "dataset.json"
    if not file.is_file():
        raise UsageError(
            f"{root}: no dataset.json. Expected the folder of one raw data set of nnU-Net, like "
            "nnUNet_raw/Dataset001_Name, with imagesTr and labelsTr."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        channels = content.get("channel_names", content.get("modality"))
        names = [str(channels[key]) for key in sorted(channels, key=int)]
        labels = dict(content["labels"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{file}: not a dataset.json of nnU-Net ({type(error).__name__}: {error}). Expected "
            "channel_names (or modality) and labels."
        ) from error
    ending = str(content.get("file_ending", ".nii.gz")).lower()
    if ending not in SUFFIX_FORMATS and ending not in IMAGE_SUFFIXES:
        known = ", ".join([*SUFFIX_FORMATS, *sorted(IMAGE_SUFFIXES)])
        raise DataError(f"{file}: file_ending {ending!r} is not read; expected one of {known}.")
    return NNUNetDataset(
        root,
        str(content.get("name") or root.name),
        _classes(file, labels),
        tuple(names),
        ending,
        str(content.get("licence") or content.get("license") or "not stated"),
    )


def find_nnunet(
    dataset: NNUNetDataset, channels: Sequence[int] | None, group_of: Callable[[str], str] | None = None
) -> Pairs:
    """Find the training cases.

    Args:
        dataset: from :func:`read_nnunet`.
        channels: the channel to use, or three that become red, green and blue; None takes the only one.
        group_of: case id -> patient; None puts every case in a group of its own.

    Raises:
        UsageError: the channels do not fit.
        DataError: a folder is missing or empty.
    """
    images, labels = dataset.root / "imagesTr", dataset.root / "labelsTr"
    for folder in (images, labels):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; expected imagesTr and labelsTr beside dataset.json.")
    ids = {name: path for path in _files(labels, dataset.ending) if (name := _stem(path, dataset.ending))}
    if not ids:
        raise DataError(f"{labels}: no label ends in {dataset.ending}, as dataset.json says they do.")
    by_channel: dict[str, dict[int, Path]] = {}
    for path in _files(images, dataset.ending):
        stem = _stem(path, dataset.ending)
        case_id, _, number = stem.rpartition("_")
        if len(number) == _CHANNEL_DIGITS and number.isdecimal():
            by_channel.setdefault(case_id, {})[int(number)] = path
    # A colour picture is one file, though its three channels have names.
    is_colour = not dataset.holds_volumes and all(set(files) == {0} for files in by_channel.values())
    wanted = (0,) if is_colour else _chosen(dataset, channels)
    cases, problems = [], []
    for case_id, label in sorted(ids.items(), key=lambda item: natural_key(item[0])):
        files = by_channel.pop(case_id, {})
        missing = [number for number in wanted if number not in files]
        if missing:
            names = ", ".join(f"{case_id}_{number:04d}{dataset.ending}" for number in missing)
            problems.append(Problem(case_id, f"imagesTr has no {names}"))
            continue
        first, *others = (files[number] for number in wanted)
        group = case_id if group_of is None else group_of(case_id)
        cases.append(
            RawCase(
                case_id,
                group,
                first,
                label,
                channel_paths=tuple(others),
                image_name=f"imagesTr/{first.name}",
                label_name=f"labelsTr/{label.name}",
            )
        )
    problems += [Problem(case_id, f"labelsTr has no {case_id}{dataset.ending}") for case_id in by_channel]
    return Pairs(tuple(cases), tuple(problems))


def _chosen(dataset: NNUNetDataset, channels: Sequence[int] | None) -> tuple[int, ...]:
    count = len(dataset.channels)
    listing = ", ".join(f"{number} ({name})" for number, name in enumerate(dataset.channels))
    if channels is None:
        if count == 1:
            return (0,)
        raise UsageError(
            f"{dataset.root}: {count} channels ({listing}), and an image has one or three. Choose with "
            "--channels: one of them, or three that become red, green and blue, like --channels 0,1,2 "
            "(a channel may be given twice)."
        )
    if len(channels) not in (1, 3) or not all(0 <= number < count for number in channels):
        raise UsageError(f"--channels {','.join(map(str, channels))}: expected one or three of {listing}.")
    if len(channels) == 3 and not dataset.holds_volumes:
        raise UsageError("--channels: pictures in a file a channel cannot be joined; choose one channel.")
    return tuple(channels)


def _classes(file: Path, labels: dict[str, Any]) -> tuple[str, ...]:
    """Names by number, from {name: number} (version 2) or {number: name} (version 1)."""
    if all(str(key).isdecimal() for key in labels):
        labels = {str(name): int(number) for number, name in labels.items()}
    regions = [name for name, value in labels.items() if isinstance(value, list)]
    if regions:
        raise DataError(
            f"{file}: {', '.join(regions)} are regions made of several labels, and sdseg predicts one label "
            "a pixel. Give each label a name of its own in a copy of dataset.json."
        )
    if "ignore" in labels:
        raise DataError(
            f"{file}: label {labels['ignore']} is to be ignored in training, which sdseg cannot do. Leave "
            "out the cases that hold it, and the label from a copy of dataset.json."
        )
    try:
        names = {int(number): name for name, number in labels.items()}
    except (TypeError, ValueError, OverflowError):
        names = {}
    if len(labels) < 2 or set(names) != set(range(len(labels))):
        shown = ", ".join(map(str, labels.values()))
        raise DataError(f"{file}: labels {shown}; expected 0 (background), 1, 2, ... without a gap.")
    return ("background", *(names[number] for number in range(1, len(names))))


def _files(folder: Path, ending: str) -> list[Path]:
    found = [path for path in visible_files(folder) if path.name.lower().endswith(ending)]
    return sorted(found, key=lambda path: natural_key(path.name))


def _stem(path: Path, ending: str) -> str:
    return path.name[: -len(ending)]
