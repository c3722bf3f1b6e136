"""DICOM series made on the spot: found, told apart, checked, read where SimpleITK reads them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from pydicom.pixels import pack_bits
from pydicom.uid import RLELossless, generate_uid

from sdseg_cli.core.data.benchmarks import BTCV_ORGANS
from sdseg_cli.core.data.dicom import DicomSeries, find_series, read_series
from sdseg_cli.core.data.dicom_codes import (
    _is_snomed_ct,
    codes_of,
    coding_remarks,
    read_segment_codes,
    segment_code,
)
from sdseg_cli.core.data.dicom_seg import (
    LoneDicomSeg,
    _description,
    read_dicom_seg,
    require_highdicom,
    write_dicom_seg,
)
from sdseg_cli.core.data.geometry import VolumeGeometry
from sdseg_cli.core.data.pairs import pair_folders
from sdseg_cli.core.data.raw_cases import Geometry, RawCase, read_case, source_hashes
from sdseg_cli.core.data.slicing import SliceStack
from sdseg_cli.core.data.volumes import read_volume, write_label_volume
from sdseg_cli.core.engine.folder_evaluation import evaluate_folders
from sdseg_cli.core.engine.folder_evaluation import pair_folders as pair_folders_of_masks
from sdseg_cli.core.engine.prediction_plan import plan_predictions
from sdseg_cli.core.engine.scans import read_scan
from sdseg_cli.core.engine.volume_evaluation import read_volume_pair
from sdseg_cli.core.errors import DataError, UsageError
from sdseg_cli.core.files import sum_of_files
from tests.dicom_slices import ct_slice

COLUMNS, ROWS, SLICES = 9, 7, 5
DISTANCES = "expected more than 0 and less than 1,000,000 mm"


def stored(count: int = SLICES) -> np.ndarray:
    """Stored values (slices, rows, columns)."""
    return np.random.default_rng(3).integers(0, 2000, (count, ROWS, COLUMNS)).astype(np.int16)


def write_series(
    folder: Path,
    *,
    description: str = "",
    count: int = SLICES,
    uid: str | None = None,
    thick: float = 2.5,
    tilt_degrees: float = 0.0,
    oblique: bool = True,
    prefix: str = "IM",
    **extra: object,
) -> list[Path]:
    """A CT series whose files are numbered against the order of the slices."""
    folder.mkdir(parents=True, exist_ok=True)
    angle = 0.3 if oblique else 0.0
    across = np.array([np.cos(angle), np.sin(angle), 0.0])
    down = np.array([-np.sin(angle) * np.cos(angle), np.cos(angle) ** 2, np.sin(angle)])
    down /= np.linalg.norm(down)
    normal = np.cross(across, down)
    step = thick * (normal + np.tan(np.radians(tilt_degrees)) * down)
    series = {
        "StudyInstanceUID": generate_uid(),
        "SeriesInstanceUID": uid or generate_uid(),
        "FrameOfReferenceUID": generate_uid(),
        "SeriesDescription": description,
        "ImageOrientationPatient": [float(f"{v:.12g}") for v in (*across, *down)],
        "SliceThickness": 99.0,  # a lie on purpose
        "RescaleSlope": 30,  # 2000 * 30 overflows 16 bits
        "RescaleIntercept": -1024,
    }
    paths = []
    for k, values in enumerate(stored(count)):
        position = [float(f"{v:.9g}") for v in np.array([-50.5, -60.25, 10]) + k * step]
        data = ct_slice(values, position, **{"InstanceNumber": count - k, **series, **extra})
        path = folder / f"{prefix}{count - k:04d}.dcm"
        data.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths  # in the order of the slices


def only(folder: Path) -> DicomSeries:
    found = find_series(list(folder.iterdir()))
    assert found.strays == ()
    (series,) = found.series
    return series


def test_a_series_is_read_where_simpleitk_reads_it(tmp_path: Path) -> None:
    paths = write_series(tmp_path)
    volume = read_series(only(tmp_path))
    image = sitk.ReadImage([str(path) for path in paths])
    assert volume.voxels.shape == (COLUMNS, ROWS, SLICES)
    np.testing.assert_array_equal(volume.voxels, sitk.GetArrayFromImage(image).transpose(2, 1, 0))
    for index in ((0, 0, 0), (8, 6, 4), (2, 5, 3)):
        ours = (volume.geometry.affine @ [*index, 1])[:3] * [-1, -1, 1]
        np.testing.assert_allclose(ours, image.TransformIndexToPhysicalPoint(index), atol=1e-6)
    assert volume.geometry.spacing_mm == pytest.approx((0.6, 0.8, 2.5))
    assert volume.file_format == "dicom"


def test_rescaling_does_not_overflow(tmp_path: Path) -> None:
    write_series(tmp_path)
    volume = read_series(only(tmp_path))
    expected = stored().astype(float) * 30 - 1024
    np.testing.assert_array_equal(volume.voxels, expected.transpose(2, 1, 0))
    assert volume.voxels.max() > 32767


def test_run_length_coded_slices_are_read(tmp_path: Path) -> None:
    for path in write_series(tmp_path):
        data = pydicom.dcmread(path)
        data.compress(RLELossless)
        data.save_as(path)
    volume = read_series(only(tmp_path))
    np.testing.assert_array_equal(volume.voxels, stored().transpose(2, 1, 0).astype(float) * 30 - 1024)


@pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000"])
def test_jpeg_lossless_and_jpeg_2000_slices_are_read(tmp_path: Path, compressor: str) -> None:
    values = np.random.default_rng(0).integers(0, 1000, (1, 16, 12)).astype(np.uint16)
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(tmp_path / "a.dcm"))
    writer.UseCompressionOn()
    writer.SetCompressor(compressor)
    writer.Execute(sitk.GetImageFromArray(values))
    assert pydicom.dcmread(tmp_path / "a.dcm").file_meta.TransferSyntaxUID.is_compressed
    volume = read_series(only(tmp_path))
    np.testing.assert_array_equal(volume.voxels[:, :, 0], values[0].T)


@pytest.mark.faults(10)
def test_several_series_and_strays_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    write_series(tmp_path, description="Portal venous 3.0", prefix="A")
    write_series(tmp_path, description="Lung", prefix="B", count=3)
    write_series(tmp_path, description="lung", prefix="C", count=2)
    write_series(tmp_path, prefix="D", uid="1.2.3.4", count=2)
    (tmp_path / "readme.txt").write_text("hello")
    cut = write_series(tmp_path / "other", count=1)[0].read_bytes()[:300]
    (tmp_path / "cut.dcm").write_bytes(cut)
    (tmp_path / "empty.dcm").write_bytes(b"")
    found = find_series([path for path in tmp_path.iterdir() if path.is_file()])
    names = sorted(series.name for series in found.series)
    assert names[0] == "1.2.3.4"
    assert names[1].startswith("Lung_")
    assert names[2] == "Portal_venous_3.0"
    assert names[3].startswith("lung_")
    assert {path.name for path, _ in found.strays} == {"readme.txt", "cut.dcm", "empty.dcm"}
    assert sorted(len(series.files) for series in found.series) == [2, 2, 3, SLICES]
    assert find_series([tmp_path / "readme.txt"]).strays == ()


@pytest.mark.faults(11)
def test_a_missing_slice_is_refused_with_its_place(tmp_path: Path) -> None:
    write_series(tmp_path, oblique=False)[2].unlink()
    with pytest.raises(DataError, match=r"missing between 12\.50 and 17\.50 mm.*2\.50 mm apart"):
        read_series(only(tmp_path))


@pytest.mark.faults(11)
def test_a_doubled_slice_is_refused_with_its_place(tmp_path: Path) -> None:
    paths = write_series(tmp_path, oblique=False)
    (tmp_path / "copy.dcm").write_bytes(paths[1].read_bytes())
    with pytest.raises(DataError, match=r"1 slices are doubled, the first at 12\.50 mm"):
        read_series(only(tmp_path))


@pytest.mark.faults(11)
def test_uneven_slices_are_refused_and_rounded_ones_noted(tmp_path: Path) -> None:
    paths = write_series(tmp_path, oblique=False)
    data = pydicom.dcmread(paths[2])
    data.ImagePositionPatient[2] += 0.1
    data.save_as(paths[2])
    assert "0.100 mm off" in read_series(only(tmp_path)).notes[0]
    data.ImagePositionPatient[2] += 0.5
    data.save_as(paths[2])
    with pytest.raises(DataError, match="unevenly spaced"):
        read_series(only(tmp_path))


@pytest.mark.faults
def test_a_tilted_gantry_keeps_the_place_of_every_slice_with_a_note(tmp_path: Path) -> None:
    paths = write_series(tmp_path, tilt_degrees=15)
    volume = read_series(only(tmp_path))
    assert "gantry tilt of 15.00 degrees" in volume.notes[0]
    for k, path in enumerate(paths):
        place = (volume.geometry.affine @ [0, 0, k, 1])[:3] * [-1, -1, 1]
        np.testing.assert_allclose(place, pydicom.dcmread(path).ImagePositionPatient, atol=1e-5)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"NumberOfFrames": 4}, "4 frames; expected one slice a file"),
        ({"SamplesPerPixel": 3}, "is in colour"),
        ({"ImagePositionPatient": None}, "without ImagePositionPatient"),
    ],
)
def test_what_is_no_stack_of_grey_slices_is_refused_with_a_hint(
    tmp_path: Path, change: dict, message: str
) -> None:
    write_series(tmp_path, **change)
    with pytest.raises(DataError, match=message):
        read_series(only(tmp_path))


@pytest.mark.faults(10)
def test_a_slice_with_cut_pixels_is_refused_by_name(tmp_path: Path) -> None:
    path = write_series(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=rf"{path.name}: cannot be read as DICOM"):
        read_series(only(tmp_path))


@pytest.mark.faults
@pytest.mark.parametrize("name", ["ImagesInAcquisition", "NumberOfSlices"])
def test_slices_that_are_missing_at_an_end_are_told_where_the_header_counts_them(
    tmp_path: Path, name: str
) -> None:
    paths = write_series(tmp_path, **{name: SLICES})
    assert not [note for note in read_series(only(tmp_path)).notes if "missing" in note]
    paths[-1].unlink()
    (note,) = [note for note in read_series(only(tmp_path)).notes if "missing" in note]
    assert note == f"warning: the first or last slices may be missing [{name} is 5, 4 are here]"


def test_a_single_slice_works(tmp_path: Path) -> None:
    write_series(tmp_path, count=1, SliceThickness=4.0)
    volume = read_series(only(tmp_path))
    assert volume.geometry.shape == (COLUMNS, ROWS, 1)
    assert volume.geometry.spacing_mm == pytest.approx((0.6, 0.8, 4.0))


@pytest.mark.parametrize("is_empty", [False, True])
def test_a_dicom_seg_refers_to_its_slices_and_holds_each_class(tmp_path: Path, is_empty: bool) -> None:
    highdicom = pytest.importorskip("highdicom")
    paths = write_series(tmp_path / "scan")
    series = only(tmp_path / "scan")
    labels = np.zeros((COLUMNS, ROWS, SLICES), np.uint8)
    if not is_empty:
        labels[1:4, 2:5, 1:3] = 1
        labels[5, 6, 4] = 2
    write_dicom_seg(tmp_path / "seg.dcm", labels, series, codes_of(("background", "liver", "tumour"), {}))
    seg = highdicom.seg.segread(tmp_path / "seg.dcm")
    uids = [pydicom.dcmread(path).SOPInstanceUID for path in paths]
    frames = seg.get_pixels_by_source_instance(
        uids, combine_segments=True, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(frames.transpose(2, 1, 0), labels)
    assert [item.SegmentLabel for item in seg.SegmentSequence] == ["liver", "tumour"]
    np.testing.assert_array_equal(read_dicom_seg(tmp_path / "seg.dcm", series), labels)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def written_segments(folder: Path, classes: tuple[str, ...], codes: str = "") -> list[pydicom.Dataset]:
    """The segments of a DICOM-SEG of these classes, as pydicom alone reads them."""
    pytest.importorskip("highdicom")
    write_series(folder / "scan")
    labels = np.zeros((COLUMNS, ROWS, SLICES), np.uint8)
    labels[1:4, 2:5, 1:3] = 1
    (folder / "codes.yaml").write_text(codes)
    stated = read_segment_codes(folder / "codes.yaml") if codes else {}
    write_dicom_seg(folder / "seg.dcm", labels, only(folder / "scan"), codes_of(classes, stated))
    return list(pydicom.dcmread(folder / "seg.dcm").SegmentSequence)


def told(sequence: pydicom.Sequence) -> tuple[str, str, str]:
    (item,) = sequence
    return item.CodingSchemeDesignator, item.CodeValue, item.CodeMeaning


def test_segments_carry_the_codes_of_what_they_are_and_of_their_side(tmp_path: Path) -> None:
    segments = written_segments(tmp_path, ("background", "Left_Kidney", "polyp", "cup"))
    types = [item.SegmentedPropertyTypeCodeSequence for item in segments]
    # The numbers are SNOMED CT's; PS3.16 lists them but for the polyp, which it knows in the colon alone.
    assert [told(item)[:2] for item in types] == [("SCT", n) for n in ("64033007", "41329004", "85756007")]
    assert told(types[1]) == ("SCT", "41329004", "Polyp")
    assert told(types[0][0].SegmentedPropertyTypeModifierCodeSequence)[2] == "Left"
    assert "SegmentedPropertyTypeModifierCodeSequence" not in types[1][0]
    categories = [told(item.SegmentedPropertyCategoryCodeSequence)[1] for item in segments]
    assert categories == ["91723000", "49755003", "85756007"]
    assert not any("AnatomicRegionSequence" in item for item in segments)


def test_users_say_how_their_classes_are_coded(tmp_path: Path) -> None:
    codes = """
