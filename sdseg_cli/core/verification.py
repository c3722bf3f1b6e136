"""Folders of ours against their manifests: is every file there, unaltered, and nothing else?

A folder is known by a file in it (:data:`MARKS`). Folders of ours inside it, such as the checkpoints and the
model of a run, are parts with manifests of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sdseg_cli.core.errors import DataError, UsageError
from sdseg_cli.core.files import EXPORT_FILE, REPORT_FILE, SUMMARY_FILE, sha256_of
from sdseg_cli.core.integrity import DAMAGE, MANIFEST_FILE, NOT_OURS, checked_sums, read_object
from sdseg_cli.core.manifest import JOURNAL_FOLDER, read_journal, unfinished
from sdseg_cli.core.run_directory import RunDirectory

Fault = Literal[
    "missing", "truncated", "altered", "unlisted", "unreadable", "no manifest", "damaged manifest"
]

# File by which a folder is known -> its kind; the first that is found holds.
MARKS = {
    "run.json": "run",
    "dataset.json": "prepared dataset",
    "prediction.json": "predictions",
    EXPORT_FILE: "exported model",
    "model_index.json": "model",
    MANIFEST_FILE: "",  # which says its kind itself
    SUMMARY_FILE: "scores",
}
SHARED_FILES = frozenset({"summary.csv", "prediction.json", REPORT_FILE})  # of all calls into a folder
_NETWORK_FILE = "config.json"  # of an autoencoder or another start; inside a model it marks nothing
_TRACKERS = frozenset({"tensorboard", "wandb", "mlruns"})  # of a run: written by others, and after it ended
_LEFTOVERS = (".partial", ".old")
_KILLED = "the call was killed at it; the same command with --skip-existing makes it again"
_DEPTH = 3  # folders between one that holds folders of ours, such as an ablation's, and these


@dataclass(frozen=True)
class Difference:
    """Something that is not as the manifest says; ``path`` begins with the folder that was given."""

    path: Path
    fault: Fault
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.fault}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class Part:
    """A folder and the files that its manifest lists.

    Attributes:
        folder: of the part.
        kind: see :data:`MARKS`.
        sums: path inside the folder -> SHA-256.
        sizes: path inside the folder -> bytes, where they are known.
        differences: found without reading the files: what is missing or not listed.
    """

    folder: Path
    kind: str
    sums: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    differences: tuple[Difference, ...] = ()

    def files(self) -> Iterator[tuple[Part, str]]:
        """The listed files that are there, to be compared one by one with :meth:`compare`."""
        absent = {difference.path for difference in self.differences}
        return ((self, name) for name in self.sums if self.folder / name not in absent)

    def compare(self, name: str) -> Difference | None:
        """Read a file; None where it is as it was written."""
        path, expected = self.folder / name, self.sizes.get(name)
        try:
            found = path.stat().st_size
            if expected is not None and found < expected:
                return Difference(path, "truncated", f"{found} bytes, expected {expected}")
            if expected is not None and found > expected:
                return Difference(path, "altered", f"{found} bytes, expected {expected}")
            digest = sha256_of(path)
        except OSError as error:
            return Difference(path, "unreadable", error.strerror or str(error))
        if digest != self.sums[name]:
            return Difference(path, "altered", f"SHA-256 {digest[:12]}, expected {self.sums[name][:12]}")
        return None


def find_parts(path: Path) -> list[Part]:
    """The parts of a folder, itself first; nothing but manifests is read.

    Raises:
        UsageError: it is no folder of ours, or a run that is going on.
    """
    kind = _kind_of(path)
    if kind is None and (path / _NETWORK_FILE).is_file():
        kind = "network"
    held = [] if kind is not None else list(_held(path, _DEPTH))
    if kind is None and not held:
        what = (
            "does not exist" if not path.exists() else "is a file" if path.is_file() else "is none of these"
        )
        raise UsageError(
            f"{path} {what}: expected a run directory (run.json), a model folder (model_index.json), a "
            f"prepared dataset (dataset.json), a folder of masks (prediction.json), of scores (summary.json) "
            f"or an exported model ({EXPORT_FILE}); or a folder that holds such."
        )
    parts: list[Part] = []
    for folder, its_kind in held if kind is None else [(path, kind)]:
        if its_kind == "run" and _status_of(folder) == "running":
            raise UsageError(f"run {folder} is going on. Verify it once it has ended.")
        parts += _parts(folder, its_kind)
    return parts


def _held(path: Path, depth: int) -> Iterator[tuple[Path, str]]:
    """The folders of ours in one that is none, such as an ablation's: its runs and its tables."""
    if not path.is_dir():
        return
    for folder in sorted(inner for inner in path.iterdir() if inner.is_dir()):
        kind = None if folder.name.startswith(".") else _kind_of(folder)
        if kind is not None:
            yield folder, kind
        elif depth > 1 and not folder.name.startswith("."):
            yield from _held(folder, depth - 1)


