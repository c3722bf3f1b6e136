"""Files and folders that are either whole or absent, never half-written under their final name."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sdseg_cli.core.errors import UsageError

EXPORT_FILE = "export.json"  # beside an exported graph, by which its folder is known
# Of a folder of scores, which is known by the first.
SUMMARY_FILE, CASES_FILE, REPORT_FILE = "summary.json", "cases.csv", "report.html"


def write_whole(path: Path, payload: bytes) -> None:
    """Write a file through a temporary one beside it, so that ``path`` is never half-written.

    Args:
        path: the final name; its folder must exist.
        payload: the file's bytes.

    Raises:
        OSError: the disk is full or the folder cannot be written; ``path`` is then as it was before.
    """
    # The temporary name is short and independent of ``path``: a name of 255 bytes must still work.
    descriptor, name = tempfile.mkstemp(prefix=".sdseg-", suffix=".partial", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_UMASK)  # mkstemp makes private files
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that takes its name, replacing it, when the block ends well.

    Every file is flushed to the disk before the renaming. When the block fails, ``path`` is as it was and
    nothing is left beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".sdseg-", suffix=".partial", dir=path.parent))
    retired = temporary.with_suffix(".old")
    try:
        yield temporary
        temporary.chmod(0o777 & ~_UMASK)  # mkdtemp makes private folders
        for file in temporary.rglob("*"):
            make_shared(file)
            _flush(file)
        _flush(temporary)
        try:
            if path.exists():
                path.replace(retired)
            temporary.replace(path)
        except BaseException:  # a signal between the two renames must not cost the old folder either
            if retired.exists() and not path.exists():
                retired.replace(path)
            raise
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


@contextlib.contextmanager
def whole_folder(path: Path, *, overwrite: bool, ours: str) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that takes its name when the block ends well.

    Args:
        path: the final folder.
        overwrite: replace an existing folder, if it is one of ours.
        ours: a file whose presence shows that an existing folder was written by sdseg.

    Raises:
        UsageError: ``path`` exists and may not be replaced.
    """
    refuse_existing(path, overwrite=overwrite, ours=ours)
    with atomic_folder(path) as temporary:
        yield temporary
        refuse_existing(path, overwrite=overwrite, ours=ours)  # somebody may have come first


def refuse_existing(path: Path, *, overwrite: bool, ours: str) -> None:
    """Raise a UsageError where writing the folder ``path`` would destroy something.

    Args:
        path: the folder to be written.
        overwrite: whether an existing folder of ours may be replaced.
        ours: a file whose presence shows that an existing folder was written by sdseg.
    """
    refuse_unwritable(path, path.parent)
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir():
        raise UsageError(f"{path}: exists and is not a folder. Choose another --out.")
    if not any(path.iterdir()):
        return
    if not (path / ours).is_file():
        raise UsageError(
            f"{path}: the folder exists and holds files that sdseg did not write (no {ours}). "
            "It is left as it is: choose another --out."
        )
    if not overwrite:
        raise UsageError(
            f"{path}: the folder exists already. Pass --overwrite to replace it, or choose another --out."
        )


def refuse_unwritable(path: Path, folder: Path) -> None:
    """Raise a UsageError where ``path`` cannot be written; to be asked before the work, which may take hours.

    Args:
        path: what is to be written, for the message.
        folder: where files are made for it; if it is not there yet, the nearest one above it counts.
    """
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(prefix=".sdseg-", dir=nearest):
            pass
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {nearest}: {error.strerror or error}. Choose another --out, or mend "
            "its permissions."
        ) from error


def make_shared(path: Path) -> None:
    """Give a file the permissions of an ordinary new one: safetensors makes files for their owner alone."""
    if path.is_file() and not path.is_symlink():
        path.chmod(path.stat().st_mode | (0o666 & ~_UMASK))


def visible_files(folder: Path, *, recursive: bool = False) -> Iterator[Path]:
    """The files of a folder, or also of its subfolders, without hidden ones and those in hidden folders."""
    for path in folder.rglob("*") if recursive else folder.iterdir():
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not is_hidden and path.is_file():
            yield path


def sha256_of(path: Path) -> str:
    """Hash a file.

    Returns:
        The SHA-256 as 64 hexadecimal digits.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def joint_sum(sums: Mapping[str, str]) -> str:
    """One SHA-256 of several files: of the lines ``SUM  NAME`` by name, as ``sha256sum`` prints them."""
    lines = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def sum_of_files(paths: Sequence[Path]) -> str:
    """The SHA-256 of a file, or the :func:`joint_sum` of several by their names."""
    if len(paths) == 1:
        return sha256_of(paths[0])
    return joint_sum({path.name: sha256_of(path) for path in paths})


def is_zip(path: Path) -> bool:
    """Whether a file is a zip archive; the standard library's own test raises for some that are damaged."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_umask() -> int:
    # Reading the mask means setting it; done once, at import, before there are threads.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


_UMASK = _read_umask()
