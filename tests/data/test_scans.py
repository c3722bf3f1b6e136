"""Volumes and fundus photographs on their way to a prepared dataset, in the published layouts."""

import json

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from sdseg_cli.core.data.benchmarks import STS3D, btcv, find_btcv, find_refuge, find_sts3d
from sdseg_cli.core.data.converting import convert
from sdseg_cli.core.data.fundus import around, around_bright_disc
from sdseg_cli.core.data.gathering import Description
from sdseg_cli.core.data.nnunet import find_nnunet, read_nnunet
from sdseg_cli.core.data.pairs import pair_folders
from sdseg_cli.core.data.preparation import prepare
from sdseg_cli.core.data.prepared import PreparedDataset
from sdseg_cli.core.data.raw_cases import Geometry, Problem, source_hashes
from sdseg_cli.core.data.splits import Split
from sdseg_cli.core.data.volume_pairs import read_volume_pair
from sdseg_cli.core.errors import DataError, UsageError

AFFINE = np.diag([-2.0, -3.0, 5.0, 1.0])  # LPS, as CT comes: rows 3 mm, columns 2 mm, slices 5 mm


def save(path, voxels, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


def scan(seed=0):
    """A scan (6, 8, 4) in HU with a bright block, and its labels."""
    voxels = np.random.default_rng(seed).integers(-300, 300, (6, 8, 4)).astype(np.int16)
    labels = np.zeros(voxels.shape, np.uint8)
    labels[1:4, 2:6, 1:3] = 6
    labels[4, 6, 2] = 11
    return voxels, labels


def run(pairs, out, classes=("background", "organs"), exclude_bad=False, **geometry):
    ids = tuple(case.case_id for case in pairs.cases)
    options = {"image_size": 16, "num_classes": len(classes), "holds_volumes": True, **geometry}
    description = Description("scans", classes, "made up", "none")
    split = Split("all", ids, (), ())
    records = prepare(
        pairs.cases,
        split,
        out,
        description=description,
        geometry=Geometry(**options),
        problems=pairs.problems,
        exclude_bad=exclude_bad,
        workers=1,
    )
    return list(records), PreparedDataset.open(out)


@pytest.fixture
def btcv_tree(tmp_path):
    for number in (1, 5):
        voxels, labels = scan(number)
        save(tmp_path / f"RawData/Training/img/img{number:04d}.nii.gz", voxels)
        save(tmp_path / f"RawData/Training/label/label{number:04d}.nii.gz", labels)
    return tmp_path


# Volumes


def test_btcv_is_found_as_published_and_its_volumes_become_slices(btcv_tree, tmp_path):
    pairs = find_btcv(btcv_tree)
    assert [case.case_id for case in pairs.cases] == ["0001", "0005"]
    benchmark = btcv("8")
    records, dataset = run(
        pairs,
        tmp_path / "out",
        benchmark.classes,
        label_values=benchmark.label_values,
        window=(-175.0, 250.0),
    )
    assert [record.slices for record in records] == [4, 4]
    view = dataset.split("train")
    assert [(item.case_id, item.slice_index) for item in view[:5]] == [
        *(("0001", index) for index in range(4)),
        ("0005", 0),
    ]
    item = view[2]
    assert item.spacing_mm == (5.0, 3.0, 2.0)
    # Feet first, the front at the top, the patient's right at the left: the array of an LPS scan, transposed.
    voxels, _ = scan(1)
    expected = np.zeros((8, 6), np.uint8)
    expected[2:6, 1:4] = benchmark.classes.index("liver")
    expected[6, 4] = benchmark.classes.index("pancreas")
    assert np.array_equal(item.label_map, expected)
    grey = np.rint(np.clip((voxels[:, :, 2].T + 175.0) * 255 / 425, 0, 255)).astype(np.uint8)
    whole = item.grid.image_to_model(np.stack([grey] * 3, axis=-1))
    assert np.array_equal(item.image, whole)
    recorded = dataset.manifest.preparation
    assert (recorded["window"], recorded["axis"]) == ([-175.0, 250.0], "axial")


def test_the_organs_of_btcv_are_13_or_8_or_one_foreground():
    thirteen, eight, binary = (btcv(organs) for organs in ("13", "8", "binary"))
    assert len(thirteen.classes) == 14
    assert all(thirteen.label_values[number] == number for number in range(14))
    assert eight.classes[5:] == ("liver", "stomach", "aorta", "pancreas")
    assert [eight.label_values[number] for number in (1, 5, 6, 11, 12)] == [1, 0, 5, 8, 0]
    assert {number for number, label in binary.label_values.items() if label} == {1, 2, 3, 4, 6, 7, 8, 11}
    assert set(binary.label_values.values()) == {0, 1}


def test_training_slices_without_foreground_can_be_left_out(btcv_tree, tmp_path):
    options = {"label_values": btcv("binary").label_values, "foreground_slices_only": True}
    _, dataset = run(find_btcv(btcv_tree), tmp_path / "out", **options)
    assert [item.slice_index for item in dataset.split("train")] == [1, 2, 1, 2]
    assert dataset.manifest.preparation["foreground_slices_only"] is True


@pytest.mark.faults(13)
def test_every_bad_volume_is_listed_in_one_pass_and_nothing_is_written(btcv_tree, tmp_path):
    home = btcv_tree / "RawData" / "Training"
    voxels, labels = scan()
    moved = AFFINE.copy()
    moved[0, 3] = 7.0
    bad = labels.copy()
    bad[0, 0, 0] = 77
    for number, (image, truth, affine) in enumerate(
        [
            (voxels, bad, AFFINE),
            (voxels, labels, moved),
            (voxels, labels[:, :, :3], AFFINE),
            (np.stack([voxels] * 2, axis=-1), labels, AFFINE),
        ],
        start=21,
    ):
        save(home / f"img/img{number:04d}.nii.gz", image)
        save(home / f"label/label{number:04d}.nii.gz", truth, affine)
    save(home / "img/img0030.nii.gz", voxels)
    pairs = find_btcv(btcv_tree)
    values = btcv("binary").label_values
    with pytest.raises(DataError) as caught:
        run(pairs, tmp_path / "out", label_values=values)
    message = str(caught.value)
    assert "5 of 7 cases cannot be used; nothing was prepared" in message
    for part in (
        "0021: ",
        "label values 77",
        "0022: ",
        "0023: ",
        "0024: ",
        "image img0030.nii.gz has no label",
    ):
        assert part in message, part
    assert message.count("does not lie on") == 2
    assert not (tmp_path / "out").exists()
    _, dataset = run(pairs, tmp_path / "out", label_values=values, exclude_bad=True)
    assert set(dataset.split("train").case_ids) == {"0001", "0005"}
    assert sorted(dataset.manifest.preparation["excluded"]) == ["0021", "0022", "0023", "0024", "0030"]


def test_specks_of_sts3d_labels_are_removed_and_counted(tmp_path):
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[:4, :4, :4] = 1  # 64 voxels: kept
    labels[6:, 6:, 6:] = 1  # 8 voxels
    for folder, voxels in (("image", labels.astype(np.int16) * 1000), ("label", labels)):
        save(tmp_path / "labelled" / folder / "Teeth_0003_0000.nii.gz", voxels)
    pairs = find_sts3d(tmp_path)
    assert [case.case_id for case in pairs.cases] == ["0003"]
    records, dataset = run(
        pairs, tmp_path / "out", STS3D.classes, threshold=0, smallest_component=STS3D.smallest_component
    )
    assert records[0].class_pixels == (512 - 64, 64)
    assert records[0].notes[-1] == "specks removed from [1 parts of the foreground]"
    assert dataset.manifest.preparation["smallest_component"] == 64


def test_folders_of_volumes_are_paired_by_name_whatever_their_formats(tmp_path):
    for name in ("a.nii.gz", "b.nii"):
        save(tmp_path / "images" / name, scan()[0])
    for name in ("a.nii", "b.nii.gz", "c.nii.gz"):
        save(tmp_path / "masks" / name, scan()[1])
    pairs = pair_folders(tmp_path / "images", tmp_path / "masks")
    assert [(case.case_id, case.is_volume) for case in pairs.cases] == [("a", True), ("b", True)]
    assert [problem.case_id for problem in pairs.problems] == ["c"]


def test_voxels_apart_from_their_header_count_for_the_checksum_of_a_volume(tmp_path):
    for folder, voxels in zip(("images", "masks"), scan(), strict=True):
        (tmp_path / folder).mkdir()
        sitk.WriteImage(sitk.GetImageFromArray(voxels), str(tmp_path / folder / "a.mhd"))
    (case,) = pair_folders(tmp_path / "images", tmp_path / "masks").cases
    before = source_hashes(case)
    for folder in ("images", "masks"):
        data = tmp_path / folder / "a.raw"
        data.write_bytes(data.read_bytes()[::-1])
    after = source_hashes(case)
    assert sorted(before) == sorted(after) == ["images/a.mhd", "masks/a.mhd"]
    assert not {*before.values()} & {*after.values()}


# nnU-Net


def nnunet_tree(root, content, channels=(0,)):
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(content))
    voxels, labels = scan()
    for channel in channels:
        save(root / "imagesTr" / f"x_{channel:04d}.nii.gz", voxels + np.int16(100 * channel))
    save(root / "labelsTr" / "x.nii.gz", (labels > 0).astype(np.uint8))
    return root


