"""Surface distances against drawings, worked by hand, and against a slow oracle."""

import math

import numpy as np
import pytest

from sdseg_cli.core.metrics.surface import SurfaceScores, surface_scores


def drawn(*rows: str) -> np.ndarray:
    return np.array([[character == "#" for character in row] for row in rows])


LEFT = drawn(
    "......",
    ".#....",
    "......",
)
RIGHT = drawn(
    "......",
    "....#.",
    "......",
)


def oracle(prediction, truth, spacing=(1.0, 1.0)):
    """Every outline pixel against every outline pixel."""

    def outline(mask):
        padded = np.pad(mask, 1)
        inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        return np.argwhere(mask & ~inner) * np.array(spacing)

    first, second = outline(prediction), outline(truth)
    distances = np.linalg.norm(first[:, None] - second[None], axis=-1)
    there, back = distances.min(1), distances.min(0)
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    return hd95, np.concatenate([there, back]).mean()


def test_two_pixels_three_columns_apart_are_three_pixels_apart():
    assert surface_scores(LEFT, RIGHT) == SurfaceScores(hd95=3.0, assd=3.0, nsd=0.0)


def test_distances_are_in_millimetres_along_the_right_axis():
    assert surface_scores(LEFT, RIGHT, (10.0, 0.5)) == SurfaceScores(hd95=1.5, assd=1.5, nsd=1.0)


def test_the_larger_direction_decides_hd95_and_assd_pools_both():
    both = LEFT | RIGHT
    # From LEFT to both: 0. From both to LEFT: 0 and 3; its 95th percentile is 2.85.
    scores = surface_scores(LEFT, both)
    assert scores.hd95 == pytest.approx(2.85)
    assert scores.assd == pytest.approx(1.0)
    assert surface_scores(both, LEFT) == scores


def test_the_inside_of_a_mask_does_not_count():
    truth = drawn(
        "#####",
        "#####",
        "#####",
        "#####",
        "#####",
    )
    ring = truth.copy()
    ring[1:4, 1:4] = False
    assert surface_scores(truth, ring).assd == 0  # both outlines run along the border of the image


def test_random_blobs_agree_with_the_slow_oracle():
    generator = np.random.default_rng(3)
    for _ in range(5):
        prediction, truth = (generator.random((2, 13, 17)) > 0.6).astype(bool)
        scores = surface_scores(prediction, truth, (0.7, 1.3))
        hd95, assd = oracle(prediction, truth, (0.7, 1.3))
        assert scores.hd95 == pytest.approx(hd95, abs=1e-6)
        assert scores.assd == pytest.approx(assd, abs=1e-6)


def test_a_volume_is_measured_in_three_dimensions():
    prediction = np.zeros((4, 3, 3), bool)
    truth = prediction.copy()
    prediction[0, 1, 1] = truth[3, 1, 1] = True
    assert surface_scores(prediction, truth, (5.0, 1.0, 1.0)).hd95 == 15.0


@pytest.mark.faults(27)
def test_a_missed_and_an_invented_structure_are_infinitely_far():
    empty = np.zeros_like(LEFT)
    assert surface_scores(empty, LEFT) == SurfaceScores(math.inf, math.inf, 0.0)
    assert surface_scores(LEFT, empty) == SurfaceScores(math.inf, math.inf, 0.0)


@pytest.mark.faults(27)
def test_two_empty_masks_have_no_distance():
    empty = np.zeros_like(LEFT)
    scores = surface_scores(empty, empty)
    assert math.isnan(scores.hd95)
    assert math.isnan(scores.assd)


@pytest.mark.faults
@pytest.mark.parametrize("spacing", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, math.nan)])
def test_a_spacing_that_is_none_is_refused(spacing):
    with pytest.raises(ValueError, match="expected 2 positive numbers"):
        surface_scores(LEFT, RIGHT, spacing)
