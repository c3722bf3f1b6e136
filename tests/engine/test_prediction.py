"""Prediction of files: names, geometry, faults and what is left on the disk. The predictor is a rule."""

from __future__ import annotations

import csv
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sdseg_cli.core.data.images import read_image, read_label_map
from sdseg_cli.core.engine import prediction
from sdseg_cli.core.engine.prediction import CasePrediction, predict_files, write_summary
from sdseg_cli.core.engine.prediction_plan import (
    plan_predictions,
    prepare_folder,
    readable,
    refuse_existing,
    split_existing,
)
from sdseg_cli.core.errors import DataError, OutOfMemoryError, UsageError

RED, BLACK = (250, 10, 10), (0, 0, 0)


@dataclass(frozen=True)
class FakePrediction:
    case_id: str
    slice_index: int
    label_map: np.ndarray
    probabilities: np.ndarray
    uncertainty: np.ndarray
    samples: None = None
    overlaps: None = None


class RedIsForeground:
    """Calls red pixels class 1 (and green ones class 2, with three classes), two images at a time."""

    resize = "squeeze"

    def __init__(self, image_size: int = 16, classes: tuple[str, ...] = ("background", "polyp")) -> None:
        self.image_size = image_size
        self.classes = classes
        self.num_classes = len(classes)
        self.most_held = 0
        self.on_case = lambda case_id: None

    def __call__(self, inputs: Iterable) -> Iterator[FakePrediction]:
        batch: list = []
        for one in inputs:
            batch.append(one)
            if len(batch) == 2:
                yield from map(self.predict, batch)
                batch = []
        yield from map(self.predict, batch)

    def predict(self, one) -> FakePrediction:
        self.on_case(one.case_id)
        image = one.image.astype(np.float32) / 255
        planes = [1 - image[..., : self.num_classes - 1].max(axis=-1)]
        planes += [image[..., index] for index in range(self.num_classes - 1)]
        probabilities = one.grid.probabilities_to_case(np.stack(planes))
        label_map = probabilities.argmax(axis=0).astype(np.uint8)
        uncertainty = np.full(label_map.shape, 0.25, np.float32)
        return FakePrediction(one.case_id, one.slice_index, label_map, probabilities, uncertainty)


