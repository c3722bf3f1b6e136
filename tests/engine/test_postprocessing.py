"""Largest components, worked out by eye."""

import numpy as np

from sdseg_cli.core.engine.postprocessing import keep_largest_components, keep_largest_in_stack


def test_each_class_keeps_its_largest_piece_and_the_rest_becomes_background():
    label_map = np.array(
        [
            [1, 1, 0, 0, 2],
            [1, 0, 0, 0, 0],
            [0, 0, 1, 0, 2],
            [0, 2, 0, 0, 2],
        ],
        np.uint8,
    )
    expected = label_map.copy()
    expected[2, 2] = 0
    expected[0, 4] = 0
    expected[3, 1] = 0
    found = keep_largest_components(label_map)
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected)
    assert label_map[2, 2] == 1  # the given map is not changed


def test_pixels_that_touch_at_a_corner_are_one_piece_and_of_equal_pieces_the_first_stays():
    corner = np.array([[1, 0, 0, 0], [0, 1, 0, 1]], np.uint8)
    assert np.array_equal(keep_largest_components(corner), [[1, 0, 0, 0], [0, 1, 0, 0]])
    equal = np.array([[1, 0, 1]], np.uint8)
    assert np.array_equal(keep_largest_components(equal), [[1, 0, 0]])


def test_empty_maps_and_volumes_are_taken():
    assert not keep_largest_components(np.zeros((3, 3), np.uint8)).any()
    volume = np.zeros((3, 4, 4), np.uint8)
    volume[:2, 0, 0] = 1  # two voxels through the slices
    volume[2, 3, 3] = 1
    kept = keep_largest_components(volume)
    assert kept.sum() == 2
    assert kept[2, 3, 3] == 0


def test_slices_of_a_volume_keep_its_largest_piece_whatever_their_order_and_gaps():
    column, dot, empty = (np.zeros((3, 3), np.uint8) for _ in range(3))
    column[0, 0] = 1
    dot[2, 2] = 1
    # Slices 4 and 5 hold one piece of two voxels; slice 7 lies beyond a gap.
    kept = keep_largest_in_stack([dot, column, empty, column], [7, 5, 9, 4])
    assert [int(label_map.sum()) for label_map in kept] == [0, 1, 0, 1]
    kept = keep_largest_in_stack([column, column, dot], [4, 6, 5])
    assert [int(label_map.sum()) for label_map in kept] == [1, 0, 0]  # all three are apart: the first stays
