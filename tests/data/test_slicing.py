"""Slices of volumes in any orientation, and back."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sdseg_cli.core.data.slicing import AXES, Axis, SliceStack, apply_window, own_window
from sdseg_cli.core.data.volumes import VolumeGeometry


def random_geometry(seed: int) -> VolumeGeometry:
    """A turned, flipped, permuted, anisotropic grid, some of them sheared."""
    generator = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(generator.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(generator.uniform(0.3, 5, 3))
    if seed % 3 == 0:
        affine[:3, 0] += 0.2 * affine[:3, 1]
    affine[:3, 3] = generator.uniform(-300, 300, 3)
    sizes = generator.permutation([4, 5, 7])
    return VolumeGeometry((int(sizes[0]), int(sizes[1]), int(sizes[2])), affine)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("seed", range(25))
def test_cutting_and_joining_is_exact_for_any_affine(axis: Axis, seed: int) -> None:
    geometry = random_geometry(seed)
    stack = SliceStack(geometry, axis)
    array = np.random.default_rng(seed).integers(0, 255, geometry.shape)
    slices = stack.cut(array)
    assert slices.shape == (stack.count, *stack.shape)
    assert np.shares_memory(slices, array)
    assert np.array_equal(stack.join(slices), array)
    assert np.array_equal(stack.join(np.ascontiguousarray(slices)), array)


@pytest.mark.parametrize(
    ("axis", "slices", "rows", "columns"),
    [
        ("axial", (0, 0, 1), (0, -1, 0), (-1, 0, 0)),
        ("coronal", (0, -1, 0), (0, 0, -1), (-1, 0, 0)),
        ("sagittal", (-1, 0, 0), (0, 0, -1), (0, -1, 0)),
    ],
)
def test_slices_of_all_48_orientations_lie_the_same_way(
    axis: Axis, slices: tuple, rows: tuple, columns: tuple
) -> None:
    """The array holds its own positions, so that each slice says how it lies in the patient."""
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            affine = np.eye(4)
            affine[:3, :3] = 0
            for array_axis, (ras, sign) in enumerate(zip(order, signs, strict=True)):
                affine[ras, array_axis] = sign * (array_axis + 1)
            geometry = VolumeGeometry((3, 4, 5), affine)
            indices = np.moveaxis(np.indices((3, 4, 5)), 0, -1)
            positions = indices @ affine[:3, :3].T
            stack = SliceStack(geometry, axis)
            cut = np.stack([stack.cut(positions[..., d]) for d in range(3)], axis=-1)
            for step, wanted, size in (
                (cut[1, 0, 0] - cut[0, 0, 0], slices, stack.spacing_mm[0]),
                (cut[0, 1, 0] - cut[0, 0, 0], rows, stack.spacing_mm[1]),
                (cut[0, 0, 1] - cut[0, 0, 0], columns, stack.spacing_mm[2]),
            ):
                np.testing.assert_allclose(step, np.multiply(wanted, size))


def test_a_tilted_scan_is_cut_along_its_nearest_axis() -> None:
    angle = np.radians(40)
    affine = np.eye(4)
    affine[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    stack = SliceStack(VolumeGeometry((4, 5, 6), affine), "axial")
    assert (stack.count, stack.shape) == (6, (5, 4))


def test_arrays_of_another_shape_are_refused() -> None:
    stack = SliceStack(VolumeGeometry((4, 5, 6), np.eye(4)), "axial")
    with pytest.raises(ValueError, match="expected"):
        stack.cut(np.zeros((4, 5, 5)))
    with pytest.raises(ValueError, match="expected"):
        stack.join(np.zeros((5, 5, 4)))


def test_a_window_clips_and_scales() -> None:
    values = np.array([-3000, -175, 37.5, 250, 32767])
    assert apply_window(values, (-175, 250)).tolist() == [0, 0, 128, 255, 255]
    assert apply_window(values.astype(np.int16), (-175, 250)).dtype == np.uint8
    with pytest.raises(ValueError, match="low below high"):
        apply_window(values, (3, 3))


def test_a_volumes_own_window_leaves_out_the_outermost_values() -> None:
    values = np.arange(1000).reshape(10, 10, 10)
    assert own_window(values) == pytest.approx(np.percentile(values, (0.5, 99.5)))
    assert own_window(np.full((3, 3, 3), 7)) == (7, 8)
    large = np.random.default_rng(0).normal(size=(200, 200, 201))
    assert own_window(large) == pytest.approx(np.percentile(large, (0.5, 99.5)), abs=0.02)
