"""Processes that compile side by side and are timed one at a time: compiling takes minutes, timing seconds.

Each process is told of a folder and of how many there are, ``SDSEG_TURNS=FOLDER:COUNT:SECONDS``. The first
:func:`turn` of a process waits until all of them have come to theirs or have ended (whoever starts them then
puts a file of any name into the folder), at most so many seconds from the folder's making; one that comes
later gives up. Without the variable nothing waits.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

_waited = False


@contextmanager
def turn() -> Iterator[None]:
    """Hold the machine alone."""
    given = os.environ.get("SDSEG_TURNS")
    if given is None:
        yield
        return
    name, count, seconds = given.rsplit(":", 2)
    folder = Path(name)
    _wait_for_all(folder, int(count), float(seconds))
    with FileLock(folder.with_suffix(".lock")):
        yield


def _wait_for_all(folder: Path, count: int, seconds: float) -> None:
    global _waited  # noqa: PLW0603
    if _waited:
        return
    _waited = True
    ends = (folder / "begun").stat().st_mtime + seconds
    if time.time() > ends:
        sys.exit("too late: the others are being timed already")
    (folder / f"ready-{os.getpid()}").touch()
    while len(list(folder.iterdir())) - 1 < count and time.time() < ends:
        time.sleep(0.2)
