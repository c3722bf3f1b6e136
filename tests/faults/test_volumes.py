"""Rows 1 to 4 and 9 to 12: volumes and DICOM series in every state, through ``sdseg predict``."""

from __future__ import annotations

import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import generate_uid

from tests.dicom_slices import ct_slice

SHAPE = (24, 20, 6)
WINDOW = ("--window", "0,1000")


def voxels() -> np.ndarray:
    """A bright block in noise that does not compress, int16 (24, 20, 6)."""
    values = np.random.default_rng(0).integers(0, 300, SHAPE).astype(np.int16)
    values[4:14, 4:12, 1:5] += 650
    return values


def oblique(shear: float = 0.0) -> np.ndarray:
    """An affine of 0.7 x 0.8 x 3.1 mm, turned about two axes."""
    a, b = 0.3, -0.2
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn = turn @ np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.array([[1, shear, 0], [0, 1, 0], [0, 0, 1]]) @ np.diag([0.7, 0.8, 3.1])
    affine[:3, 3] = 12.345678, -234.567891, 98.765432
    return affine


def save(path: Path, values: np.ndarray | None = None, *, compress: bool = True) -> Path:
    values = voxels() if values is None else values
    if ".nii" in path.name:
        nibabel.save(nibabel.Nifti1Image(values, oblique()), path)
        return path
    image = sitk.GetImageFromArray(values.T)
    affine, spacing = oblique(), np.array([0.7, 0.8, 3.1])
    image.SetOrigin((affine[:3, 3] * [-1, -1, 1]).tolist())
    image.SetSpacing(spacing.tolist())
    image.SetDirection((np.array([[-1], [-1], [1]]) * affine[:3, :3] / spacing).ravel().tolist())
    sitk.WriteImage(image, str(path), compress)
    return path


def found(path: Path) -> np.ndarray:
    """A mask in nibabel's axis order."""
    if ".nii" in path.name:
        return np.asarray(nibabel.load(path).dataobj)
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T


# ---- damage


