"""Tables as data: CSV text and formatted cells. Nothing here knows a terminal."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any


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
