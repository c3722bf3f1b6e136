"""Signals that ask for the end: training ends at the next safe place, with everything saved."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any


def stop_signals() -> tuple[signal.Signals, ...]:
    """Ctrl-C, SIGTERM, and the end of the terminal unless that is to be outlived, as under nohup."""
    found = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        found.append(signal.SIGHUP)
    return tuple(found)


def leave_terminal(number: int) -> None:
    """After SIGHUP write nothing to a terminal that is gone: it would fail, and what is done not be saved.

    Further ones are ignored: a shell passes its own on, and the kernel sends another a moment later.
    """
    if not hasattr(signal, "SIGHUP") or number != signal.SIGHUP:
        return
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)


def restore_handlers(handlers: Mapping[signal.Signals, Any]) -> None:
    """Give signals their handlers back, except one that is ignored since the terminal was left."""
    for number, handler in handlers.items():
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


class Stop:
    """Remembers the first signal; a second SIGINT ends at once."""

    signal_number: int | None = None

    def handle(self, number: int, _: FrameType | None) -> None:
        """Note a signal; the second SIGINT raises KeyboardInterrupt."""
        leave_terminal(number)
        if self.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number


@contextlib.contextmanager
def graceful_stop() -> Iterator[Stop]:
    """Collect :func:`stop_signals` while the block runs, for it to end where it is safe."""
    stop = Stop()
    try:
        previous = {number: signal.signal(number, stop.handle) for number in stop_signals()}
    except ValueError:  # not in the main thread: signals are somebody else's
        yield stop
        return
    try:
        yield stop
    finally:
        restore_handlers(previous)
