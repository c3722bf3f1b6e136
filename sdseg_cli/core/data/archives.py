"""Unpacking archives of strangers: nothing outside the folder, nothing but plain files, nothing endless."""

from __future__ import annotations

import contextlib
import errno
import lzma
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from sdseg_cli.core.errors import DataError
from sdseg_cli.core.files import is_zip

MAX_BYTES = 32 * 2**30
"""Largest sum of unpacked files."""
MAX_RATIO = 100
"""Largest ratio of unpacked to packed size; images hardly compress, bombs do by a thousand."""
RATIO_FREE_BYTES = 64 * 2**20
"""Below this unpacked size the ratio is not looked at."""
MAX_MEMBERS = 1_000_000

_CHUNK = 2**20
_DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError),
    # The last two: tarfile reads a header's extension in one piece, whatever size it claims.
    *(EOFError, NotImplementedError, OverflowError, MemoryError),
)
# What a name in an archive leads to: too long, a file and a folder at once, or nothing for this disk.
_OF_THE_NAMES = frozenset(
    {errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EILSEQ, errno.ELOOP}
)

Progress = Callable[[int, int | None], None]  # bytes done, bytes in all (None if unknown)


def is_archive(path: Path) -> bool:
    """Whether a file is, or by its name claims to be, an archive."""
    name = path.name.lower()
    claims = name.endswith((".zip", ".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz"))
    return path.is_file() and (claims or is_zip(path) or tarfile.is_tarfile(path))


@contextlib.contextmanager
def unpacked(
    archive: Path, beside: Path, *, max_bytes: int = MAX_BYTES, progress: Progress | None = None
) -> Iterator[Path]:
    """Unpack a zip or tar into a temporary folder that is removed when the block ends, however it ends.

    Args:
        archive: zip, or tar (plain, gzip, bzip2, xz).
        beside: folder to make the temporary one in; made if missing.
        max_bytes: largest sum of unpacked files, in bytes.
        progress: called with (bytes done, bytes in all or None).

    Raises:
        DataError: the archive is damaged, too large, or holds a path or link that leads outside.
    """
    existed = beside.exists()
    beside.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".sdseg-", suffix=".unpacked", dir=beside))
    try:
        unpack(archive, folder, max_bytes=max_bytes, progress=progress)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not existed:
            with contextlib.suppress(OSError):
                beside.rmdir()  # only if nothing else came into it


def unpack(
    archive: Path, folder: Path, *, max_bytes: int = MAX_BYTES, progress: Progress | None = None
) -> None:
    """Unpack into an empty folder; see :func:`unpacked`, which also cleans up."""
    budget = _Budget(archive, folder, max_bytes, progress)
    try:
        with archive.open("rb") as file:
            magic = file.read(8)
        if is_zip(archive):
            _unpack_zip(archive, folder, budget)
        elif tarfile.is_tarfile(archive):
            _unpack_tar(archive, folder, budget)
        else:
            raise DataError(_unknown(archive, magic))
    except _DAMAGE as error:
        raise _damaged(archive, error) from error
    except FileNotFoundError as error:
        raise DataError(f"{archive}: no such file.") from error
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in {None, *_OF_THE_NAMES}:
            raise  # the disk, not the archive
        if isinstance(error, OSError) and error.filename is not None:
            raise _impossible(archive, folder, error) from error
        raise _damaged(archive, error) from error


