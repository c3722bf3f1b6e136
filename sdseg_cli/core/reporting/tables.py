"""Tables as data: CSV text and formatted cells. Nothing here knows a terminal."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdseg_cli.core.reporting.page import Table

_MARKDOWN_SIGNS = re.compile(r"[\\|<*_`]")
# What LaTeX sets in text only by a command; the rest is escaped by the library.
_LATEX_SIGNS = {"–": "--", "±": r"$\pm$", "∞": r"$\infty$", "−": "$-$", "×": r"$\times$", "Δ": r"$\Delta$"}


def to_csv(records: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Write records as CSV (RFC 4180, ``\\n`` line ends).

    Args:
        records: one row each; the columns are those of the first one unless given.
        columns: names and order of the columns; needed where there may be no record.

    Returns:
        The text, with a header. NaN and None are empty cells, infinity is ``inf``; floats keep every digit.

    Raises:
        ValueError: a record has a key that is no column.
    """
    names = list(columns) if columns is not None else list(records[0]) if records else []
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({name: _csv_cell(value) for name, value in record.items()})
    return stream.getvalue()


def to_markdown(table: Table) -> str:
    """Write a table as Markdown with its title above and its caption below; names may hold any character."""
    from tabulate import tabulate

    rows = [[_MARKDOWN_SIGNS.sub(r"\\\g<0>", cell) for cell in row] for row in table.rows]
    body = tabulate(rows, table.columns, "pipe", colalign=_alignment(table), disable_numparse=True)
    return f"**{table.title}**\n\n{body}\n\n{table.caption}\n"


def to_latex(table: Table) -> str:
    """Write a table as a LaTeX ``table`` with the rules of the package booktabs; all text is escaped.

    Its label is ``tab:`` and its title in small letters.
    """
    from tabulate import LATEX_ESCAPE_RULES, tabulate

    body = tabulate(
        table.rows, table.columns, "latex_booktabs", colalign=_alignment(table), disable_numparse=True
    )
    caption = "".join(LATEX_ESCAPE_RULES.get(sign, sign) for sign in f"{table.title}. {table.caption}")
    label = re.sub(r"[^a-z0-9]+", "-", table.title.lower()).strip("-")
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}", rf"\label{{tab:{label}}}", body]
    written = "\n".join([*lines, r"\end{table}"])
    for sign, command in _LATEX_SIGNS.items():
        written = written.replace(sign, command)
    return written + "\n"


def _alignment(table: Table) -> list[str]:
    return ["left", *["right"] * (len(table.columns) - 1)]


def cell(value: float | int | None, digits: int = 4) -> str:
    """Format a number for a table: ``0.8731``; a dash where it is undefined, ``∞`` where it is infinite."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float) and math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def interval_cell(low: float, high: float, digits: int = 4) -> str:
    """Format an interval: ``0.8412 – 0.9023``, or a dash where there is none."""
    if math.isnan(low) or math.isnan(high):
        return "–"
    return f"{low:.{digits}f} – {high:.{digits}f}"


def _csv_cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return repr(value) if isinstance(value, float) else value
