"""The phantoms are deterministic, varied, and no prey for a threshold."""

from __future__ import annotations

import time

import numpy as np
import pytest
from skimage.filters import threshold_otsu
from skimage.measure import label

from sdseg_cli.core.data.phantom import (
    PHANTOM_KINDS,
    make_phantom,
    otsu_dice,
    phantom_classes,
    random_masks,
)
from sdseg_cli.core.errors import UsageError

kinds = pytest.mark.parametrize("kind", PHANTOM_KINDS)


@kinds
def test_the_same_arguments_give_the_same_picture(kind: str) -> None:
    first, again = (make_phantom(kind, seed=3, index=5, size=64) for _ in range(2))
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])


@kinds
@pytest.mark.parametrize("other", [{"seed": 4}, {"index": 6}, {"size": 65}])
def test_another_seed_index_or_size_gives_another_picture(kind: str, other: dict[str, int]) -> None:
    base = {"seed": 3, "index": 5, "size": 64}
    assert not np.array_equal(make_phantom(kind, **base)[0], make_phantom(kind, **{**base, **other})[0])


@kinds
@pytest.mark.parametrize("size", [32, 51, 128])
def test_image_and_label_map_agree_in_type_and_size(kind: str, size: int) -> None:
    image, label_map = make_phantom(kind, seed=0, index=0, size=size)
    assert image.dtype == label_map.dtype == np.uint8
    assert image.shape == (*label_map.shape, 3)
    assert all(0.84 * size < side < 1.31 * size for side in label_map.shape)


@kinds
def test_sizes_vary_from_case_to_case(kind: str) -> None:
    shapes = {make_phantom(kind, seed=0, index=index, size=48)[1].shape for index in range(8)}
    assert len(shapes) > 4


@kinds
def test_a_threshold_does_not_solve_a_phantom(kind: str) -> None:
    scores = [otsu_dice(*make_phantom(kind, seed=0, index=index, size=96)) for index in range(60)]
    assert 0.1 < np.mean(scores) < 0.5
    assert max(scores) < 0.8


@kinds
def test_labels_are_the_classes_and_each_of_them_occurs(kind: str) -> None:
    values = set()
    for index in range(6):
        values |= set(np.unique(make_phantom(kind, seed=1, index=index, size=64)[1]).tolist())
    assert values == set(range(len(phantom_classes(kind))))


def test_every_endoscopy_shows_a_polyp() -> None:
    areas = [(make_phantom("endoscopy", seed=2, index=index, size=48)[1] > 0).mean() for index in range(60)]
    assert min(areas) > 0.005
    assert max(areas) < 0.6


def test_organs_are_sometimes_missing_and_mostly_there() -> None:
    maps = [make_phantom("organs", seed=2, index=index, size=48)[1] for index in range(60)]
    complete = [set(np.unique(label_map).tolist()) == {0, 1, 2, 3} for label_map in maps]
    assert 0.7 < np.mean(complete) < 1


def test_the_organs_have_the_brightness_of_their_neighbours() -> None:
    """Of the pixels as bright as the organs, fewer than two thirds belong to an organ."""
    shares = []
    for index in range(12):
        image, label_map = make_phantom("organs", seed=5, index=index, size=96)
        low, high = np.percentile(image[..., 0][label_map > 0], [20, 80])
        as_bright = (image[..., 0] >= low) & (image[..., 0] <= high)
        shares.append((label_map[as_bright] > 0).mean())
    assert np.mean(shares) < 2 / 3


def test_ct_like_pictures_are_grey() -> None:
    image, _ = make_phantom("organs", seed=0, index=0, size=48)
    assert np.array_equal(image[..., 0], image[..., 1])
    assert np.array_equal(image[..., 0], image[..., 2])


def test_classes_are_named_with_the_background_first() -> None:
    assert phantom_classes("endoscopy") == ("background", "polyp")
    assert phantom_classes("organs") == ("background", "liver-like", "kidney-like", "spleen-like")


@pytest.mark.faults
def test_an_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"no phantom 'brain'\. Choose endoscopy or organs"):
        phantom_classes("brain")
    with pytest.raises(UsageError, match="no phantom 'brain'"):
        make_phantom("brain", seed=0, index=0)


@pytest.mark.faults
def test_a_size_that_is_too_small_is_refused_with_the_minimum() -> None:
    with pytest.raises(UsageError, match=r"phantom of 8 pixels is too small\. Ask for at least 32"):
        make_phantom("endoscopy", seed=0, index=0, size=8)


def test_otsu_dice_of_a_bright_or_a_dark_square_is_one() -> None:
    label_map = np.zeros((8, 8), np.uint8)
    label_map[2:5, 2:5] = 1
    bright = np.repeat((label_map * 200)[..., None], 3, axis=2)
    assert otsu_dice(bright, label_map) == 1
    assert otsu_dice(255 - bright, label_map) == 1


def test_otsu_dice_without_foreground_is_nan() -> None:
    assert np.isnan(otsu_dice(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)))


def test_otsu_dice_uses_the_threshold_of_scikit_image() -> None:
    image, label_map = make_phantom("organs", seed=7, index=0, size=64)
    truth = label_map > 0
    bright = image[..., 0] > threshold_otsu(image[..., 0])
    expected = max(2 * (p & truth).sum() / (p.sum() + truth.sum()) for p in (bright, ~bright))
    assert otsu_dice(image, label_map) == pytest.approx(expected, abs=1e-12)


def test_random_masks_are_binary_and_repeatable() -> None:
    mask = random_masks(1, 2, 64)
    assert mask.dtype == np.uint8
    assert mask.shape == (64, 64)
    assert set(np.unique(mask).tolist()) <= {0, 1}
    assert np.array_equal(mask, random_masks(1, 2, 64))
    assert not np.array_equal(mask, random_masks(2, 2, 64))


@pytest.mark.parametrize("size", [8, 17, 64])
def test_random_masks_of_any_size_can_be_drawn(size: int) -> None:
    assert all(random_masks(0, index, size).shape == (size, size) for index in range(200))


def test_random_masks_are_varied() -> None:
    masks = [random_masks(0, index, 64) for index in range(400)]
    areas = np.array([mask.mean() for mask in masks])
    assert (areas == 0).any(), "some are empty"
    assert (areas > 0.8).any(), "some are nearly full"
    assert (areas[areas > 0] < 0.005).any(), "some are specks"
    pieces = [label(mask, background=0, return_num=True)[1] for mask in masks]
    holes = [label(1 - mask, background=0, return_num=True)[1] for mask in masks]
    border = [mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any() for mask in masks]
    assert np.mean(np.array(pieces) > 1) > 0.1
    assert np.mean(np.array(holes) > 1) > 0.1
    assert 0.1 < np.mean(border) < 0.6


def test_random_masks_are_fast_enough_to_train_on() -> None:
    random_masks(0, 0, 256)
    start = time.process_time()
    for index in range(20):
        random_masks(0, index, 256)
    assert (time.process_time() - start) / 20 < 0.02
