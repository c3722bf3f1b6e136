"""``sdseg evaluate`` as a user meets it: a real (untrained) model on phantom data, and folders of masks."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from sdseg_cli import cli
from sdseg_cli.core.data.images import write_label_map
from sdseg_cli.core.data.prepared import PreparedDataset
from sdseg_cli.core.metrics.overlap import count_overlap, dice


def sdseg(*args) -> int:
    with pytest.raises(SystemExit) as leaving:
        cli.main([str(arg) for arg in args])
    return leaving.value.code


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a phantom dataset and a finished run, the working directory of these tests."""
    from sdseg_cli.core.engine.networks import build_networks
    from sdseg_cli.core.recipe import load_recipe
    from sdseg_cli.core.run_directory import RunDirectory

    root = tmp_path_factory.mktemp("place")
    data = root / "phantom"
    assert sdseg("prepare", "phantom", "--cases", 10, "--size", 64, "--workers", 1, "--out", data) == 0
    dataset = PreparedDataset.open(data)
    settings = [
        f"data.dataset={data}",
        "data.image_size=64",
        "model.unet_channels=[32,32]",
        "model.unet_blocks=1",
        "model.unet_heads=4",
        "model.unet_attention_strides=[]",
    ]
    recipe = load_recipe("demo", settings)
    run = RunDirectory.create(root / "runs" / "tiny", recipe)
    pipeline = build_networks(recipe, 2).pipeline(dataset.manifest, recipe, 1.0)
    pipeline.save_pretrained(run.model)
    run.write_run_json(dataset={"fingerprint": dataset.manifest.fingerprint})
    run.finish("finished")
    return root


@pytest.fixture(autouse=True)
def working_directory(place, monkeypatch):
    monkeypatch.chdir(place)


def test_a_run_is_scored_on_its_split_and_the_masks_of_predict_get_the_same_scores(place, tmp_path, capsys):
    out = tmp_path / "scores"
    assert sdseg("evaluate", "--split", "train", "--device", "cpu", "--out", out, "--overlays", 3) == 0
    shown = capsys.readouterr()
    assert "newest finished run" in shown.err
    assert "Dice" in shown.out
    assert "HD95 (px)" in shown.out
    cases = rows(out / "cases.csv")
    dataset = PreparedDataset.open(place / "phantom")
    assert [row["case"] for row in cases] == dataset.split("train").case_ids
    report = summary(out)
    assert report["classes"]["polyp"]["metrics"]["dice"]["n"] == len(cases) == 8
    assert report["convention"] == "standard"
    assert report["dataset"]["fingerprint"] == dataset.manifest.fingerprint
    pictures = sorted((out / "overlays").iterdir())
    assert [picture.name[:8] for picture in pictures] == ["worst-01", "worst-02", "worst-03"]

    scans, masks = tmp_path / "scans", tmp_path / "masks"
    scans.mkdir()
    first = dataset.split("train")[0]
    # Only images of the model's own size come through a file unchanged.
    Image.fromarray(first.image).save(scans / f"{first.case_id}.png")
    assert sdseg("predict", scans, "--out", masks, "--device", "cpu") == 0
    mask = np.asarray(Image.open(masks / f"{first.case_id}.png")) > 0
    assert sdseg("evaluate", "--split", "train", "--grid", "model", "--out", tmp_path / "model") == 0
    truth = first.grid.labels_to_model(first.label_map) > 0
    expected = dice(count_overlap(mask, truth))
    scored = rows(tmp_path / "model" / "cases.csv")[0]
    assert float(scored["dice"]) == pytest.approx(expected)


