"""Signals as a wish to stop: training ends at the next safe place, with everything saved."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Stop:
    """Remembers the first SIGINT or SIGTERM; a second SIGINT ends at once."""

    signal_number: int | None = None

    def handle(self, number: int, _: FrameType | None) -> None:
        """Note a signal; the second SIGINT raises KeyboardInterrupt."""
        if self.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number


@contextlib.contextmanager
def graceful_stop() -> Iterator[Stop]:
    """Collect SIGINT and SIGTERM while the block runs, for it to end where it is safe."""
    stop = Stop()
    try:
        previous = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are somebody else's
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
