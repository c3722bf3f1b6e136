"""Rows 12 to 14 and 23 for datasets: ``sdseg prepare`` refuses by name and in one pass."""

from __future__ import annotations

import io
import json
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

AFFINE = np.diag([-2.0, -3.0, 5.0, 1.0])


@pytest.fixture
def prepare(sdseg, tmp_path) -> Callable:
    """``sdseg prepare folder`` on ``images`` and ``masks`` into ``out``."""
    places = {name: tmp_path / name for name in ("images", "masks", "out")}
    for name in ("images", "masks"):
        places[name].mkdir()
    common = [item for name, path in places.items() for item in (f"--{name}", path)]
    return lambda *options: sdseg("prepare", "folder", *common, "--size", 32, "--workers", 1, *options)


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


@pytest.mark.faults(12, 13)
def test_labels_that_do_not_fit_are_all_listed_and_nothing_is_prepared(prepare, tmp_path):
    scan = np.random.default_rng(0).integers(-200, 200, (16, 18, 3)).astype(np.int16)
    labels = np.zeros(scan.shape, np.uint8)
    labels[4:9, 4:9, 1:] = 1
    spaced, turned, moved = AFFINE.copy(), AFFINE.copy(), AFFINE.copy()
    spaced[2, 2] = 4.0
    turned[1, 1] = 3.0
    moved[0, 3] = 7.0
    unknown = labels.copy()
    unknown[0, 0, 0] = 9
    wrong = {
        "size": (labels[:, :, :2], AFFINE, "The size is 16 x 18 x 3 against 16 x 18 x 2 voxels."),
        "spacing": (labels, spaced, "The spacing is 2 x 3 x 5 against 2 x 3 x 4 mm."),
        "direction": (labels, turned, "The array axes point apart by 0, 180, 0 degrees."),
        "origin": (labels, moved, "The first voxels are 7 mm apart."),
        "class": (unknown, AFFINE, "unexpected label values 9; expected 0 to 1."),
        "four": (np.stack([labels] * 2, axis=-1), AFFINE, "holds 4 dimensions"),
    }
    for name, (truth, affine, _) in wrong.items():
        save(tmp_path / f"images/{name}.nii.gz", scan)
        save(tmp_path / f"masks/{name}.nii.gz", truth, affine)
    for name in ("good1", "good2", "good3", "alone"):
        save(tmp_path / f"images/{name}.nii.gz", scan)
    for name in ("good1", "good2", "good3", "orphan"):
        save(tmp_path / f"masks/{name}.nii.gz", labels)
    options = ("--classes", "liver", "--fractions", "0.34,0.33,0.33")
    ended = prepare(*options)
    assert ended.code == 1
    assert ended.says("8 of 11 cases cannot be used; nothing was prepared", "--exclude-bad")
    for name, (_, _, reason) in wrong.items():
        assert ended.says(f"{name}: ", reason)
    assert ended.says("alone: image alone.nii.gz has no mask", "orphan: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "masks"]
    ended = prepare(*options, "--exclude-bad")
    assert ended.code == 0, ended.err
    assert ended.says("8 cases left out (listed in dataset.json)")
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert set(manifest["preparation"]["excluded"]) == {*wrong, "alone", "orphan"}
    assert sum(manifest["splits"].values()) == 3 * 3


@pytest.mark.faults(13, 23)
def test_labels_of_pictures_that_do_not_fit_are_all_listed(prepare, tmp_path):
    mask = np.zeros((20, 30), np.uint8)
    mask[5:12, 5:15] = 1
    for name in ("a", "b", "c", "size", "class"):
        Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(tmp_path / f"images/{name}.png")
        Image.fromarray(mask).save(tmp_path / f"masks/{name}.png")
    Image.fromarray(mask[:, :29]).save(tmp_path / "masks/size.png")
    Image.fromarray(mask * 7).save(tmp_path / "masks/class.png")
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(tmp_path / "images/twice.jpg")
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(tmp_path / "images/twice.png")
    Image.fromarray(mask).save(tmp_path / "masks/twice.png")
    ended = prepare("--classes", "liver,kidney")
    assert ended.code == 1
    assert ended.says(
        "size: mask size.png is 29x20 pixels, image size.png is 30x20; both must be the same.",
        "class.png: unexpected mask values 7; expected 0 to 2.",
        "twice: ",
        "nothing was prepared",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.faults(23)
def test_odd_names_are_the_cases_of_the_dataset(prepare, tmp_path):
    from sdseg_cli.core.data.prepared import PreparedDataset

    names = [
        " blanks in front and behind ",
        "naïve – 内視鏡 🩺",
        "x" * 251,
        "quote's & <b>",
        "dots.in.it",
        "a",
    ]
    mask = np.zeros((20, 30), np.uint8)
    for index, name in enumerate(names):
        mask[5:12, 5 : 15 + index] = 1
        Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(tmp_path / f"images/{name}.png")
        Image.fromarray(mask).save(tmp_path / f"masks/{name}.png")
    ended = prepare("--fractions", "1,0,0")
    assert ended.code == 0, ended.err
    items = {item.case_id: item.label_map for item in PreparedDataset.open(tmp_path / "out").split("train")}
    assert {name: int(items[name].sum()) for name in names} == {
        name: 7 * (10 + index) for index, name in enumerate(names)
    }


# ---- archives


def picture(index: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 30), index, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


GOOD = {"set/images/1.png": picture(1), "set/masks/1.png": picture(255)}


def make_zip(path: Path, members: dict) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as pack:
        for name, content in members.items():
            pack.writestr(name, content)


def make_tar(path: Path, members: dict) -> None:
    with tarfile.open(path, "w:gz") as pack:
        for name, content in members.items():
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = 0 if member.type != tarfile.REGTYPE else len(content)
            pack.addfile(member, io.BytesIO(content))


def zip_link() -> zipfile.ZipInfo:
    link = zipfile.ZipInfo("set/images/link.png")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return link


def tar_link(kind: bytes, target: str) -> tarfile.TarInfo:
    link = tarfile.TarInfo("set/images/link.png")
    link.type, link.linkname = kind, target
    return link


BAD_ARCHIVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "up.zip": (lambda p: make_zip(p, {**GOOD, "../evil.txt": b"evil"}), "'../evil.txt' leads outside"),
    "deep.zip": (lambda p: make_zip(p, {**GOOD, "set/../../evil.txt": b"e"}), "leads outside"),
    "absolute.zip": (lambda p: make_zip(p, {**GOOD, f"{p.parents[1]}/evil.txt": b"evil"}), "leads outside"),
    "windows.zip": (lambda p: make_zip(p, {**GOOD, "..\\evil.txt": b"evil"}), "leads outside"),
    "up.tar.gz": (lambda p: make_tar(p, {**GOOD, "../evil.txt": b"evil"}), "leads outside"),
    "link.zip": (lambda p: make_zip(p, {**GOOD, zip_link(): b"/etc/passwd"}), "is a link or device"),
    "symlink.tar.gz": (
        lambda p: make_tar(p, {**GOOD, tar_link(tarfile.SYMTYPE, "/etc/passwd"): b""}),
        "is a link or device; only plain files are unpacked",
    ),
    "hardlink.tar.gz": (
        lambda p: make_tar(p, {**GOOD, tar_link(tarfile.LNKTYPE, "../../secret"): b""}),
        "is a link or device",
    ),
    "device.tar.gz": (
        lambda p: make_tar(p, {**GOOD, tar_link(tarfile.CHRTYPE, ""): b""}),
        "is a link or device",
    ),
    "bomb.zip": (lambda p: make_zip(p, {**GOOD, "zeros.png": bytes(80 * 2**20)}), "a decompression bomb?"),
    "bomb.tar.gz": (lambda p: make_tar(p, {**GOOD, "zeros.png": bytes(80 * 2**20)}), "a decompression bomb?"),
    "cut.zip": (
        lambda p: (make_zip(p, GOOD), p.write_bytes(p.read_bytes()[:-60])),
        "not a whole zip archive, most likely cut short. Fetch it again",
    ),
    "cut.tar.gz": (
        lambda p: (make_tar(p, GOOD), p.write_bytes(p.read_bytes()[:200])),
        "the archive is damaged or cut short",
    ),
}  # fmt: skip


@pytest.mark.faults(14)
@pytest.mark.parametrize("name", BAD_ARCHIVES)
def test_a_bad_archive_writes_nothing_outside_and_leaves_nothing(name, sdseg, tmp_path):
    make, reason = BAD_ARCHIVES[name]
    archive = tmp_path / "here" / name
    archive.parent.mkdir()
    make(archive)
    before = sorted(tmp_path.rglob("*"))
    ended = sdseg(
        *("prepare", "folder", "--source", archive, "--images", "set/images", "--masks", "set/masks"),
        *("--out", tmp_path / "here" / "deep" / "out", "--size", 32, "--workers", 1),
    )
    assert ended.code == 1
    assert ended.says(f"{name}: ", reason)
    assert sorted(tmp_path.rglob("*")) == before
