"""The ``sdseg`` program: finds the command, and turns errors into a message and an exit code.

A command's module is imported only when it is called, and torch only inside the command, so that
``sdseg --help`` answers at once.

Exit codes: 0 done, 1 failed, 2 wrong usage or recipe, 3 partial (some cases failed and are listed, the rest
is done), 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import os
import re
import signal
import sys
import warnings
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from sdseg_cli import __version__
from sdseg_cli.core.engine.stopping import leave_terminal, stop_signals
from sdseg_cli.core.errors import Interrupted

COMMANDS = {
    "prepare": "Turn images and masks into a prepared dataset.",
    "train": "Train a model by a recipe.",
    "predict": "Segment a folder of images.",
    "evaluate": "Score predictions against ground truth.",
    "stability": "Repeat predictions from different noise and compare them.",
    "compare": "Put runs and other tools' masks side by side.",
    "ablate": "Train variants of a recipe and compare them.",
    "convert": "Turn a published checkpoint into a model folder.",
    "export": "Write a model as one ONNX or OpenVINO graph.",
    "autoencoder": "Train the small autoencoder of the masks.",
    "runs": "List, show and compare the runs.",
    "verify": "Check a run, a model, a dataset or masks against its manifest.",
    "recipes": "List, show, copy and check recipes.",
    "push": "Put a run's model on the hub with a card.",
    "doctor": "Look at this machine: what works, and what to do where it does not.",
    "demo": "All of it on made-up data, on a CPU, in minutes.",
}

EXAMPLES = """
sdseg demo                          # all of it, offline, on made-up data
sdseg prepare kseg                  # fetch Kvasir-SEG (46 MB) and prepare it
sdseg train --recipe kseg-fast      # train; the run is kept in runs/
sdseg predict scans/ --out masks/   # segment with the newest finished run
sdseg evaluate --split test         # Dice, IoU, HD95 ... of each case
sdseg stability --runs 10           # how much the masks depend on the noise
sdseg compare runs/a runs/b          # accuracy, cost and stability on the same cases
sdseg runs                          # what was trained here
accelerate launch --multi_gpu -m sdseg_cli train --recipe kseg

Shipped recipes: kseg, kseg-fast, cvc, cvc-fast, refuge, btcv, btcv-8, btcv-13, sts3d, demo.
"""

_PROGRAMS = ("sdseg", "accelerate", "torchrun", "python")
_REMARK = re.compile(r"\s+# ")
_SINGLE_BREAK = re.compile(r"(?<!\n)\n(?!\n|\s*[-*] )")
_SHORT_TYPES = {
    "<int>": "N",
    "<int range>": "N",
    "<float>": "X",
    "<float range>": "X",
    "<path>": "PATH",
    "<str>": "TEXT",
}
_COMPLETION_PARAMS = ("install_completion", "show_completion")  # the root's business
_EXAMPLES_HEADING = re.compile(r"^\s*Examples?:{1,2}\s*$", re.MULTILINE)


# Commands, imported when called ---------------------------------------------------------------------


def _show_examples(examples: str) -> None:
    """Draw worked examples under a help text: commands as they are written, remarks in a column.

    A remark that does not fit beside its command goes below it. Commands are never broken, so that they can
    be copied.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    lines = [re.sub(r"(?<=\S) {2,}(?!#)", " ", line.rstrip()) for line in examples.strip().splitlines()]
    pairs = [_REMARK.split(line, maxsplit=1) for line in lines]
    room = console.width - len("      # ")
    short = [pair[0] for pair in pairs if len(pair) == 2 and sum(map(len, pair)) <= room]
    column = max(map(len, short), default=0)
    console.print(" Examples", style="bold")
    for command, *remark in pairs:
        text = Text(f"   {command}", style="bold" if command.startswith(_PROGRAMS) else "")
        if remark:
            gap = "\n       "
            for width in (len(command), column):
                if max(width, len(command)) + len(remark[0]) <= room:
                    gap = " " * (max(width, len(command)) - len(command) + 2)
            text.append(f"{gap}# {remark[0]}", style="not bold dim")
        console.print(text, soft_wrap=True)
    console.print()


class _Group(TyperGroup):
    """The root: lists every command without importing one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in COMMANDS:
            self.commands[args[0]] = load_command(args[0])
        return super().resolve_command(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        return _for_reading(super().get_params(ctx), ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        _show_examples(EXAMPLES)


def load_command(name: str) -> Any:
    """Import a command's module and build the command from its function, or from its own sub-app.

    The worked examples at the end of its help are the module's ``EXAMPLES``, or what follows "Examples:" in
    the function's docstring.
    """
    module = importlib.import_module(f"sdseg_cli.commands.{name}")
    if isinstance(getattr(module, "app", None), typer.Typer):
        command: Any = typer.main.get_command(module.app)
    else:
        single = typer.Typer(add_completion=False, rich_markup_mode="rich")
        single.command(name)(getattr(module, name))
        command = typer.main.get_command(single)
    command.name = name
    for inner in getattr(command, "commands", {}).values():
        _polish(inner)
    _polish(command, getattr(module, "EXAMPLES", ""))
    return command


def _polish(command: Any, examples: str = "") -> None:
    """Let a command's help end with its examples as they are written, and spare flags their type."""
    text = (command.help or "").replace("\b", "")
    heading = _EXAMPLES_HEADING.search(text)
    if heading is not None:
        examples = examples or text[heading.end() :]
        text = text[: heading.start()]
    command.help = _SINGLE_BREAK.sub(" ", inspect.cleandoc(text))
    lines = inspect.cleandoc(_EXAMPLES_HEADING.sub("", examples)).splitlines()
    written = "\n".join(line for line in lines if line.strip())
    format_help, get_params = command.format_help, command.get_params

    def parsed_params(ctx: Any) -> list[Any]:
        return [param for param in get_params(ctx) if param.name not in _COMPLETION_PARAMS]

    def format_help_and_examples(ctx: Any, formatter: Any) -> None:
        command.get_params = lambda ctx: [_for_reading(param, ctx) for param in parsed_params(ctx)]
        try:
            format_help(ctx, formatter)
        finally:
            command.get_params = parsed_params
        if written:
            _show_examples(written)

    command.format_help = format_help_and_examples
    command.get_params = parsed_params