def halves(height: int = 24, width: int = 40) -> Image.Image:
    """Red on the left half, black on the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = RED
    return Image.fromarray(pixels)


def predict_folder(
    folder: Path, out: Path, predictor: RedIsForeground | None = None, **options
) -> list[CasePrediction]:
    tasks = plan_predictions([folder], out, **options)
    return list(predict_files(tasks, predictor or RedIsForeground()))


def statuses(records: list[CasePrediction]) -> dict[str, str]:
    return {record.file: record.status for record in records}


def files_under(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "masks"


# ---- what is written ----


def test_a_mask_has_the_size_of_its_image_and_the_foreground_where_it_was_found(scans, out):
    halves(24, 40).save(scans / "a.png")
    (record,) = predict_folder(scans, out)
    mask = read_label_map(out / "a.png", num_classes=2)
    assert mask.shape == (24, 40)
    assert mask[:, :18].all()
    assert not mask[:, 22:].any()
    assert (record.width, record.height, record.areas_px) == (40, 24, {"polyp": int(mask.sum())})
    assert record.mean_uncertainty is None
    assert set(np.unique(np.asarray(Image.open(out / "a.png")))) == {0, 255}


def test_several_classes_give_a_palette_mask_and_one_npz_of_probabilities(scans, out):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:5, :, 0] = 255
    pixels[11:, :, 1] = 255
    Image.fromarray(pixels).save(scans / "a.png")
    predictor = RedIsForeground(classes=("background", "liver", "kidney"))
    (record,) = predict_folder(scans, out, predictor, probabilities=True)
    assert Image.open(out / "a.png").mode == "P"
    assert record.areas_px == {"liver": 80, "kidney": 80}
    with np.load(out / "probabilities" / "a.npz") as stored:
        assert stored["probabilities"].shape == (3, 16, 16)
        assert list(stored["classes"]) == ["background", "liver", "kidney"]


def test_probabilities_of_one_class_are_sixteen_bit_from_0_to_65535(scans, out):
    halves(16, 16).save(scans / "a.png")
    predict_folder(scans, out, probabilities=True)
    stored = np.asarray(Image.open(out / "probabilities" / "a.png"))
    assert stored.dtype == np.uint16
    assert stored[8, 2] == round(250 / 255 * 65535)
    assert stored[8, 12] == 0


def test_uncertainty_is_sixteen_bit_with_one_half_as_its_largest_value(scans, out):
    halves(16, 16).save(scans / "a.png")
    (record,) = predict_folder(scans, out, uncertainty=True)
    stored = np.asarray(Image.open(out / "uncertainty" / "a.png"))
    assert stored.dtype == np.uint16
    assert (stored == round(0.25 * 2 * 65535)).all()
    assert record.mean_uncertainty == 0.25


def test_an_overlay_is_a_picture_of_the_size_of_the_image(scans, out):
    halves().save(scans / "a.png")
    predict_folder(scans, out, overlays=True)
    assert Image.open(out / "overlays" / "a.png").size == (40, 24)
    assert files_under(out) == ["a.png", "overlays/a.png"]


def test_subfolders_are_kept_with_recursive_and_left_out_without(scans, out):
    (scans / "one" / "two").mkdir(parents=True)
    halves().save(scans / "a.png")
    halves().save(scans / "one" / "two" / "b.bmp")
    predict_folder(scans, out)
    assert files_under(out) == ["a.png"]
    predict_folder(scans, out, recursive=True)
    assert files_under(out) == ["a.png", "one/two/b.png"]


def test_masks_inside_the_image_folder_are_not_taken_for_images_the_next_time(scans):
    halves().save(scans / "a.png")
    predict_folder(scans, scans / "masks", recursive=True)
    assert [task.file for task in plan_predictions([scans], scans / "masks", recursive=True)] == ["a.png"]


def test_a_single_image_can_be_given(scans, out):
    halves().save(scans / "a.png")
    halves().save(scans / "b.png")
    (task,) = plan_predictions([scans / "b.png"], out)
    assert (task.case_id, task.mask) == ("b", out / "b.png")


def test_the_case_id_decides_the_noise_and_is_the_name_without_suffix(scans, out):
    (scans / "s").mkdir()
    halves().save(scans / "s" / "a.jpeg")
    (task,) = plan_predictions([scans], out, recursive=True)
    assert task.case_id == "s/a"


def test_nothing_is_predicted_before_the_records_are_read(scans, out):
    halves().save(scans / "a.png")
    predict_files(plan_predictions([scans], out), RedIsForeground())
    assert not out.exists()


def test_records_keep_every_case_once_for_more_images_than_are_read_ahead(scans, out):
    for index in range(40):
        halves(8, 8).save(scans / f"{index}.png")
    records = predict_folder(scans, out)
    assert sorted(record.case_id for record in records) == sorted(str(index) for index in range(40))
    assert {record.status for record in records} == {"done"}


@pytest.mark.faults(24)
def test_images_in_memory_are_bounded_whatever_their_number(scans, out, monkeypatch):
    for index in range(60):
        halves(8, 8).save(scans / f"{index}.png")
    reads, lock = 0, threading.Lock()
    original = prediction._read_case

    def counted(*arguments):
        nonlocal reads
        with lock:
            reads += 1
        return original(*arguments)

    monkeypatch.setattr(prediction, "_read_case", counted)
    records = predict_files(plan_predictions([scans], out), RedIsForeground(), readers=2, writers=1)
    next(records)
    # 2 x 2 ahead, batches of 2, 2 writes under way and what a batch asks for next
    assert reads <= 12
    records.close()


# ---- refusals before anything is done ----


@pytest.mark.faults
def test_a_missing_folder_is_a_usage_error(tmp_path, out):
    with pytest.raises(UsageError, match="nowhere does not exist"):
        plan_predictions([tmp_path / "nowhere"], out)


@pytest.mark.faults
def test_a_folder_without_images_is_a_usage_error_that_mentions_recursive(scans, out):
    (scans / "notes.txt").write_text("no image")
    with pytest.raises(UsageError, match=r"no PNG, JPEG, TIFF or BMP .* --recursive"):
        plan_predictions([scans], out)


@pytest.mark.faults
def test_the_image_folder_as_output_folder_is_refused(scans):
    halves().save(scans / "a.png")
    for recursive in (False, True):
        with pytest.raises(UsageError, match=r"is the folder of the images.*scans/masks for instance"):
            plan_predictions([scans], scans, recursive=recursive)


@pytest.mark.faults
def test_a_mask_that_would_fall_onto_its_image_is_refused(scans):
    halves().save(scans / "a.png")
    with pytest.raises(UsageError, match=r"onto the input .*a\.png"):
        plan_predictions([scans / "a.png"], scans)


def test_the_output_folder_may_lie_above_the_images(scans):
    halves().save(scans / "a.png")
    (task,) = plan_predictions([scans], scans.parent, recursive=True)
    assert task.mask == scans.parent / "a.png"


@pytest.mark.faults
def test_existing_masks_are_refused_by_name_and_number(scans, out):
    for name in ("a", "b"):
        halves().save(scans / f"{name}.png")
    predict_folder(scans, out)
    with pytest.raises(UsageError, match=r"2 of the files .*first: a\.png.*--skip-existing.*--overwrite"):
        refuse_existing(plan_predictions([scans], out), out)


def test_skip_existing_leaves_only_what_lacks_an_output_that_is_asked_for(scans, out):
    for name in ("a", "b"):
        halves().save(scans / f"{name}.png")
    predict_folder(scans, out)
    (out / "b.png").unlink()
    todo, done = split_existing(plan_predictions([scans], out), out)
    assert ([task.case_id for task in todo], [task.case_id for task in done]) == (["b"], ["a"])
    todo, done = split_existing(plan_predictions([scans], out, probabilities=True), out)
    assert [task.case_id for task in todo] == ["a", "b"]


@pytest.mark.faults
def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "masks").write_text("")
    with pytest.raises(UsageError, match="cannot be written to"):
        prepare_folder(tmp_path / "masks")


@pytest.mark.faults
def test_a_folder_of_images_named_like_an_extra_output_is_refused_where_it_collides(scans, out):
    (scans / "overlays").mkdir()
    halves().save(scans / "a.png")
    halves().save(scans / "overlays" / "a.png")
    with pytest.raises(UsageError, match=r"both a\.png and overlays/a\.png"):
        plan_predictions([scans], out, recursive=True, overlays=True)


@pytest.mark.faults
def test_the_same_name_in_two_folders_is_refused(tmp_path, out):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        halves().save(tmp_path / folder / "a.png")
    with pytest.raises(UsageError, match="same name in several"):
        plan_predictions([tmp_path / "one", tmp_path / "two"], out)


# ---- file names ----


@pytest.mark.faults(23)
def test_images_that_differ_only_in_their_suffix_keep_it_in_the_masks_name(scans, out):
    for name in ("a.png", "a.jpg", "a.png.bmp", "b.tif"):
        halves().save(scans / name)
    records = predict_folder(scans, out)
    assert set(statuses(records).values()) == {"done"}
    assert files_under(out) == ["a.jpg.png", "a.png.bmp.png", "a.png.png", "b.png"]


@pytest.mark.faults(23)
@pytest.mark.parametrize(
    "stem", [" leading and trailing ", "naïve – 内視鏡 🩺", "x" * 251, "é" * 125, "new\nline", "a=b;c'd\"e"]
)
def test_odd_names_come_back_unchanged(scans, out, stem):
    halves().save(scans / f"{stem}.png")
    (record,) = predict_folder(scans, out, overlays=True)
    assert record.status == "done"
    assert (out / f"{stem}.png").exists()
    assert (out / "overlays" / f"{stem}.png").exists()


@pytest.mark.faults(23)
def test_a_name_that_gets_too_long_is_shortened_and_stays_unique(scans, out):
    stem = "x" * 251
    for suffix in ("png", "jpg"):
        halves().save(scans / f"{stem}.{suffix}")
    assert set(statuses(predict_folder(scans, out)).values()) == {"done"}
    masks = files_under(out)
    assert len(masks) == 2
    assert all(len(os.fsencode(name)) <= 255 for name in masks)


@pytest.mark.faults(23)
def test_a_name_that_is_no_unicode_is_predicted_and_printable(scans, out):
    raw = os.fsdecode(b"caf\xe9.png")
    halves().save(scans / "a.png")
    (scans / "a.png").rename(scans / raw)
    (record,) = predict_folder(scans, out)
    assert (record.status, record.file) == ("done", r"caf\xe9.png")
    assert (out / raw).exists()
    write_summary(out / "summary.csv", plan_predictions([scans], out), [record], ("background", "polyp"))
    assert r"caf\xe9.png" in (out / "summary.csv").read_text(encoding="utf-8")


# ---- bad and unusual images ----


@pytest.mark.faults
def test_bad_files_fail_by_name_and_the_others_go_on(scans, out):
    halves().save(scans / "good1.png")
    halves().save(scans / "good2.tif")
    (scans / "empty.png").write_bytes(b"")
    halves(200, 200).save(scans / "half.jpg")
    whole = (scans / "half.jpg").read_bytes()
    (scans / "half.jpg").write_bytes(whole[: len(whole) // 2])
    halves().save(scans / "mislabelled.bmp", format="PNG")
    (scans / "text.tiff").write_text("not an image")
    records = predict_folder(scans, out)
    assert statuses(records) == {
        "good1.png": "done",
        "good2.tif": "done",
        "empty.png": "failed",
        "half.jpg": "failed",
        "mislabelled.bmp": "failed",
        "text.tiff": "failed",
    }
    errors = {record.file: record.error for record in records}
    assert errors["empty.png"].startswith("the file is empty (0 bytes)")
    assert errors["mislabelled.bmp"].startswith("the name says BMP, the content is PNG")
    assert errors["half.jpg"].startswith("cannot be decoded as JPG")
    assert errors["text.tiff"].startswith("cannot be decoded as TIFF")
    assert files_under(out) == ["good1.png", "good2.png"]


@pytest.mark.faults
def test_a_sixteen_bit_image_is_scaled_and_the_record_says_so(scans, out):
    levels = np.zeros((16, 16), np.uint16)
    levels[:, :8] = 40000
    Image.fromarray(levels).save(scans / "a.png")
    (record,) = predict_folder(scans, out)
    assert record.notes == ("16-bit scaled from [0, 40000]",)
    assert record.areas_px == {"polyp": 128}


@pytest.mark.faults
@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_every_pixel_mode_is_predicted(scans, out, mode):
    name = "a.tif" if mode == "CMYK" else "a.png"
    halves(16, 16).convert("L").point(lambda value: 255 if value else 0).convert(
        "RGB" if mode in ("P", "CMYK") else "L"
    ).convert(mode).save(scans / name)
    (record,) = predict_folder(scans, out)
    assert (record.status, record.areas_px) == ("done", {"polyp": 128})


@pytest.mark.faults
@pytest.mark.parametrize("orientation", range(1, 9))
def test_outputs_lie_on_the_stored_grid_with_the_images_orientation_tag(scans, out, orientation):
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[2:10, 4:12] = RED
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(scans / "a.png", exif=exif)
    predict_folder(scans, out, RedIsForeground(image_size=64), probabilities=True, overlays=True)
    upright = read_image(scans / "a.png").pixels[..., 0] > 127
    mask_file = Image.open(out / "a.png")
    assert mask_file.size == (40, 24)
    assert mask_file.getexif().get(274, 1) == orientation
    mask = read_label_map(out / "a.png", num_classes=2)
    assert mask.shape == upright.shape
    assert (mask != upright).sum() <= 34  # the 8 x 8 square up to its border
    levels = Image.open(out / "probabilities" / "a.png")
    assert (levels.size, levels.getexif().get(274, 1)) == ((40, 24), orientation)
    assert Image.open(out / "overlays" / "a.png").size == upright.shape[::-1]


# ---- things that happen meanwhile ----


@pytest.mark.faults(25)
def test_a_file_that_vanishes_is_a_failed_case(scans, out):
    for name in ("a", "b"):
        halves().save(scans / f"{name}.png")
    tasks = plan_predictions([scans], out)
    (scans / "a.png").unlink()
    records = list(predict_files(tasks, RedIsForeground()))
    assert statuses(records) == {"a.png": "failed", "b.png": "done"}
    assert "gone since the start" in records[0].error


@pytest.mark.faults(25)
def test_a_file_that_changes_while_it_is_read_is_a_failed_case(scans, out, monkeypatch):
    halves().save(scans / "a.png")
    original = prediction.read_image

    def growing(path):
        loaded = original(path)
        with path.open("ab") as file:
            file.write(b"more")
        return loaded

    monkeypatch.setattr(prediction, "read_image", growing)
    (record,) = predict_folder(scans, out)
    assert (record.status, "changed while it was read" in record.error) == ("failed", True)


@pytest.mark.faults(25)
def test_a_file_that_appears_meanwhile_is_left_alone(scans, out):
    halves().save(scans / "a.png")
    predictor = RedIsForeground()
    predictor.on_case = lambda case_id: halves().save(scans / "late.png")
    assert statuses(predict_folder(scans, out, predictor)) == {"a.png": "done"}
    assert files_under(out) == ["a.png"]


@pytest.mark.faults
def test_a_failed_write_of_one_mask_is_a_failed_case(scans, out):
    for name in ("a", "b"):
        halves().save(scans / f"{name}.png")
    (out / "a.png").mkdir(parents=True)
    assert statuses(predict_folder(scans, out)) == {"a.png": "failed", "b.png": "done"}


@pytest.mark.faults(18)
def test_a_full_disk_stops_with_what_was_done_and_leaves_no_partial_mask(scans, out, monkeypatch):
    for index in range(20):
        halves().save(scans / f"{index}.png")
    original = prediction.write_label_map
    room = iter(range(5))

    def until_full(path, *arguments, **options):
        if next(room, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, *arguments, **options)

    monkeypatch.setattr(prediction, "write_label_map", until_full)
    records: list[CasePrediction] = []
    with pytest.raises(DataError, match=r"No space left on device.*--skip-existing"):
        records.extend(predict_files(plan_predictions([scans], out), RedIsForeground()))
    done = [f"{record.case_id}.png" for record in records if record.status == "done"]
    assert len(done) == 5
    assert files_under(out) == sorted(done)


@pytest.mark.faults(18)
def test_masks_on_a_small_full_file_system_are_whole_or_absent(scans, tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        noise = np.random.default_rng(0)
        for index in range(12):
            Image.fromarray(noise.integers(0, 256, (160, 160, 3), np.uint8)).save(scans / f"{index}.png")
        out = mount / "masks"
        records: list[CasePrediction] = []
        predictor = RedIsForeground(image_size=160)
        with pytest.raises(DataError, match="No space left"):
            records.extend(predict_files(plan_predictions([scans], out, probabilities=True), predictor))
        done = {f"{record.case_id}.png" for record in records if record.status == "done"}
        written = [path for path in out.rglob("*") if path.is_file()]
        assert {path.name for path in out.glob("*.png")} == done
        assert not [path for path in written if path.name.endswith(".partial")]
        for path in written:
            Image.open(path).load()
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.faults
def test_an_error_of_the_predictor_comes_after_the_records_of_what_was_written(scans, out):
    for index in range(6):
        halves().save(scans / f"{index}.png")
    predictor = RedIsForeground()

    def fail(case_id: str) -> None:
        if case_id == "4":
            raise OutOfMemoryError("no memory for one image")

    predictor.on_case = fail
    records: list[CasePrediction] = []
    with pytest.raises(OutOfMemoryError, match="no memory"):
        records.extend(predict_files(plan_predictions([scans], out), predictor))
    assert [record.case_id for record in records] == ["0", "1", "2", "3"]
    assert files_under(out) == ["0.png", "1.png", "2.png", "3.png"]


@pytest.mark.faults
def test_closing_early_leaves_whole_masks_only(scans, out):
    for index in range(20):
        halves().save(scans / f"{index}.png")
    records = predict_files(plan_predictions([scans], out), RedIsForeground())
    next(records)
    records.close()
    masks = files_under(out)
    assert 1 <= len(masks) < 20
    for name in masks:
        assert read_label_map(out / name, num_classes=2).shape == (24, 40)


# ---- the summary ----


def test_the_summary_lists_every_case_in_the_order_of_the_files(scans, out):
    halves().save(scans / "2.png")
    halves().save(scans / "10.png")
    (scans / "1.png").write_bytes(b"")
    tasks = plan_predictions([scans], out, uncertainty=True)
    records = list(predict_files(tasks, RedIsForeground(image_size=40)))
    write_summary(out / "summary.csv", tasks, reversed(records), ("background", "polyp"))
    rows = list(csv.DictReader((out / "summary.csv").open(encoding="utf-8", newline="")))
    assert [row["case"] for row in rows] == ["1", "2", "10"]
    assert [row["status"] for row in rows] == ["failed", "done", "done"]
    assert list(rows[1]) == [
        "case", "file", "width", "height", "slices", "polyp_px", "polyp_fraction", "polyp_ml",
        "polyp_components", "mean_uncertainty", "draw_agreement", "status", "seconds", "notes", "error",
    ]  # fmt: skip
    assert (rows[1]["polyp_px"], rows[1]["polyp_fraction"]) == ("480", "0.500000")
    assert rows[1]["mean_uncertainty"] == "0.250000"
    assert rows[0]["polyp_px"] == ""
    assert "empty" in rows[0]["error"]


def test_rows_of_skipped_cases_are_taken_over_from_the_summary_before(scans, out):
    classes = ("background", "polyp")
    halves().save(scans / "a.png")
    tasks = plan_predictions([scans], out)
    write_summary(out / "summary.csv", tasks, list(predict_files(tasks, RedIsForeground())), classes)
    skipped = [CasePrediction("a", "a.png", "skipped")]
    write_summary(out / "summary.csv", tasks, skipped, classes)
    (row,) = csv.DictReader((out / "summary.csv").open(encoding="utf-8", newline=""))
    assert (row["status"], row["width"], row["height"]) == ("skipped", "40", "24")


def test_readable_turns_undecodable_bytes_into_escapes():
    assert readable(os.fsdecode(b"a\xffb")) == r"a\xffb"


def test_planning_needs_no_torch():
    code = (
        "import sys; from sdseg_cli.core.engine import prediction; "
        "sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# A model that was trained on a part of its pictures


def fundus() -> np.ndarray:
    """A dark red photograph, 120 x 160, with a bright disc about 16 pixels wide around (40, 110)."""
    rows, columns = np.mgrid[:120, :160]
    image = np.full((120, 160, 3), (90, 30, 10), np.uint8)
    image[(rows - 40) ** 2 + (columns - 110) ** 2 < 8**2] = (250, 220, 120)
    return image


@pytest.mark.parametrize(("crop", "is_part"), [("bright", True), ("truth", False), (None, False)])
def test_a_model_trained_on_crops_around_the_disc_is_shown_that_part(crop, is_part, tmp_path):
    Image.fromarray(fundus()).save(tmp_path / "eye.png")
    predictor = RedIsForeground()
    predictor.pipeline = SimpleNamespace(config=SimpleNamespace(training_data={"crop": crop}))
    seen = []
    predictor.predict = lambda one: (seen.append(one.grid), RedIsForeground.predict(predictor, one))[1]
    (record,) = predict_files(plan_predictions([tmp_path], tmp_path / "out"), predictor)
    assert record.status == "done"
    top, left, height, width = seen[0].seen
    assert (height < 60) == is_part
    assert top <= 40 < top + height
    assert left <= 110 < left + width
    assert read_label_map(tmp_path / "out" / "eye.png").shape == (120, 160)
    assert any("trained on crops around the optic disc" in note for note in record.notes) == (crop == "truth")
