"""``sdseg predict`` as a command: refusals, exit codes, what is left behind. The predictor is a rule."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import typer
from PIL import Image

from sdseg_cli.commands.predict import VolumeAxis, VolumeFormat, predict
from sdseg_cli.core.data.images import read_label_map
from sdseg_cli.core.engine import prediction as engine
from sdseg_cli.core.errors import DataError, UsageError


class BrightIsForeground:
    """Calls bright pixels foreground and remembers the options it was made with."""

    image_size, resize, classes, num_classes = 16, "squeeze", ("background", "polyp"), 2
    looks = ()  # as a model that does not know what it was trained on

    def __init__(self, **options) -> None:
        self.options = options

    def warnings(self, looks) -> list[str]:
        return []

    def __call__(self, inputs: Iterable) -> Iterator[SimpleNamespace]:
        for one in inputs:
            level = one.grid.probabilities_to_case(one.image.mean(axis=-1).astype(np.float32) / 255)
            yield SimpleNamespace(
                case_id=one.case_id,
                slice_index=0,
                label_map=(level > 0.5).astype(np.uint8),
                probabilities=np.stack([1 - level, level]),
                uncertainty=np.zeros_like(level),
                samples=None,
                overlaps=None,
            )


@pytest.fixture
def made(monkeypatch) -> list[BrightIsForeground]:
    """Predictors that the command made."""
    predictors: list[BrightIsForeground] = []

    def load_predictor(reference, **options):
        predictors.append(BrightIsForeground(**options))
        return predictors[-1]

    monkeypatch.setattr("sdseg_cli.core.engine.inference.load_predictor", load_predictor)
    return predictors


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    return str(folder)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("a.png", "b.jpg", "c.bmp"):
        pixels = np.zeros((20, 30, 3), np.uint8)
        pixels[:, :15] = 255
        Image.fromarray(pixels).save(folder / name)
    return folder


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "summary.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def exit_code(**arguments) -> int:
    try:
        predict(**arguments)
    except typer.Exit as leaving:
        return leaving.exit_code
    return 0


def test_predict_writes_a_mask_an_image_and_a_summary(scans, tmp_path, model, made):
    out = tmp_path / "masks"
    assert exit_code(scans=[scans], out=out, model=model) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "a.png", "b.png", "c.png", "prediction.json", "provenance", "summary.csv",
    ]  # fmt: skip
    assert [row["status"] for row in rows(out)] == ["done"] * 3
    assert read_label_map(out / "a.png", num_classes=2).shape == (20, 30)
    settings = json.loads((out / "prediction.json").read_text())
    assert (settings["status"], settings["seed"], settings["images"]) == ("finished", 0, 3)
    assert settings["model"] == str(Path(model).resolve())


def test_options_reach_the_predictor_and_unset_ones_are_left_to_it(scans, tmp_path, model, made):
    predict(scans=[scans], out=tmp_path / "one", model=model)
    predict(scans=[scans], out=tmp_path / "two", model=model, seed=7, steps=5, samples=3, threshold=0.25)
    assert made[0].options == {"device": "auto", "precision": "auto", "seed": 0, "batch_size": None}
    assert made[1].options == {
        "device": "auto",
        "precision": "auto",
        "seed": 7,
        "batch_size": None,
        "num_inference_steps": 5,
        "num_samples": 3,
        "threshold": 0.25,
    }
    assert not (tmp_path / "one" / "uncertainty").exists()
    assert (tmp_path / "two" / "uncertainty" / "a.png").exists()


def test_another_decoder_is_another_result(scans, tmp_path, model, made):
    out, decoder = tmp_path / "masks", tmp_path / "small"
    predict(scans=[scans], out=out, model=model, decoder=decoder)
    assert made[0].options["decoder"] == str(decoder)
    assert json.loads((out / "prediction.json").read_text())["decoder"] == str(decoder)
    with pytest.raises(UsageError, match=r"were made with decoder .*small \(now as the model has it\)"):
        predict(scans=[scans], out=out, model=model, skip_existing=True)


def test_networks_are_compiled_only_if_asked_for(scans, tmp_path, model, made, monkeypatch):
    compiled = []

    def compile_it(predictor):
        compiled.append(predictor)

    monkeypatch.setattr(BrightIsForeground, "compile", compile_it, raising=False)
    predict(scans=[scans], out=tmp_path / "one", model=model)
    assert not compiled
    predict(scans=[scans], out=tmp_path / "two", model=model, compiled=True)
    assert compiled == [made[1]]


def test_flips_and_components_reach_the_predictor_and_flips_alone_give_an_uncertainty(
    scans, tmp_path, model, made
):
    predict(
        scans=[scans], out=tmp_path / "one", model=model, flips="horizontal,vertical", largest_component=True
    )
    assert made[0].options["flips"] == ["horizontal", "vertical"]
    assert made[0].options["largest_component"] is True
    assert (tmp_path / "one" / "uncertainty" / "a.png").exists()
    with pytest.raises(UsageError, match="flips"):  # not a second result in the same folder
        predict(scans=[scans], out=tmp_path / "one", model=model, skip_existing=True)
    same = {"flips": "horizontal,vertical", "largest_component": True, "skip_existing": True}
    predict(scans=[scans], out=tmp_path / "one", model=model, **same)
    predict(scans=[scans], out=tmp_path / "two", model=model, flips="none", largest_component=False)
    assert not {"flips", "largest_component"} & made[2].options.keys()


def test_the_report_shows_the_images_and_lists_what_failed_without_trusting_a_name(
    scans, tmp_path, model, made
):
    hostile = "<img src=x onerror=alert(1)>.png"
    (scans / "a.png").rename(scans / hostile)
    (scans / "torn.png").write_bytes(b"no image")
    out = tmp_path / "masks"
    assert exit_code(scans=[scans], out=out, model=model, report=True) == 3
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in html
    assert html.count("&lt;img src=x onerror=alert(1)&gt;") > 3
    assert html.count('<article class="case card"') == 3
    assert "torn" in html
    assert "failed" in html
    assert len(html) < 200_000


def test_the_report_begins_with_the_image_whose_draws_agree_least(scans, tmp_path, model, made, monkeypatch):
    shared = {"a": 8, "b": 2, "c": 5}
    original = BrightIsForeground.__call__

    def drawing(self, inputs):
        for one in original(self, inputs):
            both = shared[one.case_id]
            one.overlaps = np.array([[[10, both], [both, 10]]])
            yield one

    monkeypatch.setattr(BrightIsForeground, "__call__", drawing)
    out = tmp_path / "masks"
    predict(scans=[scans], out=out, model=model, samples=2, report=True)
    assert [float(row["draw_agreement"]) for row in rows(out)] == [0.8, 0.2, 0.5]
    html = (out / "report.html").read_text(encoding="utf-8")
    table = html[html.index('id="cases"') :]
    assert table.index("0.200") < table.index("0.500") < table.index("0.800")
    assert html.index('<h3 title="b"') < html.index('<h3 title="c"') < html.index('<h3 title="a"')


def test_json_goes_to_stdout_and_nothing_else_does(scans, tmp_path, model, made, capfd):
    predict(scans=[scans], out=tmp_path / "masks", model=model, as_json=True)
    result = json.loads(capfd.readouterr().out)
    assert (result["images"], result["done"], result["failed"]) == (3, 3, 0)
    assert result["cases"][0]["file"] == "a.png"


@pytest.mark.faults
def test_some_bad_files_give_exit_code_3_and_are_named(scans, tmp_path, model, made, capfd):
    (scans / "bad.png").write_bytes(b"")
    out = tmp_path / "masks"
    assert exit_code(scans=[scans], out=out, model=model) == 3
    message = capfd.readouterr().err
    assert "bad.png" in message
    assert "3 of 4 images done" in message
    assert "Traceback" not in message
    assert {row["file"]: row["status"] for row in rows(out)}["bad.png"] == "failed"


@pytest.mark.faults
def test_only_bad_files_give_exit_code_1(tmp_path, model, made):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "bad.png").write_bytes(b"")
    assert exit_code(scans=[tmp_path / "scans"], out=tmp_path / "masks", model=model) == 1


@pytest.mark.faults
def test_existing_masks_are_refused_before_the_model_is_loaded(scans, tmp_path, model, made):
    predict(scans=[scans], out=tmp_path / "masks", model=model)
    with pytest.raises(UsageError, match="exist already"):
        predict(scans=[scans], out=tmp_path / "masks", model=model)
    assert len(made) == 1
    predict(scans=[scans], out=tmp_path / "masks", model=model, overwrite=True)


def test_skip_existing_predicts_only_what_is_missing_and_keeps_the_rows(scans, tmp_path, model, made):
    out = tmp_path / "masks"
    predict(scans=[scans], out=out, model=model)
    (out / "b.png").unlink()
    before = (out / "a.png").stat().st_mtime_ns
    predict(scans=[scans], out=out, model=model, skip_existing=True)
    assert (out / "a.png").stat().st_mtime_ns == before
    assert [(row["status"], row["width"]) for row in rows(out)] == [
        ("skipped", "30"), ("done", "30"), ("skipped", "30"),
    ]  # fmt: skip


@pytest.mark.faults
def test_skip_existing_refuses_to_mix_two_settings(scans, tmp_path, model, made):
    predict(scans=[scans], out=tmp_path / "masks", model=model)
    with pytest.raises(UsageError, match=r"made with seed 0 \(now 1\)"):
        predict(scans=[scans], out=tmp_path / "masks", model=model, seed=1, skip_existing=True)
    with pytest.raises(UsageError, match=r"made with threshold as the model has it \(now 0\.25\)"):
        predict(scans=[scans], out=tmp_path / "masks", model=model, threshold=0.25, skip_existing=True)
    predict(scans=[scans], out=tmp_path / "masks", model=model, threshold=0.25, overwrite=True)
    with pytest.raises(UsageError, match=r"made with threshold 0\.25 \(now as the model has it\)"):
        predict(scans=[scans], out=tmp_path / "masks", model=model, skip_existing=True)


@pytest.mark.faults
def test_a_second_folder_joins_the_summary_only_with_the_same_settings(scans, tmp_path, model, made):
    out = tmp_path / "masks"
    predict(scans=[scans], out=out, model=model)
    more = tmp_path / "more"
    more.mkdir()
    Image.new("RGB", (10, 6), "white").save(more / "third.png")
    with pytest.raises(UsageError, match="Adding to them would mix two results"):
        predict(scans=[more], out=out, model=model, seed=1)
    first = [row["file"] for row in rows(out)]
    predict(scans=[more], out=out, model=model)
    assert sorted(row["file"] for row in rows(out)) == sorted([*first, "third.png"])


def test_an_interrupted_replacement_leaves_no_mask_of_before_to_be_taken_for_a_new_one(
    scans, tmp_path, model, made, monkeypatch
):
    out = tmp_path / "masks"
    predict(scans=[scans], out=out, model=model)

    def stop(*arguments, **options):
        raise DataError("stopped")

    monkeypatch.setattr(BrightIsForeground, "__call__", stop)
    with pytest.raises(DataError, match="stopped"):
        predict(scans=[scans], out=out, model=model, seed=1, overwrite=True)
    monkeypatch.undo()
    assert list(out.glob("*.png")) == []


@pytest.mark.faults(22)
def test_an_output_folder_that_cannot_be_written_fails_before_the_model_is_loaded(
    scans, tmp_path, model, made
):
    (tmp_path / "masks").write_text("a file")
    with pytest.raises(UsageError, match="cannot be written to"):
        predict(scans=[scans], out=tmp_path / "masks", model=model)
    assert made == []


@pytest.mark.faults
def test_a_model_that_is_not_there_is_a_usage_error(scans, tmp_path, made):
    with pytest.raises(UsageError):
        predict(scans=[scans], out=tmp_path / "masks", model=str(tmp_path / "none"))
    assert not (tmp_path / "masks").exists()


@pytest.mark.faults
def test_without_any_run_the_message_says_how_to_make_one(scans, tmp_path, monkeypatch, made):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="sdseg train"):
        predict(scans=[scans], out=tmp_path / "masks")


@pytest.mark.faults(18)
def test_a_full_disk_ends_with_an_error_and_what_was_done_is_listed(
    scans, tmp_path, model, made, monkeypatch, capfd
):
    original = engine.write_label_map
    room = iter(range(2))

    def until_full(path, *arguments, **options):
        if next(room, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, *arguments, **options)

    monkeypatch.setattr(engine, "write_label_map", until_full)
    out = tmp_path / "masks"
    with pytest.raises(DataError, match="No space left") as error:
        predict(scans=[scans], out=out, model=model)
    assert error.value.exit_code == 1
    assert sorted(row["status"] for row in rows(out)) == ["done", "done", "failed"]
    assert len(list(out.glob("*.png"))) == 2
    assert "2 of 3 images done" in capfd.readouterr().err
    assert json.loads((out / "prediction.json").read_text())["status"] == "stopped"


@pytest.mark.faults(18)
def test_a_disk_too_full_for_the_summary_lists_what_was_done_on_the_screen(
    scans, tmp_path, model, made, monkeypatch, capfd
):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sdseg_cli.commands.predict.write_summary", full)
    assert exit_code(scans=[scans], out=tmp_path / "masks", model=model) == 1
    message = capfd.readouterr().err
    assert "summary.csv cannot be written (No space left on device)" in message
    assert all(name in message for name in ("a.png", "b.jpg", "c.bmp"))


SLOW = """
import sys, time, types
from pathlib import Path
import numpy as np

