"""``sdseg runs``: what was trained here, one run in detail, several side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from sdseg_cli import console
from sdseg_cli.commands._options import JsonOption, complete_run
from sdseg_cli.core.errors import SdsegError, UsageError
from sdseg_cli.core.files import SUMMARY_FILE
from sdseg_cli.core.recipe import Recipe, load_recipe, recipe_keys, shipped_recipes
from sdseg_cli.core.run_directory import RUNS_ROOT, RunDirectory

EXAMPLES = """
sdseg runs                                  # the runs in runs/, newest first
sdseg runs show runs/kseg-fast-20260131-120000
sdseg runs compare runs/first runs/second   # what differs, and the scores
sdseg runs --json
"""
BARS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 60  # characters

app = typer.Typer(
    help="List the runs in runs/, look at one, or compare several.",
    invoke_without_command=True,
    rich_markup_mode="rich",
    add_completion=False,
)

RunArgument = Annotated[
    str,
    typer.Argument(metavar="RUN", help="Run directory, or its name in runs/.", autocompletion=complete_run),
]
RootOption = Annotated[Path, typer.Option("--runs", metavar="FOLDER", help="Folder that holds the runs.")]


@app.callback()
def _list(ctx: typer.Context, root: RootOption = RUNS_ROOT, as_json: JsonOption = False) -> None:
    if ctx.invoked_subcommand is not None:
        if root != RUNS_ROOT or as_json:
            raise UsageError(f"give --runs and --json behind {ctx.invoked_subcommand}, not before it.")
        return
    rows = sorted((_row(folder) for folder in _folders(root)), key=lambda row: row["created"], reverse=True)
    if as_json:
        console.show_json(rows)
        return
    if not rows:
        console.say(f"there is no run in {root}. Make one with: sdseg train --recipe kseg-fast")
        return
    console.show_table(
        ("run", "recipe", "status", "steps", "Dice", "date", "duration"),
        [
            (
                row["run"],
                row["recipe"],
                row["status"],
                row["steps"],
                row["validation_dice"],
                _local(row["created"]),
                _duration(row["seconds"]),
            )
            for row in rows
        ],
        caption="Dice: the best on the validation split.",
    )
    for row in rows:
        if row["problem"]:
            console.warn(row["problem"])


@app.command()
def show(run: RunArgument, root: RootOption = RUNS_ROOT, as_json: JsonOption = False) -> None:
    """Show one run: how it was made, what its recipe changes, and how it scored.

    Examples:

    sdseg runs show runs/kseg-fast-20260131-120000

    sdseg runs show kseg-fast-20260131-120000 --json
    """
    directory = _find(run, root)
    details = _details(directory)
    if as_json:
        console.show_json(details)
        return
    console.show_facts(details["facts"], title=str(directory.root))
    changes = details["recipe_changes"]
    if changes is not None:
        title = f"Changed from the shipped recipe {details['facts']['recipe']}"
        rows = [(key, _plain(pair["shipped"]), _plain(pair["run"])) for key, pair in changes.items()]
        if rows:
            console.show_table(("key", "shipped", "this run"), rows, title=title)
        else:
            console.show_text("The recipe is the shipped one.")
    if details["validation"]:
        console.show_text(_curve([(point["step"], point["dice"]) for point in details["validation"]]))
    if details["evaluations"]:
        scores = [(name, *(values.get(key) for key in ("dice", "iou"))) for name, values in _flat(details)]
        console.show_table(("evaluation", "Dice", "IoU"), scores)
    else:
        console.say(f"not evaluated yet: sdseg evaluate --model {directory.root}")
    for problem in details["problems"]:
        console.warn(problem)


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN RUN...", help="Two or more.", autocompletion=complete_run)
    ],
    root: RootOption = RUNS_ROOT,
    as_json: JsonOption = False,
) -> None:
    """Compare runs: the keys of their recipes that differ, and their scores side by side.

    Examples:

    sdseg runs compare runs/first runs/second

    sdseg runs compare first second third --json
    """
    if len(runs) < 2:
        raise UsageError(
            "runs compare: one run was given, expected two or more. One alone: sdseg runs show RUN"
        )
    directories = [_find(run, root) for run in runs]
    names = [str(directory.root) for directory in directories]
    if len(set(names)) < len(names):
        raise UsageError("runs compare: a run was given twice. Name different runs.")
    recipes = [_dotted(directory.read_recipe()) for directory in directories]
    differ = {
        key: [recipe.get(key) for recipe in recipes]
        for key in recipes[0]
        if any(recipe.get(key) != recipes[0][key] for recipe in recipes)
    }
    rows = [_row(directory.root) for directory in directories]
    scores: dict[str, list[Any]] = {
        "status": [row["status"] for row in rows],
        "steps": [row["steps"] for row in rows],
        "validation Dice": [row["validation_dice"] for row in rows],
    }
    found = [dict(_flat(_details(directory))) for directory in directories]
    for name in sorted({name for entry in found for name in entry}):
        for key, label in (("dice", "Dice"), ("iou", "IoU")):
            scores[f"{name} {label}"] = [entry.get(name, {}).get(key) for entry in found]
    if as_json:
        console.show_json({"runs": names, "recipe": differ, "scores": scores})
        return
    shown = [Path(name).name for name in names]
    if differ:
        lines = [(key, *map(_plain, values)) for key, values in differ.items()]
        console.show_table(("recipe key", *shown), lines, title="What differs")
    else:
        console.show_text("The recipes are equal.")
    console.show_table(("score", *shown), [(key, *values) for key, values in scores.items()], title="Scores")


# Reading runs ---------------------------------------------------------------------------------------


def _folders(root: Path) -> list[Path]:
    """Every folder below ``root``, a run or not: one that is none is listed as such."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _row(folder: Path) -> dict[str, Any]:
    """One line of the list; what cannot be read is ``broken`` and says why."""
    row: dict[str, Any] = dict.fromkeys(("recipe", "steps", "validation_dice", "seconds", "problem"))
    row |= {"run": folder.name, "path": str(folder), "status": "not a run", "created": ""}
    run = RunDirectory(folder)
    if not run.run_file.is_file():
        row["problem"] = f"{folder}: no run.json, so it is no run."
        return row
    try:
        fields = run.read_run_json()
        row["status"] = run.status
        steps, dice = _progress(run)
    except SdsegError as error:
        return {**row, "status": "broken", "problem": str(error)}
    best = fields.get("best")
    recorded = best.get("validation_dice") if isinstance(best, Mapping) else None
    return {
        **row,
        "recipe": fields.get("recipe"),
        "created": str(fields.get("created", "")),
        "steps": fields.get("steps", steps),
        "validation_dice": _number(recorded if recorded is not None else dice),
        "seconds": _number(fields.get("trained_seconds")),
    }


