"""From ``--source`` (a folder, an archive, a URL, or nothing) to a folder of raw files."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sdseg_cli.core.data.archives import Progress, is_archive, unpacked
from sdseg_cli.core.data.download import download, is_url
from sdseg_cli.core.errors import DataError, UsageError
from sdseg_cli.core.files import sha256_of


@dataclass(frozen=True)
class RawSource:
    """Raw files, ready to be read while the source is open.

    Attributes:
        root: folder of the files.
        description: what was given, for ``dataset.json``.
        sha256: of the archive; None for a folder.
    """

    root: Path
    description: str
    sha256: str | None


@contextlib.contextmanager
def opened_source(
    source: str,
    *,
    beside: Path,
    cache: Path,
    sha256: str | None = None,
    on_download: Progress | None = None,
    on_unpack: Progress | None = None,
    on_retry: Callable[[str], None] | None = None,
) -> Iterator[RawSource]:
    """Open a source; what had to be unpacked is removed at the end, what was fetched stays in the cache.

    Args:
        source: folder, archive or URL.
        beside: where to unpack (the disk that the prepared data goes to).
        cache: folder for downloads.
        sha256: expected hash of a download, if known.
        on_download: progress of the download, in bytes.
        on_unpack: progress of the unpacking, in bytes.
        on_retry: called with a sentence when a download is continued.

    Raises:
        UsageError: there is no such file or folder.
        DataError: it cannot be fetched or unpacked.
    """
    if is_url(source):
        # A folder of its own for every address: equal file names must not be taken for one another.
        place = cache / hashlib.sha256(source.encode()).hexdigest()[:12]
        archive = download(source, place, sha256=sha256, progress=on_download, retrying=on_retry)
        if not is_archive(archive):
            archive.unlink()
            raise DataError(
                f"{source}: what came is neither a zip nor a tar archive (an error page?). It was removed; "
                "look at the address in a browser, or fetch it by hand and pass --source FILE."
            )
    else:
        archive = Path(source).expanduser()
        if archive.is_dir():
            yield RawSource(archive, source, None)
            return
        if not archive.exists():
            raise UsageError(f"{source}: no such file or folder. Check --source.")
    digest = sha256_of(archive)
    with unpacked(archive, beside, progress=on_unpack) as root:
        yield RawSource(root, source, digest)
