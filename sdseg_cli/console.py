"""The only file that draws on the screen.

Messages and progress go to stderr, results (tables, JSON) to stdout, so that results can be piped. With
several processes only the main one speaks, errors excepted. Nothing here imports torch.
"""

from __future__ import annotations

import math
import os
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from sdseg_cli.core.run_directory import to_json

T = TypeVar("T")

PLAIN_REPORT_S = 15.0  # seconds between lines of progress where the screen cannot be redrawn

console = Console(stderr=True, highlight=False)
results = Console(highlight=False)


def process_index() -> int:
    """The rank of this process, 0 outside a launcher."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) or 0)


def is_main_process() -> bool:
    """Whether this process speaks for all."""
    return process_index() == 0


def is_launched() -> bool:
    """Whether a launcher started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1") or 1) > 1


# Messages -------------------------------------------------------------------------------------------


def say(message: str) -> None:
    """Tell the user something, on stderr."""
    if is_main_process():
        _print_message(message)


def warn(message: str) -> None:
    """Tell the user something to look at; the command goes on."""
    if is_main_process():
        _print_message(message, label="warning", style="bold yellow")


def fail(error: BaseException | str) -> None:
    """Tell the user why the command ends; every process may say so."""
    where = "" if is_main_process() else f" (process {process_index()})"
    _print_message(str(error) or type(error).__name__, label=f"error{where}", style="bold red")


def done(message: str) -> None:
    """Tell the user what was made."""
    if is_main_process():
        _print_message(message, label="done", style="bold green")


def _print_message(message: str, *, label: str = "", style: str = "") -> None:
    text = _wrapped(f"{label}: {message}" if label else message)
    drawn = Text(text)
    if label:
        drawn.stylize(style, 0, len(label) + 1)
    console.print(drawn, soft_wrap=True)


def _wrapped(message: str) -> str:
    """Break lines between words on a terminal; never inside a path, and not at all in a pipe."""
    if not console.is_terminal:
        return message
    lines = []
    for line in message.splitlines() or [""]:
        indent = line[: len(line) - len(line.lstrip())]
        lines += textwrap.wrap(
            line,
            max(console.width, 40),
            subsequent_indent=f"{indent}  ",
            break_long_words=False,
            break_on_hyphens=False,
            drop_whitespace=True,
        ) or [""]
    return "\n".join(lines)


@contextmanager
def working(message: str) -> Iterator[None]:
    """Show that something slow goes on: a spinner on a terminal, one line elsewhere."""
    if not is_main_process():
        yield
    elif console.is_terminal:
        with console.status(Text(message)):
            yield
    else:
        _print_message(f"{message} ...")
        yield


# Results --------------------------------------------------------------------------------------------


def show_json(data: Any) -> None:
    """Print machine-readable results to stdout, and nothing else; NaN is null, infinity "inf"."""
    if is_main_process():
        sys.stdout.write(to_json(data, indent=2) + "\n")
        sys.stdout.flush()


def show_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str = "",
    caption: str = "",
) -> None:
    """Print a table to stdout: the first column to the left, the others to the right.

    Args:
        columns: the headings.
        rows: one sequence a row; None is drawn as a dash, floats as given by ``format_number``.
        title: drawn above.
        caption: drawn below: conventions, counts, units.
    """
    if not is_main_process():
        return
    table = Table(
        title=Text(title, style="bold") if title else None,
        caption=Text(caption) if caption else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    cells = [[format_number(value) for value in row] for row in rows]
    # Names are there to be copied: what has to be folded on a narrow screen is the rest.
    names_fit = all(len(row[0]) <= results.width // 2 for row in cells)
    for index, heading in enumerate(columns):
        justify: Literal["left", "right"] = "right" if index else "left"
        table.add_column(Text(heading), justify=justify, overflow="fold", no_wrap=not index and names_fit)
    for row in cells:
        table.add_row(*map(Text, row))
    results.print(table)


def show_text(text: str) -> None:
    """Print text to stdout as it is."""
    if is_main_process():
        results.print(Text(text.rstrip("\n")), soft_wrap=True)


def show_facts(facts: Mapping[str, object], *, title: str = "") -> None:
    """Print names and values in two columns to stdout."""
    if not is_main_process():
        return
    if title:
        results.print(Text(title, style="bold"))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(Text(name), Text(format_number(value)))
    results.print(table)


def format_number(value: object) -> str:
    """Write a value for a person: floats with 4 digits after the point, counts with separators."""
    if value is None or value != value:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"
    return str(value)


# Progress -------------------------------------------------------------------------------------------


def progress(iterable: Iterable[T], total: int | None, description: str, *, unit: str = "") -> Iterator[T]:
    """Pass items through and show how far it is: a bar on a terminal, a line now and then elsewhere.

    Args:
        iterable: the items; consumed lazily.
        total: how many there will be; None = unknown.
        description: what is being done, two or three words.
        unit: what is counted, "images".
    """
    with task_progress(total, description, unit=unit) as advance:
        for item in iterable:
            yield item
            advance(1)


class Advance:
    """Moves a progress bar forward."""

    def __init__(self, total: int | None, description: str, unit: str, bar: Progress | None) -> None:
        self.total = total
        self.description = description
        self.unit = unit
        self.completed = 0
        self._bar = bar
        self._task = bar.add_task(description, total=total) if bar else None
        self._clock = _LineClock()

    def __call__(self, count: int = 1, *, total: int | None = None) -> None:
        """Add ``count`` to what is done; ``total`` corrects the expected number."""
        self.completed += count
        self.total = total or self.total
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=count, total=self.total)
        elif self._clock.is_due() or (self.total is not None and self.completed == self.total):
            of_total = f"/{self.total:,}" if self.total is not None else ""
            unit = f" {self.unit}" if self.unit else ""
            _print_message(f"{self.description}: {self.completed:,}{of_total}{unit}")


class _Silence(Advance):
    def __init__(self) -> None:
        super().__init__(None, "", "", None)

    def __call__(self, count: int = 1, *, total: int | None = None) -> None:
        self.completed += count


@contextmanager
def task_progress(total: int | None, description: str, *, unit: str = "") -> Iterator[Advance]:
    """Show a progress bar that is moved by calling what is yielded; see :func:`progress`."""
    if not is_main_process():
        yield _Silence()
    elif not console.is_terminal:
        yield Advance(total, description, unit, None)
    else:
        bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn(unit, markup=False),
            TimeRemainingColumn(compact=True),
            console=console,
            expand=True,
        )
        with bar:
            yield Advance(total, description, unit, bar)


