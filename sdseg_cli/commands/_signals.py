"""Signals that end a command with a message of its own: the first ends in order, the second at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from sdseg_cli.core.engine.stopping import leave_terminal, restore_handlers, stop_signals
from sdseg_cli.core.errors import Interrupted


@contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Raise Interrupted in the block at the first of :func:`stop_signals`; a second one ends the process.

    Args:
        message: what is kept and how to go on; shown to the user.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, and only it is interrupted
        return

    numbers = stop_signals()

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        leave_terminal(number)
        restore_handlers(dict.fromkeys(numbers, signal.SIG_DFL))
        raise Interrupted(message, number)

    before = {each: signal.signal(each, stop) for each in numbers}
    try:
        yield
    finally:
        restore_handlers(before)
