"""The processes that read cases: signals are their parent's to act on, and they end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from sdseg_cli.core.data import workers
from sdseg_cli.core.data.workers import in_order, worker_pool
from sdseg_cli.core.errors import DataError

PARENT = """
import os, time
from sdseg_cli.core.data.workers import worker_pool

if __name__ == "__main__":
    with worker_pool(1 + 1, 2) as executor:
        [job.result() for job in [executor.submit(os.getpid) for _ in range(2)]]
        print(*executor._processes, flush=True)
        time.sleep(60)
"""


def wait_until_gone(numbers: list[int]) -> None:
    end = time.monotonic() + 20
    while any(psutil.pid_exists(number) for number in numbers):
        assert time.monotonic() < end, numbers
        time.sleep(0.05)


@pytest.mark.faults(28)
def test_workers_leave_signals_to_their_parent_and_a_killed_one_ends_the_others() -> None:
    with worker_pool(2, 2) as executor:
        assert executor is not None
        [job.result() for job in [executor.submit(os.getpid) for _ in range(2)]]
        started = [*executor._processes]
        assert len(started) == 2
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            for worker in started:
                os.kill(worker, number)
        assert {*in_order(executor, [os.getpid] * 4)} <= {*started}
        for _ in started:
            executor.submit(time.sleep, 300)  # both are busy when one of them dies
        os.kill(started[0], signal.SIGKILL)
        with pytest.raises(DataError, match="a worker process ended unexpectedly"):
            list(in_order(executor, [os.getpid]))
    wait_until_gone(started)


@pytest.mark.faults(28)
@pytest.mark.parametrize("first", [True, False])
def test_a_signal_while_a_worker_starts_leaves_none_that_the_pool_does_not_know(first, monkeypatch) -> None:
    start = workers._Worker.start
    begun: list[int] = []

    def interrupted(self: workers._Worker) -> None:
        start(self)
        begun.append(self.pid or 0)
        if first or len(begun) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(workers._Worker, "start", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with worker_pool(2, 2) as executor, pytest.raises(KeyboardInterrupt):
        list(in_order(executor, [partial(time.sleep, 1)] * 2))
    assert len(begun) == (1 if first else 2)
    wait_until_gone(begun)
    assert signal.getsignal(signal.SIGINT) is handler
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()).isdisjoint({signal.SIGINT, signal.SIGTERM})


@pytest.mark.faults(28)
def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        started = [int(number) for number in parent.stdout.readline().split()]
        parent.kill()
    assert len(started) == 2
    wait_until_gone(started)
