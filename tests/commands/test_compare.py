"""``sdseg compare`` and ``sdseg ablate`` as a user meets them, with real (untrained) models on phantoms."""

import csv
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sdseg_cli import cli
from sdseg_cli.commands import ablate
from sdseg_cli.core.data.images import write_label_map
from sdseg_cli.core.data.prepared import PreparedDataset
from sdseg_cli.core.recipe import load_recipe
from sdseg_cli.core.run_directory import RunDirectory

SETTINGS = [
    "data.image_size=32",
    "model.unet_channels=[32,32]",
    "model.unet_blocks=1",
    "model.unet_heads=4",
    "model.unet_attention_strides=[]",
]


def sdseg(*args) -> int:
    with pytest.raises(SystemExit) as leaving:
        cli.main([str(arg) for arg in args])
    return leaving.value.code


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def make_run(root: Path, data: Path, settings=(), *, recipe="demo") -> RunDirectory:
    """A finished run of an untrained model, with the metrics of a training."""
    import torch

    from sdseg_cli.core.engine.networks import build_networks

    chosen = load_recipe(recipe, [f"data.dataset={data}", *SETTINGS, *settings])
    run = RunDirectory.create(root, chosen)
    torch.manual_seed(chosen.train.seed)
    dataset = PreparedDataset.open(data)
    build_networks(chosen, 2).pipeline(dataset.manifest, chosen, 1.0).save_pretrained(run.model)
    run.append_metrics({"step": 5, "samples_per_second": 20.0, "memory_gib": 1.5, "seconds": 60.0})
    run.append_metrics({"step": 5, "validation_dice": 0.25})
    run.write_run_json(parameters={"unet": 7, "image_encoder": 5}, device="cpu (1 threads)")
    run.finish("finished", steps=5, trained_seconds=61.0)
    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a dataset and two runs, the working directory of these tests."""
    root = tmp_path_factory.mktemp("place")
    options = ("--cases", 10, "--size", 32, "--workers", 1)
    assert sdseg("prepare", "phantom", *options, "--out", root / "phantom") == 0
    for name, seed in (("a", 0), ("b", 1)):
        make_run(root / "runs" / name, root / "phantom", [f"train.seed={seed}"])
    return root


@pytest.fixture(autouse=True)
def working_directory(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture
def masks(place, tmp_path):
    """Another tool's masks of the training split: the truth, moved by a pixel."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for one in PreparedDataset.open(place / "phantom").split("train"):
        write_label_map(folder / f"{one.case_id}.png", np.roll(one.label_map, 1, axis=1), 2)
    return folder


def test_a_model_that_knows_no_data_is_compared_on_that_of_the_run_beside_it(place, tmp_path):
    shutil.copytree(place / "runs/a/model", tmp_path / "copied")
    given = ("runs/b", f"copied={tmp_path / 'copied'}")
    options = ("--split", "train", "--draws", 0, "--device", "cpu", "--out", tmp_path / "out")
    assert sdseg("compare", *given, *options) == 0
    methods = json.loads((tmp_path / "out/summary.json").read_text())["methods"]
    (own,), (copied,) = methods["b"], methods["copied"]
    assert copied["kind"] == "model"
    assert copied["dataset"] == own["dataset"]
    shutil.copytree(place / "runs/b/model", tmp_path / "other")
    assert sdseg("compare", tmp_path / "copied", tmp_path / "other", "--out", tmp_path / "none") == 2


def test_runs_and_masks_are_put_side_by_side(place, masks, tmp_path, capsys):
    out = tmp_path / "out"
    given = ("ours=runs/a", "ours=runs/b", f"other={masks}")
    assert sdseg("compare", *given, "--split", "train", "--draws", 2, "--device", "cpu", "--out", out) == 0
    shown = capsys.readouterr()
    assert "Paired differences from ours" in shown.out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["cases"] == 8
    assert [one["kind"] for one in summary["methods"]["ours"]] == ["run", "run"]
    costs = summary["costs"]
    assert costs["ours"]["parameters"] == 12
    assert costs["ours"]["training_memory_gib"] == 1.5
    assert costs["ours"]["images_per_second"] > 0
    assert 0 <= costs["ours"]["agreement"] <= 1
    assert costs["other"]["parameters"] is None
    assert {path.name for path in out.iterdir()} == {*summary["files"], "manifest.json"}
    overall = {(r["method"], r["metric"]): r for r in rows(out / "comparison.csv")}
    assert float(overall["other", "dice"]["mean"]) > 0.8
    assert float(overall["other", "dice"]["difference"]) > 0
    assert float(overall["ours", "dice"]["runs"]) == 2
    assert r"\toprule" in (out / "comparison.tex").read_text()
    assert "| other" in (out / "comparison.md").read_text()
    assert (out / "curves.png").stat().st_size > 1000
    page = (out / "report.html").read_text()
    assert page.count("Validation Dice by ") == 4  # by step and by time, each with its words for the blind
    assert page.count('<circle class="dot c0"') == 4  # in both charts two runs, validated once
    assert "<img" not in page
    for number, name in enumerate("ab"):
        assert re.search(
            rf"The recipe of ours \(runs/{name}\), with [^<]*</summary>\n<pre>[^<]*seed: {number}\n", page
        )
    assert page.count("The recipe of") == 2  # the masks have none
    digests = [one["sha256"] for method in summary["methods"].values() for one in method]
    assert len({*digests}) == 3  # two models, one folder of masks
    fingerprint = PreparedDataset.open("phantom").manifest.fingerprint
    for evidence in (*digests, fingerprint, "Command", "torch"):
        assert str(evidence) in page, evidence


