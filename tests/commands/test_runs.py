"""``sdseg runs``: the list with broken folders in it, one run in detail, several compared."""

import json

import pytest

from sdseg_cli import cli
from sdseg_cli.core.recipe import load_recipe
from sdseg_cli.core.run_directory import RunDirectory


def sdseg(capsys, *args) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main([*map(str, args)])
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    made = (("first", [], 0.5, "2026-01-01"), ("second", ["train.seed=7"], 0.75, "2026-01-02"))
    for name, changes, dice, day in made:
        run = RunDirectory.create(tmp_path / "runs" / name, load_recipe("demo", changes))
        run.append_metrics({"step": 5, "validation_dice": dice - 0.25})
        run.append_metrics({"step": 10, "validation_dice": dice})
        best = {"step": 10, "validation_dice": dice}
        parameters = {"unet": 1000, "image_encoder": 234}
        run.write_run_json(created=f"{day}T10:00:00+00:00", parameters=parameters)
        run.finish("finished", steps=10, trained_seconds=3725.0, best=best)
    summary = {"classes": {"polyp": {"metrics": {"dice": {"mean": 0.625}, "iou": {"mean": None}}}}}
    (tmp_path / "runs/second/evaluation/test").mkdir(parents=True)
    (tmp_path / "runs/second/evaluation/test/summary.json").write_text(json.dumps(summary))
    return tmp_path / "runs"


def test_the_newest_run_is_listed_first_with_its_best_dice(runs, capsys):
    code, out, _ = sdseg(capsys, "runs")
    assert code == 0
    assert out.index("second") < out.index("first")
    assert "0.7500" in out
    assert "1:02:05" in out


@pytest.mark.faults
def test_folders_that_are_no_runs_are_listed_as_such(runs, capsys):
    (runs / "foreign").mkdir()
    (runs / "torn").mkdir()
    (runs / "torn/run.json").write_text('{"status": ')
    (runs / "first/metrics.jsonl").write_text("nonsense\n")
    code, out, _ = sdseg(capsys, "runs", "--json")
    assert code == 0
    assert {row["run"]: row["status"] for row in json.loads(out)} == {
        "second": "finished",
        "first": "broken",
        "foreign": "not a run",
        "torn": "broken",
    }
    assert sdseg(capsys, "runs")[2].count("warning:") == 3


@pytest.mark.faults
def test_fields_of_another_kind_do_not_break_the_list(runs, capsys):
    fields = {"status": "finished", "best": 3, "trained_seconds": "long", "created": None, "dataset": []}
    (runs / "first/run.json").write_text(json.dumps(fields))
    assert sdseg(capsys, "runs")[0] == 0
    assert sdseg(capsys, "runs", "show", "first")[0] == 0


def test_show_names_what_the_recipe_changes_and_draws_the_curve(runs, capsys):
    code, out, _ = sdseg(capsys, "runs", "show", "second")
    assert code == 0
    assert "train.seed" in out
    assert "Validation Dice 0.500 to 0.750, steps 5 to 10\n▁█" in out
    assert "test, polyp" in out
    assert "1,234" in out


@pytest.mark.faults
def test_a_broken_recipe_or_summary_is_told_and_the_rest_is_shown(runs, capsys):
    (runs / "second/recipe.yaml").write_text("name: [")
    (runs / "second/evaluation/test/summary.json").write_text("[]")
    code, out, err = sdseg(capsys, "runs", "show", "second")
    assert code == 0
    assert "▁█" in out
    assert err.count("warning:") == 2


def test_compare_shows_only_the_keys_that_differ_and_the_scores(runs, capsys):
    code, out, _ = sdseg(capsys, "runs", "compare", "first", "second", "--json")
    assert code == 0
    compared = json.loads(out)
    assert compared["recipe"] == {"train.seed": [load_recipe("demo").train.seed, 7]}
    assert compared["scores"]["validation Dice"] == [0.5, 0.75]
    assert compared["scores"]["test, polyp Dice"] == [None, 0.625]
    assert "What differs" in sdseg(capsys, "runs", "compare", "first", "second")[1]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("show", "secnd"), "does not exist"),
        (("compare", "first"), "expected two or more"),
        (("compare", "first", "first"), "given twice"),
    ],
)
def test_a_run_that_is_not_there_is_a_mistake_of_use(runs, capsys, args, message):
    code, _, err = sdseg(capsys, "runs", *args)
    assert code == 2
    assert message in err