class Slow:
    image_size, resize, classes, num_classes, looks = 16, "squeeze", ("background", "polyp"), 2, []
    def warnings(self, looks):
        return []
    def __call__(self, inputs):
        for one in inputs:
            print("predicting", flush=True)
            time.sleep(0.15)
            level = one.grid.probabilities_to_case(one.image.mean(axis=-1).astype(np.float32) / 255)
            yield types.SimpleNamespace(case_id=one.case_id, slice_index=0,
                label_map=(level > 0.5).astype(np.uint8), probabilities=np.stack([1 - level, level]),
                uncertainty=level, samples=None, overlaps=None)

from sdseg_cli.core.engine import inference
inference.load_predictor = lambda reference, **options: Slow()
from sdseg_cli.cli import main
sys.argv = ["sdseg", *sys.argv[1:]]
sys.exit(main())
"""


@pytest.fixture
def slow_scans(tmp_path: Path) -> Path:
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(60):
        Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(folder / f"{index}.png")
    return folder


def start_slow(tmp_path: Path, scans: Path, model: str) -> subprocess.Popen:
    script = tmp_path / "slow.py"
    script.write_text(textwrap.dedent(SLOW))
    return subprocess.Popen(
        [sys.executable, script, "predict", scans, "--out", tmp_path / "masks", "--model", model],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.faults(28)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_in_order_with_whole_masks_and_a_summary(tmp_path, slow_scans, model, number, code):
    process = start_slow(tmp_path, slow_scans, model)
    for _ in range(4):
        assert process.stdout is not None
        assert process.stdout.readline() == "predicting\n"
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == code
    assert "--skip-existing" in message
    assert "Traceback" not in message
    out = tmp_path / "masks"
    masks = {path.name for path in out.glob("*.png")}
    assert 2 <= len(masks) < 60
    assert {f"{row['case']}.png" for row in rows(out) if row["status"] == "done"} == masks
    for name in masks:
        assert read_label_map(out / name, num_classes=2).shape == (20, 30)
    assert not list(out.glob("*.partial"))


@pytest.mark.faults(24)
def test_something_is_on_the_screen_within_two_seconds_also_for_many_files(tmp_path, model):
    folder = tmp_path / "ten-thousand"
    folder.mkdir()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "0.png")
    for index in range(1, 10_000):
        os.link(folder / "0.png", folder / f"{index}.png")
    began = time.monotonic()
    process = start_slow_without_torch(folder, tmp_path, model)
    assert process.stderr is not None
    line = process.stderr.readline()
    seconds = time.monotonic() - began
    process.kill()
    process.communicate()
    assert line.startswith("model:")
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    assert seconds < 2 * max(1.0, busy)


def start_slow_without_torch(scans: Path, tmp_path: Path, model: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "sdseg_cli", "predict", scans, "--out", tmp_path / "masks"]
    return subprocess.Popen(
        [*command, "--model", model], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


TWO = """
import os, sys, types
from pathlib import Path
import numpy as np
from sdseg_cli.core.engine import inference

