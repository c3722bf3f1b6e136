"""DICOM series made on the spot: found, told apart, checked, read where SimpleITK reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless, generate_uid

from sdseg_cli.core.data.benchmarks import BTCV_ORGANS
from sdseg_cli.core.data.dicom import DicomSeries, find_series, read_series
from sdseg_cli.core.data.dicom_codes import coding_remarks, segment_code
from sdseg_cli.core.data.dicom_seg import read_dicom_seg, require_highdicom, write_dicom_seg
from sdseg_cli.core.errors import DataError, UsageError

COLUMNS, ROWS, SLICES = 9, 7, 5


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
    uid = uid or generate_uid()
    study, frame = generate_uid(), generate_uid()
    angle = 0.3 if oblique else 0.0
    across = np.array([np.cos(angle), np.sin(angle), 0.0])
    down = np.array([-np.sin(angle) * np.cos(angle), np.cos(angle) ** 2, np.sin(angle)])
    down /= np.linalg.norm(down)
    normal = np.cross(across, down)
    step = thick * (normal + np.tan(np.radians(tilt_degrees)) * down)
    paths = []
    for k in range(count):
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
        data.PatientName, data.PatientID, data.PatientBirthDate, data.PatientSex = "Test^A", "7", "", ""
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, uid, frame
        data.StudyID, data.StudyDate, data.StudyTime, data.AccessionNumber = "1", "20200101", "120000", ""
        data.ReferringPhysicianName, data.SeriesNumber, data.InstanceNumber = "", 1, count - k
        data.Modality, data.SeriesDescription, data.PositionReferenceIndicator = "CT", description, ""
        data.Manufacturer, data.Laterality, data.PatientPosition = "none", "", "HFS"
        data.ImagePositionPatient = [float(f"{v:.9g}") for v in np.array([-50.5, -60.25, 10]) + k * step]
        data.ImageOrientationPatient = [float(f"{v:.12g}") for v in (*across, *down)]
        data.PixelSpacing, data.SliceThickness = [0.8, 0.6], 99.0  # the thickness is a lie on purpose
        data.Rows, data.Columns, data.SamplesPerPixel = ROWS, COLUMNS, 1
        data.PhotometricInterpretation, data.PixelRepresentation = "MONOCHROME2", 1
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.RescaleSlope, data.RescaleIntercept = 30, -1024  # 2000 * 30 overflows 16 bits
        data.PixelData = stored(count)[k].tobytes()
        for name, value in extra.items():
            setattr(data, name, value)
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
    write_dicom_seg(tmp_path / "seg.dcm", labels, series, ("background", "liver", "tumour"))
    seg = highdicom.seg.segread(tmp_path / "seg.dcm")
    uids = [pydicom.dcmread(path).SOPInstanceUID for path in paths]
    frames = seg.get_pixels_by_source_instance(
        uids, combine_segments=True, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(frames.transpose(2, 1, 0), labels)
    assert [item.SegmentLabel for item in seg.SegmentSequence] == ["liver", "tumour"]
    np.testing.assert_array_equal(read_dicom_seg(tmp_path / "seg.dcm", series), labels)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_segments_carry_the_codes_of_what_they_are_and_of_their_side(tmp_path: Path) -> None:
    highdicom = pytest.importorskip("highdicom")
    write_series(tmp_path / "scan")
    labels = np.zeros((COLUMNS, ROWS, SLICES), np.uint8)
    labels[1:4, 2:5, 1:3] = 1
    classes = ("background", "Left_Kidney", "polyp", "cup")
    write_dicom_seg(tmp_path / "seg.dcm", labels, only(tmp_path / "scan"), classes)
    segments = highdicom.seg.segread(tmp_path / "seg.dcm").SegmentSequence
    types = [item.SegmentedPropertyTypeCodeSequence[0] for item in segments]
    # The numbers are SNOMED CT's, as PS3.16 lists them.
    assert [item.CodeValue for item in types] == ["64033007", "68496003", "85756007"]
    assert {item.CodingSchemeDesignator for item in types} == {"SCT"}
    assert types[0].SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    assert "SegmentedPropertyTypeModifierCodeSequence" not in types[1]
    categories = [item.SegmentedPropertyCategoryCodeSequence[0].CodeValue for item in segments]
    assert categories == ["91723000", "49755003", "85756007"]


def test_every_organ_of_the_benchmark_has_a_code_and_what_has_none_is_told() -> None:
    found = {name: segment_code(name) for name in BTCV_ORGANS}
    assert all(code.is_known for code in found.values())
    assert len({str(code) for code in found.values()}) == 13
    assert found["right adrenal gland"].property_type.value == "23451007"
    assert str(found["right adrenal gland"]) == "Adrenal gland, right (SCT 23451007)"
    assert not segment_code("left right kidney").is_known
    assert segment_code("left cup").side is None
    known, unknown = coding_remarks(("background", "liver", "cup", "thing"))
    assert "liver is Liver (SCT 10200004)" in known
    assert "no SNOMED CT code is known for cup, thing" in unknown


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
        ("PixelSpacing", [0, 0], "PixelSpacing is 0 x 0 mm; expected more than 0"),
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


def test_without_a_stated_spacing_the_volume_says_that_millilitres_mean_nothing(tmp_path):
    write_series(tmp_path, PixelSpacing=None)
    volume = read_series(only(tmp_path))
    assert any("no PixelSpacing is stated" in note for note in volume.notes)
