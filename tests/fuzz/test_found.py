"""What fuzzing found, kept: each of these once ended sdseg otherwise than with an error of its own."""

from __future__ import annotations

import io
import json
import re
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch

from sdseg_cli.core.data.archives import is_archive, unpacked
from sdseg_cli.core.data.dicom import find_series, read_series
from sdseg_cli.core.data.nnunet import read_nnunet
from sdseg_cli.core.data.prepared import PreparedDataset
from sdseg_cli.core.data.slicing import apply_window, own_window
from sdseg_cli.core.data.volumes import read_volume
from sdseg_cli.core.errors import DataError, ModelError
from sdseg_cli.core.files import is_zip
from sdseg_cli.core.model.checkpoint_file import read_state_dict
from sdseg_cli.core.model.image_encoder import KLImageEncoder
from sdseg_cli.core.model.official import encoder_shape, unet_shape
from sdseg_cli.core.model.unet import SDSegUNet
from tests.fuzz.parsers import dicom_seeds

pytestmark = pytest.mark.faults

META = """ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = False
CompressedData = False
TransformMatrix = 1 0 0 0 1 0 0 0 1
Offset = 0 0 0
ElementSpacing = 1 1 2
DimSize = 3 3 3
ElementType = MET_UCHAR
ElementDataFile = {data}
"""
NRRD = """NRRD0004
type: uint8
dimension: 3
space: left-posterior-superior
sizes: 3 3 3
space directions: (1,0,0) (0,1,0) (0,0,2)
encoding: raw
space origin: (0,0,0)
data file: {data}
"""


def meta(folder: Path, *changes: tuple[str, str], data: str = "a.raw") -> Path:
    return header(folder / "a.mhd", META.format(data=data), *changes)


def nrrd(folder: Path, *changes: tuple[str, str], data: str = "a.raw") -> Path:
    return header(folder / "a.nhdr", NRRD.format(data=data), *changes)


def header(path: Path, text: str, *changes: tuple[str, str]) -> Path:
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    (path.parent / "a.raw").write_bytes(bytes(range(27)))
    return path


@pytest.mark.parametrize("make", [meta, nrrd])
def test_the_headers_that_are_damaged_below_are_sound(make, tmp_path):
    volume = read_volume(make(tmp_path))
    assert volume.voxels.ravel(order="F").tolist() == list(range(27))
    assert volume.geometry.spacing_mm == (1, 1, 2)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("NDims = 3", "NDims = 1e308", "NDims is '1e308', expected a whole number"),  # a segfault
        ("NDims = 3", "NDims = 99999", "claims 99999 dimensions"),
        ("1 0 0 0 1 0 0 0 1", "1 0 0 0 1 0 1e308 0 1", "TransformMatrix .* expected finite"),  # a hang
        ("1 0 0 0 1 0 0 0 1", "1 0 0 nan 1 0 0 0 1", "TransformMatrix .* expected finite"),
        ("1 0 0 0 1 0 0 0 1", "1 0 0", "TransformMatrix holds 3 numbers, expected 9"),
        ("3 3 3", "3 3", "DimSize is '3 3', expected 3 positive"),
        ("3 3 3", "3 -3 3", "DimSize is '3 -3 3', expected 3 positive"),
        ("NDims = 3\n", "NDims = 3\nNDims = 2\n", "states NDims twice"),
        ("NDims = 3\n", "NDims\n", "holds the line 'NDims'"),
        ("ElementDataFile = a.raw\n", "", "names no ElementDataFile"),
    ],
)
def test_a_metaimage_header_that_cannot_be_meant_is_refused(old, new, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_volume(meta(tmp_path, (old, new)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("dimension: 3", "dimension: 1e9", "dimension is '1e9', expected a whole number"),
        ("(0,0,2)", "(0,0,1e308)", "spacedirections .* expected finite"),
        ("(0,0,2)", "(0,0,x)", "spacedirections .* expected finite"),
        ("sizes: 3 3 3", "sizes: 3 3", "sizes is '3 3', expected 3 positive"),
        ("encoding: raw", "encoding raw", "holds the line 'encoding raw'"),
        ("encoding: raw", "encoding: raw\nencoding: gzip", "states encoding twice"),
        ("encoding: raw", "# " + "x" * 1_100_000 + "\nencoding: raw", "does not end within 1048576 bytes"),
    ],
)
def test_a_nrrd_header_that_cannot_be_meant_is_refused(old, new, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_volume(nrrd(tmp_path, (old, new)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "NDims = 3\n",
            "NDims = 3\n0008|0060 = MR\nmy key = x y\nSeries-Date = 3\nComment = a\nComment = b\n",
        ),
        ("NDims = 3\n", "NDims = 3\nModality: MET_MOD_CT\n"),
    ],
)
def test_what_others_write_into_a_metaimage_is_no_damage(old, new, tmp_path):
    assert read_volume(meta(tmp_path, (old, new))).voxels.shape == (3, 3, 3)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("encoding: raw", "encoding: raw\nDICOM:0008:=a\nDICOM:0010:=b\nkey with blanks:=1: 2"),
        ("encoding: raw", "encoding: raw\nold max: 3.4e38\nmax: inf"),
        ("encoding: raw", "# " + "x" * 70_000 + "\nencoding: raw"),
    ],
)
def test_what_others_write_into_a_nrrd_is_no_damage(old, new, tmp_path):
    assert read_volume(nrrd(tmp_path, (old, new))).voxels.shape == (3, 3, 3)


