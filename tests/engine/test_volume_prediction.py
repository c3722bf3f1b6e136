"""Prediction of volumes: the mask lies where the scan lies. The predictor is a rule."""

from __future__ import annotations

import csv
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from sdseg_cli.core.data.raw_cases import Geometry
from sdseg_cli.core.data.volume_pairs import read_volume_pair
from sdseg_cli.core.data.volumes import VolumeGeometry, read_label_volume, write_label_volume
from sdseg_cli.core.engine.prediction import predict_files, read_summary, write_summary
from sdseg_cli.core.engine.prediction_page import prediction_page
from sdseg_cli.core.engine.prediction_pictures import read_shown_case
from sdseg_cli.core.engine.prediction_plan import plan_predictions, remove_outputs
from sdseg_cli.core.engine.report_parts import MOST_VIEWS
from sdseg_cli.core.engine.volume_prediction import VolumeSettings
from sdseg_cli.core.errors import ModelError, UsageError
from sdseg_cli.core.grid import Grid

SHAPE = (12, 10, 8)
AFFINE = np.array([[0.5, 0.1, 0, -30], [-0.1, 0.5, 0.2, 12.5], [0, -0.05, 2.0, 7], [0, 0, 0, 1.0]])
AFFINE[:3, :3] = np.linalg.qr(AFFINE[:3, :3])[0] @ np.diag([0.5, 0.6, 2.0])


class BrightIsForeground:
    """Calls bright pixels foreground; ``seen`` are the case ids and slice indices."""

    resize, classes, num_classes, image_size = "squeeze", ("background", "lesion"), 2, 12

    def __init__(self, **training_data: object) -> None:
        self.seen: list[tuple[str, int]] = []
        self.pipeline = SimpleNamespace(config=SimpleNamespace(training_data=training_data))

    def __call__(self, inputs: Iterable) -> Iterator[SimpleNamespace]:
        for one in inputs:
            self.seen.append((one.case_id, one.slice_index))
            level = one.grid.probabilities_to_case(one.image[..., 0].astype(np.float32)[None] / 255)[0]
            yield SimpleNamespace(
                case_id=one.case_id,
                slice_index=one.slice_index,
                label_map=(level > 0.5).astype(np.uint8),
                probabilities=np.stack([1 - level, level]),
                uncertainty=np.full(level.shape, 0.25, np.float32),
                overlaps=np.array([[[4, 2], [2, 4]]]),  # two draws that share half of their pixels
            )


def scan(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    voxels = np.full(shape, -100, np.int16)
    voxels[2:6, 3:7, 1:4] = 200
    voxels[8:11, 1:4, 6:] = 200
    return voxels


def save(path: Path, voxels: np.ndarray | None = None) -> Path:
    voxels = scan() if voxels is None else voxels
    if path.name.endswith((".nii", ".nii.gz")):
        nibabel.save(nibabel.Nifti1Image(voxels, AFFINE), path)
    else:
        image = sitk.GetImageFromArray(voxels.transpose(2, 1, 0))
        flip = np.array([-1, -1, 1])
        image.SetOrigin([float(v) for v in flip * AFFINE[:3, 3]])
        spacing = np.linalg.norm(AFFINE[:3, :3], axis=0)
        image.SetSpacing([float(v) for v in spacing])
        image.SetDirection([float(v) for v in (flip[:, None] * AFFINE[:3, :3] / spacing).ravel()])
        sitk.WriteImage(image, str(path))
    return path


def save_series(folder: Path, letter: str, slices: int) -> None:
    pydicom = pytest.importorskip("pydicom")
    image = sitk.GetImageFromArray(np.full((slices, 6, 7), 300, np.int16))
    for k in range(slices):
        path = folder / f"{letter}{k}.dcm"
        sitk.WriteImage(image[:, :, k : k + 1], str(path))
        data = pydicom.dcmread(path)
        data.SeriesInstanceUID, data.SeriesDescription = f"1.2.{ord(letter)}", f"Series {letter}"
        data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 3.0 * k], [1, 0, 0, 0, 1, 0]
        data.save_as(path)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    (tmp_path / "scans").mkdir()
    return tmp_path / "scans"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "masks"


