import hashlib
import http.server
import threading

import pytest

from sdseg_cli.core.data import download as module
from sdseg_cli.core.data.download import download
from sdseg_cli.core.data.sources import opened_source
from sdseg_cli.core.errors import DataError, UsageError

CONTENT = bytes(range(256)) * 4096  # 1 MiB
PIECE = 2**16  # what is received and written at a time
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """A server on this machine that can break off, change its file and ignore ranges."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.etag = '"first"'
        self.ranges = True
        self.break_after = []  # bytes sent before each coming answer breaks off
        self.status = None
        self.seen = []  # the Range headers of the requests

    def url(self, name="data.bin"):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.seen.append(wanted)
        if server.status is not None:
            self.send_error(server.status)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges else 0
        if start and self.headers.get("If-Range") not in (None, server.etag):
            start = 0
        if start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            end = len(server.content)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
        self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.break_after:
            self.wfile.write(body[: server.break_after.pop(0)])
            self.close_connection = True
            return
        self.wfile.write(body)

    def log_message(self, *_arguments):
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_a_file_comes_whole_with_its_progress(server, tmp_path):
    told = []
    file = download(server.url(), tmp_path, sha256=SHA256, progress=lambda *step: told.append(step))
    assert file == tmp_path / "data.bin"
    assert file.read_bytes() == CONTENT
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert [entry.name for entry in tmp_path.iterdir()] == ["data.bin"]


def test_a_file_that_is_there_already_is_not_fetched_again(server, tmp_path):
    for _ in range(2):
        download(server.url(), tmp_path, sha256=SHA256)
    assert server.seen == [None]


@pytest.mark.faults
def test_a_break_is_continued_where_it_happened(server, tmp_path):
    server.break_after = [4 * PIECE, 2 * PIECE]
    said = []
    file = download(server.url(), tmp_path, sha256=SHA256, retrying=said.append)
    assert file.read_bytes() == CONTENT
    assert server.seen == [None, f"bytes={4 * PIECE}-", f"bytes={6 * PIECE}-"]
    assert len(said) == 2
    assert "attempt 2 of 4" in said[0]


@pytest.mark.faults
def test_the_next_command_continues_what_the_last_one_left(server, tmp_path):
    server.break_after = [PIECE] * module.ATTEMPTS
    with pytest.raises(DataError, match=r"cannot be fetched .*--source FILE"):
        download(server.url(), tmp_path, sha256=SHA256)
    assert (tmp_path / "data.bin.partial").stat().st_size == PIECE * module.ATTEMPTS
    assert not (tmp_path / "data.bin").exists()
    file = download(server.url(), tmp_path, sha256=SHA256)
    assert file.read_bytes() == CONTENT
    assert server.seen[-1] == f"bytes={4 * PIECE}-"


@pytest.mark.faults
def test_without_ranges_it_starts_again(server, tmp_path):
    server.ranges = False
    server.break_after = [4 * PIECE]
    assert download(server.url(), tmp_path).read_bytes() == CONTENT


@pytest.mark.faults
def test_a_file_that_changed_meanwhile_is_not_patched_together(server, tmp_path):
    server.break_after = [PIECE] * module.ATTEMPTS
    with pytest.raises(DataError, match="cannot be fetched"):
        download(server.url(), tmp_path)
    server.content, server.etag = CONTENT[::-1], '"second"'
    assert download(server.url(), tmp_path).read_bytes() == CONTENT[::-1]


@pytest.mark.faults
def test_a_partial_file_that_is_complete_is_taken(server, tmp_path):
    (tmp_path / "data.bin.partial").write_bytes(CONTENT)
    assert download(server.url(), tmp_path, sha256=SHA256).read_bytes() == CONTENT


@pytest.mark.faults
def test_a_partial_file_that_is_too_long_is_thrown_away(server, tmp_path):
    (tmp_path / "data.bin.partial").write_bytes(CONTENT + b"more")
    assert download(server.url(), tmp_path, sha256=SHA256).read_bytes() == CONTENT


@pytest.mark.faults
def test_a_wrong_checksum_removes_the_file(server, tmp_path):
    with pytest.raises(DataError, match=r"is not the expected one \(its SHA-256 is not 0000"):
        download(server.url(), tmp_path, sha256="0" * 64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults
def test_a_missing_page_says_what_to_do(server, tmp_path):
    server.status = 404
    with pytest.raises(DataError, match=r"cannot be fetched \(404 .*pass --source FILE"):
        download(server.url(), tmp_path)
    assert server.seen == [None]  # asking again would not help


@pytest.mark.faults
def test_no_network_says_what_to_do(tmp_path):
    said = []
    expected = (
        r"http://127\.0\.0\.1:9/x\.zip: cannot be fetched \(Failed to establish a new connection.*\)\. Run"
    )
    with pytest.raises(DataError, match=expected):
        download("http://127.0.0.1:9/x.zip", tmp_path, retrying=said.append)
    assert said == []  # asking again at once would be in vain


def test_other_schemes_are_refused(tmp_path):
    with pytest.raises(UsageError, match="only http and https are fetched"):
        download("ftp://example.org/x.zip", tmp_path)


# Sources


@pytest.mark.faults
def test_an_error_page_instead_of_an_archive_is_removed_and_said(server, tmp_path):
    server.content = b"<html>sorry</html>"
    options = {"beside": tmp_path / "out", "cache": tmp_path / "cache"}
    with (
        pytest.raises(DataError, match="what came is neither a zip nor a tar archive"),
        opened_source(server.url("data"), **options),
    ):
        pass
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_equal_names_at_different_addresses_are_different_files(server, tmp_path):
    import io
    import zipfile

    def archive_of(name):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as pack:
            pack.writestr(name, b"x")
        return buffer.getvalue()

    options = {"beside": tmp_path / "out", "cache": tmp_path / "cache"}
    for name in ("one", "two"):
        server.content = archive_of(name)
        with opened_source(server.url(f"{name}/data.zip"), **options) as raw:
            assert [path.name for path in raw.root.iterdir()] == [name]
            assert raw.sha256 == hashlib.sha256(server.content).hexdigest()
    assert not (tmp_path / "out").exists()


@pytest.mark.faults
def test_a_source_that_is_not_there_is_a_usage_error(tmp_path):
    with (
        pytest.raises(UsageError, match=r"gone\.zip: no such file or folder"),
        opened_source(str(tmp_path / "gone.zip"), beside=tmp_path, cache=tmp_path),
    ):
        pass
