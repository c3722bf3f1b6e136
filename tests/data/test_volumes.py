"""Volumes of every format: the same place in the patient, and every damage refused by name."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from sdseg_cli.core.data import volumes as volumes_module
from sdseg_cli.core.data.geometry import VolumeGeometry, geometry_from_lps, lps_from_geometry
from sdseg_cli.core.data.volume_files import volume_suffix
from sdseg_cli.core.data.volumes import (
    WRITABLE_SUFFIXES,
    files_of_volume,
    read_label_volume,
    read_volume,
    write_label_volume,
    write_probability_volume,
)
from sdseg_cli.core.errors import DataError

SHAPE = (7, 6, 5)


def oblique(shear: float = 0.0) -> np.ndarray:
    """An affine of 0.7 x 0.8 x 3.1 mm, turned about all three axes."""
    turn = np.eye(3)
    for axis, angle in enumerate((0.3, -0.2, 0.5)):
        step = np.eye(3)
        a, b = [other for other in range(3) if other != axis]
        step[a, a] = step[b, b] = np.cos(angle)
        step[a, b], step[b, a] = -np.sin(angle), np.sin(angle)
        turn = turn @ step
    sheared = np.eye(3)
    sheared[0, 1] = shear
    affine = np.eye(4)
    affine[:3, :3] = turn @ sheared @ np.diag([0.7, 0.8, 3.1])
    affine[:3, 3] = 12.3456789, -234.5678912, 98.7654321
    return affine


def scan(dtype: str = "int16") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1000, SHAPE).astype(dtype)


def save_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(voxels, oblique() if affine is None else affine), path)
    return path


def save_itk(path: Path, voxels: np.ndarray, *, compress: bool = False) -> Path:
    """Written with SimpleITK alone, from an affine turned into LPS by hand."""
    image = sitk.GetImageFromArray(voxels.transpose(2, 1, 0))
    affine = oblique()
    flip = np.array([-1, -1, 1])
    spacing = [0.7, 0.8, 3.1]
    image.SetOrigin([float(value) for value in flip * affine[:3, 3]])
    image.SetSpacing(spacing)
    image.SetDirection([float(value) for value in (flip[:, None] * affine[:3, :3] / spacing).ravel()])
    sitk.WriteImage(image, str(path), compress)
    return path


def lps_position(path: Path, index: tuple[int, int, int]) -> np.ndarray:
    return np.array(sitk.ReadImage(str(path)).TransformIndexToPhysicalPoint(index))


# ---- geometry -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"])
def test_every_format_is_read_with_the_voxels_where_the_other_library_puts_them(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"scan{suffix}"
    _ = save_nifti(path, scan()) if "nii" in suffix else save_itk(path, scan())
    volume = read_volume(path)
    assert np.array_equal(volume.voxels, scan())
    np.testing.assert_allclose(volume.geometry.affine, oblique(), atol=2e-5)
    # SimpleITK is the oracle: the same index is the same place, in LPS.
    for index in ((0, 0, 0), (6, 5, 4), (3, 1, 2)):
        ours = volume.geometry.affine @ [*index, 1]
        np.testing.assert_allclose(ours[:3] * [-1, -1, 1], lps_position(path, index), atol=2e-5)
        assert sitk.ReadImage(str(path))[index] == volume.voxels[index]


@pytest.mark.faults(9)
@pytest.mark.parametrize("suffix", WRITABLE_SUFFIXES)
@pytest.mark.parametrize("shear", [0.0, 0.3])
def test_labels_written_in_every_format_lie_where_they_were(
    tmp_path: Path, suffix: str, shear: float
) -> None:
    geometry = VolumeGeometry(SHAPE, oblique(shear))
    labels = (scan() % 4).astype(np.uint8)
    path = tmp_path / f"mask{suffix}"
    write_label_volume(path, labels, geometry)
    volume = read_label_volume(path, num_classes=4)
    assert np.array_equal(volume.voxels, labels)
    assert volume.voxels.dtype == np.uint8
    np.testing.assert_allclose(volume.geometry.affine, geometry.affine, atol=2e-5)
    if shear and "nii" in suffix:
        image = nibabel.load(path)
        np.testing.assert_allclose(image.affine, geometry.affine, atol=2e-5)
        return  # ITK refuses or straightens a sheared NIfTI; nibabel is the judge
    for index in ((0, 0, 0), (6, 5, 4)):
        expected = (geometry.affine @ [*index, 1])[:3] * [-1, -1, 1]
        np.testing.assert_allclose(lps_position(path, index), expected, atol=5e-5)
        assert sitk.ReadImage(str(path))[index] == labels[index]


def test_lps_and_back_is_exact() -> None:
    geometry = VolumeGeometry(SHAPE, oblique())
    again = geometry_from_lps(SHAPE, *lps_from_geometry(geometry))
    np.testing.assert_allclose(again.affine, geometry.affine, atol=1e-12)


def test_spacing_and_volume_of_a_voxel_come_from_the_affine() -> None:
    geometry = VolumeGeometry(SHAPE, oblique())
    assert geometry.spacing_mm == pytest.approx((0.7, 0.8, 3.1))
    assert geometry.voxel_ml == pytest.approx(0.7 * 0.8 * 3.1 / 1000)
    assert geometry.shear_degrees == pytest.approx(0, abs=1e-6)


def test_differences_name_size_spacing_origin_and_direction() -> None:
    geometry = VolumeGeometry(SHAPE, oblique())
    assert geometry.differences(VolumeGeometry(SHAPE, oblique().astype(np.float32).astype(float))) == []
    other = oblique()
    other[:3, 0] *= 2
    other[:3, 3] += 1
    assert [text.split()[1] for text in geometry.differences(VolumeGeometry((7, 6, 4), other))] == [
        "size",
        "spacing",
        "first",
    ]
    flipped = oblique()
    flipped[:3, 2] *= -1
    (sentence,) = geometry.differences(VolumeGeometry(SHAPE, flipped))
    assert "0, 0, 180 degrees" in sentence


@pytest.mark.faults(9)
def test_a_nifti_mask_keeps_codes_and_description_of_the_scan(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(scan(), oblique())
    shifted = oblique()
    shifted[0, 3] += 5
    image.set_sform(oblique(), code=4)
    image.set_qform(shifted, code=1)
    image.header["descrip"] = b"ward 7"
    image.header["db_name"], image.header["aux_file"] = b"Kowalczyk^Zofia", b"zofia.txt"
    nibabel.save(image, tmp_path / "scan.nii.gz")
    volume = read_volume(tmp_path / "scan.nii.gz")
    assert any("sform and qform differ" in note for note in volume.notes)
    write_label_volume(tmp_path / "m.nii.gz", np.ones(SHAPE, np.uint8), volume.geometry, like=volume)
    mask = nibabel.load(tmp_path / "m.nii.gz")
    assert (int(mask.header["sform_code"]), int(mask.header["qform_code"])) == (4, 1)
    np.testing.assert_allclose(mask.get_qform(), shifted, atol=1e-4)
    assert np.array_equal(mask.affine, nibabel.load(tmp_path / "scan.nii.gz").affine)
    assert mask.header["descrip"].item() == b"ward 7"
    assert (
        mask.header["db_name"].item() == mask.header["aux_file"].item() == b""
    )  # of the patient, not the grid
    assert mask.get_data_dtype() == np.uint8


@pytest.mark.faults(9)
def test_shear_is_kept_with_a_note(tmp_path: Path) -> None:
    volume = read_volume(save_nifti(tmp_path / "a.nii", scan(), oblique(0.3)))
    assert any("sheared by" in note for note in volume.notes)
    np.testing.assert_allclose(volume.geometry.affine, oblique(0.3), atol=2e-5)


# ---- values ---------------------------------------------------------------------------------------------


def test_slope_and_intercept_do_not_overflow(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.full(SHAPE, 30000, np.int16), np.eye(4))
    image.header.set_slope_inter(3.0, -1024)
    nibabel.save(image, tmp_path / "a.nii")
    raw = nibabel.Nifti1Image.from_filename(tmp_path / "a.nii")
    stored = raw.dataobj.get_unscaled()
    volume = read_volume(tmp_path / "a.nii")
    assert volume.voxels.dtype == np.float32
    slope, intercept = raw.dataobj.slope, raw.dataobj.inter
    assert volume.voxels[0, 0, 0] == pytest.approx(float(stored[0, 0, 0]) * slope + intercept)


@pytest.mark.faults(3)
def test_voxels_that_are_not_finite_are_counted_or_filled(tmp_path: Path) -> None:
    voxels = scan("float32")
    voxels[0, 0, :2] = np.nan
    voxels[1, 0, 0] = np.inf
    path = save_nifti(tmp_path / "a.nii.gz", voxels)
    with pytest.raises(DataError, match=r"3 of 210 voxels are NaN or infinite.*--nan-fill"):
        read_volume(path)
    filled = read_volume(path, nan_fill=-7)
    assert filled.voxels[0, 0].tolist()[:2] == [-7, -7]
    assert filled.voxels[1, 0, 0] == -7
    assert "3 voxels" in filled.notes[0]


def test_big_endian_and_unsigned_files_keep_their_values(tmp_path: Path) -> None:
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(np.uint16)
    nibabel.save(nibabel.Nifti1Image(scan("uint16"), np.eye(4), header), tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    assert np.array_equal(volume.voxels, scan("uint16"))
    assert volume.voxels.dtype.isnative


@pytest.mark.faults(13)
def test_labels_that_are_no_classes_are_listed(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, np.float32)
    labels[0, 0, 0], labels[1, 0, 0], labels[2, 0, 0] = 1, 7, 2.5
    path = save_nifti(tmp_path / "a.nii", labels)
    with pytest.raises(DataError, match=r"2.5, 7; expected 0 to 2"):
        read_label_volume(path, num_classes=3)
    with pytest.raises(DataError, match=r"2.5; expected 0, 1, 7"):
        read_label_volume(path, label_values={0: 0, 1: 1, 7: 2})
    labels[2, 0, 0] = 0
    mapped = read_label_volume(save_nifti(path, labels), label_values={0: 0, 1: 1, 7: 2})
    assert mapped.voxels[:3, 0, 0].tolist() == [1, 2, 0]


# ---- shapes ---------------------------------------------------------------------------------------------


@pytest.mark.faults(12)
def test_several_volumes_and_colours_are_refused_with_a_hint(tmp_path: Path) -> None:
    save_nifti(tmp_path / "four.nii", np.zeros((4, 4, 4, 2), np.int16))
    with pytest.raises(DataError, match=r"4 dimensions \(4 x 4 x 4 x 2\).*file of its own"):
        read_volume(tmp_path / "four.nii")
    colours = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    save_nifti(tmp_path / "rgb.nii", colours)
    with pytest.raises(DataError, match="colours"):
        read_volume(tmp_path / "rgb.nii")
    sitk.WriteImage(sitk.Image([4, 4, 4], sitk.sitkVectorUInt8, 3), str(tmp_path / "rgb.mha"))
    with pytest.raises(DataError, match="3 numbers a voxel"):
        read_volume(tmp_path / "rgb.mha")


@pytest.mark.faults(12)
def test_a_single_slice_and_a_single_time_point_are_volumes(tmp_path: Path) -> None:
    assert read_volume(save_nifti(tmp_path / "a.nii", scan()[..., None])).geometry.shape == SHAPE
    assert read_volume(save_nifti(tmp_path / "b.nii", scan()[:, :, :1])).voxels.shape == (7, 6, 1)
    sitk.WriteImage(sitk.GetImageFromArray(scan()[:, :, 0]), str(tmp_path / "c.mha"))
    flat = read_volume(tmp_path / "c.mha")
    assert np.array_equal(flat.voxels[:, :, 0], scan()[:, :, 0].T)


# ---- damage ---------------------------------------------------------------------------------------------


@pytest.mark.faults(1)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("compress", [False, True])
def test_a_cut_file_is_refused_by_name(tmp_path: Path, suffix: str, compress: bool) -> None:
    path = tmp_path / f"scan{suffix}"
    _ = save_nifti(path, scan()) if "nii" in suffix else save_itk(path, scan(), compress=compress)
    whole = path.read_bytes()
    for share in (0.0, 0.05, 0.5, 0.97):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DataError, match=f"scan{suffix}"):
            read_volume(path)


@pytest.mark.faults(1)
@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_a_flipped_bit_in_compressed_voxels_never_changes_a_voxel(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scan{suffix}"
    _ = save_nifti(path, scan()) if "nii" in suffix else save_itk(path, scan(), compress=True)
    whole = path.read_bytes()
    refused = 0
    for back in range(1, 200, 7):
        damaged = bytearray(whole)
        damaged[-back] ^= 0x10
        path.write_bytes(damaged)
        voxels = _voxels_or_none(path)
        refused += voxels is None
        # A few bits are padding between the parts of the stream and mean nothing.
        assert voxels is None or np.array_equal(voxels, scan())
    assert refused > 20


def _voxels_or_none(path: Path) -> np.ndarray | None:
    try:
        return read_volume(path).voxels
    except DataError as error:
        if str(path) not in str(error):
            raise
        return None


@pytest.mark.faults(2)
def test_a_name_that_lies_about_compression_is_explained(tmp_path: Path) -> None:
    raw = save_nifti(tmp_path / "a.nii", scan()).read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(raw)
    with pytest.raises(DataError, match=r"says .nii.gz, but the content is not gzip.*\*.nii"):
        read_volume(tmp_path / "b.nii.gz")
    (tmp_path / "c.nii").write_bytes(gzip.compress(raw))
    with pytest.raises(DataError, match=r"says .nii, but the content is gzip"):
        read_volume(tmp_path / "c.nii")
    (tmp_path / "d.mha").write_bytes(raw)
    with pytest.raises(DataError, match=r"says \.mha"):
        read_volume(tmp_path / "d.mha")


@pytest.mark.faults(4)
def test_a_header_that_claims_terabytes_is_refused_before_anything_is_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_shape((30000, 30000, 1500))
    header.set_data_dtype(np.float64)
    header["magic"], header["vox_offset"] = b"n+1", 352
    (tmp_path / "a.nii").write_bytes(header.binaryblock + bytes(200))
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(200)))
    mha = (
        "ObjectType = Image\nNDims = 3\nDimSize = 30000 30000 1500\nElementType = MET_DOUBLE\n"
        "ElementDataFile = LOCAL\n"
    )
    (tmp_path / "c.mha").write_bytes(mha.encode() + bytes(200))
    nrrd = "NRRD0004\ntype: double\ndimension: 3\nsizes: 30000 30000 1500\nencoding: raw\nendian: little\n\n"
    (tmp_path / "d.nrrd").write_bytes(nrrd.encode() + bytes(200))
    for name in ("a.nii", "b.nii.gz", "c.mha", "d.nrrd"):
        with pytest.raises(DataError, match=f"{name}: its header claims 30000 x 30000 x 1500"):
            read_volume(tmp_path / name)
    (tmp_path / "e.mha").write_bytes(mha.replace("30000 30000", "300 300").encode() + bytes(200))
    with pytest.raises(DataError, match="promises 1080000000 bytes of voxels, but the file has only 200"):
        read_volume(tmp_path / "e.mha")


@pytest.mark.faults(1)
def test_damaged_headers_never_end_in_a_traceback(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    for suffix in (".nii", ".nrrd", ".mha"):
        path = tmp_path / f"scan{suffix}"
        _ = save_nifti(path, scan()) if "nii" in suffix else save_itk(path, scan())
        whole = path.read_bytes()
        refused = 0
        for _ in range(60):
            damaged = bytearray(whole)
            for position in generator.integers(0, 340, 4):
                damaged[position] = generator.integers(0, 256)
            path.write_bytes(damaged)
            refused += _voxels_or_none(path) is None
        assert refused > 0


@pytest.mark.parametrize("suffix", [".nhdr", ".mhd", ".nrrd", ".mha"])
def test_the_files_of_a_volume_are_the_header_and_its_voxels(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    save_itk(path, scan())
    assert files_of_volume(path)[0] == path
    assert sorted(files_of_volume(path)) == sorted(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_voxels_beside_a_header_of_any_suffix_are_files_of_the_volume(suffix: str, tmp_path: Path) -> None:
    """The suffix only says where they usually are; the header may name another file all the same."""
    detached = ".nhdr" if suffix == ".nrrd" else ".mhd"
    save_itk(tmp_path / f"a{detached}", scan())
    (voxels,) = (path for path in tmp_path.iterdir() if path.suffix != detached)
    path = (tmp_path / f"a{detached}").rename(tmp_path / f"a{suffix}")
    read_volume(path)
    assert files_of_volume(path) == [path, voxels]
    path.write_bytes(b"NRRD0004\ndata file: ../../secret\n\n")
    assert files_of_volume(path) == [path]


@pytest.mark.faults
def test_a_header_without_its_voxels_is_explained(tmp_path: Path) -> None:
    save_itk(tmp_path / "a.mhd", scan())
    (tmp_path / "a.raw").unlink()
    with pytest.raises(DataError, match=r"its voxels are in a\.raw"):
        read_volume(tmp_path / "a.mhd")


# ---- writing --------------------------------------------------------------------------------------------


@pytest.mark.faults(18)
@pytest.mark.parametrize("suffix", WRITABLE_SUFFIXES)
def test_a_mask_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, payload: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(volumes_module, "write_whole", full)
    with pytest.raises(OSError, match="No space"):
        write_label_volume(
            tmp_path / f"m{suffix}", np.zeros(SHAPE, np.uint8), VolumeGeometry(SHAPE, np.eye(4))
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults(18)
def test_a_library_that_writes_something_else_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = sitk.WriteImage
    monkeypatch.setattr(sitk, "WriteImage", lambda image, name, packed: written(image * 0, name, packed))
    with pytest.raises(OSError, match=r"m\.mha"):
        write_label_volume(tmp_path / "m.mha", np.ones(SHAPE, np.uint8), VolumeGeometry(SHAPE, np.eye(4)))
    assert list(tmp_path.iterdir()) == []


def test_probabilities_are_float_volumes_with_a_channel_a_class(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 2 * np.prod(SHAPE)).reshape(*SHAPE, 2)
    write_probability_volume(tmp_path / "p.nii.gz", values, VolumeGeometry(SHAPE, oblique()))
    image = nibabel.load(tmp_path / "p.nii.gz")
    assert image.get_data_dtype() == np.float32
    np.testing.assert_allclose(image.get_fdata(), values, atol=1e-7)


def test_volumes_are_known_by_their_suffix() -> None:
    names = ["a.nii", "a.NII.GZ", "b.c.nrrd", "a.mhd", "a.nhdr", "x.mha"]
    assert all(volume_suffix(Path(name)) for name in names)
    others = ["a.gz", "a.png", "nii", ".nii.gz", "._a.nii.gz", "a.nii.bak", "folder"]
    assert not any(volume_suffix(Path(name)) for name in others)