class _Budget:
    """Counts what is written and refuses more than is allowed, whatever the headers say."""

    def __init__(self, archive: Path, folder: Path, max_bytes: int, progress: Progress | None) -> None:
        self._archive = archive
        self._folder = folder
        packed = archive.stat().st_size if archive.exists() else 0
        self._limit = min(max_bytes, max(RATIO_FREE_BYTES, packed * MAX_RATIO))
        self._packed = packed
        self._progress = progress
        self._done = 0
        self._members = 0
        self.total: int | None = None
        self._taken: set[str] = set()

    def announce(self, total: int) -> None:
        """Check the size that the headers promise, before anything is written."""
        self.total = total
        self._check(total)
        free = shutil.disk_usage(self._folder).free
        if total > free:
            raise DataError(
                f"{self._archive}: needs {_size(total)} unpacked, {_size(free)} are free in "
                f"{self._folder.parent}. Make room, or unpack it elsewhere and give that folder as --source."
            )

    def claim(self, name: str) -> Path:
        """Give the place of a member; refuse names that lead outside or come twice."""
        self._members += 1
        if self._members > MAX_MEMBERS:
            raise DataError(f"{self._archive}: more than {MAX_MEMBERS} files. This is no image archive.")
        relative = PurePosixPath(name)
        windows = PureWindowsPath(name)
        outside = relative.is_absolute() or windows.drive or windows.root or ".." in windows.parts
        if outside or "\\" in name or "\0" in name or not relative.parts:
            raise DataError(
                f"{self._archive}: the path {name!r} leads outside the archive's folder. Nothing was "
                "unpacked; do not trust this file."
            )
        key = str(relative)
        if key in self._taken:
            raise DataError(f"{self._archive}: holds {name!r} twice. Unpack it by hand and check it.")
        self._taken.add(key)
        return self._folder.joinpath(*relative.parts)

    def copy(self, source: IO[bytes], target: Path, expected: int) -> None:
        """Write one file, counting real bytes."""
        target.parent.mkdir(parents=True, exist_ok=True)
        written = 0
        with target.open("xb") as file:
            while chunk := source.read(_CHUNK):
                written += len(chunk)
                self._done += len(chunk)
                self._check(self._done)
                file.write(chunk)
                if self._progress is not None:
                    self._progress(self._done, self.total)
        if written != expected:
            raise EOFError(f"{target.name} has {written} bytes, expected {expected}")

    def _check(self, size: int) -> None:
        if size > self._limit:
            raise DataError(
                f"{self._archive}: unpacks to {_size(size)} or more from {_size(self._packed)}; at most "
                f"{_size(self._limit)} are accepted (a decompression bomb?). If you trust it, unpack it by "
                "hand and give the folder as --source."
            )


def _unpack_zip(archive: Path, folder: Path, budget: _Budget) -> None:
    with zipfile.ZipFile(archive) as pack:
        members = [member for member in pack.infolist() if not _is_clutter(member.filename)]
        budget.announce(sum(member.file_size for member in members))
        places = []
        for member in members:  # all names are judged before the first byte is written
            mode = member.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _not_plain(archive, member.filename)
            if member.flag_bits & 1:
                raise DataError(
                    f"{archive}: {member.filename} is encrypted. Unpack it by hand and give the folder "
                    "as --source."
                )
            places.append(budget.claim(member.filename))
        for member, place in zip(members, places, strict=True):
            if member.is_dir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                with pack.open(member) as source:
                    budget.copy(source, place, member.file_size)


def _unpack_tar(archive: Path, folder: Path, budget: _Budget) -> None:
    with tarfile.open(archive) as pack:
        for member in pack:  # one pass: a second one would decompress everything again
            if _is_clutter(member.name) or member.name in (".", "./"):
                continue
            if not (member.isreg() or member.isdir()):
                raise _not_plain(archive, member.name)
            place = budget.claim(member.name)
            tarfile.data_filter(member, str(folder))  # the standard library's own judgement as well
            if member.isdir():
                place.mkdir(parents=True, exist_ok=True)
                continue
            source = pack.extractfile(member)
            if source is None:
                raise _not_plain(archive, member.name)
            with source:
                budget.copy(source, place, member.size)


def _is_clutter(name: str) -> bool:
    """What macOS adds beside the files; it looks like images but is none."""
    parts = PurePosixPath(name).parts
    return "__MACOSX" in parts or (bool(parts) and parts[-1].startswith("._"))


def _not_plain(archive: Path, name: str) -> DataError:
    return DataError(
        f"{archive}: {name!r} is a link or device; only plain files are unpacked. Nothing was kept; "
        "do not trust this file."
    )


def _damaged(archive: Path, error: Exception) -> DataError:
    return DataError(
        f"{archive}: the archive is damaged or cut short ({str(error) or type(error).__name__}). "
        "Delete it and fetch it again; nothing was unpacked."
    )


def _impossible(archive: Path, folder: Path, error: OSError) -> DataError:
    name = str(error.filename).removeprefix(f"{folder}/")
    return DataError(
        f"{archive}: {name[:200]!r} cannot be made in {folder.parent} ({error.strerror}): the name is one "
        "that this disk does not take, too long, or a file's and a folder's at once. Nothing was kept: "
        "unpack it by hand, elsewhere, and give the folder as --source."
    )


def _unknown(archive: Path, magic: bytes) -> str:
    if not magic:
        return f"{archive}: the file is empty (0 bytes). Fetch it again."
    if magic.startswith(b"PK") or archive.suffix.lower() == ".zip":
        return f"{archive}: not a whole zip archive, most likely cut short. Fetch it again."
    if magic.startswith((b"Rar!", b"7z\xbc\xaf")):
        return f"{archive}: RAR and 7z are not read. Unpack it by hand and give the folder as --source."
    return f"{archive}: neither a zip nor a tar archive, or cut short. Fetch it again or give a folder."


def _size(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
