"""What is laid over an image is where the label map says, in the colour of its class."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from sdseg_cli.core.reporting.overlays import (
    CLASS_COLOURS,
    colour_of,
    contact_sheet,
    overlay,
    prediction_grid,
)


def grey(height: int = 12, width: int = 16, value: int = 100) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def square(height: int = 12, width: int = 16, label: int = 1) -> np.ndarray:
    label_map = np.zeros((height, width), np.uint8)
    label_map[3:9, 4:12] = label
    return label_map


def test_an_empty_label_map_leaves_the_image_as_it_is() -> None:
    assert np.array_equal(overlay(grey(), np.zeros((12, 16), np.uint8)), grey())


def test_the_background_far_from_an_area_is_untouched() -> None:
    drawn = overlay(grey(), square())
    assert (drawn[:2] == 100).all()
    assert (drawn[:, 14:] == 100).all()


def test_inside_the_colour_is_mixed_by_alpha() -> None:
    drawn = overlay(grey(), square(label=2), alpha=0.5, contours=False)
    expected = (100 + CLASS_COLOURS[2].astype(float)) / 2
    assert np.abs(drawn[5, 7] - expected).max() <= 1
    assert (drawn[square() == 0] == 100).all()


def test_the_contour_is_the_inner_edge_in_full_colour_with_a_dark_line_outside() -> None:
    drawn = overlay(grey(), square(), alpha=0)
    assert tuple(drawn[3, 4]) == colour_of(1)
    assert tuple(drawn[8, 11]) == colour_of(1)
    assert tuple(drawn[5, 7]) == (100, 100, 100), "the middle is clear"
    assert tuple(drawn[2, 7]) == (45, 45, 45), "one pixel outside is darkened"


def test_two_classes_that_touch_have_a_contour_each() -> None:
    label_map = np.zeros((12, 16), np.uint8)
    label_map[2:10, 2:8] = 1
    label_map[2:10, 8:14] = 2
    drawn = overlay(grey(), label_map, alpha=0)
    assert tuple(drawn[5, 7]) == colour_of(1)
    assert tuple(drawn[5, 8]) == colour_of(2)


def test_an_area_at_the_border_needs_no_contour_along_it() -> None:
    drawn = overlay(grey(), np.ones((12, 16), np.uint8), alpha=0)
    assert np.array_equal(drawn, grey())


def test_grey_images_are_taken_and_inputs_are_not_changed() -> None:
    image, label_map = grey()[..., 0], square()
    assert np.array_equal(overlay(image, label_map), overlay(grey(), square()))
    assert (image == 100).all()
    assert np.array_equal(label_map, square())


def test_lines_are_wider_on_larger_pictures() -> None:
    label_map = np.zeros((480, 480), np.uint8)
    label_map[100:300, 100:300] = 1
    drawn = overlay(grey(480, 480), label_map, alpha=0)
    assert [tuple(drawn[row, 200]) == colour_of(1) for row in (99, 100, 101, 102, 103)] == [
        False,
        True,
        True,
        True,
        False,
    ]


def test_colours_come_round_again_after_the_last() -> None:
    assert colour_of(len(CLASS_COLOURS)) == colour_of(1)
    assert colour_of(len(CLASS_COLOURS) - 1) == tuple(CLASS_COLOURS[-1])
    assert overlay(grey(), square(label=255)).shape == (12, 16, 3)


def test_the_first_colours_stay_apart_for_the_colour_blind() -> None:
    """Seen with no green-sensitive cones (Vienot 1999), the first four still differ clearly."""
    linear = (CLASS_COLOURS[1:5].astype(float) / 255) ** 2.2
    seen = linear @ np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]).T
    seen = np.clip(seen, 0, 1) ** (1 / 2.2) * 255
    assert min(np.abs(one - other).max() for one, other in combinations(seen, 2)) > 40


@pytest.mark.faults
def test_an_overlay_of_another_size_is_refused_with_both_sizes() -> None:
    with pytest.raises(ValueError, match="image is 16x12 pixels, what is laid over it is 8x6"):
        overlay(grey(), np.zeros((6, 8), np.uint8))


def test_a_contact_sheet_has_a_tile_for_every_item() -> None:
    items = [(f"case {number}", grey(20, 30), square(20, 30)) for number in range(5)]
    sheet = contact_sheet(items, columns=2, tile=60)
    assert sheet.dtype == np.uint8
    assert sheet.shape[1] == 2 * 68 + 8
    assert sheet.shape[0] == 3 * (40 + 22 + 8) + 8
    assert (sheet == colour_of(1)).all(axis=-1).any()


def test_a_contact_sheet_takes_any_sizes_and_titles() -> None:
    items = [
        ("a very long title that cannot fit above a small tile.png", grey(20, 30), square(20, 30)),
        ("наука 测试\nnew line", grey(200, 13), square(200, 13)),
        ("", grey(1, 1), np.zeros((1, 1), np.uint8)),
    ]
    assert contact_sheet(items, columns=9, tile=50).shape[1] == 3 * 58 + 8


def test_a_legend_names_the_classes_but_not_the_background() -> None:
    items = [("case", grey(), np.zeros((12, 16), np.uint8))]
    plain = contact_sheet(items, tile=200)
    named = contact_sheet(items, tile=200, classes=("background", "liver", "spleen"))
    assert named.shape[0] > plain.shape[0]
    for label in (1, 2):
        assert (named == colour_of(label)).all(axis=-1).any()
    assert not (named == colour_of(3)).all(axis=-1).any()


def test_a_prediction_grid_has_three_columns_and_a_fourth_for_a_probability() -> None:
    item = ("case", grey(), square(), np.zeros((12, 16), np.uint8))
    assert prediction_grid([item], tile=64).shape[1] == 3 * 72 + 8
    probability = square().astype(np.float32) * 0.7
    assert prediction_grid([(*item, probability), item], tile=64).shape[1] == 4 * 72 + 8


def test_the_outline_of_the_truth_is_drawn_over_a_prediction_that_missed_it() -> None:
    grid = prediction_grid([("case", grey(), square(), np.zeros((12, 16), np.uint8))], tile=64)
    left = 8 + 2 * 72
    assert (grid[40:90, left : left + 64] == 255).all(axis=-1).any()


@pytest.mark.faults
def test_sheets_without_items_or_with_arrays_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        contact_sheet([])
    with pytest.raises(ValueError, match="at least one row"):
        prediction_grid([])
    with pytest.raises(ValueError, match="image is 16x12 pixels, what is laid over it is 12x12"):
        prediction_grid([("case", grey(), square(), np.zeros((12, 12), np.uint8))])