def _progress(run: RunDirectory) -> tuple[int | None, float | None]:
    """The last step and the best validation Dice of metrics.jsonl."""
    steps = [record["step"] for record in _records(run) if isinstance(record.get("step"), int)]
    dices = [dice for _, dice in _validations(run)]
    return (max(steps, default=None), max(dices, default=None))


def _records(run: RunDirectory) -> list[dict[str, Any]]:
    return [record for record in run.read_metrics() if isinstance(record, dict)]


def _validations(run: RunDirectory) -> list[tuple[int, float]]:
    points = [(record.get("step"), _number(record.get("validation_dice"))) for record in _records(run)]
    return [(step, dice) for step, dice in points if isinstance(step, int) and dice is not None]


def _find(run: str, root: Path) -> RunDirectory:
    path = Path(run).expanduser()
    if not path.exists() and len(path.parts) == 1 and (root / path).is_dir():
        path = root / path
    return RunDirectory.open(path)


def _details(run: RunDirectory) -> dict[str, Any]:
    fields, row = run.read_run_json(), _row(run.root)
    problems = [row["problem"]] if row["problem"] else []
    dataset = fields.get("dataset")
    dataset = dataset if isinstance(dataset, Mapping) else {}
    changes, validation = None, []
    try:
        validation = [{"step": step, "dice": dice} for step, dice in _validations(run)]
        changes = _changes(run.read_recipe())
    except SdsegError as error:
        problems = list(dict.fromkeys([*problems, str(error)]))
    evaluations, broken = _evaluations(run)
    counts = fields.get("parameters")
    facts = {
        "recipe": row["recipe"],
        "status": row["status"],
        "created": row["created"],
        "steps": row["steps"],
        "duration": _duration(row["seconds"]),
        "best validation Dice": row["validation_dice"],
        "dataset": dataset.get("path"),
        "fingerprint": dataset.get("fingerprint"),
        "device": fields.get("device"),
        "precision": fields.get("precision"),
        "processes": fields.get("processes"),
        "seed": fields.get("seed"),
        "parameters": sum(counts.values()) if isinstance(counts, Mapping) else None,
        "model": str(run.model) if run.has_model else None,
    }
    return {
        "run": str(run.root),
        "facts": facts,
        "recipe_changes": changes,
        "validation": validation,
        "evaluations": evaluations,
        "problems": problems + broken,
    }


