"""Volumes against volumes: three-dimensional distances in mm, and masks that lie elsewhere."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from sdseg_cli.core.data.volumes import VolumeGeometry, write_label_volume
from sdseg_cli.core.engine.evaluation_records import CaseScores, FailedCase
from sdseg_cli.core.engine.folder_evaluation import evaluate_folders, pair_folders
from sdseg_cli.core.metrics.surface import surface_scores

CLASSES = ("background", "organ")
AFFINE = np.diag([0.5, 0.5, 4.0, 1.0])


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("predictions", "truth"):
        (tmp_path / name).mkdir()
    return tmp_path / "predictions", tmp_path / "truth"


def save(path: Path, labels: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    write_label_volume(path, labels, VolumeGeometry(labels.shape, affine))


def cube(shift: int = 0) -> np.ndarray:
    labels = np.zeros((12, 10, 8), np.uint8)
    labels[3:8, 3:7, 2 + shift : 5 + shift] = 1
    return labels


def score(folders: tuple[Path, Path], **options) -> list[CaseScores | FailedCase]:
    return list(evaluate_folders(pair_folders(*folders), CLASSES, **options))


def test_volumes_of_two_formats_are_measured_in_mm_along_all_axes(folders):
    save(folders[0] / "a.nii.gz", cube(shift=1))
    save(folders[1] / "a.mha", cube())
    (record,) = score(folders)
    (entry,) = record.classes
    assert (record.unit, record.slices) == ("mm", 8)
    assert entry.dice == pytest.approx(2 / 3)
    assert entry.hd95 == pytest.approx(4.0)  # one slice of 4 mm
    expected = surface_scores(cube(1) == 1, cube() == 1, (0.5, 0.5, 4.0))
    assert (entry.assd, entry.nsd) == (expected.assd, expected.nsd)
    assert 0 < entry.nsd < 1
    (wide,) = score(folders, nsd_tolerance=4.0)
    assert wide.classes[0].nsd == 1


def test_a_volume_elsewhere_fails_with_both_geometries_unless_it_is_resampled(folders):
    turned = np.diag([-0.5, 0.5, 4.0, 1.0])
    turned[0, 3] = 0.5 * 11
    save(folders[0] / "a.nii.gz", cube()[::-1], turned)
    save(folders[1] / "a.nii.gz", cube())
    save(folders[0] / "b.nrrd", cube())
    save(folders[1] / "b.nii", cube())
    failed, done = score(folders)
    assert isinstance(failed, FailedCase)
    assert failed.error.count("12 x 10 x 8 voxels of 0.5 x 0.5 x 4 mm") == 2
    assert "--resample" in failed.error
    assert "180, 0, 0 degrees" in failed.error
    assert done.dice == 1
    resampled, _ = score(folders, resample=True)
    assert resampled.dice == 1
    assert resampled.classes[0].hd95 == 0


def test_nsd_agrees_with_monai_and_says_0_for_a_missed_structure():
    import torch
    from monai.metrics import compute_surface_dice

    a, b = cube(1), cube()
    ours = surface_scores(a == 1, b == 1, (0.5, 0.5, 4.0), tolerance=1.0).nsd
    one_hot = [torch.from_numpy(np.stack([x == 0, x == 1])[None]) for x in (a, b)]
    theirs = compute_surface_dice(*one_hot, class_thresholds=[1.0], spacing=[0.5, 0.5, 4.0])
    assert ours == pytest.approx(float(theirs), abs=1e-6)
    assert surface_scores(a == 1, b == 2).nsd == 0
    assert np.isnan(surface_scores(a == 3, b == 3).nsd)


def test_the_page_shows_axial_slices_as_viewers_do_whatever_the_order_of_the_axes(folders):
    # Stored as (feet-head, right-left, back-front), all three counted against RAS.
    affine = np.array([[0, -0.5, 0, 20], [0, 0, -0.7, 30], [-2.0, 0, 0, 40], [0, 0, 0, 1]])
    truth = np.zeros((9, 40, 30), np.uint8)
    truth[3:7, 5:12, 4:20] = 1
    predicted = truth.copy()
    predicted[5, 5:12, 12:20] = 0
    save(folders[0] / "a.nii.gz", predicted, affine)
    save(folders[1] / "a.nii.gz", truth, affine)
    (record,) = score(folders)
    assert record.slices == 9
    canonical = nibabel.as_closest_canonical(nibabel.load(folders[1] / "a.nii.gz")).get_fdata()
    shown = record.picture
    assert shown.slice_index == 9 - 1 - 5  # from the feet up
    assert shown.pixel_mm == pytest.approx((0.7, 0.5))
    # Rows from the front to the back, columns from the patient's right to the left.
    viewed = canonical[::-1, ::-1, shown.slice_index].T
    assert shown.grid.content[2:] == (192, 256)
    expected = shown.grid.labels_to_model(np.ascontiguousarray(viewed).astype(np.uint8))
    np.testing.assert_array_equal(shown.ground_truth, expected)
    assert shown.prediction.sum() < shown.ground_truth.sum()
    assert [picture.slice_index for picture in record.stack] == [2, 3, 4, 5]
