"""Several methods on the same cases: accuracy with intervals, paired differences, and what each one costs.

Everything is computed from the scores of the cases (the rows of ``cases.csv``), so that a run, a folder of
masks and an older evaluation are compared alike. A method may consist of several runs (seeds): the scores of
a case are averaged over them first, and the spread of their means is told beside.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sdseg_cli.core.engine.evaluation_records import DISTANCES, MEAN_OF_CLASSES
from sdseg_cli.core.errors import DataError, UsageError
from sdseg_cli.core.metrics.paired import PairedDifference, holm, paired_difference
from sdseg_cli.core.metrics.summary import Summary, summarise

COMPARED: tuple[str, ...] = ("dice", "iou", "hd95", "assd", "nsd")
NOT_SHARED = "not in every method"
OF_ONE_UNIT = (*DISTANCES, "nsd")  # NSD forgives a distance


@dataclass(frozen=True)
class Costs:
    """What one run took to train and takes to predict; None where it is not known.

    Memory is the GPU's where one was used, else the whole process's, in GiB. ``images_per_second`` is of
    batches of ``batch_size`` in ``precision``. Stability is that of ``draws`` single draws of the noise:
    ``agreement`` is the mean Dice between their masks; ``lpips``, ``psnr`` (dB), ``ssim`` and ``ms_ssim``
    compare the scores of each with the first (see :mod:`sdseg_cli.core.engine.stability`).
    """

    parameters: int | None = None
    training_seconds: float | None = None
    training_steps: int | None = None
    training_samples_per_second: float | None = None
    training_memory_gib: float | None = None
    training_device: str | None = None
    images_per_second: float | None = None
    prediction_memory_gib: float | None = None
    prediction_device: str | None = None
    batch_size: int | None = None
    precision: str | None = None
    draws: int | None = None
    agreement: float | None = None
    lpips: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    ms_ssim: float | None = None


@dataclass(frozen=True)
class ScoredRun:
    """One run, model, folder of masks or evaluation, scored.

    Attributes:
        location: where it is.
        kind: ``run``, ``model``, ``masks`` or ``scores``.
        rows: as in ``cases.csv``: one per case and class with the metrics, ``outcome`` and ``distance_unit``.
        failed: case id -> why it has no scores.
        costs: of training and prediction.
        curve: records of ``metrics.jsonl``, where it was trained here.
        facts: what the report records about it.
        recipe: it was trained by, as YAML; empty where that is not known.
    """

    location: str
    kind: str
    rows: tuple[Mapping[str, Any], ...]
    failed: Mapping[str, str] = field(default_factory=dict)
    costs: Costs = field(default_factory=Costs)
    curve: tuple[Mapping[str, Any], ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = ""


@dataclass(frozen=True)
class Method:
    """A name of the table with its runs; several are seeds of the same method."""

    name: str
    runs: tuple[ScoredRun, ...]


@dataclass(frozen=True)
class Accuracy:
    """One metric of one class of one method.

    Attributes:
        cases: scores of the cases in the comparison's order, averaged over the runs.
        summary: of ``cases``.
        run_means: the mean of each run; their spread is that of training again.
        difference: from the baseline; None for the baseline itself.
        p_adjusted: of the difference, by Holm over the methods; NaN where there is none.
    """

    method: str
    class_name: str
    metric: str
    cases: tuple[float, ...]
    summary: Summary
    run_means: tuple[float, ...]
    difference: PairedDifference | None = None
    p_adjusted: float = math.nan

    @property
    def spread(self) -> float:
        """Standard deviation (n - 1) of the runs' means; NaN with one run."""
        finite = [mean for mean in self.run_means if math.isfinite(mean)]
        return float(np.std(finite, ddof=1)) if len(finite) > 1 else math.nan