def test_scores_go_into_the_run_and_are_not_replaced_unasked(place, capsys):
    target = place / "runs" / "tiny" / "evaluation" / "test"
    assert sdseg("evaluate", "--run", "runs/tiny", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == summary(target)
    assert sdseg("evaluate", "--run", "runs/tiny") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert sdseg("evaluate", "--run", "runs/tiny", "--overwrite", "--convention", "sdseg") == 0
    assert summary(target)["convention"] == "sdseg"
    assert list(target.parent.iterdir()) == [target]  # nothing temporary is left


def test_several_draws_agree_more_or_less_and_the_page_shows_calibration_and_doubt(place, tmp_path, capsys):
    out = tmp_path / "scores"
    options = (
        "--threshold",
        0.0,
        "--samples",
        2,
        "--flips",
        "horizontal",
        "--largest-component",
        "--device",
        "cpu",
    )
    assert sdseg("evaluate", "--split", "train", "--out", out, "--overlays", 1, *options) == 0
    assert "report.html" in capsys.readouterr().err
    agreement = [float(row["draw_agreement"]) for row in rows(out / "cases.csv") if row["draw_agreement"]]
    assert agreement
    assert all(0 <= value <= 1 for value in agreement)
    assert summary(out)["sampling"]["flips"] == ["horizontal"]
    html = (out / "report.html").read_text(encoding="utf-8")
    for words in (
        "Are the probabilities honest?",
        "Agreement of draws",
        "the Dice with the truth on average",
        "The most doubtful first",
        "uncertainty",
        "flips horizontal",
    ):
        assert words in html
    assert html.count('<article class="case card"') == 8  # all of them: there are no more
    assert "unet_channels" in html  # the recipe


@pytest.mark.faults
@pytest.mark.parametrize("flips", ["diagonal", "vertical,vertical", ""])
def test_flips_that_are_none_are_refused(flips, tmp_path, capsys):
    assert sdseg("evaluate", "--flips", flips, "--out", tmp_path / "out") == 2
    assert "expected horizontal, vertical" in capsys.readouterr().err


@pytest.mark.faults
def test_a_dataset_of_another_size_is_refused_before_anything_is_written(place, tmp_path, capsys):
    other = tmp_path / "other"
    assert sdseg("prepare", "phantom", "--cases", 3, "--size", 32, "--workers", 1, "--out", other) == 0
    capsys.readouterr()
    assert sdseg("evaluate", "--data", other, "--out", tmp_path / "out") == 1
    assert "image size: dataset 32, model 64" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.faults
def test_a_missing_dataset_and_a_missing_model_say_how_to_make_them(tmp_path, capsys, monkeypatch):
    assert sdseg("evaluate", "--data", tmp_path / "kseg") == 1
    assert "sdseg prepare kseg" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert sdseg("evaluate") == 2
    assert "sdseg train" in capsys.readouterr().err


@pytest.fixture
def folders(tmp_path):
    truth, masks = tmp_path / "truth", tmp_path / "masks"
    generator = np.random.default_rng(0)
    for folder in (truth, masks):
        folder.mkdir()
        for name in "abc":
            write_label_map(folder / f"{name}.png", (generator.random((20, 30)) > 0.7).astype(np.uint8), 2)
    return masks, truth


def test_two_folders_are_scored_with_a_table_and_pictures(folders, tmp_path, capsys):
    masks, truth = folders
    out = tmp_path / "out"
    assert sdseg("evaluate", "--predictions", masks, "--ground-truth", truth, "--out", out) == 0
    assert "3 cases" in capsys.readouterr().out
    pair = [np.asarray(Image.open(folder / "b.png")) > 0 for folder in folders]
    assert float(rows(out / "cases.csv")[1]["dice"]) == pytest.approx(dice(count_overlap(*pair)))
    assert len(list((out / "overlays").iterdir())) == 3
    html = (out / "report.html").read_text(encoding="utf-8")
    assert html.count('<article class="case card"') == 3
    assert "The worst first" in html
    assert "honest" not in html  # masks have no probabilities
    assert "<figcaption>image</figcaption>" not in html  # there is none to show
    assert html.count("<figcaption>prediction, truth outlined</figcaption>") == 3


def save_labels(path: Path, voxels: np.ndarray, spacing: tuple[float, ...] = (1.0, 1.0, 2.0)) -> None:
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels.astype(np.uint8), np.diag([*spacing, 1.0])), path)


def test_a_prediction_on_another_grid_is_scored_only_where_resampling_is_asked_for(tmp_path, capsys):
    truth = np.zeros((8, 8, 6))
    truth[2:6, 2:6, 2:4] = 1
    save_labels(tmp_path / "truth" / "a.nii.gz", truth)
    # The same body on voxels of half the thickness; their centres lie a quarter of a slice lower and higher.
    fine = np.zeros((8, 8, 12))
    fine[2:6, 2:6, 4:8] = 1
    save_labels(tmp_path / "masks" / "a.nii.gz", fine, (1.0, 1.0, 1.0))
    both = ("evaluate", "--predictions", tmp_path / "masks", "--ground-truth", tmp_path / "truth")
    assert sdseg(*both, "--out", tmp_path / "no") == 1
    assert "--resample" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert sdseg(*both, "--resample", "--out", tmp_path / "yes") == 0
    report = summary(tmp_path / "yes")
    assert report["resample"] is True
    assert report["distance_unit"] == "mm"
    assert rows(tmp_path / "yes" / "cases.csv")[0]["true_px"] == "32"
    assert report["classes"]["foreground"]["metrics"]["dice"]["mean"] == pytest.approx(1.0)


def test_the_tolerance_of_the_surface_dice_is_in_mm_and_recorded(tmp_path, capsys):
    truth = np.zeros((8, 8, 6))
    truth[2:6, 2:6, 2:4] = 1
    save_labels(tmp_path / "truth" / "a.nii.gz", truth)
    save_labels(tmp_path / "masks" / "a.nii.gz", np.roll(truth, 1, axis=2))  # a slice of 2 mm too high
    both = ("evaluate", "--predictions", tmp_path / "masks", "--ground-truth", tmp_path / "truth")
    found = {}
    for tolerance in (1.9, 2.1):
        out = tmp_path / str(tolerance)
        assert sdseg(*both, "--nsd-tolerance", tolerance, "--out", out) == 0
        report = summary(out)
        assert (report["nsd_tolerance"], report["nsd_tolerance_unit"]) == (tolerance, "mm")
        found[tolerance] = report["classes"]["foreground"]["metrics"]["nsd"]["mean"]
    assert found[1.9] < found[2.1] == 1.0