def _for_reading(param: Any, ctx: Any) -> Any:
    """Give the text of an option the room: on 80 columns long types and opposites leave it fifteen.

    A copy is returned: what is read and what is parsed are the same option. A flag has no type, bounds are
    short, and the words of a choice and the opposite of a flag are said in the text.
    """
    if getattr(param, "param_type_name", "") != "option":
        return param
    param = copy.copy(param)
    remarks = [param.help or ""]
    if param.secondary_opts:
        remarks.append(f"Opposite: {', '.join(param.secondary_opts)}.")
        param.secondary_opts = []
    kind = param.display_type(ctx) if hasattr(param, "display_type") else ""
    low, high = getattr(param, "min", None), getattr(param, "max", None)
    param.min = param.max = None
    if getattr(param, "is_flag", False):
        param.metavar = ""
    elif low is not None and high is not None:
        param.metavar = f"{low:g}..{high:g}"
    elif param.metavar is None and "|" in kind:
        remarks.append(f"One of {', '.join(kind.strip('<>').split('|'))}.")
        param.metavar = "WORD"
    elif param.metavar is None:
        param.metavar = _SHORT_TYPES.get(kind)
    param.help = " ".join(remarks)
    return param


app = typer.Typer(
    name="sdseg",
    cls=_Group,
    help="Medical image segmentation with latent diffusion in a single reverse step (SDSeg).",
    context_settings={"help_option_names": ["--help", "-h"]},
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _register(name: str, summary: str) -> None:
    def placeholder() -> None:
        """Stands in the list of commands until the real one is called."""

    app.command(name, help=summary)(placeholder)


for _name, _summary in COMMANDS.items():
    _register(_name, _summary)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sdseg {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# Errors, signals and the exit code ------------------------------------------------------------------


def main(args: list[str] | None = None) -> NoReturn:
    """Run the program and leave with its exit code."""
    _quieten_libraries()
    _listen_for_signals()
    try:
        app(args=args, prog_name="sdseg")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code == 130:  # as the parser leaves for Ctrl-C
            _say_stopped("stopped by Ctrl-C.")
    except KeyboardInterrupt:
        code = 130
        _say_stopped("stopped by Ctrl-C.")
    except Interrupted as stop:
        code = stop.exit_code
        _say_stopped(str(stop))
    except Exception as error:
        code = _exit_code_of(error)
    _flush_results()
    sys.exit(code)


def _exit_code_of(error: Exception) -> int:
    """Tell the user what went wrong; an error that is sdseg's own fault keeps its traceback."""
    from sdseg_cli.console import fail
    from sdseg_cli.core.errors import SdsegError, is_disk_full

    if isinstance(error, SdsegError):
        fail(error)
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        return 1
    if is_disk_full(error):
        where = getattr(error, "filename", None)
        fail(
            f"the disk is full{f' at {where}' if where else ''}: {error}. What was finished before is whole. "
            "Free some space or choose another --out, then run the command again."
        )
        return 1
    if isinstance(error, OSError) and error.filename is not None:
        fail(f"{error.filename}: {error.strerror or error}. Check the path and its permissions.")
        return 1
    if _is_lost_process(error):
        fail(
            "another process of this command has ended (killed, perhaps for lack of memory). Start it again."
        )
        return 1
    if isinstance(error, MemoryError):
        fail("out of memory. Use a smaller --batch-size, fewer --workers or a smaller image size.")
        return 1
    raise error


def _is_lost_process(error: Exception) -> bool:
    from sdseg_cli.console import is_launched

    if not is_launched():
        return False
    from sdseg_cli.core.engine.processes import is_lost

    return is_lost(error)


def _say_stopped(message: str) -> None:
    from sdseg_cli.console import say

    say(message)


def _listen_for_signals() -> None:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does: temporary files are removed on the way out."""
    process = os.getpid()

    def stop(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != process:  # a loading process that inherited this handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        leave_terminal(number)
        raise Interrupted(f"stopped by {signal.Signals(number).name}.", number)

    with contextlib.suppress(ValueError):  # not the main thread: who embeds us handles the signals
        for number in stop_signals():
            if number != signal.SIGINT:  # which Python makes a KeyboardInterrupt
                signal.signal(number, stop)


def _quieten_libraries() -> None:
    """Keep other libraries' notices and bars off the screen, unless the user asked for them."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def _flush_results() -> None:
    """Flush stdout; where its reader has gone (``sdseg ... | head``), leave without a complaint."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