polyp: SCT:68496003:Polyp of colon   # a code alone is the type; the category is that of the name
stone:
  type: "99CLINIC:K-7:Stone: large"
  category: SCT:49755003:Morphologically Abnormal Structure
  side: right
  region: SCT:64033007:Kidney
"""
    segments = written_segments(tmp_path, ("background", "polyp", "stone", "liver"), codes)
    types = [item.SegmentedPropertyTypeCodeSequence for item in segments]
    assert told(types[0]) == ("SCT", "68496003", "Polyp of colon")
    assert told(types[1]) == ("99CLINIC", "K-7", "Stone: large")
    assert told(types[2])[1] == "10200004"  # not stated: by its name
    categories = [told(item.SegmentedPropertyCategoryCodeSequence)[1] for item in segments]
    assert categories == ["49755003", "49755003", "91723000"]
    assert told(types[1][0].SegmentedPropertyTypeModifierCodeSequence)[2] == "Right"
    assert told(segments[1].AnatomicRegionSequence) == ("SCT", "64033007", "Kidney")
    assert "AnatomicRegionSequence" not in segments[0]
    (remark,) = coding_remarks(
        codes_of(("background", "stone"), {"stone": read_segment_codes(tmp_path / "codes.yaml")["stone"]})
    )
    assert (
        remark
        == "segments are coded so: stone is Stone: large, right (99CLINIC K-7) in Kidney (SCT 64033007)"
    )


@pytest.mark.faults
@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ("", "expected a class a line"),
        ("- polyp", "expected a class a line"),
        ("polyp: 41329004", "line 1: polyp: found 41329004, expected SCHEME:CODE:MEANING"),
        ("polyp: SCT:41329004", "expected SCHEME:CODE:MEANING"),
        ("polyp: SCT:41329005:Polyp", "41329005 is no code of SNOMED CT: its last digit"),
        (f"polyp: DCM:1:{'x' * 65}", "no meaning of DICOM: expected at most 64 characters"),
        ("polyp: DCM:12345678901234567:x", "no code of DICOM: expected at most 16"),
        ("liver:\n  side: left", "liver: there is no type"),
        ("liver:\n  type: SCT:10200004:Liver\n  sort: x", "liver: found sort; expected type"),
        ("liver:\n  type: SCT:10200004:Liver\n  side: up", "side: found 'up', expected left or right"),
        ("a: b\nstone: SCT:56381008:Calculus", "line 2: stone: the name is not known, so its category"),
        ("polyp: *all", "line 1"),
    ],
)
def test_codes_that_are_none_are_told_with_their_lines(codes: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "codes.yaml").write_text(codes)
    with pytest.raises(UsageError) as told_of:
        read_segment_codes(tmp_path / "codes.yaml")
    assert str(tmp_path / "codes.yaml") in str(told_of.value)
    assert message in str(told_of.value)


def test_a_class_that_the_model_does_not_have_cannot_be_coded(tmp_path: Path) -> None:
    (tmp_path / "codes.yaml").write_text("polyp: SCT:41329004:Polyp\nliver: SCT:10200004:Liver\n")
    stated = read_segment_codes(tmp_path / "codes.yaml")
    told = "liver: the model has no class of this name, expected polyp; mend it or leave it out"
    with pytest.raises(UsageError, match=told):
        codes_of(("background", "polyp"), stated)
    with pytest.raises(UsageError, match=r"--segment-codes: polyp: .*expected cup.*; liver: .*expected cup"):
        codes_of(("background", "cup"), stated)
    with pytest.raises(UsageError, match=rf"codes\.yaml: line 2: {told}\."):
        read_segment_codes(tmp_path / "codes.yaml", ("background", "polyp"))
    with pytest.raises(UsageError, match="cannot be read"):
        read_segment_codes(tmp_path / "absent.yaml")


def test_the_check_digit_holds_for_every_code_of_the_standard_and_for_no_mistyped_one() -> None:
    from pydicom.sr.codedict import codes

    values = {
        code.value
        for cid in (7151, 6201, 7159)
        for name in getattr(codes, f"cid{cid}").dir()
        if (code := getattr(getattr(codes, f"cid{cid}"), name)).scheme_designator == "SCT"
    }
    assert len(values) > 500
    assert [value for value in values if not _is_snomed_ct(value)] == []
    for value in ("41329004", "10200004", "64033007"):
        mistyped = [f"{value[:i]}{(int(value[i]) + 1) % 10}{value[i + 1 :]}" for i in range(len(value))]
        swapped = [value[:i] + value[i + 1] + value[i] + value[i + 2 :] for i in range(len(value) - 1)]
        assert not any(_is_snomed_ct(wrong) for wrong in {*mistyped, *swapped} - {value})


def test_every_organ_of_the_benchmark_has_a_code_and_what_has_none_is_told() -> None:
    found = {name: segment_code(name) for name in BTCV_ORGANS}
    assert all(code.is_known for code in found.values())
    assert len({str(code) for code in found.values()}) == 13
    assert found["right adrenal gland"].property_type.value == "23451007"
    assert str(found["right adrenal gland"]) == "Adrenal gland, right (SCT 23451007)"
    assert not segment_code("left right kidney").is_known
    assert segment_code("left cup").side is None
    known, unknown = coding_remarks(codes_of(("background", "liver", "cup", "thing"), {}))
    assert "liver is Liver (SCT 10200004)" in known
    assert "no code is known for cup, thing" in unknown


@pytest.mark.faults
def test_a_dicom_seg_of_other_slices_is_not_read(tmp_path: Path) -> None:
    pytest.importorskip("highdicom")
    write_series(tmp_path / "scan")
    with pytest.raises(DataError, match="cannot be read as a DICOM-SEG"):
        read_dicom_seg(tmp_path / "scan" / "absent.dcm", only(tmp_path / "scan"))


@pytest.mark.faults
def test_what_a_library_says_of_a_dicom_seg_is_told_without_the_values_it_quotes(
    tmp_path, monkeypatch
) -> None:
    highdicom = pytest.importorskip("highdicom")
    write_series(tmp_path / "scan")

    def damaged(path: Path) -> None:
        raise ValueError("could not read 'Doe^Jane' as a date")

    monkeypatch.setattr(highdicom.seg, "segread", damaged)
    with pytest.raises(DataError, match=r"could not read '\.\.\.' as a date") as told:
        read_dicom_seg(tmp_path / "seg.dcm", only(tmp_path / "scan"))
    assert "Doe" not in str(told.value)


def test_without_highdicom_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'sdseg\[dicom\]'"):
        require_highdicom()


# Headers that cannot be used


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ImageOrientationPatient", None, "headers cannot be used"),
        ("PixelSpacing", [0, 0], f"PixelSpacing is 0 x 0 mm; {DISTANCES}"),
        ("PixelSpacing", [2e6, 1], rf"PixelSpacing is 2e\+06 x 1 mm; {DISTANCES}"),
        ("SliceThickness", 3e6, rf"SpacingBetweenSlices or SliceThickness is 3e\+06 mm; {DISTANCES}"),
        ("ImagePositionPatient", [1.0, 2.0], "headers cannot be used"),
    ],
)
def test_a_series_whose_headers_cannot_be_used_is_refused_by_name(name, value, message, tmp_path):
    write_series(tmp_path, description="liver", **{name: value})
    with pytest.raises(DataError, match=f"series 'liver': .*{message}"):
        read_series(only(tmp_path))


@pytest.mark.faults(10)
def test_a_damaged_value_makes_a_stray_and_not_the_end_of_the_search(tmp_path):
    paths = write_series(tmp_path)
    data = paths[0].read_bytes()
    rows = data.index(bytes([0x28, 0x00, 0x10, 0x00]) + b"US")
    paths[0].write_bytes(data[: rows + 6] + bytes([1, 0]) + data[rows + 8 : rows + 9] + data[rows + 10 :])
    found = find_series(list(tmp_path.iterdir()))
    assert [path.name for path, _ in found.strays] == [paths[0].name]
    assert [len(series.files) for series in found.series] == [SLICES - 1]


@pytest.mark.faults
def test_slices_too_far_apart_are_refused_with_the_range(tmp_path):
    write_series(tmp_path, thick=2e6)
    with pytest.raises(DataError, match=rf"the slices are 2e\+06 mm apart; {DISTANCES}"):
        read_series(only(tmp_path))


def test_without_a_stated_spacing_the_volume_says_that_millilitres_mean_nothing(tmp_path):
    write_series(tmp_path, PixelSpacing=None)
    volume = read_series(only(tmp_path))
    assert any("no PixelSpacing is stated" in note for note in volume.notes)


# Prepared


def label_volume(folder: Path) -> tuple[np.ndarray, Path]:
    """Labels of the only series of a folder, and the same series written as NIfTI by SimpleITK."""
    series = only(folder)
    labels = np.zeros((COLUMNS, ROWS, SLICES), np.uint8)
    labels[1:5, 2:6, 1:4] = 1
    labels[6:8, 2:4, 2:4] = 2
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    target = folder.parents[1] / f"{folder.name}.nii.gz"
    sitk.WriteImage(sitk.Cast(image, sitk.sitkFloat32), str(target))
    assert read_series(series).geometry.differences(read_volume(target).geometry) == []
    return labels, target


def slices_of(case, num_classes: int = 3) -> list:
    slices, _ = read_case(case, Geometry(num_classes=num_classes, window=(-1024, 40000)))
    return list(slices)


def test_series_are_prepared_with_labels_of_any_format_as_their_volumes_are(tmp_path: Path) -> None:
    pytest.importorskip("highdicom")
    images, masks = tmp_path / "images", tmp_path / "masks"
    masks.mkdir()
    write_series(images / "patient 1", description="CT 1.25")  # alone in its folder: named like it
    labels, nifti = label_volume(images / "patient 1")
    geometry = read_series(only(images / "patient 1")).geometry
    write_label_volume(masks / "patient 1.nii.gz", labels, geometry)
    write_series(images / "two", description="early 1.5")
    write_series(images / "two", description="late", prefix="L")
    early, late = find_series(list((images / "two").iterdir())).series
    (masks / "two").mkdir()
    codes = codes_of(("background", "liver", "tumour"), {})
    write_dicom_seg(masks / "two" / "early_1.5.dcm", labels, early, codes)
    write_label_volume(masks / "two" / "late.nrrd", labels, read_series(late).geometry)
    (images / "two" / "notes.txt").write_text("no slice")
    pairs = pair_folders(images, masks)
    assert [case.case_id for case in pairs.cases] == ["patient 1", "two__early_1.5", "two__late"]
    assert all(case.is_volume for case in pairs.cases)
    assert [(one.case_id, one.reason) for one in pairs.problems] == [
        ("two__notes.txt", "is not a DICOM file")
    ]
    expected = slices_of(RawCase("x", "x", nifti, masks / "patient 1.nii.gz"))
    assert max(one.label_map.max() for one in expected) == 2
    for case in pairs.cases:
        for found, wanted in zip(slices_of(case), expected, strict=True):
            np.testing.assert_array_equal(found.label_map, wanted.label_map)
            np.testing.assert_array_equal(found.image, wanted.image)
            assert found.spacing_mm == pytest.approx(wanted.spacing_mm)
    before = [source_hashes(case)[case.image_name] for case in pairs.cases]
    assert len({*before}) == 3
    data = pydicom.dcmread(late.files[0])
    data.PatientName = "Other"
    data.save_as(late.files[0])
    after = [source_hashes(case)[case.image_name] for case in pairs.cases]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, True, False]


def test_a_series_has_the_same_checksum_wherever_it_is_recorded(tmp_path: Path) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    masks.mkdir()
    paths = write_series(images / "a")
    labels, _ = label_volume(images / "a")
    write_label_volume(masks / "a.nii.gz", labels, read_series(only(images / "a")).geometry)
    (case,) = pair_folders(images, masks).cases
    (task,) = plan_predictions([images], tmp_path / "out", recursive=True)
    prepared = source_hashes(case)["images/a"]
    assert prepared == read_scan(task, None).sha256 == sum_of_files(paths)


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_a_series_named_like_the_folder_of_another_hides_none(names: tuple[str, str], tmp_path: Path) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    write_series(images, description=names[0])
    write_series(images / names[0], description=names[1])
    labels, _ = label_volume(images / names[0])
    geometry = read_series(only(images / names[0])).geometry
    (masks / names[0]).mkdir(parents=True)
    for path in (masks / f"{names[0]}.nii.gz", masks / names[0] / f"{names[1]}.nii.gz"):
        write_label_volume(path, labels, geometry)
    pairs = pair_folders(images, masks)
    assert pairs.problems == ()
    assert {case.case_id: case.series.folder for case in pairs.cases if case.series} == {
        names[0]: images,
        "__".join(names): images / names[0],
    }
    shutil.rmtree(masks / names[0])
    (problem,) = pair_folders(images, masks).problems
    assert problem.reason == f"image {'/'.join(names)} has no mask in {masks}"


@pytest.mark.faults
def test_labels_that_do_not_fit_a_series_are_told(tmp_path: Path) -> None:
    pytest.importorskip("highdicom")
    images, masks = tmp_path / "images", tmp_path / "masks"
    masks.mkdir()
    for name in "ab":
        write_series(images / name)
    labels, nifti = label_volume(images / "a")
    write_dicom_seg(masks / "a.dcm", labels, only(images / "a"), codes_of(("background", "x", "y"), {}))
    (case,) = pair_folders(images, masks).cases
    assert [one.reason for one in pair_folders(images, masks).problems] == [f"image b has no mask in {masks}"]
    with pytest.raises(DataError, match=r"a\.dcm: segment 2 found, expected 1 to 1"):
        slices_of(case, num_classes=2)
    with pytest.raises(DataError, match=r"a\.dcm is DICOM, its image a\.nii\.gz is none"):
        slices_of(RawCase("x", "x", nifti, masks / "a.dcm"))
    (masks / "a.dcm").rename(masks / "b.dcm")  # of other slices
    (case,) = pair_folders(images, masks).cases
    with pytest.raises(DataError, match=r"b\.dcm: refers to 5 slices that are not in series"):
        slices_of(case)


def rewritten(seg: Path, frames: np.ndarray, *, move: object = (0, 0, 0), flip: bool = False) -> Path:
    """The same DICOM-SEG with other frames (frames, rows, columns), moved or with columns counted back."""
    document = pydicom.dcmread(seg)
    (shared,) = document.SharedFunctionalGroupsSequence
    orientation = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    if flip:
        move = orientation[:3] * 0.6 * (COLUMNS - 1)
        orientation[:3] *= -1
        shared.PlaneOrientationSequence[0].ImageOrientationPatient = [float(f"{v:.12g}") for v in orientation]
    for frame in document.PerFrameFunctionalGroupsSequence:
        (position,) = frame.PlanePositionSequence
        moved = np.array(position.ImagePositionPatient, float) + move
        position.ImagePositionPatient = [float(f"{v:.9g}") for v in moved]
    document.Rows, document.Columns = frames.shape[1:]
    document.PixelData = pack_bits(np.ascontiguousarray(frames).ravel())
    document.save_as(seg.with_name("rewritten.dcm"))
    return seg.with_name("rewritten.dcm")


@pytest.mark.faults
@pytest.mark.parametrize("tilt_degrees", [0.0, 12.0])
def test_a_segmentation_is_prepared_where_it_says_it_lies(tilt_degrees: float, tmp_path: Path) -> None:
    pytest.importorskip("highdicom")
    folder = tmp_path / "images" / "a"
    write_series(folder, tilt_degrees=tilt_degrees)
    series, seg = only(folder), tmp_path / "a.dcm"
    labels = np.zeros((COLUMNS, ROWS, SLICES), np.uint8)
    labels[1:5, 2:5, [1, 2, 4]] = 1
    labels[6:8, 2:4, 2] = 2
    write_dicom_seg(seg, labels, series, codes_of(("background", "x", "y"), {}))
    case = RawCase("x", "x", folder, seg, series=series)
    stack = SliceStack(read_series(series).geometry, Geometry(3).axis)

    def check(path: Path) -> None:
        found = [one.label_map for one in slices_of(replace(case, label_path=path))]
        np.testing.assert_array_equal(found, stack.cut(labels))

    frames = pydicom.dcmread(seg).pixel_array
    check(seg)
    refused = {
        "moved": rewritten(seg, frames, move=(20, 20, 20)).rename(tmp_path / "moved.dcm"),
        "larger": rewritten(seg, np.pad(frames, ((0, 0), (0, 2), (0, 3)))).rename(tmp_path / "larger.dcm"),
    }
    flipped = rewritten(seg, frames[:, :, ::-1], flip=True).rename(tmp_path / "flipped.dcm")
    if tilt_degrees:  # it forms no block that could be turned
        refused["flipped"] = flipped
    else:
        check(flipped)
        check(rewritten(seg, frames[:, :6]))  # a smaller part of the slices
    for name, path in refused.items():
        with pytest.raises(DataError, match=rf"{name}\.dcm \(.*does not lie on series .*\(9 x 7 x 5 voxels"):
            slices_of(replace(case, label_path=path))


def test_a_segmentation_with_gaps_of_unstated_width_is_read_by_its_references(tmp_path: Path) -> None:
    pytest.importorskip("highdicom")
    write_series(tmp_path / "scan")
    series = only(tmp_path / "scan")
    labels = np.zeros((COLUMNS, ROWS, SLICES), np.uint8)
    labels[1:5, 2:5, [0, 3]] = 1
    write_dicom_seg(tmp_path / "a.dcm", labels, series, codes_of(("background", "x"), {}))
    document = pydicom.dcmread(tmp_path / "a.dcm")
    del document.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices
    document.save_as(tmp_path / "a.dcm")
    np.testing.assert_array_equal(read_dicom_seg(tmp_path / "a.dcm", series), labels)


@pytest.mark.faults
def test_a_segment_number_beyond_a_byte_is_no_other_class(tmp_path: Path) -> None:
    highdicom = pytest.importorskip("highdicom")
    write_series(tmp_path / "scan")
    series, seg = only(tmp_path / "scan"), tmp_path / "a.dcm"
    code = codes_of(("background", "x"), {})["x"]
    labels = np.zeros((SLICES, ROWS, COLUMNS), np.uint16)
    labels[1:3, 2:4] = 257  # 1 in a byte
    description = _description(257, "x", code)
    highdicom.seg.Segmentation(
        source_images=[pydicom.dcmread(path) for path in series.files[::-1]],
        pixel_array=labels,
        segmentation_type=highdicom.seg.SegmentationTypeValues.LABELMAP,
        segment_descriptions=[description],
        series_instance_uid=highdicom.UID(),
        series_number=1,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="none",
        manufacturer_model_name="none",
        software_versions="1",
        device_serial_number="none",
    ).save_as(seg)
    with pytest.raises(DataError, match=r"a\.dcm: segment 257 found, expected 1 to 1"):
        slices_of(RawCase("x", "x", tmp_path / "scan", seg, series=series), num_classes=2)
    with pytest.raises(DataError, match=r"a\.dcm: segment 257 found, expected 1 to 1"):
        read_volume_pair("case", seg, seg, 2)


# Evaluated


@pytest.fixture
def segmented(tmp_path: Path) -> tuple[Path, np.ndarray, VolumeGeometry]:
    """A DICOM-SEG that lacks the empty slices, its labels, and where all slices of the scan lie."""
    pytest.importorskip("highdicom")
    write_series(tmp_path / "images" / "a")
    labels, _ = label_volume(tmp_path / "images" / "a")
    series = only(tmp_path / "images" / "a")
    write_dicom_seg(tmp_path / "a.dcm", labels, series, codes_of(("background", "x", "y"), {}))
    return tmp_path / "a.dcm", labels, read_series(series).geometry


def test_a_segmentation_is_scored_against_volumes_whatever_their_axes(segmented, tmp_path: Path) -> None:
    seg, labels, geometry = segmented
    alone = LoneDicomSeg.open(seg).volume()
    assert alone.geometry.shape == (COLUMNS, ROWS, 3)  # without the empty first and last slice
    stored = nibabel.Nifti1Image(labels, geometry.affine)
    for name, axes in (("same", "LPS"), ("other", "SAR"), ("turned", "PIL")):
        start = io_orientation(geometry.affine)
        turned = stored.as_reoriented(ornt_transform(start, axcodes2ornt(axes)))
        nibabel.save(turned, tmp_path / f"{name}.nii.gz")
        found = read_volume_pair("case", seg, tmp_path / f"{name}.nii.gz", 3)
        np.testing.assert_array_equal(found.prediction, turned.get_fdata())
        np.testing.assert_array_equal(found.ground_truth, turned.get_fdata())
        swapped = read_volume_pair("case", tmp_path / f"{name}.nii.gz", seg, 3)
        np.testing.assert_array_equal(swapped.ground_truth, turned.get_fdata())


def test_two_segmentations_are_scored_on_the_smallest_grid_that_holds_both(segmented, tmp_path) -> None:
    seg, labels, _ = segmented
    series = only(tmp_path / "images" / "a")
    other = np.zeros_like(labels)
    other[1:5, 2:6, 3:] = 1
    write_dicom_seg(tmp_path / "b.dcm", other, series, codes_of(("background", "x", "y"), {}))
    for first, second, expected in ((seg, tmp_path / "b.dcm", (labels, other)),
                                    (tmp_path / "b.dcm", seg, (other, labels))):  # fmt: skip
        found = read_volume_pair("case", first, second, 3)
        # Without the first slice, and from the other end, which is how highdicom counts.
        np.testing.assert_array_equal(found.prediction, expected[0][:, :, :0:-1])
        np.testing.assert_array_equal(found.ground_truth, expected[1][:, :, :0:-1])
    (tmp_path / "p").mkdir()
    (tmp_path / "t").mkdir()
    seg.rename(tmp_path / "p" / "case.dcm")
    (tmp_path / "b.dcm").rename(tmp_path / "t" / "case.dcm")
    (record,) = evaluate_folders(
        pair_folders_of_masks(tmp_path / "p", tmp_path / "t"), ("background", "x", "y")
    )
    shared = int(((labels == 1) & (other == 1)).sum())
    assert record.classes[0].dice == pytest.approx(2 * shared / ((labels == 1).sum() + (other == 1).sum()))


def changed(
    seg: Path,
    name: str,
    *,
    frame: bool = False,
    spacing: bool = True,
    series: bool = True,
    sources: bool = True,
    shared: bool = True,
) -> Path:
    """The same DICOM-SEG in another frame of reference, or without what it may lack.

    That is the distance between slices, the list of what it refers to, the references of its frames too, and
    measures that all frames share.
    """
    document = pydicom.dcmread(seg)
    (groups,) = document.SharedFunctionalGroupsSequence
    (measures,) = groups.PixelMeasuresSequence
    if frame:
        document.FrameOfReferenceUID = generate_uid()
    if not spacing:
        measures.SliceThickness = measures.SpacingBetweenSlices
        del measures.SpacingBetweenSlices
    if not shared:
        for own in document.PerFrameFunctionalGroupsSequence:
            own.PixelMeasuresSequence = groups.PixelMeasuresSequence
        del groups.PixelMeasuresSequence
    if not (series and sources):
        del document.ReferencedSeriesSequence
    if not sources:
        for groups in document.PerFrameFunctionalGroupsSequence:
            del groups.DerivationImageSequence
    document.save_as(seg.with_name(name))
    return seg.with_name(name)


@pytest.mark.faults
def test_places_in_two_frames_of_reference_are_compared_only_by_their_slices(segmented, tmp_path) -> None:
    seg, labels, _ = segmented
    read_volume_pair("case", seg, changed(seg, "known.dcm", frame=True), 3)
    unknown = changed(seg, "unknown.dcm", frame=True, sources=False)
    with pytest.raises(DataError, match=r"a\.dcm and .*unknown\.dcm differ in their FrameOfReferenceUID"):
        read_volume_pair("case", seg, unknown, 3)
    read_volume_pair("case", seg, changed(seg, "same.dcm", sources=False), 3)
    series = only(tmp_path / "images" / "a")
    np.testing.assert_array_equal(read_dicom_seg(tmp_path / "known.dcm", series), labels)
    np.testing.assert_array_equal(read_dicom_seg(tmp_path / "same.dcm", series), labels)
    with pytest.raises(DataError, match=r"unknown\.dcm: refers to no slices, and its FrameOfReference"):
        read_dicom_seg(unknown, series)
    by_frames = changed(seg, "by frames.dcm", frame=True, series=False)
    np.testing.assert_array_equal(read_dicom_seg(by_frames, series), labels)
    read_volume_pair("case", seg, by_frames, 3)


def test_a_segmentation_whose_frames_each_state_their_measures_is_scored(segmented, tmp_path) -> None:
    seg, labels, geometry = segmented
    write_label_volume(tmp_path / "truth.nii.gz", labels, geometry)
    found = read_volume_pair("case", changed(seg, "own.dcm", shared=False), tmp_path / "truth.nii.gz", 3)
    np.testing.assert_array_equal(found.prediction, found.ground_truth)


@pytest.mark.parametrize("marked", [(0, 3), (0, 2, 3), (0, 2, 4), (1,)])
def test_a_segmentation_with_gaps_of_unstated_width_is_scored_on_the_grid_of_the_other(
    marked: tuple[int, ...], segmented, tmp_path: Path
) -> None:
    _, whole, geometry = segmented
    labels = np.zeros_like(whole)
    labels[1:5, 2:6, list(marked)] = 1
    seg, full = tmp_path / "gaps.dcm", tmp_path / "full.dcm"
    series = only(tmp_path / "images" / "a")
    for path, values in ((seg, labels), (full, np.ones_like(whole))):
        write_dicom_seg(path, values, series, codes_of(("background", "x", "y"), {}))
    gaps = changed(seg, "unstated.dcm", spacing=False)
    assert LoneDicomSeg.open(gaps).lacks_spacing
    write_label_volume(tmp_path / "truth.nii.gz", labels, geometry)
    found = read_volume_pair("case", gaps, tmp_path / "truth.nii.gz", 3)
    np.testing.assert_array_equal(found.prediction, labels)
    for stated in (full, changed(full, "both unstated.dcm", spacing=False)):
        for swap in (False, True):
            pair = (stated, gaps) if swap else (gaps, stated)
            found = read_volume_pair("case", *pair, 3)
            one = found.ground_truth if swap else found.prediction
            np.testing.assert_array_equal(one, labels[:, :, ::-1])  # which is how highdicom counts


@pytest.mark.faults
@pytest.mark.parametrize("factor", [1.7, 0.5, 0.25])
def test_a_segmentation_of_other_slices_keeps_its_own_distance_between_them(
    factor: float, segmented, tmp_path: Path
) -> None:
    seg, whole, geometry = segmented
    affine = geometry.affine @ np.diag([1, 1, factor, 1])
    other = np.repeat(whole, max(1, round(1 / factor)), axis=2)
    write_label_volume(tmp_path / "other.nii.gz", other, VolumeGeometry(other.shape, affine))
    unstated = changed(seg, "unstated.dcm", spacing=False)
    with pytest.raises(DataError, match="do not lie voxel on voxel"):
        read_volume_pair("case", unstated, tmp_path / "other.nii.gz", 3)
    assert read_volume_pair("case", unstated, tmp_path / "other.nii.gz", 3, resample=True).prediction.any()


def test_a_block_of_a_grid_lies_on_it_along_every_axis() -> None:
    grid = VolumeGeometry((20, 20, 20), np.eye(4))
    half, axis = np.radians(20) / 2, np.ones(3) / np.sqrt(3)
    about_diagonal = sitk.VersorTransform((*(np.sin(half) * axis), np.cos(half)))  # leaves two corners
    turned, sheared = np.eye(4), np.eye(4)
    turned[:3, :3] = np.reshape(about_diagonal.GetMatrix(), (3, 3))
    sheared[0, 1:3] = 0.3, -0.3
    for affine in (turned, sheared):
        assert VolumeGeometry((10, 10, 10), affine).inside(grid) is None
    block = VolumeGeometry((10, 10, 10), np.diag([1.0, 1.002, 1.0, 1.0])).inside(grid)
    assert block is not None
    assert block.fits(grid.shape)


@pytest.mark.faults
def test_segmentations_far_apart_are_not_scored_on_a_grid_of_all_between(
    segmented, tmp_path, monkeypatch
) -> None:
    seg, _, geometry = segmented
    monkeypatch.setattr("sdseg_cli.core.engine.volume_evaluation.MAX_VOXELS", 20_000)
    document = pydicom.dcmread(seg)
    step = geometry.affine[:3, 2] * [-1, -1, 1] * 1000
    for frame in document.PerFrameFunctionalGroupsSequence:
        (position,) = frame.PlanePositionSequence
        moved = np.array(position.ImagePositionPatient, float) + step
        position.ImagePositionPatient = [float(f"{v:.10g}") for v in moved]
    document.save_as(tmp_path / "far.dcm")
    with pytest.raises(DataError, match="do not lie voxel on voxel"):
        read_volume_pair("case", seg, tmp_path / "far.dcm", 3)


@pytest.mark.faults
@pytest.mark.parametrize("moved", ["between", "beyond"])
def test_a_segmentation_that_lies_elsewhere_is_not_scored(moved, segmented, tmp_path: Path) -> None:
    seg, labels, geometry = segmented
    affine = geometry.affine.copy()
    if moved == "between":
        affine[:3, 3] += 0.5 * affine[:3, 0]
        truth = labels
    else:
        truth = labels[:, :, :3]  # a scan that ends before the segmentation does
    write_label_volume(tmp_path / "t.nii.gz", truth, VolumeGeometry(truth.shape, affine))
    with pytest.raises(DataError, match="do not lie voxel on voxel"):
        read_volume_pair("case", seg, tmp_path / "t.nii.gz", 3)
    with pytest.raises(DataError, match=r"a\.dcm: segment 2 found, expected 1 to 1"):
        read_volume_pair("case", seg, seg, 2)
    document = pydicom.dcmread(seg)
    frames = document.PerFrameFunctionalGroupsSequence
    position = frames[-1].PlanePositionSequence[0]
    position.ImagePositionPatient = [float(v) + 3.7 for v in position.ImagePositionPatient]
    document.save_as(tmp_path / "bent.dcm")
    with pytest.raises(DataError, match=r"bent\.dcm: cannot be read as a DICOM-SEG \(its slices"):
        read_volume_pair("case", tmp_path / "bent.dcm", tmp_path / "t.nii.gz", 3)
    (tmp_path / "b.dcm").write_bytes(seg.read_bytes()[:700])
    with pytest.raises(DataError, match=r"b\.dcm: cannot be read as a DICOM-SEG"):
        read_volume_pair("case", tmp_path / "b.dcm", tmp_path / "t.nii.gz", 3)