def _changes(recipe: Recipe) -> dict[str, dict[str, Any]] | None:
    """Keys that differ from the shipped recipe of the same name; None where there is none."""
    if recipe.name not in shipped_recipes():
        return None
    shipped, ours = _dotted(load_recipe(recipe.name)), _dotted(recipe)
    return {key: {"shipped": shipped[key], "run": ours[key]} for key in ours if ours[key] != shipped[key]}


def _dotted(recipe: Recipe) -> dict[str, Any]:
    flat = {}
    for path in recipe_keys():
        value: Any = recipe.values()
        for part in path:
            value = value[part]
        flat[".".join(path)] = value
    return flat


def _evaluations(run: RunDirectory) -> tuple[dict[str, Any], list[str]]:
    """Split -> class -> mean scores, from the summaries; and what could not be read."""
    found: dict[str, Any] = {}
    problems = []
    for path in sorted(run.evaluation.glob(f"*/{SUMMARY_FILE}")):
        try:
            classes = json.loads(path.read_text(encoding="utf-8"))["classes"]
            found[path.parent.name] = {
                name: {key: _number(entry["metrics"][key]["mean"]) for key in ("dice", "iou")}
                for name, entry in classes.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{path} cannot be read ({type(error).__name__}: {error}). Evaluate again.")
    return found, problems


def _flat(details: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{split}, {name}", scores)
        for split, classes in details["evaluations"].items()
        for name, scores in classes.items()
    ]


# Writing them ---------------------------------------------------------------------------------------


def _curve(points: list[tuple[int, float]]) -> str:
    """Draw the validation Dice as a row of bars between its lowest and highest value."""
    if len(points) > CURVE_WIDTH:
        kept = [round(index * (len(points) - 1) / (CURVE_WIDTH - 1)) for index in range(CURVE_WIDTH)]
        points = [points[index] for index in kept]
    values = [dice for _, dice in points]
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    bars = "".join(BARS[round((value - low) * scale)] for value in values)
    return f"Validation Dice {low:.3f} to {high:.3f}, steps {points[0][0]:,} to {points[-1][0]:,}\n{bars}"


def _number(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def _plain(value: Any) -> str:
    from sdseg_cli.core.recipe import format_value

    return format_value(value)


def _local(created: str) -> str | None:
    try:
        return f"{datetime.fromisoformat(created).astimezone():%Y-%m-%d %H:%M}"
    except ValueError:
        return None


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