@pytest.mark.parametrize("make", [meta, nrrd])
@pytest.mark.parametrize(
    "kind", ["absolute", "above", "inside and above", "home", "pattern", "list", "format"]
)
def test_a_header_reads_no_voxels_from_outside_its_folder(make, kind, tmp_path):
    secret = tmp_path / "secret.raw"
    secret.write_bytes(bytes(27))
    data, message = {
        "absolute": (str(secret), "outside its own folder"),
        "above": ("../secret.raw", "outside its own folder"),
        "inside and above": ("x/../../secret.raw", "outside its own folder"),
        "home": ("~/secret.raw", "outside its own folder"),
        "pattern": ("%03d.raw 1 3 1", "spread over several files"),
        "list": ("LIST", "spread over several files"),
        "format": ("%n%n%n%s", "spread over several files"),
    }[kind]
    with pytest.raises(DataError, match=message):
        read_volume(make(tmp_path / "scans", data=data))


def archive_of(kind: str, names: dict[str, bytes], path: Path) -> Path:
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as pack:
            for name, content in names.items():
                pack.writestr(name, content)
        return path
    with tarfile.open(path, "w") as pack:
        for name, content in names.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            pack.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize(
    "names",
    [
        {"a": b"x", "a/b": b"y"},  # a file and a folder
        {"a/b": b"y", "a": b"x"},
        {"é" * 200: b"x"},  # 400 bytes
    ],
    ids=["file then folder", "folder then file", "too long"],
)
def test_names_that_this_disk_cannot_hold_are_told_with_their_place(kind, names, tmp_path):
    archive = archive_of(kind, names, tmp_path / f"a.{kind}")
    told = rf"{archive.name}: '[aé/b]+' cannot be made in .*/work \(.*unpack it by hand, elsewhere"
    with pytest.raises(DataError, match=told), unpacked(archive, tmp_path / "work"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]


@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + b"\xff" * 11])
@pytest.mark.parametrize("member", [b"x", b"L", b"g"])
def test_an_extension_of_a_tar_header_that_claims_terabytes_is_refused(size, member, tmp_path):
    archive = archive_of("tar", {"a": b"x"}, tmp_path / "a.tar")
    payload = bytearray(archive.read_bytes())
    payload[124:136], payload[156:157], payload[148:156] = size, member, b" " * 8
    payload[148:156] = b"%06o\0 " % sum(payload[:512])
    archive.write_bytes(payload)
    with pytest.raises(DataError, match=r"a\.tar"), unpacked(archive, tmp_path / "work"):
        pass


@pytest.mark.parametrize(
    "labels",
    [{"background": 0, "a": "b"}, {"background": 0, "a": float("inf")}, {"background": 0, "a": None}],
)
def test_labels_of_an_nnunet_dataset_that_are_no_numbers_are_refused(labels, tmp_path):
    content = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".png"}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"expected 0 \(background\), 1, 2"):
        read_nnunet(tmp_path)


def changed(source: Path, folder: Path, change) -> Path:
    import shutil

    shutil.copytree(source, folder)
    manifest = json.loads((folder / "dataset.json").read_text())
    change(manifest)
    (folder / "dataset.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("files", None), ("files", {"a": "b"}), ("splits", []), ("splits", {"train": None})),
        *(("splits", {"../outside": 1}), ("classes", None), ("classes", ["background"]), ("classes", [1, 2])),
        *(
            ("image_size", "big"),
            ("image_size", 0),
            ("resize", "stretch"),
            ("preparation", []),
            ("version", "x"),
        ),
    ],
)
def test_a_manifest_whose_fields_are_of_another_kind_is_refused(key, value, polyps, tmp_path):
    folder = changed(polyps, tmp_path / "data", lambda manifest: manifest.update({key: value}))
    with pytest.raises(DataError, match=r"dataset\.json: cannot be read"):
        PreparedDataset.open(folder)


