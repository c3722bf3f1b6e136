"""Fetching an archive: checked against its hash, continued where it broke off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sdseg_cli.core.data.archives import Progress
from sdseg_cli.core.errors import DataError, UsageError

ATTEMPTS = 4
TIMEOUT_S = 30.0
_CHUNK = 2**16  # bytes; a break loses less than that


def is_url(source: str) -> bool:
    """Whether ``--source`` names something on the web."""
    return urlsplit(source).scheme in ("http", "https", "ftp")


def download(
    url: str,
    folder: Path,
    *,
    sha256: str | None = None,
    progress: Progress | None = None,
    retrying: Callable[[str], None] | None = None,
) -> Path:
    """Fetch a file into ``folder`` unless it is there already.

    What was received before a break stays in ``<name>.partial`` and is continued, within this call and by
    the next one, where the server supports ranges.

    Args:
        url: http or https.
        folder: where the file goes; made if missing.
        sha256: expected hash, 64 hexadecimal digits; None accepts what comes.
        progress: called with (bytes done, bytes in all or None).
        retrying: called with a sentence before each further attempt.

    Returns:
        The file.

    Raises:
        UsageError: not an http address.
        DataError: the file cannot be fetched, or is not the expected one; the message says what to do.
    """
    import pooch
    import requests

    if urlsplit(url).scheme not in ("http", "https"):
        raise UsageError(f"{url}: only http and https are fetched. Fetch it by hand and give the file.")
    name = Path(unquote(urlsplit(url).path)).name or "download"
    downloader = _Resuming(folder / f"{name}.partial", progress, retrying)
    pooch.get_logger().setLevel("ERROR")  # one screen: the caller says what is going on
    try:
        folder.mkdir(parents=True, exist_ok=True)
        expected = f"sha256:{sha256}" if sha256 else None
        file = Path(pooch.retrieve(url, expected, fname=name, path=folder, downloader=downloader))
    except requests.RequestException as error:
        kept = f" What came is kept in {downloader.partial}." if downloader.partial.exists() else ""
        raise DataError(
            f"{url}: cannot be fetched ({_short(error)}).{kept} Run the same command again later, or fetch "
            "it by hand and pass --source FILE."
        ) from error
    except ValueError as error:
        if sha256 is None:
            raise
        raise DataError(
            f"{url}: the file received is not the expected one (its SHA-256 is not {sha256}). It was "
            "removed. Try again, or fetch it by hand and pass --source FILE."
        ) from error
    return file


class _Resuming:
    """A downloader for pooch that continues a partial file."""

    def __init__(
        self, partial: Path, progress: Progress | None, retrying: Callable[[str], None] | None
    ) -> None:
        self.partial = partial
        self._tag = partial.with_name(partial.name + ".etag")
        self._progress = progress
        self._retrying = retrying

    def __call__(self, url: str, output_file: str, _pooch: object, check_only: bool = False) -> None:
        from requests import ConnectionError as Broken
        from requests import Timeout
        from requests.exceptions import ChunkedEncodingError

        broken_off = (Broken, Timeout, ChunkedEncodingError)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._fetch(url)
                break
            except broken_off as error:
                if attempt == ATTEMPTS or _never_connected(error):
                    raise
                if self._retrying is not None:
                    self._retrying(
                        f"{url}: broken off ({_short(error)}), attempt {attempt + 1} of {ATTEMPTS}"
                    )
        self.partial.replace(output_file)
        self._tag.unlink(missing_ok=True)

    def _fetch(self, url: str) -> None:
        import requests

        have = self.partial.stat().st_size if self.partial.exists() else 0
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if self._tag.exists():  # the server restarts by itself if the file has changed meanwhile
                headers["If-Range"] = self._tag.read_text(encoding="utf-8")
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
            if response.status_code == requests.codes.requested_range_not_satisfiable:
                # Either complete already or not the same file any more: the hash of the whole decides
                # in the first case, a fresh start is right in the second.
                if response.headers.get("Content-Range") == f"bytes */{have}":
                    return
                self.partial.unlink()
                raise requests.ConnectionError("the partial file does not fit, starting again")
            response.raise_for_status()
            begins = f"bytes {have}-"
            continued = response.status_code == requests.codes.partial_content and response.headers.get(
                "Content-Range", ""
            ).startswith(begins)
            if not continued:
                have = 0
            tag = response.headers.get("ETag", "")
            if tag and not tag.startswith("W/"):
                self._tag.write_text(tag, encoding="utf-8")
            else:
                self._tag.unlink(missing_ok=True)
            length = response.headers.get("Content-Length")
            total = have + int(length) if length is not None and length.isdecimal() else None
            with self.partial.open("ab" if continued else "wb") as file:
                for chunk in response.iter_content(_CHUNK):
                    file.write(chunk)
                    have += len(chunk)
                    if self._progress is not None:
                        self._progress(have, total)
            if total is not None and have < total:
                raise requests.ConnectionError(f"received {have} of {total} bytes")


def _short(error: Exception) -> str:
    """The cause at the bottom of the libraries' nested messages, in one line."""
    cause = _cause(error)
    text = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
    if cause is not error:
        text = text.split(": ", 1)[-1]  # without the connection object's own name
    return text if len(text) <= 200 else text[:200] + "..."


def _cause(error: Exception) -> Exception:
    inner = error.args[0] if error.args else None
    reason = getattr(inner, "reason", None)
    return reason if isinstance(reason, Exception) else error


def _never_connected(error: Exception) -> bool:
    """Whether there is no way to the server at all, so that asking again at once is in vain."""
    from urllib3.exceptions import NewConnectionError

    return isinstance(_cause(error), NewConnectionError)  # a name that is not resolved is one as well
