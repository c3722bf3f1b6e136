"""A comparison as tables (terminal, Markdown, LaTeX), as records (CSV, JSON) and as a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from sdseg_cli.core.engine.comparison import COMPARED, OF_ONE_UNIT, Accuracy, Comparison, Costs, Method
from sdseg_cli.core.engine.evaluation_records import DISTANCES, MEAN_OF_CLASSES
from sdseg_cli.core.engine.evaluation_summary import CONVENTION_TEXTS
from sdseg_cli.core.engine.report_parts import MOST_ROWS
from sdseg_cli.core.reporting.charts import DotRow, Series, dot_plot, line_chart, line_legend
from sdseg_cli.core.reporting.curves import Convergence
from sdseg_cli.core.reporting.page import CaseTable, Chart, Figure, Page, Table, format_duration
from sdseg_cli.core.reporting.tables import cell, interval_cell

MOST_CHARTED = 8  # methods of one chart


def comparison_tables(comparison: Comparison, split: str | None, convention: str, grid: str) -> list[Table]:
    """All tables, those left out that would say nothing; ``split`` is None where the cases are of none."""
    title = "Comparison" if split is None else f"Comparison, split {split}"
    tables = [
        _accuracy_table(comparison, title, convention, grid),
        _difference_table(comparison),
        _class_table(comparison),
        _cost_table(comparison),
        _stability_table(comparison),
    ]
    return [table for table in map(_without_empty_columns, tables) if len(table.columns) > 1]


def _accuracy_table(comparison: Comparison, title: str, convention: str, grid: str) -> Table:
    """One row a method: means over the cases, and the interval of the Dice."""
    columns = ["method", "Dice", "95 % interval", "IoU", "NSD", f"HD95 ({comparison.unit})"]
    columns += ["missed", "invented", "runs", "± of runs"]
    several_runs = any(len(method.runs) > 1 for method in comparison.methods)
    rows = []
    for method in comparison.methods:
        dice = comparison.find(method.name, comparison.overall, "dice")
        others = [_mean_of(comparison, method.name, metric) for metric in ("iou", "nsd")]
        distance = _mean_of(comparison, method.name, "hd95", digits=2)
        outcomes = [
            f"{counts[method.name]:g}" if any(counts.values()) else "–"
            for counts in (comparison.missed, comparison.false_alarms)
        ]
        runs = [str(len(method.runs)), cell(dice.spread)] if several_runs else ["–", "–"]
        rows.append(
            (method.name, cell(dice.summary.mean), _interval(dice), *others, distance, *outcomes, *runs)
        )
    return Table(title, _accuracy_caption(comparison, convention, grid), tuple(columns), tuple(rows))


def _accuracy_caption(comparison: Comparison, convention: str, grid: str) -> str:
    over = "" if len(comparison.classes) == 1 else f", means over {len(comparison.classes) - 1} classes"
    left_out = f" {len(comparison.left_out)} cases are left out." if comparison.left_out else ""
    structures = any(comparison.missed.values()) or any(comparison.false_alarms.values())
    outcomes = " Structures missed and invented (false alarms) are counted a run." if structures else ""
    return (
        f"{len(comparison.cases)} cases{over}, compared on the {grid}'s grid; 95 % bootstrap intervals of "
        "the mean. HD95 is over the cases where it is finite, 'n of all' where those are not "
        f"all.{outcomes}{left_out} Convention {convention!r}. {CONVENTION_TEXTS[convention]}"
    )


def _difference_table(comparison: Comparison) -> Table:
    """One row a method that is not the baseline: how much better its Dice is, case by case."""
    rows = []
    for method in comparison.methods:
        entry = comparison.find(method.name, comparison.overall, "dice")
        if (difference := entry.difference) is None:
            continue
        interval = interval_cell(difference.low, difference.high)
        p_values = (_p_value(difference.p_value), _p_value(entry.p_adjusted))
        mean = "–" if math.isnan(difference.mean) else f"{difference.mean:+.4f}"
        rows.append((method.name, mean, interval, *p_values, str(difference.n)))
    caption = (
        f"Dice minus that of {comparison.baseline}, case by case; 95 % bootstrap intervals; two-sided "
        "p-values of the Wilcoxon signed-rank test, and adjusted over the methods by Holm."
    )
    columns = ("method", "difference", "95 % interval", "p", "p adjusted", "cases")
    return Table(f"Paired differences from {comparison.baseline}", caption, columns, tuple(rows))


def _class_table(comparison: Comparison) -> Table:
    """Dice of every class, one column a method."""
    names = [method.name for method in comparison.methods]
    columns = ("class", *names) if len(comparison.classes) > 1 else ("class",)
    rows = tuple(
        (class_name, *(cell(comparison.find(name, class_name, "dice").summary.mean) for name in columns[1:]))
        for class_name in comparison.classes
    )
    caption = f"Mean Dice over {len(comparison.cases)} cases; intervals are in comparison.csv."
    return Table("Dice of each class", caption, columns, rows)


def _cost_table(comparison: Comparison) -> Table:
    """One row a method: weights, training, prediction; means over runs."""
    rows = []
    for method in comparison.methods:
        costs = mean_costs(method)
        rows.append(
            (
                method.name,
                "–" if costs.parameters is None else f"{costs.parameters / 1e6:.2f} M",
                "–" if costs.training_seconds is None else format_duration(costs.training_seconds),
                cell(costs.training_memory_gib, 2),
                cell(costs.training_samples_per_second, 1),
                cell(costs.images_per_second, 1),
                cell(costs.prediction_memory_gib, 2),
                cell(costs.batch_size),
            )
        )
    columns = (
        *("method", "weights", "training", "training GiB", "samples/s"),
        *("images/s", "prediction GiB", "batch"),
    )
    return Table("Cost", _cost_caption(comparison), columns, tuple(rows))


def _cost_caption(comparison: Comparison) -> str:
    costs = [run.costs for method in comparison.methods for run in method.runs]
    trained = sorted({one.training_device for one in costs if one.training_device})
    predicted = sorted(
        {f"{one.prediction_device} in {one.precision}" for one in costs if one.prediction_device}
    )
    parts = [f"Trained on {', '.join(trained)}."] if trained else []
    if any("cpu" in name for name in trained):
        parts.append("On a CPU the training's memory is that of the whole process.")
    if predicted:
        parts.append(
            f"Predicted on {', '.join(predicted)}, one after the other: reading and prediction in batches, "
            "no scoring, no writing."
        )
    return " ".join(parts)


def _stability_table(comparison: Comparison) -> Table:
    """One row a method: how far single draws of the noise agree; means over runs."""
    rows = []
    for method in comparison.methods:
        costs = mean_costs(method)
        figures = [cell(costs.lpips), cell(costs.psnr, 2), cell(costs.ssim), cell(costs.ms_ssim)]
        rows.append((method.name, cell(costs.agreement), *figures))
    draws = sorted({run.costs.draws for one in comparison.methods for run in one.runs if run.costs.draws})
    caption = (
        f"{', '.join(map(str, draws))} single draws of the noise. Agreement: mean Dice between their masks, "
        "over all pairs; the others compare the predicted scores of each with the first (PSNR leaves out "
        "pairs that are equal)."
    )
    columns = ("method", "agreement", "LPIPS", "PSNR (dB)", "SSIM", "MS-SSIM")
    return Table("Stability", caption, columns, tuple(rows))


def _without_empty_columns(table: Table) -> Table:
    """Leave out what is known of no row."""
    kept = [at for at in range(len(table.columns)) if at == 0 or any(row[at] != "–" for row in table.rows)]
    rows = tuple(tuple(row[at] for at in kept) for row in table.rows)
    return replace(table, columns=tuple(table.columns[at] for at in kept), rows=rows)


def mean_costs(method: Method) -> Costs:
    """The means over a method's runs of what is known of each; of devices the first."""
    values = {}
    for name in asdict(Costs()):
        known = [value for run in method.runs if (value := getattr(run.costs, name)) is not None]
        if not known or isinstance(known[0], str):
            values[name] = known[0] if known else None
        else:
            mean = sum(known) / len(known)
            values[name] = round(mean) if isinstance(known[0], int) else mean
    return Costs(**values)


