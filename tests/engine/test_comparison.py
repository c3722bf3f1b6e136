"""Comparisons from made-up scores: pairing, averaging over runs, what is refused."""

import math

import pytest

from sdseg_cli.core.engine.comparison import Costs, Method, ScoredRun, compare
from sdseg_cli.core.engine.comparison_report import (
    _convergence_charts,
    accuracy_records,
    case_records,
    comparison_tables,
    mean_costs,
)
from sdseg_cli.core.errors import DataError, UsageError
from sdseg_cli.core.reporting.curves import Convergence


def run(location, dices, *, classes=("polyp",), failed=None, unit="px", cases="abcdefgh", **changes):
    """A scored run; ``dices`` are of the cases a, b, c ..., one value or one for each class."""
    rows = []
    for case, values in zip(cases, dices, strict=False):
        for name, value in zip(classes, values if isinstance(values, tuple) else (values,), strict=True):
            scores = {"dice": value, "iou": value / 2, "hd95": 3.0, "assd": 1.0, "nsd": value}
            outcome = "missed" if value == 0 else "scored"
            rows.append({"case": case, "class": name, **scores, "distance_unit": unit, "outcome": outcome})
    return ScoredRun(location, "run", tuple(rows), failed or {}, **changes)


def test_runs_of_one_method_are_averaged_for_each_case_and_their_spread_is_told():
    ours = Method("ours", (run("x", [0.6, 0.8]), run("y", [0.8, 0.6])))
    found = compare([ours, Method("other", (run("z", [0.5, 0.4]),))])
    entry = found.find("ours", "polyp", "dice")
    assert entry.cases == pytest.approx((0.7, 0.7))
    assert entry.run_means == pytest.approx((0.7, 0.7))
    assert entry.spread == pytest.approx(0)
    assert entry.difference is None
    other = found.find("other", "polyp", "dice")
    assert other.difference.mean == pytest.approx((-0.2 - 0.3) / 2)
    assert math.isnan(other.spread)


def test_differences_are_from_the_baseline_that_was_named():
    methods = [Method(name, (run(name, dices),)) for name, dices in (("a", [0.5, 0.7]), ("b", [0.4, 0.4]))]
    assert compare(methods).baseline == "a"
    found = compare(methods, baseline="b")
    assert found.find("a", "polyp", "dice").difference.mean == pytest.approx(0.2)
    with pytest.raises(UsageError, match=r"--baseline c: there is no such method. There are: a, b"):
        compare(methods, baseline="c")


def test_p_values_are_adjusted_over_the_methods():
    cases = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    methods = [Method("base", (run("base", cases),))]
    methods += [
        Method(f"m{k}", (run(f"m{k}", [c + 0.01 * k + 0.001 * i for i, c in enumerate(cases)]),))
        for k in (1, 2)
    ]
    found = compare(methods)
    for name in ("m1", "m2"):
        entry = found.find(name, "polyp", "dice")
        assert entry.difference.p_value == pytest.approx(2 / 2**7)
        assert entry.p_adjusted == pytest.approx(4 / 2**7)


def test_several_classes_get_their_mean_of_each_case_where_it_is_defined():
    several = run("x", [(0.2, 0.6), (math.nan, 0.4)], classes=("cup", "disc"))
    found = compare(
        [Method("x", (several,)), Method("y", (run("y", [(0.2, 0.4), (0.1, 0.1)], classes=("cup", "disc")),))]
    )
    assert found.classes == ("cup", "disc", "mean of classes")
    assert found.find("x", found.overall, "dice").cases == pytest.approx((0.4, 0.4))
    titles = [table.title for table in comparison_tables(found, "test", "standard", "case")]
    assert titles == ["Comparison, split test", "Paired differences from x", "Dice of each class"]


def test_distances_say_over_how_many_cases_they_are():
    missed = run("x", [0.0, 0.8])
    rows = tuple({**row, "hd95": math.inf} if row["case"] == "a" else row for row in missed.rows)
    found = compare([Method("x", (ScoredRun("x", "run", rows),)), Method("y", (run("y", [0.5, 0.4]),))])
    table = comparison_tables(found, "test", "standard", "case")[0]
    at = table.columns.index("HD95 (px)")
    assert [row[at] for row in table.rows] == ["3.00 (1 of 2)", "3.00"]


def test_missed_structures_are_counted_a_run():
    ours = Method("ours", (run("x", [0.0, 0.8]), run("y", [0.5, 0.6])))
    found = compare([ours, Method("other", (run("z", [0.5, 0.4]),))])
    assert found.missed == {"ours": 0.5, "other": 0}
    table = comparison_tables(found, "test", "standard", "case")[0]
    assert table.rows[0][table.columns.index("missed")] == "0.5"