def test_the_scores_of_a_run_and_of_masks_are_those_of_evaluate(place, masks, tmp_path, capsys):
    assert (
        sdseg("evaluate", "--model", "runs/a", "--split", "train", "--device", "cpu", "--out", tmp_path / "e")
        == 0
    )
    truth = tmp_path / "truth"
    truth.mkdir()
    for one in PreparedDataset.open(place / "phantom").split("train"):
        write_label_map(truth / f"{one.case_id}.png", one.label_map, 2)
    folders = ("--predictions", masks, "--ground-truth", truth, "--classes", "polyp")
    assert sdseg("evaluate", *folders, "--out", tmp_path / "m") == 0
    given = ("runs/a", f"masks={masks}")
    out = tmp_path / "out"
    assert sdseg("compare", *given, "--split", "train", "--draws", 0, "--device", "cpu", "--out", out) == 0
    for name, folder in (("a", "e"), ("masks", "m")):
        expected = {row["case"]: row["dice"] for row in rows(tmp_path / folder / "cases.csv")}
        assert {r["case"]: r["dice"] for r in rows(out / "cases.csv") if r["method"] == name} == expected
    # And what evaluate wrote can be given in place of either.
    again = tmp_path / "again"
    capsys.readouterr()
    assert sdseg("compare", tmp_path / "e", tmp_path / "m", "--split", "train", "--out", again, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((again / "summary.json").read_text())
    assert report["methods"]["e"][0]["kind"] == "scores"
    assert report["methods"]["e"][0]["dataset"]["split"] == "train"
    assert not (again / "curves.png").exists()
    # Not of another split, and not counted otherwise.
    assert sdseg("compare", tmp_path / "e", "runs/b", "--out", tmp_path / "x") == 1
    assert "was scored with --split train, this comparison counts with test" in capsys.readouterr().err
    options = ("--split", "train", "--convention", "sdseg")
    assert sdseg("compare", tmp_path / "e", tmp_path / "m", *options, "--out", tmp_path / "x") == 1
    assert "was scored with --convention standard" in capsys.readouterr().err
    # Nor over one of the sources, nor from a torn table.
    options = ("--split", "train", "--overwrite")
    assert sdseg("compare", tmp_path / "e", tmp_path / "m", *options, "--out", tmp_path / "e") == 2
    table = tmp_path / "m" / "cases.csv"
    table.write_text(table.read_text()[:-40])
    assert sdseg("compare", tmp_path / "e", tmp_path / "m", "--split", "train", "--out", tmp_path / "x") == 1
    assert "cases.csv cannot be read" in capsys.readouterr().err


@pytest.mark.faults
def test_a_torn_mask_leaves_its_case_out_by_name(place, masks, tmp_path, capsys):
    torn = sorted(masks.iterdir())[0]
    torn.write_bytes(torn.read_bytes()[:40])
    out = tmp_path / "out"
    given = ("runs/a", f"masks={masks}", "--split", "train", "--draws", 0, "--device", "cpu")
    assert sdseg("compare", *given, "--out", out) == 3
    assert torn.name in capsys.readouterr().err
    assert json.loads((out / "summary.json").read_text())["cases"] == 7


@pytest.mark.faults
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["runs/a"], "one method was given, expected two"),
        (["runs/a", "runs/b/../a"], "was given twice for a"),
        (["x=runs/a", "runs/x"], "would both be called x"),
        (["runs/a", "runs/a", "runs/b"], "runs/a was given twice for a"),
        (["a=runs/a", "a=runs/a", "runs/b"], "runs/a was given twice for a"),
        (["runs/a", "runs/b", "--draws", "1"], "one draw has none to be compared with"),
        (["runs/a", "empty"], "empty holds no run, no model, no masks and no scores"),
        (["runs/a", "nowhere"], "error: nowhere does not exist."),
        (["runs/a", "x=no/masks/here"], "error: no/masks/here does not exist."),
        (["runs/a", "runs/aa"], "error: runs/aa does not exist. Did you mean runs/a?"),
        (["runs/a", "runs/b", "--baseline", "c"], "there is no such method. There are: a, b"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_predicted(
    given, message, tmp_path, capsys, monkeypatch
):
    from sdseg_cli.core.engine import inference

    monkeypatch.setattr(inference, "load_predictor", None)  # whoever gets so far fails
    Path("empty").mkdir(exist_ok=True)
    assert sdseg("compare", *given, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.faults
def test_missing_masks_are_named_or_scored_as_empty(masks, tmp_path, capsys):
    gone = sorted(masks.iterdir())[0]
    gone.unlink()
    given = ("runs/a", f"masks={masks}", "--split", "train", "--draws", 0, "--device", "cpu")
    capsys.readouterr()
    assert sdseg("compare", *given, "--out", tmp_path / "out") == 1
    assert f"1 of 8 masks are missing: {gone.stem}" in capsys.readouterr().err
    assert sdseg("compare", *given, "--allow-missing", "--out", tmp_path / "out") == 0
    row = next(
        r for r in rows(tmp_path / "out/cases.csv") if r["method"] == "masks" and r["case"] == gone.stem
    )
    assert (float(row["dice"]), row["outcome"]) == (0, "missed")


# ---- ablate ---------------------------------------------------------------------------------------------


@pytest.fixture
def trainings(place, monkeypatch):
    """Trainings that take no time: the command that would be run leaves an untrained run behind."""
    asked = []

    def leave_a_run(command):
        asked.append(command)
        options = dict(itertools.pairwise(command))
        settings = [value for key, value in itertools.pairwise(command) if key == "--set"]
        if "train.learning_rate=0.5" in settings:
            return 1
        if "--resume" not in options:
            make_run(Path(options["--out"]), place / "phantom", settings)
        return 0

    monkeypatch.setattr(ablate, "_run", leave_a_run)
    return asked


BASE = ["--set", "data.dataset=phantom", *(part for setting in SETTINGS for part in ("--set", setting))]
COMMON = ["ablate", "-r", "demo", *BASE, "--draws", 0, "--device", "cpu"]


def test_variants_are_trained_once_compared_on_validation_and_the_best_is_tested(trainings, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["--variant", "base:", "--variant", "frozen: model.freeze_image_encoder=true", "--seeds", "0,1"]
    assert sdseg(*COMMON, *given, "--final-test", "--json", "--out", out) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"validation", "test"}
    assert len(trainings) == 4
    assert sorted(path.name for path in (out / "runs").iterdir()) == [
        "base-seed0", "base-seed1", "frozen-seed0", "frozen-seed1",
    ]  # fmt: skip
    assert load_recipe(out / "runs/frozen-seed1/recipe.yaml").model.freeze_image_encoder
    summary = json.loads((out / "validation/summary.json").read_text())
    assert summary["split"] == "validation"
    assert summary["baseline"] == "base"
    assert len(summary["methods"]["frozen"]) == 2
    assert json.loads((out / "test/summary.json").read_text())["split"] == "test"
    # The same command again trains nothing more, and replaces nothing unasked.
    assert sdseg(*COMMON, *given, "--out", out) == 2
    assert sdseg(*COMMON, *given, "--out", out, "--overwrite") == 0
    assert len(trainings) == 4


def test_variants_of_sampling_alone_share_a_training(trainings, tmp_path):
    out = tmp_path / "out"
    given = ["--variant", "one:", "--variant", "three: sampling.num_samples=3"]
    assert sdseg(*COMMON, *given, "--out", out) == 0
    assert len(trainings) == 1
    methods = json.loads((out / "validation/summary.json").read_text())["methods"]
    assert methods["three"][0]["location"] == methods["one"][0]["location"]
    assert methods["three"][0]["sampling"]["num_samples"] == 3


@pytest.mark.faults
def test_a_variant_that_cannot_be_trained_is_left_out_by_name(trainings, tmp_path, capsys):
    given = [
        "--variant",
        "a:",
        "--variant",
        "b: train.batch_size=2",
        "--variant",
        "wild: train.learning_rate=0.5",
    ]
    assert sdseg(*COMMON, *given, "--out", tmp_path / "out") == 3
    assert "wild, seed 0: its training failed (exit code 1)" in capsys.readouterr().err
    summary = json.loads((tmp_path / "out/validation/summary.json").read_text())
    assert set(summary["methods"]) == {"a", "b"}
    assert "wild" in summary["notes"][0]
    swapped = ["--variant", "wild: train.learning_rate=0.5", "--variant", "a:"]
    assert sdseg(*COMMON, *swapped, "--out", tmp_path / "other") == 1
    assert "Without the baseline" in capsys.readouterr().err


@pytest.mark.faults
def test_a_run_of_other_settings_is_not_taken_for_a_variant(trainings, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["--variant", "a:", "--variant", "b: model.freeze_image_encoder=true"]
    assert sdseg(*COMMON, *given, "--out", out) == 0
    changed = ["--variant", "a:", "--variant", "b: train.learning_rate=0.01"]
    assert sdseg(*COMMON, *changed, "--out", out, "--overwrite") == 2
    assert "was trained by other settings than variant b has now" in capsys.readouterr().err


def test_an_unfinished_run_is_continued_and_one_without_a_checkpoint_begins_again(place, tmp_path):
    recipe = load_recipe("demo", ["data.dataset=phantom", *SETTINGS])
    job = ablate._Job("a", 0, recipe, tmp_path / "a", ("train.seed=0",))
    begin = ["--recipe", "demo", "--out", str(job.run), "--set", "train.seed=0"]
    assert ablate._arguments("demo", job) == begin
    run = RunDirectory.create(job.run, recipe)
    run.finish("interrupted")
    assert ablate._arguments("demo", job) == [*begin, "--overwrite"]
    run.checkpoint(5).mkdir(parents=True)
    assert ablate._arguments("demo", job) == ["--resume", str(job.run)]
    shutil.rmtree(job.run)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--variant", "a:"], "expected two variants or more"),
        (["--variant", "a", "--variant", "b:"], "expected 'NAME: KEY=VALUE"),
        (["--variant", "a:", "--variant", "b: train.stps=5"], "train.stps"),
        (["--variant", "a:", "--variant", "a:"], "two variants of this name"),
        (["--variant", "a:", "--variant", "b: train.seed=3"], "b: train.seed is said by --seeds"),
        (["--variant", "a:", "--variant", "b: evaluate.grid=model"], "all variants are scored alike"),
        (["--variant", "a:", "--variant", "b: 'x"], "Close the quotation mark"),
        (["--variant", "a:", "--variant", "b:", "--seeds", "²"], "expected different whole numbers"),
        (["--variant", "a:", "--variant", "b:", "--launch", ""], "--launch: expected a command"),
        (["--variants", "no.yaml"], "one that sdseg ships: paper"),
        (["--variants", "bad.yaml"], "bad.yaml:2: b: expected a list of KEY=VALUE"),
        (["--variant", "a:", "--variant", "b:", "--seeds", "1,1"], "expected different whole numbers"),
    ],
)
def test_a_mistake_in_a_variant_is_told_before_the_first_is_trained(
    given, message, trainings, tmp_path, capsys
):
    Path("bad.yaml").write_text("a: []\nb: train.steps=5\n")
    assert sdseg(*COMMON, *given, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not trainings


def test_the_papers_variants_are_of_a_recipe_with_the_papers_objective():
    from sdseg_cli.core.recipe import shipped_ablations

    table = ablate._variants("paper", [])
    jobs = ablate._jobs("kseg", table, [], [0], Path("out"))
    assert list(shipped_ablations()) == ["paper"]
    assert len(jobs) == len(table) == 8
    assert len({job.run for job in jobs}) == 4  # those of prediction alone share the first one's training


def test_a_real_training_is_started_in_a_process_of_its_own(place, tmp_path):
    short = [
        "train.steps=2",
        "train.batch_size=2",
        "train.warmup_steps=0",
        "data.workers=0",
        "train.validation_cases=1",
    ]
    given = [part for setting in [*short, "train.trackers=[]"] for part in ("--set", setting)]
    given += ["--variant", "one:", "--variant", "two: sampling.num_samples=2"]
    out = tmp_path / "out"
    assert sdseg(*COMMON, *given, "--out", out) == 0
    costs = json.loads((out / "validation/summary.json").read_text())["costs"]
    assert costs["one"]["training_steps"] == 2
    assert costs["one"]["training_seconds"] > 0


@pytest.mark.faults
@pytest.mark.slow
def test_ctrl_c_lets_the_training_save_and_the_same_command_goes_on(place, tmp_path):
    settings = ["train.steps=120", "train.batch_size=2", "data.workers=0", "train.validate_every=1000"]
    settings += ["train.trackers=[]", "train.log_every=1", "train.warmup_steps=0"]
    given = [part for setting in settings for part in ("--set", setting)]
    given += ["--variant", "one:", "--variant", "two: sampling.num_samples=2"]
    run = RunDirectory(tmp_path / "out/runs/one-seed0")
    command = [sys.executable, "-m", "sdseg_cli", *map(str, COMMON), *given, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (run.metrics_file.is_file() and len(run.read_metrics()) > 3):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said
    assert run.status == "interrupted"
    step = int(run.latest_checkpoint().name.removeprefix("step-"))
    assert 3 < step < 120
    again = subprocess.run(
        [*command, "--set", "train.steps=120"], capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert f"steps {step + 1:,} to 120" in again.stderr
    assert run.status == "finished"
