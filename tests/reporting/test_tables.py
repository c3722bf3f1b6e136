"""Tables as text."""

import math

import pytest

from sdseg_cli.core.reporting.page import Table
from sdseg_cli.core.reporting.tables import cell, interval_cell, to_csv, to_latex, to_markdown


def test_csv_keeps_every_digit_and_leaves_undefined_cells_empty():
    records = [
        {"case": "a,b", "dice": 0.1 + 0.2, "hd95": math.inf},
        {"case": "ü", "dice": math.nan, "hd95": None},
    ]
    assert to_csv(records) == 'case,dice,hd95\n"a,b",0.30000000000000004,inf\nü,,\n'


def test_csv_without_records_still_has_its_header():
    assert to_csv([], ["case", "dice"]) == "case,dice\n"


def test_csv_refuses_a_column_it_does_not_have():
    with pytest.raises(ValueError, match="fields not in fieldnames: 'iou'"):
        to_csv([{"case": "a", "iou": 1.0}], ["case"])


def test_cells_show_what_is_undefined_and_what_is_infinite():
    assert [cell(0.87654), cell(3), cell(12.345, 2), cell(math.nan), cell(None), cell(math.inf)] == [
        "0.8765",
        "3",
        "12.35",
        "–",
        "–",
        "∞",
    ]


def test_an_interval_is_a_dash_where_there_is_none():
    assert interval_cell(0.84123, 0.9) == "0.8412 – 0.9000"
    assert interval_cell(math.nan, math.nan) == "–"


def test_markdown_and_latex_hold_every_cell_as_it_is_written():
    table = Table("Scores", "50 % of A & B.", ("method", "Dice"), (("a|b_1", "0.4000"), ("ours", "∞")))
    markdown = to_markdown(table)
    assert "| a\\|b\\_1" in markdown
    assert "0.4000 |" in markdown
    assert markdown.startswith("**Scores**")
    assert markdown.rstrip().endswith("50 % of A & B.")
    latex = to_latex(table)
    assert r"\toprule" in latex
    assert r"a|b\_1" in latex
    assert r"$\infty$" in latex
    assert r"\caption{Scores. 50 \% of A \& B.}" in latex
    assert r"\label{tab:scores}" in latex
    assert latex.count(r"\begin{") == latex.count(r"\end{") == 2