# ---- records --------------------------------------------------------------------------------------------


def accuracy_records(comparison: Comparison) -> list[dict[str, Any]]:
    """One record per method, class and metric, for ``comparison.csv``."""
    records = []
    for entry in comparison.accuracies:
        difference = entry.difference
        records.append(
            {
                "method": entry.method,
                "class": entry.class_name,
                "metric": entry.metric,
                "mean": entry.summary.mean,
                "low": entry.summary.low,
                "high": entry.summary.high,
                "median": entry.summary.median,
                "interval_method": entry.summary.interval_method,
                "cases": entry.summary.n,
                "infinite": entry.summary.infinite,
                "runs": len(entry.run_means),
                "std_of_runs": entry.spread,
                "baseline": comparison.baseline,
                "difference": difference.mean if difference else math.nan,
                "difference_low": difference.low if difference else math.nan,
                "difference_high": difference.high if difference else math.nan,
                "difference_cases": difference.n if difference else None,
                "difference_left_out": difference.left_out if difference else None,
                "p_value": difference.p_value if difference else math.nan,
                "p_adjusted": entry.p_adjusted,
                "unit": comparison.unit if entry.metric in DISTANCES else "",
            }
        )
    return records


def cost_records(comparison: Comparison) -> list[dict[str, Any]]:
    """One record per run, for ``costs.csv``."""
    return [
        {"method": method.name, "location": run.location, **asdict(run.costs)}
        for method in comparison.methods
        for run in method.runs
    ]


