"""What several processes share out and bring together; one process is the simple case of it."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

T = TypeVar("T")

_WORDS_OF_A_LOSS = (
    *("gloo/transport", "Connection closed by peer", "Connection reset by peer"),
    *("ncclRemoteError", "remote process exit", "communicator was aborted", "collective operation timeout"),
)


class Processes:
    """The processes of this run, as ``accelerate launch`` or torchrun started them.

    Args:
        cpu: keep to the CPU (and to gloo between processes) even where there is a GPU.
    """

    def __init__(self, *, cpu: bool = False) -> None:
        self._state = PartialState(cpu=cpu)
        if self._state.num_processes > 1:
            atexit.unregister(_leave_group)  # once, however often this object is made
            atexit.register(_leave_group)
        self.rank: int = self._state.process_index
        self.count: int = self._state.num_processes
        self.is_main: bool = self._state.is_main_process

    def share(self, items: Sequence[T]) -> list[T]:
        """Give this process's part: every item belongs to exactly one process."""
        return list(items[self.rank :: self.count])

    def gather(self, records: list[T]) -> list[T]:
        """Give everybody the records of all processes, in the order of the items they were shared from."""
        if self.count == 1:
            return records
        parts: list[list[T]] = gather_object([records])
        longest = max(map(len, parts))
        return [part[i] for i in range(longest) for part in parts if i < len(part)]

    def any(self, flag: bool) -> bool:
        """Tell every process whether any of them says yes."""
        return flag if self.count == 1 else any(gather_object([flag]))

    def wait(self) -> None:
        """Wait until every process has come here."""
        self._state.wait_for_everyone()


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process of the group is gone: gloo and NCCL have no kind for it.

    NCCL's other errors, such as two processes on one GPU, are no loss and keep their own words.
    """
    if isinstance(error, torch.distributed.DistNetworkError | torch.distributed.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS_OF_A_LOSS)


def _leave_group() -> None:
    """Leave the group of processes before the interpreter takes itself apart.

    A process that still belongs to it when it ends may be aborted by the group's own threads ("terminate
    called without an active exception"), whatever its exit code was to be.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
