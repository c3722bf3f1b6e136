"""Runs ``sdseg`` in a process of its own that dies of SIGKILL at a chosen moment; a fixture has its name.

Given as globals: ARGUMENTS, LOG (file for both outputs), MOMENT (a name from MOMENTS, or None) and COUNT (at
which time that it comes), ENVIRONMENT (variables to add).
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_step(count: int) -> None:
    from sdseg_cli.core.engine import training

    rate = training.learning_rate_at

    def deadly(step, recipe):
        if step == count:
            die()
        return rate(step, recipe)

    training.learning_rate_at = deadly


def sigterm_before_step(count: int) -> None:
    """To this process alone, which must tell the others of its group."""
    from sdseg_cli.core.engine import training

    rate = training.learning_rate_at

    def stopping(step, recipe):
        if step == count:
            signal.raise_signal(signal.SIGTERM)
        return rate(step, recipe)

    training.learning_rate_at = stopping


def half_of_the_optimizer_saved(count: int) -> None:
    import torch

    save, seen = torch.save, []

    def deadly(value, file, *args, **options):
        save(value, file, *args, **options)
        if str(file).endswith("optimizer.bin"):
            seen.append(file)
            if len(seen) == count:
                os.truncate(file, Path(file).stat().st_size // 2)
                die()

    torch.save = deadly


def renaming(to: Callable[[str], bool], count: int, *, after: bool) -> None:
    replace, seen = os.replace, []

    def deadly(source, target, **options):
        is_it = to(str(target))
        seen.extend([target] if is_it else [])
        if is_it and len(seen) == count and not after:
            die()
        replace(source, target, **options)
        if is_it and len(seen) == count:
            die()

    os.replace = deadly


def half_a_line_of_metrics(count: int) -> None:
    from sdseg_cli.core import run_directory

    append, seen = run_directory.RunDirectory.append_metrics, []

    def deadly(run, record):
        seen.append(record)
        if len(seen) == count:
            with run.metrics_file.open("a") as file:
                file.write('{"step": 5, "los')
            die()
        append(run, record)

    run_directory.RunDirectory.append_metrics = deadly


def half_of_an_old_checkpoint_removed(count: int) -> None:
    rmtree, seen = shutil.rmtree, []

    def deadly(path, *args, **options):
        if Path(path).name.startswith("step-"):
            seen.append(path)
            if len(seen) == count:
                (Path(path) / "model.safetensors").unlink()
                die()
        rmtree(path, *args, **options)

    shutil.rmtree = deadly


def is_checkpoint(target: str) -> bool:
    return Path(target).name.startswith("step-") and Path(target).suffix == ""


def is_model(target: str) -> bool:
    return Path(target).name == "model"


MOMENTS = {
    "before a step": before_step,
    "SIGTERM before a step": sigterm_before_step,
    "half of the optimizer saved": half_of_the_optimizer_saved,
    "before a checkpoint has its name": lambda count: renaming(is_checkpoint, count, after=False),
    "after a checkpoint has its name": lambda count: renaming(is_checkpoint, count, after=True),
    "before a model has its name": lambda count: renaming(is_model, count, after=False),
    "after a model has its name": lambda count: renaming(is_model, count, after=True),
    "half a line of metrics": half_a_line_of_metrics,
    "half of an old checkpoint removed": half_of_an_old_checkpoint_removed,
}

if __name__ == "__main__":
    descriptor = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # type: ignore[name-defined]  # noqa: F821
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.setpgrp()  # so that a test can signal this process and its loaders, as a terminal does
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(ENVIRONMENT)  # type: ignore[name-defined]  # noqa: F821
    if MOMENT is not None:  # type: ignore[name-defined]  # noqa: F821
        MOMENTS[MOMENT](COUNT)  # type: ignore[name-defined]  # noqa: F821
    from sdseg_cli.cli import main

    sys.argv = ["sdseg", *ARGUMENTS]  # type: ignore[name-defined]  # noqa: F821
    main(ARGUMENTS)  # type: ignore[name-defined]  # noqa: F821
