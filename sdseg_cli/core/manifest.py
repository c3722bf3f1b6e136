"""Manifests: what a folder of results holds, file by file with its SHA-256, and what it was made with.

A checkpoint, a model, a run and a folder of scores have a ``manifest.json``, written last, when the folder
is whole. A prepared dataset lists its files in ``dataset.json``. Masks are added to a folder by several calls
and processes, so that their list is a file of lines for each, in ``provenance/``, see :class:`Journal`.
``verification.py`` compares folders with these lists, ``integrity.py`` what is loaded.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sdseg_cli import __version__
from sdseg_cli.core.files import joint_sum, sha256_of
from sdseg_cli.core.integrity import DAMAGE, MANIFEST_FILE, NOT_OURS, read_object
from sdseg_cli.core.run_directory import RunDirectory, atomic_write, library_versions, now, to_json

JOURNAL_FOLDER = "provenance"
_NETWORK = ("config.json", "*.safetensors")  # files of a network that diffusers saved


def made_with() -> dict[str, Any]:
    """Time, command and versions, for a manifest or a report."""
    return {"written": now(), "command": sys.argv, "versions": library_versions()}


def write_manifest(
    folder: Path, kind: str, *, files: Iterable[Path] | None = None, **fields: Any
) -> dict[str, str]:
    """Write the manifest of a folder that is otherwise finished.

    Args:
        folder: what is listed.
        kind: of the folder, as ``sdseg verify`` names it.
        files: those to list; None is every file in it.
        fields: what else the manifest says, before its lists.

    Returns:
        Path inside the folder -> SHA-256.
    """
    listed = sorted(files if files is not None else (path for path in folder.rglob("*") if path.is_file()))
    listed = [path for path in listed if path != folder / MANIFEST_FILE]
    sums = {path.relative_to(folder).as_posix(): sha256_of(path) for path in listed}
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in listed}
    content = {"kind": kind, "sdseg": __version__, **fields, "files": sums, "bytes": sizes}
    atomic_write(folder / MANIFEST_FILE, to_json(content, indent=2) + "\n")
    return sums


def write_run_manifest(run: RunDirectory) -> None:
    """Write the manifest of a run that ended, in whichever way: recipe, run.json, metrics and pictures.

    Checkpoints, the model and the scores have manifests of their own; the trackers' files have none.
    """
    files = [run.recipe_file, run.run_file, run.metrics_file, run.root / "curves.png"]
    files += run.validation.glob("*.png")
    write_manifest(run.root, "run", files=[path for path in files if path.is_file()])


def model_folder(location: str) -> Path | None:
    """The folder of a model: as given, or that of a hub id in the hub's cache; None where there is none."""
    if Path(location).is_dir():
        return Path(location)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError

    try:
        found = try_to_load_from_cache(location, "model_index.json")
    except HFValidationError:  # a path that is not there
        return None
    return Path(found).parent if isinstance(found, str) else None


def model_sum(location: str | Path) -> str | None:
    """The :func:`~sdseg_cli.core.files.joint_sum` of a model's files now, without its manifest and its card.

    An autoencoder that the model refers to, rather than holds, counts as if it lay in ``autoencoder/``.

    Args:
        location: folder or hub id of a model, an exported model or a decoder.

    Returns:
        64 hexadecimal digits; None where there is no such folder, in the hub's cache neither.
    """
    folder = model_folder(str(location))
    if folder is None:
        return None
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    paths |= _referred(folder)
    return joint_sum(
        {
            name: sha256_of(path)
            for name, path in paths.items()
            if name != MANIFEST_FILE and name not in NOT_OURS and not name.startswith(".")
        }
    )


def _referred(folder: Path) -> dict[str, Path]:
    """The files of the autoencoder that a model refers to, if it does and they are in a folder.

    That of a hub id or the built-in one is held fast by the checksum in model_index.json alone.
    """
    try:
        place = Path(read_object(folder / "model_index.json")["autoencoder_reference"]["location"])
    except (OSError, *DAMAGE):
        return {}
    place = place / "vae" if (place / "vae").is_dir() else place
    return {f"autoencoder/{path.name}": path for name in _NETWORK for path in place.glob(name)}


class Journal:
    """The list of a folder that several calls and processes write into, each a file of lines of its own.

    The first line says what the call is (``call``: command, versions, model ...) and what it is to write
    (``planned``); every later one names its call and lists files with size and SHA-256. A line is written in
    one piece, at once after its files: a process that is killed leaves no file unlisted but those it was at,
    and :func:`unfinished` knows them.

    Args:
        folder: of the results.
        about: what the first line says of the call.
        planned: files that it is to write.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], planned: Iterable[Path] = ()) -> None:
        self._folder = folder
        self._call = uuid.uuid4().hex[:12]
        self._path = folder / JOURNAL_FOLDER / f"{self._call}.jsonl"
        self._path.parent.mkdir(exist_ok=True)
        self._lock = threading.Lock()
        self._torn = False
        names = [path.relative_to(folder).as_posix() for path in planned]
        self._append({"sdseg": __version__, **made_with(), **about, "planned": names})

    def add(self, files: Iterable[Path], **about: Any) -> None:
        """List files that were just written, and what they were made from."""
        paths = {path.relative_to(self._folder).as_posix(): path for path in files}
        sums = {name: sha256_of(path) for name, path in paths.items()}
        sizes = {name: path.stat().st_size for name, path in paths.items()}
        self._append({**about, "files": sums, "bytes": sizes})

    def remove(self, paths: Iterable[Path]) -> None:
        """Say of files that they are no more, whoever listed them."""
        self._append({"removed": sorted(path.relative_to(self._folder).as_posix() for path in paths)})

    def _append(self, record: Mapping[str, Any]) -> None:
        line = to_json({"call": self._call, "time": time.time(), **record})
        with self._lock:
            begin = b"\n" if self._torn else b""
            self._torn = True  # unless all of it gets onto the disk
            with self._path.open("ab") as file:
                file.write(begin + line.encode("utf-8", "backslashreplace") + b"\n")
            self._torn = False


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """The lines of all journals of a folder, in the order of their time; one that a kill tore is left out.

    The last line about a file holds.

    Raises:
        FileNotFoundError: there is none.
        OSError: one cannot be read.
    """
    files = sorted((folder / JOURNAL_FOLDER).glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(folder / JOURNAL_FOLDER)
    records = []
    for line in b"\n".join(file.read_bytes() for file in files).splitlines():
        try:
            record = json.loads(line)
            records.append((float(record["time"]), record))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return [record for _, record in sorted(records, key=lambda pair: pair[0])]


def unfinished(folder: Path) -> set[str]:
    """Files that a call was to write and no call has listed: if they are there, it was killed at them."""
    planned: set[str] = set()
    listed: set[str] = set()
    try:
        for line in read_journal(folder):
            planned |= set(line.get("planned", []))
            listed = (listed - set(line.get("removed", []))) | set(line.get("files", {}))
    except (OSError, *DAMAGE):
        return set()
    return planned - listed