@contextmanager
def byte_progress(description: str) -> Iterator[Advance]:
    """Show how much of a download is done, in MB; the total is given with the first advance."""
    if not is_main_process():
        yield _Silence()
        return
    if not console.is_terminal:
        yield Advance(None, description, "bytes", None)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        _Megabytes(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, expand=True) as bar:
        yield Advance(None, description, "", bar)


class _Megabytes(ProgressColumn):
    def render(self, task: Task) -> Text:
        total = f"/{task.total / 1e6:.1f}" if task.total else ""
        return Text(f"{task.completed / 1e6:.1f}{total} MB")


class TrainingProgress:
    """The line of a training: step, loss, validation Dice, images a second, memory, time left."""

    def __init__(
        self,
        total: int,
        start: int,
        bar: Progress | None,
        *,
        ends: float = math.inf,
        silent: bool = False,
    ) -> None:
        self.total = total
        self._ends = ends
        self._bar = bar
        self._task = bar.add_task("", total=total, completed=start, facts="") if bar else None
        self._facts: dict[str, str] = {}
        self._silent = silent
        self._clock = _LineClock()
        self._started = (time.monotonic(), start)

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        dice: float | None = None,
        samples_per_second: float | None = None,
        memory_gib: float | None = None,
        note: str | None = None,
    ) -> None:
        """Show the state after ``step`` optimizer steps; what is None stays as it was.

        Args:
            step: steps done.
            loss: training loss.
            dice: validation Dice.
            samples_per_second: images a second, over all processes.
            memory_gib: peak memory of the device in GiB.
            note: something going on instead of steps ("validating"); "" clears it.
        """
        given = {
            "note": note,
            "loss": None if loss is None else f"loss {loss:.4f}",
            "dice": None if dice is None else f"Dice {dice:.3f}",
            "speed": None if samples_per_second is None else f"{samples_per_second:.3g} img/s",
            "memory": None if memory_gib is None else f"{memory_gib:.1f} GiB",
        }
        self._facts.update({name: text for name, text in given.items() if text is not None})
        if self._silent:
            return
        facts = "  ".join(text for text in self._facts.values() if text)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, facts=facts)
        elif self._clock.is_due() or step == self.total or dice is not None:
            _print_message(f"step {step:,}/{self.total:,}  {facts}{self._time_left(step)}")

    def say(self, message: str) -> None:
        """Print a message above the line."""
        say(message)

    def _time_left(self, step: int) -> str:
        began, start = self._started
        if step <= start or step >= self.total:
            return ""
        at_this_pace = (time.monotonic() - began) / (step - start) * (self.total - step)
        return f"  {_clock(at_this_pace, self._ends)} left"


class _TimeLeft(ProgressColumn):
    max_refresh = 0.5

    def __init__(self, ends: float) -> None:
        super().__init__()
        self._ends = ends

    def render(self, task: Task) -> Text:
        left = math.inf if task.time_remaining is None else task.time_remaining
        return Text(_clock(left, self._ends), style="progress.remaining")


def _clock(seconds: float, ends: float) -> str:
    """Hours, minutes and seconds that are left, at most until ``ends`` of the monotonic clock."""
    seconds = min(seconds, max(0.0, ends - time.monotonic()))
    return "-:--:--" if math.isinf(seconds) else str(timedelta(seconds=int(seconds)))


@contextmanager
def training_progress(
    total: int, *, start: int = 0, seconds: float | None = None
) -> Iterator[TrainingProgress]:
    """Show a training of ``total`` optimizer steps, of which ``start`` are done already.

    Args:
        total: optimizer steps.
        start: how many of them are done.
        seconds: after which it ends at the latest; None if it may take as long as it takes.
    """
    ends = math.inf if seconds is None else time.monotonic() + seconds
    if not is_main_process():
        yield TrainingProgress(total, start, None, silent=True)
    elif not console.is_terminal:
        yield TrainingProgress(total, start, None, ends=ends)
    else:
        columns = (
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
            _TimeLeft(ends),
        )
        with Progress(*columns, console=console, expand=True) as bar:
            yield TrainingProgress(total, start, bar)


class _LineClock:
    """Says when the next line of progress is due, so that a log file is not flooded."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def is_due(self) -> bool:
        if time.monotonic() - self._last < PLAIN_REPORT_S:
            return False
        self._last = time.monotonic()
        return True
