"""``sdseg demo``: one page in the end, nothing of anybody else's touched, an interrupted one goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer

from sdseg_cli.commands import demo as command
from sdseg_cli.commands.demo import DemoSettings, demo
from sdseg_cli.core.engine.demonstration import DemoFolder, ShownCase, chosen_cases
from sdseg_cli.core.errors import DataError, UsageError
from sdseg_cli.core.reporting.page import Figure, Page

NAMES = ("prepare", "train", "predict", "evaluate", "stability")
TINY = [
    "data.image_size=64",
    "train.steps=2",
    "train.warmup_steps=1",
    "train.validate_every=2",
    "train.checkpoint_every=2",
    "train.log_every=1",
    "train.batch_size=2",
    "train.trackers=[]",
    "model.unet_channels=[32, 32]",
    "model.unet_attention_strides=[]",
    "model.unet_heads=1",
]


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The stages that were run; each only leaves its name. The page is a stand-in."""
    names: list[str] = []

    def stages(folder: DemoFolder, chosen: DemoSettings) -> list[command._Stage]:
        return [
            command._Stage(name, f"sdseg {name}", lambda name=name: names.append(name))  # type: ignore[misc]
            for name in NAMES
        ]

    page = Page("t", "", figures=(Figure("Dice", "1"), Figure("Otsu", "0")))
    monkeypatch.setattr(command, "_stages", stages)
    monkeypatch.setattr(command, "_steps", lambda *_: [])
    monkeypatch.setattr("sdseg_cli.core.engine.demonstration.demonstration_page", lambda *_: page)
    return names


def test_the_five_verbs_run_in_order_and_the_page_is_written(tmp_path, calls):
    demo(out=tmp_path / "demo")
    assert calls == list(NAMES)
    assert (tmp_path / "demo" / "index.html").read_text().startswith("<!doctype html>")
    assert list(json.loads((tmp_path / "demo" / "demo.json").read_text())["seconds"]) == list(NAMES)


@pytest.mark.faults
def test_a_finished_demonstration_is_refused_and_replaced_only_on_demand(tmp_path, calls):
    demo(out=tmp_path / "demo")
    with pytest.raises(UsageError, match=r"finished demonstration.*--overwrite"):
        demo(out=tmp_path / "demo")
    assert len(calls) == 5
    demo(out=tmp_path / "demo", overwrite=True)
    assert len(calls) == 10


@pytest.mark.faults
def test_a_folder_of_other_files_is_left_alone_even_with_overwrite(tmp_path, calls):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.txt.*left alone"):
        demo(out=tmp_path / "demo", overwrite=True)
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["thesis.txt"]
    assert calls == []


@pytest.mark.faults
def test_overwrite_removes_only_what_a_demonstration_writes(tmp_path, calls):
    demo(out=tmp_path / "demo")
    (tmp_path / "demo" / "notes.txt").write_text("mine")
    (tmp_path / "demo" / "masks").mkdir()
    (tmp_path / "demo" / "masks" / "old.png").write_bytes(b"")
    demo(out=tmp_path / "demo", overwrite=True)
    assert (tmp_path / "demo" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "demo" / "masks").exists()


@pytest.mark.faults
def test_an_interrupted_demonstration_goes_on_where_it_stopped(tmp_path, calls, monkeypatch):
    whole = command._stages

    def breaking(folder, chosen):
        stages = whole(folder, chosen)

        def stop() -> None:
            raise KeyboardInterrupt

        return [*stages[:2], command._Stage("predict", "sdseg predict", stop), *stages[3:]]

    monkeypatch.setattr(command, "_stages", breaking)
    with pytest.raises(KeyboardInterrupt):
        demo(out=tmp_path / "demo")
    assert calls == ["prepare", "train"]
    monkeypatch.setattr(command, "_stages", whole)
    demo(out=tmp_path / "demo")
    assert calls == list(NAMES)


@pytest.mark.faults
def test_going_on_with_other_settings_is_refused(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(
        "sdseg_cli.core.engine.demonstration.demonstration_page",
        lambda *_: (_ for _ in ()).throw(DataError("no page")),
    )
    with pytest.raises(DataError):
        demo(out=tmp_path / "demo")
    with pytest.raises(UsageError, match=r"cases 300 \(now 40\)"):
        demo(out=tmp_path / "demo", cases=40)


@pytest.mark.faults
def test_a_verb_that_leaves_with_an_exit_code_stops_the_demonstration(tmp_path, calls, monkeypatch):
    def leave() -> None:
        raise typer.Exit(3)

    monkeypatch.setattr(
        command, "_stages", lambda *_: [command._Stage("prepare", "sdseg prepare phantom", leave)]
    )
    with pytest.raises(DataError, match="prepare did not do all of its work"):
        demo(out=tmp_path / "demo")


def test_the_commands_on_the_page_are_those_that_do_the_same(tmp_path):
    chosen = DemoSettings(300, 128, 5, 5, 7, ("train.steps=9",), "cpu")
    lines = {stage.name: stage.command for stage in command._stages(DemoFolder(Path("demo")), chosen)}
    assert lines["prepare"] == (
        "sdseg prepare phantom --cases 300 --size 128 --fractions 0.8,0.1,0.1 --seed 7 --out demo/data"
    )
    assert lines["train"] == (
        "sdseg train --recipe demo --set train.steps=9 --set data.dataset=demo/data --set train.seed=7 "
        "--device cpu --out demo/run"
    )
    assert lines["stability"] == (
        "sdseg stability --model demo/run --split test --runs 5 --seed 7 --device cpu"
    )


def case(name: str, dice: float) -> ShownCase:
    return ShownCase(name, dice, 0.3, 0.1, 0.2)


def test_the_gallery_shows_worst_middle_and_best_each_once():
    chosen = chosen_cases([case(f"c{index:02d}", index / 20) for index in range(20)])
    assert [(badge, shown.case_id) for badge, shown in chosen] == [
        ("worst", "c00"), ("worst", "c01"), ("worst", "c02"),
        ("middle", "c08"), ("middle", "c09"), ("middle", "c10"),
        ("best", "c18"), ("best", "c19"),
    ]  # fmt: skip


@pytest.mark.parametrize("count", range(1, 13))
def test_the_gallery_never_shows_a_case_twice(count):
    chosen = [shown.case_id for _, shown in chosen_cases([case(str(k), 0.5) for k in range(count)])]
    assert len(chosen) == len(set(chosen)) == min(count, 8)


def test_a_case_without_a_score_counts_as_worst():
    cases = [case(str(k), 0.5) for k in range(9)] + [case("undefined", float("nan"))]
    assert chosen_cases(cases)[0][1].case_id == "undefined"


@pytest.mark.slow
def test_a_tiny_demonstration_ends_with_one_page_that_shows_it_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo(out=Path("demo"), cases=20, samples=2, runs=2, settings=TINY)
    html = Path("demo/index.html").read_text(encoding="utf-8")
    for words in ("sdseg prepare phantom", "sdseg train", "sdseg predict demo/scans", "sdseg evaluate"):
        assert re.sub(r"</?span>", "", html).count(words) >= 1
    for title in ("Test Dice", "Otsu threshold", "Every test image", "Scores on the test split", "Stability"):
        assert title in html
    # Two test images, each with truth, prediction, outline of the truth and uncertainty; the contact sheet.
    assert html.count("data:image/webp;base64,") == 2 * 5 + 1
    assert not re.search(r"https?:", html)
    assert len(list(Path("demo/masks").glob("*.png"))) == 2