def case_records(comparison: Comparison) -> list[dict[str, Any]]:
    """One record per run, case and class, for ``cases.csv``; the compared cases only."""
    kept = set(comparison.cases)
    names = ("case", "class", *COMPARED, "distance_unit", "outcome")
    return [
        {"method": method.name, "location": run.location, **{name: row[name] for name in names}}
        for method in comparison.methods
        for run in method.runs
        for row in run.rows
        if row["case"] in kept
    ]


# ---- the page -------------------------------------------------------------------------------------------


def comparison_page(
    comparison: Comparison,
    title: str,
    tables: Sequence[Table],
    *,
    curves: Sequence[Convergence],
    facts: Mapping[str, Any],
    footer: str,
) -> Page:
    """Put a comparison on one page.

    Args:
        comparison: what is shown.
        title: of the page.
        tables: as made here.
        curves: of the runs that are compared, none where nothing was trained.
        facts: names and values for the end of the page.
        footer: the last line.
    """
    overall = [comparison.find(method.name, comparison.overall, "dice") for method in comparison.methods]
    others = [entry for entry in overall if entry.method != comparison.baseline]
    kept = {comparison.baseline, *(entry.method for entry in others[: MOST_CHARTED - 1])}
    shown = [entry for entry in overall if entry.method in kept]
    rest = f" The first {len(shown)} of {len(overall)} methods." if len(shown) < len(overall) else ""
    rows = [
        DotRow(
            entry.method,
            entry.cases,
            entry.summary.mean,
            (entry.summary.low, entry.summary.high),
            highlighted=entry.method == comparison.baseline,
        )
        for entry in shown
    ]
    chart = Chart(
        "Dice of every case",
        "A dot is a case; the line is the mean, the bar its 95 % interval. "
        f"Coloured: {comparison.baseline}, the baseline.{rest}",
        dot_plot(rows, x_label="Dice", description="Dice of every case, one row a method"),
    )
    figures = tuple(
        Figure(
            entry.method,
            cell(entry.summary.mean),
            "baseline" if entry.difference is None else f"{_difference(entry)} from {comparison.baseline}",
        )
        for entry in shown
    )
    return Page(
        title,
        f"{len(comparison.methods)} methods on the same {len(comparison.cases)} cases.",
        figures=figures,
        charts=(chart,),
        charts_title="Accuracy",
        convergence=_convergence_charts(curves, comparison.baseline),
        tables=tuple(tables),
        cases=_case_table(comparison, overall),
        facts=tuple((name, str(value)) for name, value in facts.items()),
        recipes=_recipes(comparison),
        footer=footer,
    )


