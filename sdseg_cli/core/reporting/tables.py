"""Tables as data: CSV text and formatted cells. Nothing here knows a terminal."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdseg_cli.core.reporting.page import Table

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
    """Write a table as Markdown with its title above and its caption below; names may hold bars."""
    from tabulate import tabulate

    rows = [[cell.replace("|", r"\|") for cell in row] for row in table.rows]
    body = tabulate(rows, table.columns, "pipe", colalign=_alignment(table), disable_numparse=True)
    return f"**{table.title}**\n\n{body}\n\n{table.caption}\n"


def to_latex(table: Table, label: str) -> str:
    """Write a table as a LaTeX ``table`` with the rules of the package booktabs.

    Args:
        table: of text; every character that LaTeX would read is escaped.
        label: what ``\\ref`` calls it.
    """
    from tabulate import tabulate

    body = tabulate(
        table.rows, table.columns, "latex_booktabs", colalign=_alignment(table), disable_numparse=True
    )
    caption = tabulate([[f"{table.title}. {table.caption}"]], tablefmt="latex", disable_numparse=True)
    text = (
        caption.splitlines()[2].removesuffix(r"\\").strip()
    )  # the only row, escaped as the table's cells are
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{text}}}",
        rf"\label{{{label}}}",
        body,
        r"\end{table}",
    ]
    written = "\n".join(lines)
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