def test_the_tolerance_applies_to_a_split_too(place, tmp_path):
    scored = {}
    for tolerance in (0, 500):  # no more than the outlines themselves; all of the image
        out = tmp_path / str(tolerance)
        assert sdseg("evaluate", "--nsd-tolerance", tolerance, "--out", out, "--device", "cpu") == 0
        report = summary(out)
        assert (report["nsd_tolerance"], report["nsd_tolerance_unit"]) == (tolerance, "px")
        scored[tolerance] = [float(row["nsd"]) for row in rows(out / "cases.csv")]
    both = [pair for pair in zip(scored[0], scored[500], strict=True) if pair[1] > 0]  # 0 where one is empty
    assert all(low < high == 1.0 for low, high in both)


def test_images_and_volumes_together_say_the_unit_of_every_case(folders, tmp_path, capsys):
    masks, truth = folders
    body = np.zeros((8, 8, 6))
    body[2:6, 2:6, 2:4] = 1
    for folder in folders:
        save_labels(folder / "volume.nii.gz", body)
    out = tmp_path / "out"
    assert sdseg("evaluate", "--predictions", masks, "--ground-truth", truth, "--out", out) == 0
    units = {row["case"]: row["distance_unit"] for row in rows(out / "cases.csv")}
    assert units == {"a": "px", "b": "px", "c": "px", "volume": "mm"}
    table = (out / "report.html").read_text(encoding="utf-8").split('id="cases"')[1]
    assert "mm or px" not in table
    assert table.count('<td class="text">px</td>') == 3
    assert table.count('<td class="text">mm</td>') == 1


@pytest.mark.faults
def test_bad_pairs_are_listed_the_rest_is_scored_and_the_exit_code_is_3(folders, tmp_path, capsys):
    masks, truth = folders
    write_label_map(masks / "a.png", np.zeros((20, 31), np.uint8), 2)
    (masks / "b.png").write_bytes(b"")
    out = tmp_path / "out"
    assert sdseg("evaluate", "--predictions", masks, "--ground-truth", truth, "--out", out) == 3
    messages = capsys.readouterr().err
    assert "prediction is 31x20" in messages
    assert "ground truth 30x20" in messages
    assert "b.png" in messages
    assert "2 of 3 cases could not be scored" in messages
    report = summary(out)
    assert report["cases"] == {"scored": 1, "failed": 2}
    assert sorted(report["failed_cases"]) == ["a", "b"]
    assert [row["case"] for row in rows(out / "cases.csv")] == ["c"]


@pytest.mark.faults
def test_a_missing_mask_is_an_error_that_names_it_unless_allowed(folders, tmp_path, capsys):
    masks, truth = folders
    (masks / "b.png").unlink()
    both = ("evaluate", "--predictions", masks, "--ground-truth", truth, "--out", tmp_path / "out")
    assert sdseg(*both) == 1
    assert "1 of 3 predictions are missing: b." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert sdseg(*both, "--allow-missing") == 0
    report = summary(tmp_path / "out")
    assert report["missing_scored_as_empty"] == ["b"]
    assert report["classes"]["foreground"]["missed"] == 1
    assert rows(tmp_path / "out" / "cases.csv")[1]["hd95"] == "inf"


@pytest.mark.faults
def test_no_usable_pair_is_a_failure_and_writes_nothing(folders, tmp_path, capsys):
    masks, truth = folders
    for file in masks.iterdir():
        file.write_bytes(b"")
    assert sdseg("evaluate", "--predictions", masks, "--ground-truth", truth, "--out", tmp_path / "out") == 1
    assert "none of the 3 pairs could be scored" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--predictions", "x"], "belong together"),
        (
            ["--predictions", "x", "--ground-truth", "y", "--model", "z"],
            "--model only make sense with a model",
        ),
        (["--allow-missing"], "--allow-missing only make sense with --predictions"),
        (["--predictions", "x", "--ground-truth", "y", "--classes", "a,,b"], "separated by commas"),
    ],
)
def test_options_that_contradict_each_other_are_refused(args, message, capsys):
    assert sdseg("evaluate", *args) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.faults
def test_a_folder_that_is_not_ours_is_never_replaced(folders, tmp_path, capsys):
    masks, truth = folders
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    both = ("evaluate", "--predictions", masks, "--ground-truth", truth, "--out", out, "--overwrite")
    assert sdseg(*both) == 2
    assert (out / "thesis.txt").read_text() == "mine"


@pytest.mark.slow
def test_two_processes_score_every_case_once_with_the_same_result(place, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "sdseg_cli"]
    command = ["evaluate", "--split", "train", "--device", "cpu", "--out"]
    subprocess.run([*launch, *command, tmp_path / "two"], check=True, env=environment, capture_output=True)
    assert sdseg(*command, tmp_path / "one") == 0
    assert summary(tmp_path / "two")["processes"] == 2
    one, two = rows(tmp_path / "one" / "cases.csv"), rows(tmp_path / "two" / "cases.csv")
    assert [row["case"] for row in two] == [row["case"] for row in one]
    for first, second in zip(one, two, strict=True):
        assert float(first["dice"]) == pytest.approx(float(second["dice"]), abs=0.01)
