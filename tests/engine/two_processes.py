"""Runs ``sdseg`` commands one after another in every process of a launcher, and notes what each wrote.

Usage: two_processes.py COMMANDS.json NOTES; COMMANDS is a list of argument lists, NOTES a folder that gets
RANK.json: the number of processes, and per command the exit code and the final names written.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

written: set[str] = set()
here = str(Path.cwd())


def note(event: str, arguments: tuple) -> None:
    if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
        if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            keep(arguments[0])
    elif event == "os.rename":
        keep(os.fsdecode(arguments[1]))


def keep(name: str) -> None:
    path = str(Path(name).absolute())
    if Path(path).is_dir():  # a nameless file in it, to see whether it can be written to
        return
    is_final = ".partial" not in path and ".old" not in path and "/." not in path
    if path.startswith(here) and is_final:
        written.add(str(Path(path).relative_to(here)))


if __name__ == "__main__":
    commands, notes = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    sys.addaudithook(note)
    from accelerate import Accelerator

    from sdseg_cli.cli import main
    from sdseg_cli.core.engine.processes import Processes

    Accelerator.end_training = lambda accelerator: None  # it would leave the group; the next command needs it
    found = []
    for command in commands:
        written.clear()
        try:
            main(command)
        except SystemExit as end:
            found.append({"exit_code": end.code, "written": sorted(written)})
    processes = Processes(cpu=True)
    own = {"rank": processes.rank, "count": processes.count, "commands": found}
    (notes / f"{processes.rank}.json").write_text(json.dumps(own))