@dataclass(frozen=True)
class Comparison:
    """The methods on the cases that all of them have scores of.

    ``classes`` are the foreground classes, followed by their mean where there are several; ``left_out`` says
    of cases why they are in no figure; ``missed`` and ``false_alarms`` count structures that a method did not
    find or invented, a run.
    """

    methods: tuple[Method, ...]
    baseline: str
    cases: tuple[str, ...]
    classes: tuple[str, ...]
    unit: str
    accuracies: tuple[Accuracy, ...]
    missed: Mapping[str, float]
    false_alarms: Mapping[str, float]
    left_out: Mapping[str, str]

    @property
    def overall(self) -> str:
        """The class that stands for all: their mean, or the only one."""
        return self.classes[-1]

    def find(self, method: str, class_name: str, metric: str) -> Accuracy:
        """One entry by its names."""
        return next(
            entry
            for entry in self.accuracies
            if (entry.method, entry.class_name, entry.metric) == (method, class_name, metric)
        )


def choose_baseline(names: Sequence[str], wanted: str | None) -> str:
    """The method that differences are from, by default the first. Raises UsageError for an unknown one."""
    if wanted is not None and wanted not in names:
        raise UsageError(f"--baseline {wanted}: there is no such method. There are: {', '.join(names)}.")
    return names[0] if wanted is None else wanted


def compare(methods: Sequence[Method], *, baseline: str | None = None, partial: bool = False) -> Comparison:
    """Compare methods on the cases that they share.

    Args:
        methods: in the order of the table, each with at least one run.
        baseline: whose scores the others' differences are from; None takes the first.
        partial: compare on the common cases where the methods have not the same ones; else that is refused.
            Cases that failed somewhere are left out in either way.

    Returns:
        The comparison. Two-sided p-values are adjusted over the methods, for each class and metric.

    Raises:
        UsageError: no baseline of that name.
        DataError: classes or cases differ, or no case is common.
    """
    for run in (run for method in methods for run in method.runs):
        if not run.rows:
            reasons = "; ".join(list(run.failed.values())[:3]) or "it holds none"
            raise DataError(f"{run.location}: no case has a score: {reasons}")
    names = [method.name for method in methods]
    chosen = choose_baseline(names, baseline)
    tables = {
        method.name: [{(row["case"], row["class"]): row for row in run.rows} for run in method.runs]
        for method in methods
    }
    classes = _common_classes(methods)
    cases, left_out = _common_cases(methods, partial=partial)
    _refuse_other_truth(methods)
    units = {str(row["distance_unit"]) for method in methods for run in method.runs for row in run.rows}
    unit = units.pop() if len(units) == 1 else "mixed"
    shown = (*classes, MEAN_OF_CLASSES) if len(classes) > 1 else classes
    # Millimetres and pixels have no mean.
    metrics = [metric for metric in COMPARED if unit != "mixed" or metric not in OF_ONE_UNIT]
    accuracies = []
    for class_name in shown:
        meant = classes if class_name == MEAN_OF_CLASSES else (class_name,)
        for metric in metrics:
            scores = {
                name: np.array([_values(table, cases, meant, metric) for table in tables[name]])
                for name in names
            }
            accuracies += _accuracies(scores, class_name, metric, chosen)
    missed, false_alarms = (
        {name: _count(tables[name], cases, outcome) for name in names}
        for outcome in ("missed", "false alarm")
    )
    return Comparison(
        tuple(methods), chosen, cases, shown, unit, tuple(accuracies), missed, false_alarms, left_out
    )


def _count(
    tables: Sequence[Mapping[tuple[str, str], Mapping[str, Any]]], cases: Sequence[str], outcome: str
) -> float:
    kept = set(cases)
    found = sum(
        row["outcome"] == outcome for table in tables for (case, _), row in table.items() if case in kept
    )
    return found / len(tables)


def _refuse_other_truth(methods: Sequence[Method]) -> None:
    """Cases are paired by their ids: what they hold must be the same, too, as far as it can be seen."""
    seen: dict[tuple[str, str], tuple[int, str]] = {}
    for run in (run for method in methods for run in method.runs):
        for row in run.rows:
            if row.get("true_px") in (None, ""):
                continue
            found = int(row["true_px"])
            expected, where = seen.setdefault((row["case"], row["class"]), (found, run.location))
            if found != expected:
                raise DataError(
                    f"case {row['case']} is not the same everywhere: its {row['class']} has {expected} "
                    f"pixels in {where}, {found} in {run.location}. Compare on the same data and grid."
                )


