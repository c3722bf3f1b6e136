"""Runs ``sdseg`` in a process of its own under some hardship; a fixture of conftest.py starts it.

Given as globals: ARGUMENTS, LOG (file for both outputs) and HARDSHIPS (name -> what it needs).
"""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NO_SMALL_DISK = 77  # exit code where the machine lets nobody mount one
_NEW_NAMESPACES = 0x10000000 | 0x00020000  # CLONE_NEWUSER | CLONE_NEWNS of linux/sched.h


def small_disk(folder: str, kib: int, kept: str) -> None:
    """Mount ``kib`` KiB in the place of a folder, for this process alone, and leave a copy in ``kept``."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_NAMESPACES) != 0:
        os._exit(NO_SMALL_DISK)
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], check=True)
    except (OSError, subprocess.SubprocessError):
        os._exit(NO_SMALL_DISK)

    def leave(code: int) -> None:
        shutil.copytree(folder, kept, dirs_exist_ok=True)  # the command line exits, and the program again
        leave_really(code)

    leave_really, sys.exit = sys.exit, leave  # type: ignore[assignment]


def stuck_step(step: int, sign: str) -> None:
    """Let the training of one step take for ever; ``sign`` is a file that tells of it."""
    from sdseg_cli.core.engine import training

    rate = training.learning_rate_at

    def stuck(number, recipe):
        if number == step:
            Path(sign).touch()
            while True:
                time.sleep(0.02)
        return rate(number, recipe)

    training.learning_rate_at = stuck


def stuck_call(place: str, sign: str) -> None:
    """Let a call of ``place`` (``module:attribute``) take for ever; ``sign`` is a file that tells of it."""
    module, attribute = place.split(":")
    owner: Any = importlib.import_module(module)
    *classes, name = attribute.split(".")
    for inner in classes:
        owner = getattr(owner, inner)

    def stuck(*_: object, **__: object) -> None:
        Path(sign).touch()
        while True:
            time.sleep(0.02)

    setattr(owner, name, stuck)


def slow_predictions(seconds: float) -> None:
    """Let the networks take ``seconds`` for each batch."""
    from sdseg_cli.core.model.pipeline import SDSegPipeline

    sample = SDSegPipeline.sample

    def slow(pipeline, images, **options):
        time.sleep(seconds)
        return sample(pipeline, images, **options)

    SDSegPipeline.sample = slow  # type: ignore[method-assign, assignment]


def stuck_write(sign: str) -> None:
    """Let the third mask be written for ever, half of it in its temporary file."""
    from sdseg_cli.core.engine import prediction

    write, seen = prediction.write_label_map, []

    def stuck(path, *arguments, **options):
        seen.append(path)
        if len(seen) == 3:
            (path.parent / ".sdseg-half.partial").write_bytes(b"half")
            Path(sign).touch()
            while True:
                time.sleep(0.02)
        write(path, *arguments, **options)

    prediction.write_label_map = stuck


if __name__ == "__main__":
    descriptor = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # type: ignore[name-defined]  # noqa: F821
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.setpgrp()  # so that a test can signal this process as a terminal does
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, values in HARDSHIPS.items():  # type: ignore[name-defined]  # noqa: F821
        globals()[name](*values)
    from sdseg_cli.cli import main

    sys.argv = ["sdseg", *ARGUMENTS]  # type: ignore[name-defined]  # noqa: F821
    main(ARGUMENTS)  # type: ignore[name-defined]  # noqa: F821