def _status_of(run: Path) -> str:
    """The status of a run, ``damaged`` where run.json cannot be read: it is compared like any file."""
    try:
        return RunDirectory(run).status
    except (DataError, RecursionError):
        return "damaged"


def _kind_of(folder: Path) -> str | None:
    return next((kind for mark, kind in MARKS.items() if (folder / mark).is_file()), None)


def _parts(folder: Path, kind: str) -> Iterator[Part]:
    found, inner = _walk(folder, kind)
    try:
        kind, sums, sizes = _listing(folder, kind)
    except FileNotFoundError:
        yield Part(folder, kind, differences=(Difference(folder, "no manifest", _why_none(folder, kind)),))
    except (OSError, *DAMAGE) as error:
        detail = f"{type(error).__name__}: {error}"
        yield Part(folder, kind, differences=(Difference(folder, "damaged manifest", detail),))
    else:
        missing = [Difference(folder / name, "missing") for name in sums if not (folder / name).is_file()]
        killed = unfinished(folder) if kind == "predictions" else set()
        unlisted = [
            Difference(folder / name, "unlisted", _KILLED if name in killed else "")
            for name in found
            if name not in sums
        ]
        yield Part(folder, kind, sums, sizes, (*missing, *unlisted))
    for place, inner_kind in inner:
        yield from _parts(place, inner_kind)


def _walk(folder: Path, kind: str) -> tuple[list[str], list[tuple[Path, str]]]:
    """Files that belong to a folder, by their paths inside it, and the folders of ours in it."""
    files: list[str] = []
    inner: list[tuple[Path, str]] = []
    for place, folders, names in os.walk(folder):
        here = Path(place)
        kept = []
        for name in sorted(folders):
            within = _kind_of(here / name)
            if name.endswith(_LEFTOVERS):
                files.append((here / name).relative_to(folder).as_posix())
            elif within is not None:
                inner.append((here / name, within))
            elif not name.startswith(".") and not (kind == "run" and here == folder and name in _TRACKERS):
                kept.append(name)
        folders[:] = kept
        own = {MANIFEST_FILE, *NOT_OURS} if here == folder else set()
        own |= {"dataset.json"} if kind == "prepared dataset" and here == folder else set()
        if kind == "predictions" and here == folder / JOURNAL_FOLDER:
            own |= {name for name in names if name.endswith(".jsonl")}
        for name in sorted(names):
            if name not in own and (not name.startswith(".") or name.endswith(_LEFTOVERS)):
                files.append((here / name).relative_to(folder).as_posix())
    return files, inner


def _listing(folder: Path, kind: str) -> tuple[str, dict[str, str], dict[str, int]]:
    """Kind, checksums and sizes by a folder's manifest.

    Raises:
        FileNotFoundError: there is none.
        ValueError, KeyError, TypeError, AttributeError: it is of another form.
    """
    if kind == "predictions":
        sums: dict[str, str] = {}
        sizes: dict[str, int] = {}
        shared: dict[str, set[str]] = {}
        for line in read_journal(folder):
            for name in line.get("removed", []):
                sums.pop(name, None)
                sizes.pop(name, None)
            sums |= line.get("files", {})
            sizes |= line.get("bytes", {})
            for name in SHARED_FILES & set(line.get("files", {})):
                shared.setdefault(name, set()).add(line["files"][name])
        for name, known in shared.items():
            # Rewritten by every call: which was last cannot be told by the clocks of several machines.
            path = folder / name
            found = sha256_of(path) if path.is_file() else ""
            if name in sums and found in known:
                sums[name], sizes[name] = found, path.stat().st_size
        return kind, *_checked(sums, sizes)
    if kind == "prepared dataset":
        content = read_object(folder / "dataset.json")
        if "checksums" not in content:
            raise FileNotFoundError
        return kind, *_checked(content["checksums"], content["files"])
    content = read_object(folder / MANIFEST_FILE)
    named = "checkpoint" if "progress" in content else str(content.get("kind", kind))
    return named, *_checked(content["files"], content.get("bytes", {}))


def _checked(sums: Any, sizes: Any) -> tuple[dict[str, str], dict[str, int]]:
    return checked_sums(sums), {name: int(size) for name, size in sizes.items()}


def _why_none(folder: Path, kind: str) -> str:
    if kind == "run":
        status = _status_of(folder)
        return (
            f"{status}; a run writes it when it ends: this one was killed, or made by an older sdseg. "
            "Recipe, metrics and pictures are not checked"
        )
    remedy = {
        "prepared dataset": "dataset.json has no checksums: prepare it again to have them",
        "predictions": f"there is no {JOURNAL_FOLDER}/: predict again with --overwrite to have one",
        "scores": "measure again with --overwrite to have one",
    }
    return "made by an older sdseg or by others; " + remedy.get(kind, "make it again to have one")