def test_a_split_of_another_length_than_stated_is_refused(polyps, tmp_path):
    folder = changed(polyps, tmp_path / "data", lambda manifest: manifest["splits"].update(train=3))
    view = PreparedDataset.open(folder).split("train")
    with pytest.raises(DataError, match=r"train: holds \d+ slices, expected 3"):
        view[0]


def test_a_dicom_slice_that_decodes_to_another_shape_than_its_header_says_is_refused(tmp_path, monkeypatch):
    for name, content in dicom_seeds()[0].items():
        (tmp_path / name).write_bytes(content)
    (series,) = find_series(list(tmp_path.iterdir())).series
    monkeypatch.setattr(pydicom.Dataset, "pixel_array", property(lambda _: np.zeros((6, 7, 2), np.int16)))
    with pytest.raises(DataError, match=r"cannot be read as DICOM.*reshape"):
        read_series(series)


@pytest.mark.parametrize(
    ("tag", "value", "told"),
    [
        ("ImageOrientationPatient", [1, 0, 0, 1, 0, 0], "the slices are 0 mm apart"),
        ("ImageOrientationPatient", [1, 0, 0, 1, 1e-6, 0], "lays two array axes on one line"),
        ("SpacingBetweenSlices", "1e999", "SpacingBetweenSlices or SliceThickness is inf mm"),
        ("ImagePositionPatient", ["1e999", 0, 0], "ImagePositionPatient or .* is no number"),
        ("PixelSpacing", ["1e300", 1], r"PixelSpacing is 1e\+300 x 1 mm"),
    ],
)
def test_a_dicom_slice_that_lies_nowhere_is_refused(tag, value, told, tmp_path):
    """They went on to a mask's geometry, where the linear algebra gave up."""
    name, content = next(iter(dicom_seeds()[0].items()))
    data = pydicom.dcmread(io.BytesIO(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's own of a number that is none
        setattr(data, tag, value)
        data.save_as(tmp_path / Path(name).name)
    (series,) = find_series(list(tmp_path.iterdir())).series
    with pytest.raises(DataError, match=told):
        read_series(series)


@pytest.mark.parametrize("value", [0.0, 1e20, -3e38])
def test_a_constant_volume_has_a_window_however_large_its_value(value):
    low, high = own_window(np.full((2, 3, 4), value, np.float32))
    assert low < high
    assert apply_window(np.full(3, value, np.float32), (low, high)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize(
    ("read", "key"),
    [
        (encoder_shape, "encoder.down.0.block.0.conv1.weight"),
        (encoder_shape, "encoder.conv_out.weight"),
        (unet_shape, "input_blocks.0.0.weight"),
        (unet_shape, "label_emb.weight"),
    ],
)
def test_a_weight_without_its_dimensions_tells_no_architecture(read, key, shape):
    kernel = torch.zeros(4, 4, 1, 1)
    names = ["encoder.down.0.block.0.conv1.weight", "encoder.conv_out.weight", "out.2.weight"]
    names += [f"input_blocks.{index}.0.out_layers.3.weight" for index in (0, 1)]
    state = {**dict.fromkeys([*names, "input_blocks.0.0.weight"], kernel), key: torch.zeros(shape)}
    with pytest.raises(ModelError, match=rf"{re.escape(key)} of the checkpoint has the shape \(.*expected"):
        read(state)


@pytest.mark.parametrize(
    ("network", "key"), [(KLImageEncoder, "levels"), (KLImageEncoder, "blocks"), (SDSegUNet, "blocks")]
)
def test_a_configuration_of_ten_thousands_of_layers_is_refused_before_they_are_built(network, key):
    with pytest.raises(ValueError, match="65536"):
        network(**{key: 65536})


def test_a_zip_that_says_it_spans_disks_is_no_zip(tmp_path):
    """The standard library's test of whether it is one raises."""
    path = tmp_path / "a.ckpt"
    locator = b"PK\x06\x07" + bytes(4) + bytes(8) + (9).to_bytes(4, "little")
    path.write_bytes(b"PK\x03\x04" + bytes(60) + locator + b"PK\x05\x06" + bytes(18))
    with pytest.raises(zipfile.BadZipFile, match="multiple disks"):
        zipfile.is_zipfile(path)
    assert not is_zip(path)
    assert not is_archive(path)
    with pytest.raises(ModelError, match="cannot be read"):
        read_state_dict(path)