class Marks:
    image_size, resize, classes, num_classes, looks = 16, "squeeze", ("background", "polyp"), 2, []
    def warnings(self, looks):
        return []
    def __call__(self, inputs):
        for one in inputs:
            Path(os.environ["MARKS"], f"{os.environ['RANK']}-{one.case_id}").touch()
            level = one.grid.probabilities_to_case(one.image.mean(axis=-1).astype(np.float32) / 255)
            yield types.SimpleNamespace(case_id=one.case_id, slice_index=0,
                label_map=(level > 0.5).astype(np.uint8), probabilities=np.stack([1 - level, level]),
                uncertainty=level, samples=None, overlaps=None)

inference.load_predictor = lambda reference, **options: Marks()
from sdseg_cli.cli import main
main(sys.argv[1:])
"""


def test_two_processes_share_the_images_and_lose_or_double_none(tmp_path, model):
    scans, marks, out = (tmp_path / name for name in ("scans", "marks", "masks"))
    scans.mkdir()
    marks.mkdir()
    for index in range(7):
        Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(scans / f"{index}.png")
    script = tmp_path / "two.py"
    script.write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    finished = subprocess.run(
        [*launch, "predict", scans, "--out", out, "--model", model, "--device", "cpu"],
        capture_output=True,
        text=True,
        env={**os.environ, "MARKS": str(marks), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    assert sorted(path.name for path in marks.iterdir()) == [
        "0-0", "0-2", "0-4", "0-6", "1-1", "1-3", "1-5",
    ]  # fmt: skip
    assert [(row["case"], row["status"]) for row in rows(out)] == [(str(k), "done") for k in range(7)]
    assert finished.stderr.count("7 of 7 images done") == 1


# ---- volumes ----


def save_volume(path: Path, value: int = 900) -> None:
    import nibabel

    voxels = np.full((8, 9, 5), -100, np.int16)
    voxels[2:6, 2:6, 1:4] = value
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([0.5, 0.7, 3.0, 1.0])), path)


def test_a_volume_gives_a_mask_in_its_geometry_and_a_broken_one_exit_code_3(tmp_path, model, made, capfd):
    import nibabel

    folder = tmp_path / "scans"
    folder.mkdir()
    save_volume(folder / "a.nii.gz")
    (folder / "b.nii.gz").write_bytes(b"nothing")
    out = tmp_path / "masks"
    assert (
        exit_code(scans=[folder], out=out, model=model, window="-100,900", mask_format=VolumeFormat.nrrd) == 3
    )
    assert (out / "a.nrrd").exists()
    assert "b.nii.gz" in capfd.readouterr().err
    assert nibabel.load(folder / "a.nii.gz").shape == (8, 9, 5)
    settings = json.loads((out / "prediction.json").read_text())
    assert settings["window"] == [-100, 900]
    table = {row["file"]: row for row in rows(out)}
    assert table["a.nii.gz"]["slices"] == "5"
    assert float(table["a.nii.gz"]["polyp_ml"]) > 0


def test_what_the_model_was_trained_on_decides_which_files_make_a_case(tmp_path, model, made):
    stated = {"channels": [0, 1, 1], "sampling": {"num_samples": 3}}
    (Path(model) / "model_index.json").write_text(json.dumps({"training_data": stated}))
    for number in (0, 1):
        image = nibabel.Nifti1Image(np.full((6, 5, 4), 200 * number, np.int16), np.eye(4))
        nibabel.save(image, tmp_path / f"case_{number:04d}.nii.gz")
    names = [tmp_path / f"case_{number:04d}.nii.gz" for number in (0, 1)]
    assert exit_code(scans=names, out=tmp_path / "out", model=model, report=True) == 0
    assert (tmp_path / "out" / "case.nii.gz").is_file()
    assert [row["case"] for row in rows(tmp_path / "out")] == ["case"]
    assert made[0].options["num_samples"] == 3


@pytest.mark.faults
def test_a_code_for_a_class_that_the_model_does_not_have_is_told_before_it_is_loaded(
    scans, tmp_path, model, made
):
    pytest.importorskip("highdicom")
    (Path(model) / "model_index.json").write_text(json.dumps({"classes": ["background", "polyp"]}))
    (tmp_path / "codes.yaml").write_text("pollyp: SCT:41329004:Polyp\n")
    codes = {"mask_format": VolumeFormat.dicom_seg, "segment_codes": tmp_path / "codes.yaml"}
    with pytest.raises(UsageError, match=r"codes\.yaml: line 1: pollyp: the model has no class .* polyp;"):
        predict(scans=[scans], out=tmp_path / "out", model=model, **codes)
    assert made == []
    assert not (tmp_path / "out").exists()


def test_slices_run_along_the_axis_that_is_asked_for_and_the_page_shows_them(tmp_path, model, made):
    folder = tmp_path / "scans"
    folder.mkdir()
    save_volume(folder / "a.nii.gz")
    out = tmp_path / "masks"
    options = {"scans": [folder], "model": model, "window": "-100,900", "axis": VolumeAxis.coronal}
    assert exit_code(out=out, report=True, **options) == 0
    (row,) = rows(out)
    assert (row["slices"], row["width"], row["height"]) == ("9", "8", "5")
    assert json.loads((out / "prediction.json").read_text())["axis"] == "coronal"
    html = (out / "report.html").read_text(encoding="utf-8")
    # Four of the nine coronal slices have a mask; the front comes first.
    assert re.findall(r'data-name="(slice \d+)"', html) == ["slice 3", "slice 4", "slice 5", "slice 6"]
    assert "data-views" in html
    assert "polyp (ml)" in html
    with pytest.raises(UsageError, match="axis coronal"):
        predict(out=out, skip_existing=True, **{**options, "axis": VolumeAxis.axial})


def test_masks_of_another_window_are_not_mixed(tmp_path, model, made):
    folder = tmp_path / "scans"
    folder.mkdir()
    save_volume(folder / "a.nii.gz")
    out = tmp_path / "masks"
    assert exit_code(scans=[folder], out=out, model=model, window="-100,900") == 0
    with pytest.raises(UsageError, match="window"):
        predict(scans=[folder], out=out, model=model, window="0,900", skip_existing=True)
    assert exit_code(scans=[folder], out=out, model=model, window="-100,900", skip_existing=True) == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [("window", "0,9"), ("axis", VolumeAxis.coronal), ("nan_fill", 0.0), ("mask_format", VolumeFormat.mha)],
)
def test_options_of_volumes_are_refused_where_there_are_none(scans, tmp_path, model, made, option, value):
    name = {"nan_fill": "--nan-fill", "mask_format": "--format"}.get(option, f"--{option}")
    with pytest.raises(UsageError, match=f"{name}: of use for volumes only"):
        predict(scans=[scans], out=tmp_path / "masks", model=model, **{option: value})


@pytest.mark.parametrize("window", ["5", "5,1", "a,b", "nan,1"])
def test_a_window_that_is_none_is_a_usage_error(scans, tmp_path, model, made, window):
    with pytest.raises(UsageError, match="expected two numbers LOW,HIGH"):
        predict(scans=[scans], out=tmp_path / "masks", model=model, window=window)
