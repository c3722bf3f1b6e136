"""Real ``sdseg`` processes for tests and benchmarks, and everything that a training arrived at.

``conftest.py`` makes fixtures of both functions; ``benchmarks/resume_table.py`` uses them as they are.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import runpy
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SCRIPT = str(Path(__file__).with_name("sdseg_process.py"))
_PRELOADED = [
    "sdseg_cli.commands.train",
    "sdseg_cli.core.engine.training",
    "sdseg_cli.core.recipe",
    "datasets",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
]


def starter(logs: Path) -> Callable[..., Any]:
    """Give ``start("train", "--recipe", ...)``, which starts ``sdseg`` in a process of its own.

    ``start`` gives a ``multiprocessing`` process with ``log``, what it printed. ``moment`` and ``count``
    name a moment of ``sdseg_process.py`` at which it dies of SIGKILL, ``environment`` adds variables. A
    server that has imported everything forks them, so that a start takes a fraction of a second.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    numbers = itertools.count()

    def start(
        *arguments: object,
        moment: str | None = None,
        count: int = 1,
        environment: dict[str, str] | None = None,
    ) -> Any:
        log = logs / f"{next(numbers)}.txt"
        given = {
            "ARGUMENTS": [*map(str, arguments)],
            "LOG": str(log),
            "MOMENT": moment,
            "COUNT": count,
            "ENVIRONMENT": environment or {},
        }
        process = context.Process(target=runpy.run_path, args=(_SCRIPT, given, "__main__"))
        process.start()
        process.log = lambda: log.read_text() if log.exists() else ""  # type: ignore[attr-defined]
        return process

    return start


def start_group(start: Callable[..., Any], processes: int, *arguments: object, **of_first: Any) -> list[Any]:
    """Start one command in a group of processes, told of each other as torchrun tells them.

    Args:
        start: from :func:`starter`.
        processes: how many; one is no group.
        arguments: of ``sdseg``.
        of_first: further options of ``start``, for the first process.
    """
    if processes == 1:
        return [start(*arguments, **of_first)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [
        start(
            *arguments,
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            **(of_first if rank == 0 else {}),
        )
        for rank in range(processes)
    ]


def state_of(run: Any) -> dict[str, Any]:
    """Everything a run arrived at, times excepted: weights, averages, optimizer, metrics, exported model."""
    import torch

    def digest(*files: Path) -> str:
        joined = hashlib.sha256()
        for file in files:
            joined.update(file.read_bytes())
        return joined.hexdigest()

    checkpoint = run.latest_checkpoint()
    optimizer = torch.load(checkpoint / "optimizer.bin", weights_only=True)
    timed = ("seconds", "samples_per_second", "memory_gib")
    metrics = run.read_metrics()
    return {
        "step": checkpoint.name,
        "weights": digest(checkpoint / "model.safetensors"),
        "averages": digest(checkpoint / "averages.safetensors"),
        "optimizer": {
            (index, name): hashlib.sha256(value.numpy().tobytes()).hexdigest()
            for index, state in optimizer["state"].items()
            for name, value in state.items()
        },
        "rates": [group["lr"] for group in optimizer["param_groups"]],
        "metrics": [{key: m[key] for key in m if key not in timed} for m in metrics],
        "model": digest(*sorted(run.model.rglob("*.*"))),
        "best": run.read_run_json()["best"],
        "pictures": digest(*sorted(run.validation.iterdir())),
        "files": sorted(
            str(path.relative_to(run.root))
            for path in run.root.rglob("*")
            if not set(path.parents) & set(run.all_checkpoints()[:-1])
            and path not in run.all_checkpoints()[:-1]
        ),
    }