def _convergence_charts(curves: Sequence[Convergence], baseline: str) -> tuple[Chart, ...]:
    """Validation Dice by step and by time, the baseline in the colour that it has in the other chart."""
    ordered = sorted(curves, key=lambda curve: curve.method != baseline)
    by_step = [Series(one.method, one.steps, one.dices, marks=True) for one in ordered]
    by_time = [  # those without a time keep their place, and so their colours
        Series(one.method, one.minutes or (), one.dices if one.minutes else (), marks=True) for one in ordered
    ]
    if baseline not in {one.method for one in curves}:  # masks or scores: its colour is no other's here
        by_step, by_time = ([Series(baseline, (), ()), *lines] for lines in (by_step, by_time))
    lowest = min((min(one.dices) for one in curves), default=0.0)
    highest = max((max(one.dices) for one in curves), default=1.0)
    return tuple(
        Chart(
            title,
            "On the validation split during training; a line a run, a colour a method.",
            line_chart(
                lines,
                x_label=x_label,
                y_label="validation Dice",
                y_range=(max(0.0, lowest - 0.05), min(1.0, highest + 0.03)),
                description=f"{title}, a line a run",
            ),
            line_legend(lines),
        )
        for title, x_label, lines in (
            ("Validation Dice by step", "optimizer step", by_step),
            ("Validation Dice by time", "minutes trained", by_time),
        )
        if any(len(one.x) for one in lines)
    )


def _recipes(comparison: Comparison) -> tuple[tuple[str, str], ...]:
    """Every recipe once, with the methods and places of the runs that were trained by it."""
    trained: dict[str, dict[str, None]] = {}
    for method in comparison.methods:
        for run in method.runs:
            trained.setdefault(run.recipe, {})[f"{method.name} ({run.location})"] = None
    return tuple((", ".join(runs), recipe) for recipe, runs in trained.items() if recipe)


def _case_table(comparison: Comparison, overall: Sequence[Accuracy]) -> CaseTable:
    first = overall[0].cases
    order = sorted(range(len(first)), key=lambda at: first[at] if math.isfinite(first[at]) else math.inf)
    of = "" if comparison.overall != MEAN_OF_CLASSES else " (mean of classes)"
    rest = f" The first {MOST_ROWS:,}; all are in cases.csv." if len(order) > MOST_ROWS else ""
    return CaseTable(
        "Cases",
        f"Dice{of} of each case by each method, the worst of {overall[0].method} first.{rest}",
        ("case", *(entry.method for entry in overall)),
        tuple(
            (comparison.cases[at], *(cell(entry.cases[at]) for entry in overall)) for at in order[:MOST_ROWS]
        ),
        limit_column=1,
    )


def _mean_of(comparison: Comparison, method: str, metric: str, digits: int = 4) -> str:
    if metric in OF_ONE_UNIT and comparison.unit == "mixed":
        return "–"  # millimetres and pixels have no mean
    summary = comparison.find(method, comparison.overall, metric).summary
    counted = f" ({summary.n - summary.infinite} of {summary.n})" if summary.infinite else ""
    return cell(summary.mean, digits) + counted


def _interval(entry: Accuracy) -> str:
    return interval_cell(entry.summary.low, entry.summary.high)


def _difference(entry: Accuracy) -> str:
    difference = entry.difference
    if difference is None or math.isnan(difference.mean):
        return "–"
    return f"{difference.mean:+.4f} ({interval_cell(difference.low, difference.high)})"


def _p_value(p: float) -> str:
    if math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