V1 = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver"}}
V2 = {
    "channel_names": {"0": "T1", "1": "T2", "2": "FLAIR"},
    "labels": {"background": 0, "liver": 1},
    "file_ending": ".nii.gz",
}


def test_both_versions_of_nnunets_dataset_json_are_read(tmp_path):
    first = read_nnunet(nnunet_tree(tmp_path / "one", V1))
    second = read_nnunet(nnunet_tree(tmp_path / "two", V2, (0, 1, 2)))
    assert first.classes == second.classes == ("background", "liver")
    assert (first.channels, second.channels) == (("CT",), ("T1", "T2", "FLAIR"))
    assert [case.case_id for case in find_nnunet(first, None).cases] == ["x"]


def test_three_channels_of_nnunet_become_red_green_and_blue(tmp_path):
    dataset = read_nnunet(nnunet_tree(tmp_path / "raw", V2, (0, 1, 2)))
    pairs = find_nnunet(dataset, (2, 0, 1))
    _, prepared = run(pairs, tmp_path / "out", dataset.classes, window=(-300.0, 500.0))
    means = prepared.split("train")[0].image.mean(axis=(0, 1))
    assert means[0] > means[2] > means[1]


@pytest.mark.faults
def test_several_channels_without_a_choice_and_a_missing_channel_are_refused(tmp_path):
    dataset = read_nnunet(nnunet_tree(tmp_path / "raw", V2, (0, 2)))
    with pytest.raises(UsageError, match=r"3 channels \(0 \(T1\), 1 \(T2\), 2 \(FLAIR\)\).*--channels 0,1,2"):
        find_nnunet(dataset, None)
    pairs = find_nnunet(dataset, (0, 1, 2))
    assert [problem.reason for problem in pairs.problems] == ["imagesTr has no x_0001.nii.gz"]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"background": 0, "whole": [1, 2], "core": [2]}, "whole, core are regions"),
        ({"background": 0, "liver": 1, "ignore": 2}, "label 2 is to be ignored"),
        ({"background": 0, "liver": 3}, "labels 0, 3; expected 0"),
    ],
)
def test_labels_of_nnunet_that_sdseg_cannot_learn_are_refused(tmp_path, labels, message):
    with pytest.raises(DataError, match=message):
        read_nnunet(nnunet_tree(tmp_path, {**V2, "labels": labels}))