def run(scans: Path, out: Path, predictor: BrightIsForeground | None = None, **options: object) -> list:
    out.mkdir(exist_ok=True)
    settings = options.pop("settings", VolumeSettings(window=(-175, 250)))
    tasks = plan_predictions([scans], out, **options)  # type: ignore[arg-type]
    return list(predict_files(tasks, predictor or BrightIsForeground(), volumes=settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize(
    ("name", "mask"), [("a.nii.gz", "a.nii.gz"), ("a.nii", "a.nii"), ("a.nrrd", "a.nrrd"), ("a.mhd", "a.mha")]
)
def test_a_mask_lies_on_its_volume_in_the_same_format(scans, out, axis, name, mask):
    save(scans / name)
    (record,) = run(scans, out, settings=VolumeSettings((-175, 250), axis))
    assert record.status == "done", record.error
    volume = read_label_volume(out / mask, num_classes=2)
    np.testing.assert_allclose(volume.geometry.affine, AFFINE, atol=1e-5)
    # The slice that is squeezed to the model's square and back may blur an edge by a voxel.
    truth = scan() > 0
    assert 2 * (truth & (volume.voxels == 1)).sum() / (truth.sum() + volume.voxels.sum()) > 0.8
    assert volume.voxels[3:5, 4:6, 2].all()


def test_records_hold_millilitres_components_and_slices(scans, out):
    save(scans / "a.nii")
    (record,) = run(scans, out)
    assert (record.slices, record.height, record.width) == (8, 10, 12)
    labels = read_label_volume(out / "a.nii").voxels
    assert record.areas_px == {"lesion": int(labels.sum())}
    assert record.volumes_ml["lesion"] == pytest.approx(labels.sum() * 0.5 * 0.6 * 2.0 / 1000)
    assert record.components == {"lesion": 2}
    tasks = plan_predictions([scans], out)
    write_summary(out / "summary.csv", tasks, [record], ("background", "lesion"))
    (row,) = csv.DictReader((out / "summary.csv").open())
    assert (row["slices"], row["lesion_components"]) == ("8", "2")


def test_slices_are_named_by_their_index_whatever_the_number_of_volumes(scans, out):
    for name in ("a.nii", "b.nrrd"):
        save(scans / name)
    predictor = BrightIsForeground()
    run(scans, out, predictor)
    assert predictor.seen == [(case, index) for case in ("a", "b") for index in range(8)]


def test_images_volumes_and_series_are_mixed_and_a_bad_one_fails_by_name(scans, out):
    from PIL import Image

    Image.fromarray(np.full((9, 9, 3), 250, np.uint8)).save(scans / "p.png")
    save(scans / "good.nii.gz")
    whole = save(scans / "cut.nii.gz").read_bytes()
    (scans / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    save(scans / "nan.nii", np.full(SHAPE, np.nan, np.float32))
    save(scans / "z.mha")
    records = {record.file: record for record in run(scans, out)}
    assert {name: record.status for name, record in records.items()} == {
        "p.png": "done", "good.nii.gz": "done", "cut.nii.gz": "failed", "nan.nii": "failed", "z.mha": "done",
    }  # fmt: skip
    assert "NaN" in records["nan.nii"].error
    assert sorted(path.name for path in out.iterdir()) == ["good.nii.gz", "p.png", "z.mha"]


def test_probabilities_and_uncertainty_are_float_volumes_and_the_overlay_a_sheet(scans, out):
    save(scans / "a.nrrd")
    run(scans, out, probabilities=True, uncertainty=True, overlays=True)
    probability = nibabel.load(out / "probabilities" / "a.nii.gz")
    labels = read_label_volume(out / "a.nrrd").voxels
    assert np.array_equal(probability.get_fdata() > 0.5, labels == 1)
    np.testing.assert_allclose(probability.affine, AFFINE, atol=1e-5)
    assert np.allclose(nibabel.load(out / "uncertainty" / "a.nii.gz").get_fdata(), 0.25)
    assert (out / "overlays" / "a.png").stat().st_size > 1000


def test_window_and_axis_come_from_the_model_unless_they_are_stated(scans, out):
    save(scans / "a.nii")
    (record,) = run(scans, out, BrightIsForeground(window=[-175, 250], axis="coronal"), settings=None)
    assert record.slices == 10
    assert record.notes == ()
    (record,) = run(scans, out, settings=None)
    assert "0.5 to 99.5 percentile was taken [-100, 200]" in record.notes[0]
    assert VolumeSettings((0, 1), "axial").completed(BrightIsForeground(window=[5, 6])).window == (0, 1)
    with pytest.raises(ModelError, match="diagonal"):
        VolumeSettings().completed(BrightIsForeground(axis="diagonal"))


def test_a_format_can_be_chosen_and_dicom_seg_needs_dicom(scans, out):
    save(scans / "a.mha")
    run(scans, out, mask_format="nifti")
    assert (out / "a.nii.gz").exists()
    with pytest.raises(UsageError, match="needs DICOM series"):
        plan_predictions([scans], out, mask_format="dicom-seg")


def test_names_that_differ_only_in_their_suffix_keep_it(scans, out):
    save(scans / "a.nii.gz")
    save(scans / "a.nii")
    run(scans, out)
    assert sorted(path.name for path in out.iterdir()) == ["a.nii.gz.nii.gz", "a.nii.nii"]


def test_series_of_a_folder_give_a_mask_each_and_strays_are_told(scans, out):
    save_series(scans, "A", 3)
    save_series(scans, "B", 2)
    (scans / "notes.txt").write_text("x")
    strays = []
    tasks = plan_predictions([scans], out, on_stray=lambda path, reason: strays.append(path.name))
    assert [task.case_id for task in tasks] == ["Series_A", "Series_B"]
    assert strays == ["notes.txt"]
    out.mkdir()
    records = list(predict_files(tasks, BrightIsForeground(), volumes=VolumeSettings((0, 100))))
    assert [record.slices for record in records] == [3, 2], records
    assert read_label_volume(out / "Series_A.nii.gz").geometry.shape == (7, 6, 3)


@pytest.mark.faults(25)
@pytest.mark.parametrize("when", ["a slice is rewritten", "a slice is gone"])
def test_a_slice_that_changes_while_its_series_is_read_fails_the_series(when, scans, out, monkeypatch):
    from sdseg_cli.core.engine import scans as scans_module

    save_series(scans, "A", 3)
    read = scans_module.read_series

    def while_another_writes(series, **options):
        volume = read(series, **options)
        last = series.files[-1]
        last.unlink() if "gone" in when else last.write_bytes(last.read_bytes() + bytes(2))
        return volume

    monkeypatch.setattr(scans_module, "read_series", while_another_writes)
    (record,) = run(scans, out)
    assert record.status == "failed"
    assert ("changed while it was read" if "rewritten" in when else "gone since the start") in record.error
    assert not list(out.glob("*.nii.gz"))


@pytest.mark.faults(25)
def test_voxels_beside_a_header_that_change_while_they_are_read_fail_the_volume(tmp_path, out, monkeypatch):
    from sdseg_cli.core.engine import scans as scans_module

    volume = sitk.GetImageFromArray(np.zeros((3, 4, 5), np.int16))
    (tmp_path / "only").mkdir()
    sitk.WriteImage(volume, tmp_path / "only" / "a.nhdr")
    read = scans_module.read_volume

    def while_another_writes(path, **options):
        found = read(path, **options)
        (tmp_path / "only" / "a.raw").write_bytes(bytes(121))
        return found

    monkeypatch.setattr(scans_module, "read_volume", while_another_writes)
    (record,) = run(tmp_path / "only", out)
    assert (record.status, "its file a.raw changed while it was read" in record.error) == ("failed", True)


def test_memory_grows_no_faster_than_the_voxels_of_a_volume(scans, out):
    def peak(length: int) -> int:
        path = scans / "a.nii"
        voxels = np.zeros((64, 64, length), np.int16)
        voxels[10:20, 10:20] = 500
        save(path, voxels)
        del voxels
        tracemalloc.start()
        run(scans, out)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    peak(10)  # what is imported once
    short, long = peak(100), peak(300)
    grown = 64 * 64 * 200
    # Two bytes a voxel of the scan, one of the mask and its copies while it is counted and written.
    assert long - short < grown * 8


def test_a_written_mask_keeps_the_geometry_of_another_writer(tmp_path):
    geometry = VolumeGeometry(SHAPE, AFFINE)
    write_label_volume(tmp_path / "m.mha", np.ones(SHAPE, np.uint8), geometry)
    image = sitk.ReadImage(str(tmp_path / "m.mha"))
    assert image.GetSpacing() == pytest.approx(geometry.spacing_mm, abs=1e-9)


def test_the_draws_of_all_slices_make_the_draw_agreement_of_the_volume(tmp_path):
    save(tmp_path / "a.nii.gz")
    tasks = plan_predictions([tmp_path], tmp_path / "out")
    (record,) = predict_files(tasks, BrightIsForeground())
    assert record.draw_agreement == pytest.approx(0.5)


def test_the_largest_component_of_a_volume_is_one_of_its_parts_not_one_of_each_slice(tmp_path):
    save(tmp_path / "a.nii.gz")
    tasks = plan_predictions([tmp_path], tmp_path / "out")
    predictor = BrightIsForeground()
    (both,) = predict_files(tasks, predictor)
    predictor.largest_component = True
    (one,) = predict_files(tasks, predictor)
    assert (both.components["lesion"], one.components["lesion"]) == (2, 1)
    assert both.areas_px["lesion"] - one.areas_px["lesion"] == 3 * 3 * 2  # the smaller of the two
    assert predictor.largest_component is True


@pytest.mark.faults
class Remembers(BrightIsForeground):
    """Keeps what it was shown."""

    def __call__(self, inputs: Iterable) -> Iterator[SimpleNamespace]:
        self.images: list[np.ndarray] = []
        return super().__call__(self._kept(inputs))

    def _kept(self, inputs: Iterable) -> Iterator[SimpleNamespace]:
        for one in inputs:
            self.images.append(one.image)
            yield one


def save_channels(scans: Path, case: str, numbers: Iterable[int]) -> None:
    for number in numbers:
        save(scans / f"{case}_{number:04d}.nii.gz", scan() + np.int16(10 * number))


@pytest.mark.parametrize("window", [(-175, 250), None])
def test_the_channels_of_a_case_are_seen_as_they_were_in_training(scans, out, tmp_path, window):
    save_channels(scans, "a_1", range(4))
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(scans / "b_0001.png")  # a picture stays one
    predictor = Remembers(channels=[2, 0, 3], axis="axial")
    picture, record = run(scans, out, predictor, channels=[2, 0, 3], settings=VolumeSettings(window))
    assert (picture.case_id, record.case_id, record.status) == ("b_0001", "a_1", "done")
    assert (record.file, record.slices) == ("a_1_0000.nii.gz", 8)
    assert read_label_volume(out / "a_1.nii.gz").geometry.shape == SHAPE
    save(tmp_path / "label.nii.gz", (scan() > 0).astype(np.uint8))
    files = [scans / f"a_1_{number:04d}.nii.gz" for number in (2, 0, 3)]
    slices, _ = read_volume_pair(files, tmp_path / "label.nii.gz", Geometry(window=window))
    grid = Grid(10, 12, 12)
    trained_on = [grid.image_to_model(one.image) for one in slices]
    np.testing.assert_array_equal(predictor.images, trained_on)
    assert window is None or len({image.tobytes() for image in np.moveaxis(trained_on[3], -1, 0)}) == 3
    (task,) = [task for task in plan_predictions([scans], out, channels=[2, 0, 3]) if task.is_volume]
    shown = read_shown_case(task, 2, VolumeSettings(window, "axial"))
    assert shown.slices[0].image.shape == (10, 12, 3)


@pytest.mark.faults
def test_a_channel_that_is_missing_or_lies_elsewhere_fails_its_case_alone(scans, out):
    save_channels(scans, "a", (0, 1, 2))
    save_channels(scans, "b", (0, 2))
    save_channels(scans, "c", (0, 1))
    save(scans / "c_0002.nii.gz", scan()[:, :, :7])
    records = run(scans, out, BrightIsForeground(channels=[0, 1, 2]), channels=[0, 1, 2])
    assert [record.status for record in records] == ["done", "failed", "failed"]
    assert records[1].error.startswith("b_0001.nii.gz: missing beside b_0000.nii.gz")
    assert records[2].error.startswith("channel c_0002.nii.gz (")
    assert "does not lie voxel on voxel on c_0000.nii.gz" in records[2].error
    assert [path.name for path in out.iterdir()] == ["a.nii.gz"]


@pytest.mark.faults
def test_a_volume_that_is_no_channel_by_its_name_fails_alone(scans, out):
    save_channels(scans, "a", (0, 2, 3))
    for name in ("a.nii.gz", "b.nrrd"):  # a label map of the case, perhaps
        save(scans / name)
    records = run(scans, out, BrightIsForeground(channels=[0, 2, 3]), channels=[0, 2, 3])
    assert [(record.file, record.status) for record in records] == [
        ("a.nii.gz", "failed"),
        ("a_0000.nii.gz", "done"),
        ("b.nrrd", "failed"),
    ]
    assert records[0].error.startswith("is no channel of a case by its name. The model was trained on the")
    assert "expected files named CASE_0000, CASE_0002, CASE_0003 (and .nii.gz" in records[2].error
    assert [path.name for path in out.iterdir()] == ["a.nii.gz"]


@pytest.mark.faults
def test_a_model_of_three_channels_refuses_volumes_that_are_none(tmp_path):
    save(tmp_path / "a.nii.gz")
    with pytest.raises(UsageError, match=r"channels 0, 2, 3 of every.*CASE_0002.* Not one of the 1 .*a\.nii"):
        plan_predictions([tmp_path], tmp_path / "out", channels=[0, 2, 3])
    (tmp_path / "series").mkdir()
    save_series(tmp_path / "series", "A", 3)
    with pytest.raises(
        UsageError, match=r"Not one of the 1 .* Convert the DICOM series to volumes named so\.$"
    ):
        plan_predictions([tmp_path / "series"], tmp_path / "out", channels=[0, 2, 3])
    (task,) = plan_predictions([tmp_path / "series"], tmp_path / "out", channels=[1])
    (record,) = predict_files([task], BrightIsForeground(channels=[0, 2, 3]))
    assert record.error.endswith("Convert the series to volumes named so, or leave it out.")
    tasks = plan_predictions([tmp_path], tmp_path / "out", channels=[1])
    (record,) = predict_files(tasks, BrightIsForeground(channels=[0, 2, 3]))
    assert (record.status, record.case_id) == ("failed", "a")
    (record,) = predict_files(tasks, BrightIsForeground(channels=[1]))
    assert record.status == "done"


@pytest.mark.faults(20)
def test_memory_that_runs_out_in_one_volume_is_that_volumes_failure(tmp_path, monkeypatch):
    for name in "ab":
        save(tmp_path / f"{name}.nii.gz")
    tasks = plan_predictions([tmp_path], tmp_path / "out")
    predictor = BrightIsForeground()
    answer = type(predictor).__call__

    def greedy(self, inputs):
        for prediction in answer(self, inputs):
            if prediction.case_id == "a":
                raise MemoryError
            yield prediction

    monkeypatch.setattr(BrightIsForeground, "__call__", greedy)
    assert [record.status for record in predict_files(tasks, predictor)] == ["failed", "done"]


def test_what_is_replaced_goes_in_every_format_it_can_have(tmp_path):
    save(tmp_path / "a.nii.gz")
    out = tmp_path / "out"
    list(predict_files(plan_predictions([tmp_path], out), BrightIsForeground()))
    assert (out / "a.nii.gz").is_file()
    remove_outputs(plan_predictions([tmp_path], out, mask_format="nrrd"))
    assert not list(out.glob("a.*"))
    assert (tmp_path / "a.nii.gz").is_file()


@pytest.mark.faults
def test_a_mask_that_cannot_be_written_says_so(tmp_path):
    save(tmp_path / "a.nii.gz")
    tasks = plan_predictions([tmp_path], tmp_path / "out")
    tasks[0].mask.mkdir(parents=True)
    (tasks[0].mask / "full").touch()
    (record,) = predict_files(tasks, BrightIsForeground())
    assert record.status == "failed"
    assert "cannot be written" in record.error


def test_the_page_shows_slices_of_a_volume_from_its_fullest_on(scans, out):
    voxels = np.full((20, 14, 30), -100, np.int16)
    voxels[8:10, 6:8, 4:28] = 200
    voxels[2:18, 2:12, 10] = 200  # of 24 marked slices the fullest, and none of the evenly chosen eleven
    save(scans / "a.nii.gz", voxels)
    save(scans / "empty.nrrd", np.full((6, 5, 3), -100, np.int16))
    options = {"uncertainty": True, "settings": (window := VolumeSettings((-175, 250), "axial"))}
    records = run(scans, out, **options)
    assert [record.status for record in records] == ["done", "done"]
    tasks = plan_predictions([scans], out, uncertainty=True)
    classes = ("background", "lesion")
    write_summary(out / "summary.csv", tasks, records, classes)
    rows = list(read_summary(out / "summary.csv").values())
    page = prediction_page(tasks, rows, classes, {}, volumes=window)
    case = next(case for case in page.gallery if case.title == "a")
    names = [view.name for view in case.views]
    assert len(names) == MOST_VIEWS
    assert (names[0], names[-1]) == ("slice 4", "slice 27")
    assert names[case.first] == "slice 10"
    assert [stage.caption for stage in case.views[0].stages] == ["image", "prediction", "uncertainty"]
    # Pixels are 0.5 x 0.6 mm, columns run along the first array axis.
    assert case.views[0].width / case.views[0].height == pytest.approx(20 * 0.5 / (14 * 0.6), rel=0.01)
    empty = next(case for case in page.gallery if case.title == "empty")
    assert [view.name for view in empty.views] == ["slice 0", "slice 1", "slice 2"]
    assert page.cases is not None
    assert "lesion (ml)" in page.cases.columns
    assert "lesion (%)" not in page.cases.columns
    assert "20 × 14 × 30" in {row[page.cases.columns.index("size (px)")] for row in page.cases.rows}


def test_a_shown_slice_is_the_one_the_model_saw_with_its_mask_on_it(scans, out):
    save(scans / "a.nii.gz")
    run(scans, out)
    (task,) = plan_predictions([scans], out)
    shown = read_shown_case(task, 2, VolumeSettings((-175, 250)))
    assert shown is not None
    first = shown.slices[0]
    assert first.name == "slice 1"
    bright = first.image[..., 0] > 128
    assert 2 * (bright & (first.label_map == 1)).sum() / (bright.sum() + first.label_map.sum()) > 0.8
    task.mask.unlink()
    assert read_shown_case(task, 2) is None
