"""The errors a user can meet. Each message says what, where, found, expected and the remedy."""

import errno


class SdsegError(Exception):
    """Something the user can mend; shown without a traceback and turned into ``exit_code``."""

    exit_code = 1


class UsageError(SdsegError):
    """A wrong option, a missing file that was asked for by name, or a setting that makes no sense."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that cannot be used; the message lists every mistake with its line."""


class DataError(SdsegError):
    """A file or data set that cannot be read or does not fit."""


class ModelError(SdsegError):
    """Weights, a model directory or a checkpoint that cannot be used."""


class OutOfMemoryError(SdsegError):
    """The device has too little memory even for the smallest batch."""


class Interrupted(BaseException):
    """The user or the system asked for the end; state is saved.

    Like KeyboardInterrupt no Exception: whoever goes on after the failure of one case must not take it for
    one. ``exit_code`` is 130 for Ctrl-C, 143 for SIGTERM, 129 for a terminal that is gone.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk or a quota is full; some libraries only say so in the text."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(error)