def test_pictures_of_nnunet_are_read_as_pictures(tmp_path):
    labels = np.zeros((12, 10), np.uint8)
    labels[3:6, 2:5] = 1
    for folder, name, array in (("imagesTr", "x_0000", labels * 90), ("labelsTr", "x", labels)):
        (tmp_path / "raw" / folder).mkdir(parents=True)
        Image.fromarray(array).save(tmp_path / "raw" / folder / f"{name}.png")
    content = {**V2, "channel_names": {"0": "R", "1": "G", "2": "B"}, "file_ending": ".png"}
    (tmp_path / "raw" / "dataset.json").write_text(json.dumps(content))
    dataset = read_nnunet(tmp_path / "raw")
    assert not dataset.holds_volumes
    pairs = find_nnunet(dataset, None)  # one file holds all three channels
    _, prepared = run(
        pairs, tmp_path / "out", dataset.classes, holds_volumes=False, label_values={0: 0, 1: 1}
    )
    assert np.array_equal(prepared.split("train")[0].label_map, labels)


# REFUGE2


def photograph(disc=(30, 70), radius=6):
    """A fundus-like photograph (100, 120) with a bright disc, and the masks of disc and cup."""
    rows, columns = np.mgrid[:100, :120]
    field = (rows - 50) ** 2 + (columns - 60) ** 2 < 48**2
    distance = (rows - disc[0]) ** 2 + (columns - disc[1]) ** 2
    image = np.zeros((100, 120, 3), np.uint8)
    image[field] = (120, 60, 20)
    image[distance < radius**2] = (250, 220, 120)
    return image, distance < radius**2, distance < (radius / 2) ** 2


