"""Processes that work on cases ahead of whoever reads the results, in order and within bounded memory."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import parent_process
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, TypeVar

from sdseg_cli.core.errors import DataError

T = TypeVar("T")

_AHEAD = 32  # cases; a prepared volume takes some 30 MB
_SIGNALS_OF_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def worker_pool(workers: int | None, cases: int) -> Iterator[ProcessPoolExecutor | None]:
    """Start processes, one a core where ``workers`` does not say; None where this one is enough."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = workers if workers is not None else (min(cores, 16) if cases >= 64 else 1)
    if count <= 1:
        yield None
        return
    executor = ProcessPoolExecutor(count, mp_context=_Context(), initializer=_watch_parent)
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def in_order(executor: ProcessPoolExecutor | None, jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Run jobs ahead of the reader, but only so many that memory stays bounded."""
    if executor is None:
        for job in jobs:
            yield job()
        return
    ahead: deque[Future[T]] = deque()
    try:
        for job in jobs:
            with _signals_later():
                ahead.append(executor.submit(job))
            if len(ahead) >= _AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process ended unexpectedly, most likely for lack of memory. Try again with --workers 1."
        ) from error


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """Let signals that end a command wait until the block has ended.

    Within it a worker may be started. Were that broken off, the worker would run and the pool not know of it,
    and the command wait for it at its end.
    """
    came: list[int] = []
    before: dict[signal.Signals, Any] = {}
    try:
        with contextlib.suppress(ValueError):  # not the main thread: signals are somebody else's
            for number in _SIGNALS_OF_THE_PARENT:
                before[number] = signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        for blocked, handler in before.items():
            signal.signal(blocked, handler)
    for each in came:
        signal.raise_signal(each)


class _Worker(SpawnProcess):
    """A process that leaves the signals which end a command to its parent.

    Ctrl-C, a closed terminal and a scheduler's SIGTERM reach every process of the group. A worker that acted
    on them would print of its own, or be taken for one that died for lack of memory.
    """

    def start(self) -> None:
        """Start with these signals blocked: the mask is inherited, and holds from the first moment on."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS_OF_THE_PARENT)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def terminate(self) -> None:
        """The pool ends the others so when one has died."""
        self.kill()


class _Context(SpawnContext):
    """Spawned, not forked: a fork of a process with threads (arrow's, torch's) can hang."""

    Process = _Worker


def _watch_parent() -> None:
    """End this process with its parent, which may be killed: it would wait for work for ever."""
    parent = parent_process()
    assert parent is not None  # noqa: S101  (a worker is started by somebody)

    def end() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end, daemon=True).start()