@pytest.mark.faults
def test_a_case_that_failed_somewhere_is_left_out_everywhere():
    torn = run("x", [0.9], failed={"b": "b.png is torn"})
    found = compare([Method("x", (torn,)), Method("y", (run("y", [0.5, 0.1]),))])
    assert found.cases == ("a",)
    assert found.left_out == {"b": "x: b.png is torn"}
    assert [record["case"] for record in case_records(found)] == ["a", "a"]


@pytest.mark.faults
def test_methods_of_other_cases_are_refused_unless_the_common_ones_are_asked_for():
    methods = [Method("x", (run("x", [0.9, 0.8, 0.7]),)), Method("y", (run("y", [0.5]),))]
    with pytest.raises(DataError, match=r"y lacks b, c\. .*compare the 1 common cases with --common"):
        compare(methods)
    found = compare(methods, partial=True)
    assert found.cases == ("a",)
    assert set(found.left_out) == {"b", "c"}


@pytest.mark.faults
def test_methods_of_other_classes_are_refused():
    methods = [Method("x", (run("x", [0.9]),)), Method("y", (run("y", [0.9], classes=("disc",)),))]
    with pytest.raises(DataError, match=r"not the same classes: x: polyp; y: disc"):
        compare(methods)


@pytest.mark.faults
def test_cases_of_one_name_that_hold_something_else_are_refused():
    first, second = run("x", [0.9, 0.8]), run("y", [0.9, 0.8])
    pixels = [{**row, "true_px": 40} for row in first.rows]
    others = [{**row, "true_px": "40" if row["case"] == "a" else "41"} for row in second.rows]
    methods = [
        Method("x", (ScoredRun("x", "run", tuple(pixels)),)),
        Method("y", (ScoredRun("y", "scores", tuple(others)),)),
    ]
    with pytest.raises(
        DataError, match="case b is not the same everywhere: its polyp has 40 pixels in x, 41 in y"
    ):
        compare(methods)


@pytest.mark.faults
def test_a_case_without_a_row_for_every_class_is_refused():
    torn = run("x", [(0.2, 0.6), (0.1, 0.4)], classes=("cup", "disc"))
    torn = ScoredRun("x", "scores", torn.rows[:-1])
    whole = run("y", [(0.2, 0.4), (0.1, 0.1)], classes=("cup", "disc"))
    with pytest.raises(DataError, match=r"x: case b has not one row for each class \(cup, disc\)"):
        compare([Method("y", (whole,)), Method("x", (torn,))])


@pytest.mark.faults
def test_without_scores_or_without_a_common_case_there_is_nothing_to_compare():
    other = Method("y", (run("y", [0.9]),))
    with pytest.raises(DataError, match=r"x: no case has a score: a.png is torn"):
        compare([Method("x", (run("x", [], failed={"a": "a.png is torn"}),)), other], partial=True)
    with pytest.raises(DataError, match="no case in common"):
        compare([other, Method("x", (run("x", [0.9], cases="z"),))], partial=True)


def test_millimetres_and_pixels_are_not_averaged_into_one_column():
    methods = [Method("x", (run("x", [0.9, 0.8]),)), Method("y", (run("y", [0.5, 0.5], unit="mm"),))]
    found = compare(methods)
    assert found.unit == "mixed"
    assert {entry.metric for entry in found.accuracies} == {"dice", "iou"}
    assert not any(
        "HD95" in column for column in comparison_tables(found, "test", "standard", "case")[0].columns
    )


def test_costs_are_means_over_runs_and_what_nobody_knows_has_no_column():
    costs = [Costs(parameters=10, images_per_second=2.0), Costs(parameters=10, images_per_second=4.0)]
    method = Method("ours", tuple(run(str(n), [0.5], costs=cost) for n, cost in enumerate(costs)))
    assert mean_costs(method) == Costs(parameters=10, images_per_second=3.0)
    table = comparison_tables(
        compare([method, Method("masks", (run("z", [0.5]),))]), "test", "standard", "case"
    )[-1]
    assert table.columns == ("method", "weights", "images/s")
    assert table.rows[1] == ("masks", "–", "–")


def test_records_hold_every_method_class_and_metric():
    records = accuracy_records(compare([Method(n, (run(n, [0.5, 0.6]),)) for n in ("x", "y")]))
    assert {(record["method"], record["metric"]) for record in records} == {
        (name, metric) for name in ("x", "y") for metric in ("dice", "iou", "hd95", "assd", "nsd")
    }
    assert all(math.isnan(record["difference"]) for record in records if record["method"] == "x")


def test_only_the_baseline_has_the_baselines_colour_among_the_curves():
    curves = [Convergence(name, (1.0, 2.0), (0.4, 0.5), (1.0, 2.0)) for name in ("ours", "base")]
    for baseline, expected in (
        ("base", {"base": "c0", "ours": "c1"}),
        ("masks", {"ours": "c1", "base": "c2"}),
    ):
        for chart in _convergence_charts(curves, baseline):
            assert dict(chart.legend) == expected
            assert ('class="curve c0"' in chart.svg) is (baseline == "base")