def _accuracies(
    scores: Mapping[str, np.ndarray], class_name: str, metric: str, baseline: str
) -> list[Accuracy]:
    """One class and metric of every method; ``scores`` are (runs, cases)."""
    means = {name: _mean(values, axis=0) for name, values in scores.items()}
    differences = {
        name: paired_difference(values.tolist(), means[baseline].tolist())
        for name, values in means.items()
        if name != baseline
    }
    adjusted = dict(zip(differences, holm([one.p_value for one in differences.values()]), strict=True))
    return [
        Accuracy(
            name,
            class_name,
            metric,
            tuple(map(float, means[name])),
            summarise(means[name].tolist()),
            tuple(float(_mean(run[~np.isinf(run)], axis=0)) for run in values),
            differences.get(name),
            adjusted.get(name, math.nan),
        )
        for name, values in scores.items()
    ]


def _values(
    table: Mapping[tuple[str, str], Mapping[str, Any]],
    cases: Sequence[str],
    classes: Sequence[str],
    metric: str,
) -> np.ndarray:
    """Of each case the mean over ``classes`` of their defined scores, float64 (cases,)."""
    return _mean(np.array([[float(table[case, name][metric]) for case in cases] for name in classes]), axis=0)


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of the defined values: NaN without any, infinite if one is."""
    defined = ~np.isnan(values)
    counts = defined.sum(axis)
    total = np.where(defined, values, 0).sum(axis)
    return np.where(counts > 0, total / np.maximum(counts, 1), np.nan)


def _common_classes(methods: Sequence[Method]) -> tuple[str, ...]:
    found = {
        run.location: tuple(dict.fromkeys(str(row["class"]) for row in run.rows))
        for method in methods
        for run in method.runs
    }
    if len({frozenset(classes) for classes in found.values()}) > 1:
        listed = "; ".join(f"{location}: {', '.join(classes)}" for location, classes in found.items())
        raise DataError(
            f"the methods have not the same classes: {listed}. Compare what was made for the same classes."
        )
    return next(iter(found.values()))


def _refuse_torn(run: ScoredRun) -> None:
    classes = {str(row["class"]) for row in run.rows}
    found = Counter((str(row["case"]), str(row["class"])) for row in run.rows)
    cases = dict.fromkeys(str(row["case"]) for row in run.rows)
    wrong = [case for case in cases if any(found[case, name] != 1 for name in classes)]
    if wrong:
        raise DataError(
            f"{run.location}: case {wrong[0]} has not one row for each class "
            f"({', '.join(sorted(classes))}). Evaluate again."
        )


def _common_cases(methods: Sequence[Method], *, partial: bool) -> tuple[tuple[str, ...], dict[str, str]]:
    """The cases that everybody has, in the order of the first run; and why others are left out."""
    runs = [run for method in methods for run in method.runs]
    for run in runs:
        _refuse_torn(run)
    scored = [dict.fromkeys(str(row["case"]) for row in run.rows) for run in runs]
    left_out = {case: f"{run.location}: {why}" for run in runs for case, why in run.failed.items()}
    common = tuple(case for case in scored[0] if all(case in other for other in scored))
    everybody = dict.fromkeys(case for cases in scored for case in cases)
    everywhere = set(common)
    missing = [case for case in everybody if case not in everywhere and case not in left_out]
    if missing and not partial:
        lacking = [
            f"{run.location} lacks {', '.join(lacks[:5])}"
            + (f" and {len(lacks) - 5} more" if lacks[5:] else "")
            for run, cases in zip(runs, scored, strict=True)
            if (lacks := [case for case in missing if case not in cases])
        ]
        raise DataError(
            f"the methods were not scored on the same cases: {'; '.join(lacking)}. Score all of them on the "
            f"same split, or compare the {len(common)} common cases with --common."
        )
    if not common:
        raise DataError("the methods have no case in common, so there is nothing to compare.")
    for case in missing:
        left_out[case] = NOT_SHARED
    return common, left_out