def refuge_tree(root, *, inverted=False, values=(0, 128, 255)):
    image, disc, cup = photograph()
    mask = np.full(disc.shape, values[2], np.uint8)
    mask[disc], mask[cup] = values[1], values[0]
    for part, name in (("train", "g0001"), ("val", "V0001"), ("test", "T0001")):
        for folder in ("images", "masks"):
            (root / part / folder).mkdir(parents=True)
        Image.fromarray(image).save(root / part / "images" / f"{name}.png")
        Image.fromarray(255 - mask if inverted else mask).save(root / part / "masks" / f"{name}.bmp")
    return root


@pytest.mark.parametrize("crop", ["truth", "bright", "none"])
def test_refuge_shows_the_crop_and_keeps_the_whole_photograph_as_its_grid(tmp_path, crop):
    pairs = find_refuge(refuge_tree(tmp_path / "raw"), crop)
    assert [case.case_id for case in pairs.cases] == ["g0001", "V0001", "T0001"]
    _, dataset = run(pairs, tmp_path / "out", ("background", "cup"), holds_volumes=False)
    item = dataset.split("train")[0]
    image, disc, cup = photograph()
    assert np.array_equal(item.label_map, cup)
    if crop == "none":
        assert item.grid.crop is None
        return
    top, left, height, width = item.grid.crop
    assert height == width < 40
    assert disc[top : top + height, left : left + width].sum() == disc.sum()
    part = image[top : top + height, left : left + width]
    assert np.array_equal(
        item.image, np.asarray(Image.fromarray(part).resize((16, 16), Image.Resampling.BICUBIC))
    )


def test_inverted_masks_of_refuge_are_recognised(tmp_path):
    pairs = find_refuge(refuge_tree(tmp_path / "raw", inverted=True), "truth")
    records, dataset = run(pairs, tmp_path / "out", ("background", "cup"), holds_volumes=False)
    assert np.array_equal(dataset.split("train")[0].label_map, photograph()[2])
    assert "255 for the cup" in records[0].notes[0]


@pytest.mark.faults
@pytest.mark.parametrize("values", [(0, 100, 255), (255, 128, 255), (0, 255, 128)])
def test_a_mask_of_refuge_that_is_neither_is_refused(tmp_path, values):
    pairs = find_refuge(refuge_tree(tmp_path / "raw", values=values), "truth")
    with pytest.raises(DataError, match="3 of 3 cases cannot be used"):
        run(pairs, tmp_path / "out", ("background", "cup"), holds_volumes=False)


@pytest.mark.parametrize("place", [(30, 70), (50, 30), (65, 85)])
def test_the_bright_crop_follows_the_disc(place):
    image, disc, _ = photograph(place)
    top, left, height, width = around_bright_disc(image)
    assert disc[top : top + height, left : left + width].sum() == disc.sum()


def test_the_square_around_a_disc_at_the_border_stays_inside():
    disc = np.zeros((20, 30), bool)
    disc[0:4, 26:30] = True
    assert around(disc, 2.0) == (0, 22, 8, 8)


@pytest.mark.faults
def test_voxels_that_are_not_finite_are_refused_or_filled_on_request(btcv_tree, tmp_path):
    scan_file = next(iter(sorted((btcv_tree).rglob("img0001.nii.gz"))))
    image = nibabel.load(scan_file)
    voxels = np.asarray(image.dataobj, np.float32)
    voxels[0, 0, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), scan_file)
    with pytest.raises(DataError, match=r"1 of .* voxels are NaN or infinite"):
        read_volume_pair(
            [scan_file], _label_of(scan_file), Geometry(label_values=dict.fromkeys(range(14), 0))
        )
    filled = Geometry(label_values=dict.fromkeys(range(14), 0), nan_fill=-1000.0)
    _, notes = read_volume_pair([scan_file], _label_of(scan_file), filled)
    assert any("set to -1000" in note for note in notes)


def _label_of(scan_file):
    return scan_file.parent.parent / "label" / scan_file.name.replace("img", "label")


def test_only_volumes_lose_their_training_slices_without_foreground(tmp_path):
    empty = np.zeros((8, 8), np.uint8)
    for index in range(3):
        for folder, array in (("images", np.full((8, 8, 3), 90, np.uint8)), ("masks", empty)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / folder / f"{index}.png")
    pairs = pair_folders(tmp_path / "images", tmp_path / "masks")
    geometry = Geometry(8, foreground_slices_only=True, holds_volumes=True)
    assert not isinstance(convert(pairs.cases[0], geometry, "train"), Problem)