@pytest.mark.faults(1)
@pytest.mark.parametrize("suffix", ["nii", "nii.gz", "nrrd", "mha"])
def test_cut_and_bit_flipped_volumes_fail_by_name_and_the_others_go_on(
    suffix, predict, scans, outcomes, written
):
    content = save(scans / f"good.{suffix}").read_bytes()
    (scans / f"cut.{suffix}").write_bytes(content[: int(len(content) * 0.6)])
    (scans / f"header.{suffix}").write_bytes(content[:40])
    flipped = bytearray(content)
    # In compressed voxels every bit counts; of plain ones only the header's (here the size) can be told.
    flipped[42 if suffix == "nii" else len(content) // 2] ^= 0x40
    (scans / f"flipped.{suffix}").write_bytes(flipped)
    ended = predict(*WINDOW)
    assert ended.code == 3
    for name in ("cut", "header", "flipped"):
        assert ended.says(f"warning: {name}.{suffix}: ")
        status, error = outcomes()[f"{name}.{suffix}"]
        assert status == "failed"
        assert "fetch it again" in error.lower(), error
    assert ended.says("1 of 4 volumes done", "3 failed")
    assert written() == {f"good.{suffix}"}


@pytest.mark.faults(1)
def test_what_is_mended_in_a_header_is_told_as_a_warning_of_that_file(predict, scans, outcomes):
    content = bytearray(save(scans / "a.nii").read_bytes())
    content[0] ^= 0x10  # the header's own length
    (scans / "a.nii").write_bytes(content)
    ended = predict(*WINDOW)
    assert ended.code == 0
    assert ended.says("1 x warning: damage in the header: sizeof_hdr should be 348", "(a.nii)")
    assert ended.err.count("sizeof_hdr should be 348") == 1


@pytest.mark.faults(2)
def test_names_that_lie_about_gzip_are_explained_with_the_right_name(predict, scans, outcomes, written):
    plain = save(scans / "good.nii").read_bytes()
    (scans / "raw.nii.gz").write_bytes(plain)
    (scans / "packed.nii").write_bytes(gzip.compress(plain))
    (scans / "packed.mha").write_bytes(gzip.compress(plain))
    ended = predict(*WINDOW)
    assert ended.code == 3
    assert ended.says(
        "raw.nii.gz: the name says .nii.gz, but the content is not gzip. Rename it to *.nii.",
        "packed.nii: the name says .nii, but the content is gzip. Rename it to *.nii.gz.",
        "packed.mha: the name says .mha, but the content is gzip. Rename or unpack it.",
    )
    assert written() == {"good.nii"}


@pytest.mark.faults(3)
@pytest.mark.parametrize("suffix", ["nii.gz", "nrrd", "mha"])
def test_voxels_that_are_not_finite_are_counted_and_filled_on_request_only(
    suffix, predict, scans, outcomes, written, masks
):
    values = voxels().astype(np.float32)
    values[5, 5, 2:4] = np.nan
    values[0, 0, 0] = -np.inf
    save(scans / f"bad.{suffix}", values)
    save(scans / f"good.{suffix}")
    ended = predict(*WINDOW)
    assert ended.code == 3
    assert ended.says(
        f"bad.{suffix}: 3 of 2880 voxels are NaN or infinite", "--nan-fill which value they get"
    )
    assert outcomes()[f"bad.{suffix}"][0] == "failed"
    assert written() == {f"good.{suffix}"}
    ended = predict(*WINDOW, "--nan-fill", 900, "--overwrite")
    assert ended.code == 0
    assert ended.says("1 x 3 voxels that are NaN or infinite were set to 900")
    mask = found(masks / f"bad.{suffix}")
    assert mask[5, 5, 2] == 1
    assert np.array_equal(mask, found(masks / f"good.{suffix}")) == (mask[0, 0, 0] == 0)


@pytest.mark.faults(4)
def test_headers_that_claim_terabytes_are_refused_before_anything_is_allocated(
    predict, scans, outcomes, written, monkeypatch
):
    monkeypatch.setattr(sitk.ImageFileReader, "Execute", lambda _: pytest.fail("the voxels were read"))
    few = bytes(200)
    header = nibabel.Nifti1Header()
    header.set_data_shape((30000, 30000, 1500))
    header.set_data_dtype(np.float64)
    header["magic"], header["vox_offset"] = b"n+1", 352
    (scans / "a.nii").write_bytes(header.binaryblock + few)
    (scans / "b.nii.gz").write_bytes(gzip.compress(header.binaryblock + few))
    mha = "ObjectType = Image\nNDims = 3\nDimSize = {}\nElementType = MET_DOUBLE\nElementDataFile = LOCAL\n"
    nrrd = "NRRD0004\ntype: double\ndimension: 3\nsizes: {}\nencoding: {}\nendian: little\n\n"
    huge, large = "30000 30000 1500", "1000 1000 2000"  # 11 TB, and 16 GB that a machine may have
    for name, sizes in (("huge", huge), ("large", large)):
        (scans / f"{name}.mha").write_bytes(mha.format(sizes).encode() + few)
        (scans / f"{name}.nrrd").write_bytes(nrrd.format(sizes, "raw").encode() + few)
        (scans / f"{name}-packed.nrrd").write_bytes(nrrd.format(sizes, "gzip").encode() + gzip.compress(few))
    header.set_data_shape((1000, 1000, 2000))
    (scans / "large.nii").write_bytes(header.binaryblock + few)
    tracemalloc.start()
    ended = predict(*WINDOW)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert ended.code == 1  # not one of them is good
    assert peak < 100 * 2**20
    assert ended.says(
        "a.nii: its header claims 30000 x 30000 x 1500 voxels; at most 2147483648 are read. The header is",
        "large.mha: its header promises 16000000000 bytes of voxels, but the file has only 200. It is cut",
        "0 of 9 volumes done",
    )
    assert {status for status, _ in outcomes().values()} == {"failed"}
    assert written() == set()


# ---- shapes


@pytest.mark.faults(12)
def test_four_dimensions_and_colours_are_refused_with_a_hint_and_a_single_slice_works(
    predict, scans, outcomes, written, masks
):
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 4, 2), np.int16), np.eye(4)), scans / "four.nii.gz")
    colours = np.zeros((8, 8, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(colours, np.eye(4)), scans / "rgb.nii")
    for suffix in ("mha", "nrrd"):
        sitk.WriteImage(sitk.Image([8, 8, 4], sitk.sitkVectorUInt8, 3), str(scans / f"rgb.{suffix}"))
    for suffix in ("nii.gz", "nrrd", "mha"):
        save(scans / f"single.{suffix}", voxels()[:, :, 2:3])
    nibabel.save(nibabel.Nifti1Image(voxels()[..., None], np.eye(4)), scans / "one-time-point.nii")
    sitk.WriteImage(sitk.GetImageFromArray(voxels()[:, :, 2].T), str(scans / "flat.mha"))
    ended = predict(*WINDOW)
    assert ended.code == 3
    assert ended.says(
        "four.nii.gz: holds 4 dimensions (8 x 8 x 4 x 2); expected a single volume. Save each time point or",
        "rgb.nii: its voxels are colours; expected single real numbers. Export one grey channel.",
        "rgb.mha: holds 3 numbers a voxel (colours or a vector); expected one. Export a single grey channel.",
        "rgb.nrrd: holds 3 numbers a voxel",
    )
    done = {name for name, (status, _) in outcomes().items() if status == "done"}
    assert done == {"single.nii.gz", "single.nrrd", "single.mha", "one-time-point.nii", "flat.mha"}
    for path in masks.glob("single.*"):
        mask = found(path)
        assert mask.shape == (24, 20, 1)
        assert mask[4:13, 4:11].all()
    assert found(masks / "flat.mha").shape[:2] == (24, 20)


# ---- geometry


def forms(path: Path) -> tuple[np.ndarray, int, np.ndarray, int]:
    image = nibabel.load(path)
    qform, qcode = image.get_qform(coded=True)
    sform, scode = image.get_sform(coded=True)
    none = np.zeros((4, 4))
    return none if qform is None else qform, int(qcode), none if sform is None else sform, int(scode)


@pytest.mark.faults(9)
def test_masks_of_nifti_lie_where_their_volumes_do_whatever_the_header_says(predict, scans, masks, outcomes):
    plain = nibabel.Nifti1Image(voxels(), oblique())
    nibabel.save(plain, scans / "oblique.nii.gz")
    differ = nibabel.Nifti1Image(voxels(), oblique())
    moved = oblique()
    moved[:3, 3] += 5, 0, -3
    differ.set_sform(oblique(), code=4)
    differ.set_qform(moved, code=1)
    nibabel.save(differ, scans / "differ.nii.gz")
    sheared = nibabel.Nifti1Image(voxels(), oblique(0.3))
    nibabel.save(sheared, scans / "sheared.nii.gz")
    only_q = nibabel.Nifti1Image(voxels(), None)
    only_q.set_qform(oblique(), code=1)
    nibabel.save(only_q, scans / "qform.nii")
    neither = nibabel.Nifti1Image(voxels(), None)
    neither.header.set_zooms((0.7, 0.8, 3.1))
    nibabel.save(neither, scans / "neither.nii")
    flipped = nibabel.Nifti1Image(voxels(), oblique() @ np.diag([-1, 1, -1, 1]))
    nibabel.save(flipped, scans / "flipped.nii.gz")
    ended = predict(*WINDOW)
    assert ended.code == 0, ended.err
    assert ended.says(
        "warning: sform and qform differ; the sform is used (differ.nii.gz)",
        "warning: the array axes are sheared by",
        "the geometry is kept as it is (sheared.nii.gz)",
        "the header states no orientation; the array axes are taken as left, front, up (neither.nii)",
    )
    assert len(outcomes()) == 6
    for name in outcomes():
        image, mask = nibabel.load(scans / name), nibabel.load(masks / name)
        assert mask.shape == SHAPE
        assert np.abs(mask.affine - image.affine).max() < 1e-5, name
        for ours, theirs in zip(forms(masks / name), forms(scans / name), strict=True):
            assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() < 1e-5, name
        assert mask.header.get_zooms() == pytest.approx(image.header.get_zooms(), abs=1e-5)
        assert found(masks / name)[5:13, 5:11, 1:5].all()
        assert not found(masks / name)[:, :, (0, 5)].any()


@pytest.mark.faults(9)
@pytest.mark.parametrize("suffix", ["nrrd", "mha"])
@pytest.mark.parametrize("asked", ["same", "nifti"])
def test_masks_of_nrrd_and_metaimage_lie_where_their_volumes_do(suffix, asked, predict, scans, masks):
    save(scans / f"a.{suffix}")
    ended = predict(*WINDOW, "--format", asked)
    assert ended.code == 0, ended.err
    mask = masks / ("a.nii.gz" if asked == "nifti" else f"a.{suffix}")
    one, other = sitk.ReadImage(str(scans / f"a.{suffix}")), sitk.ReadImage(str(mask))
    # NIfTI stores 32-bit numbers: 3e-5 mm at 250 mm.
    tolerance = 1e-5 if asked == "same" else 3e-5
    for index in ((0, 0, 0), (23, 19, 5), (7, 3, 2)):
        there, here = (image.TransformIndexToPhysicalPoint(index) for image in (one, other))
        assert np.abs(np.subtract(there, here)).max() < tolerance
    assert found(mask)[5:13, 5:11, 1:5].all()


# ---- DICOM


def save_series(
    folder: Path,
    description: str,
    *,
    count: int = 6,
    prefix: str = "IM",
    change: Callable[[pydicom.Dataset, int], None] = lambda data, k: None,
) -> list[Path]:
    """A CT series of 2.5 mm, in the order of its slices; the files are numbered the other way round."""
    folder.mkdir(exist_ok=True)
    series = {
        "StudyInstanceUID": generate_uid(),
        "SeriesInstanceUID": generate_uid(),
        "SeriesDescription": description,
        "PixelSpacing": [0.8, 0.7],
        "SliceThickness": 2.5,
    }
    values = np.random.default_rng(0).integers(0, 200, (count, 20, 24)).astype(np.int16)
    values[1:-1, 4:12, 4:14] += 700
    paths = []
    for k in range(count):
        data = ct_slice(values[k], [-50, -60, 10 + 2.5 * k], InstanceNumber=count - k, **series)
        change(data, k)
        path = folder / f"{prefix}{count - k:04d}.dcm"
        data.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


@pytest.mark.faults(10)
def test_several_series_strays_and_cut_files_give_a_mask_each_and_a_list(
    predict, scans, masks, outcomes, written
):
    save_series(scans, "Portal venous 3.0", prefix="A")
    lung = save_series(scans, "Lung", prefix="B")
    torn = save_series(scans, "Torn", prefix="C")
    torn[2].write_bytes(torn[2].read_bytes()[:-200])
    (scans / "header.dcm").write_bytes(lung[0].read_bytes()[:300])
    (scans / "empty.dcm").write_bytes(b"")
    (scans / "notes.txt").write_text("the patient was late")
    report = save_series(scans / "apart", "Report", count=1, change=lambda d, _: setattr(d, "Modality", "SR"))
    report[0].rename(scans / "report.dcm")
    ended = predict(*WINDOW)
    assert ended.code == 3
    assert ended.says(
        "header.dcm: has no SeriesInstanceUID; it is cut short or not a slice; it is left out",
        "empty.dcm: is not a DICOM file; it is left out",
        "notes.txt: is not a DICOM file; it is left out",
        "report.dcm: holds no image slice (modality SR); it is left out",
        f"warning: Torn: {torn[2]}: cannot be read as DICOM",
        "2 of 3 volumes done",
        "1 failed",
    )
    assert written() == {"Portal_venous_3.0.nii.gz", "Lung.nii.gz"}
    assert outcomes()["Torn"][0] == "failed"
    for name in written():
        mask = nibabel.load(masks / name)
        assert mask.shape == (24, 20, 6)
        np.testing.assert_allclose(mask.header.get_zooms(), (0.7, 0.8, 2.5), atol=1e-5)
        np.testing.assert_allclose(mask.affine[:3, 3], (50, 60, 10), atol=1e-5)  # RAS against LPS
        assert found(masks / name)[5:13, 5:11, 1:5].all()


@pytest.mark.faults(11)
def test_missing_and_doubled_slices_are_refused_with_their_place(predict, scans, outcomes, written):
    save_series(scans, "Gap", prefix="A")[3].unlink()
    doubled = save_series(scans, "Twice", prefix="B")
    (scans / "copy of B0002.dcm").write_bytes(doubled[2].read_bytes())
    save_series(scans, "Whole", prefix="C")
    ended = predict(*WINDOW)
    assert ended.code == 3
    assert ended.says(
        "Gap: series 'Gap': slices are missing between 15.00 and 20.00 mm along the normal (slices are "
        "2.50 mm apart elsewhere; 1 gaps). Fetch the whole series again.",
        "Twice: series 'Twice': 1 slices are doubled, the first at 15.00 mm along the normal. Remove the",
    )
    assert {name: status for name, (status, _) in outcomes().items()} == {
        "Gap": "failed",
        "Twice": "failed",
        "Whole": "done",
    }
    assert written() == {"Whole.nii.gz"}


@pytest.mark.faults(4, 10)
def test_a_dicom_header_that_claims_gigabytes_is_refused_before_anything_is_allocated(
    predict, scans, outcomes, written
):
    def huge(data: pydicom.Dataset, _: int) -> None:
        data.Rows, data.Columns = 30000, 30000

    save_series(scans, "Huge", count=2, change=huge, prefix="A")
    save_series(scans, "Whole", prefix="B")
    tracemalloc.start()
    ended = predict(*WINDOW)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert ended.code == 3
    assert ended.says("Huge: ", "A0001.dcm claims 30000 x 30000 pixels of 16 bits, and has only")
    assert peak < 200 * 2**20
    assert written() == {"Whole.nii.gz"}


@pytest.mark.faults(25)
def test_volumes_and_slices_that_vanish_during_the_prediction_are_failed_cases(
    predict, scans, predictor, outcomes, written
):
    for name in ("a", "b", "c"):
        save(scans / f"{name}.nii.gz")
    slices = save_series(scans, "z", prefix="IM")

    def meddle(case_id: str) -> None:
        (scans / "c.nii.gz").unlink(missing_ok=True)
        slices[1].unlink(missing_ok=True)

    predictor.on_case = meddle
    ended = predict(*WINDOW)
    assert ended.code == 3
    assert outcomes()["a.nii.gz"][0] == "done"
    assert ended.says(
        "c.nii.gz: the file is gone since the start.", f"z: {slices[1]}: the file is gone since the start."
    )
    assert written() == {"a.nii.gz", "b.nii.gz"}
