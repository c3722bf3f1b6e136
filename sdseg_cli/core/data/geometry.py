"""Where the voxels of a volume lie in the patient, and the one place where RAS and LPS meet.

nibabel and this package speak of millimetres to the patient's right-to-left as R+ ("RAS+"); SimpleITK and
DICOM count towards the left and the back ("LPS+"). Both mean the centres of the voxels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
SHEAR_DEGREES = 0.1
"""Array axes further from a right angle than this are called sheared."""


@dataclass(frozen=True, eq=False)
class VolumeGeometry:
    """Size and place of a volume.

    Attributes:
        shape: voxels along the array axes i, j, k.
        affine: float64, (4, 4), array index (i, j, k, 1) -> RAS+ millimetres.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxels along i, j and k, in mm."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(i), float(j), float(k)

    @property
    def origin_mm(self) -> tuple[float, float, float]:
        """Centre of the first voxel, RAS+ mm."""
        x, y, z = self.affine[:3, 3]
        return float(x), float(y), float(z)

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres, right for sheared grids too."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    @property
    def shear_degrees(self) -> float:
        """The largest deviation of two array axes from a right angle."""
        directions = self._directions()
        cosines = np.abs(directions.T @ directions - np.eye(3)).max()
        return math.degrees(math.asin(min(1.0, float(cosines))))

    def describe(self) -> str:
        """Size, spacing and origin in a line, for messages."""
        size = " x ".join(map(str, self.shape))
        spacing = " x ".join(f"{value:.4g}" for value in self.spacing_mm)
        origin = ", ".join(f"{value:.2f}" for value in self.origin_mm)
        return f"{size} voxels of {spacing} mm from ({origin}) mm"

    def differences(
        self,
        other: VolumeGeometry,
        *,
        spacing_tolerance_mm: float = 1e-3,
        origin_tolerance_mm: float = 1e-2,
        direction_tolerance_degrees: float = 0.1,
    ) -> list[str]:
        """What keeps two volumes from lying voxel on voxel.

        The tolerances are wide enough for files that store 32-bit or rounded numbers.

        Args:
            other: the geometry to compare with.
            spacing_tolerance_mm: for the distance between voxels along each array axis.
            origin_tolerance_mm: for the place of the first voxel.
            direction_tolerance_degrees: for the angle between the same array axis of both.

        Returns:
            A sentence for each of size, spacing, origin and direction that differs; empty where all agree.
        """
        found = []
        if self.shape != other.shape:
            found.append(f"The size is {_join(self.shape)} against {_join(other.shape)} voxels.")
        spacings = np.array(self.spacing_mm), np.array(other.spacing_mm)
        if np.abs(spacings[0] - spacings[1]).max() > spacing_tolerance_mm:
            found.append(f"The spacing is {_join(self.spacing_mm)} against {_join(other.spacing_mm)} mm.")
        distance = float(np.linalg.norm(self.affine[:3, 3] - other.affine[:3, 3]))
        if distance > origin_tolerance_mm:
            found.append(f"The first voxels are {distance:.4g} mm apart.")
        # The angle by the chord: the cosine of small angles has no digits left.
        chords = np.linalg.norm(self._directions() - other._directions(), axis=0)
        angles = np.degrees(2 * np.arcsin(np.minimum(1.0, chords / 2)))
        if angles.max() > direction_tolerance_degrees:
            degrees = ", ".join(f"{angle:.4g}" for angle in angles)
            found.append(f"The array axes point apart by {degrees} degrees.")
        return found

    def inside(self, other: VolumeGeometry, *, tolerance: float = 0.05) -> VoxelBlock | None:
        """Find the block of another grid that these voxels are, if they are one.

        Args:
            other: the grid, which may be larger and count its axes in another order or direction.
            tolerance: how far the first corner and those along each axis may be from voxels of it, in voxels.

        Returns:
            The block; it may reach beyond ``other``. None where the voxels lie between those of ``other``.
        """
        steps = np.linalg.inv(other.affine) @ self.affine
        order = np.abs(steps[:3, :3]).argmax(axis=0)  # for each own axis that of the grid
        if len({*order.tolist()}) < 3:
            return None
        signs = np.sign(steps[order, np.arange(3)]).astype(int)
        extent = np.array(self.shape) - 1
        first = np.rint(steps[:3, 3]).astype(int)
        last = first.copy()
        last[order] += signs * extent
        edges = np.zeros((3, 3))  # of the block, from its first corner along each of its axes
        edges[order, np.arange(3)] = signs * extent
        off = np.abs(steps[:3, 3] - first).max() + np.abs(steps[:3, :3] * extent - edges).max()
        if off > tolerance:
            return None
        axes = np.argsort(order)
        return VoxelBlock(
            start=tuple(np.minimum(first, last).tolist()),
            stop=tuple((np.maximum(first, last) + 1).tolist()),
            order=tuple(axes.tolist()),
            signs=tuple(signs[axes].tolist()),
        )

    def _directions(self) -> np.ndarray:
        return self.affine[:3, :3] / np.array(self.spacing_mm)


@dataclass(frozen=True)
class VoxelBlock:
    """A block of a larger grid.

    Attributes:
        start, stop: along the axes of the grid; they may lie outside it.
        order: for each axis of the grid the axis of the block.
        signs: for each axis of the grid 1 or -1, whether the block counts the same way.
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]
    order: tuple[int, ...]
    signs: tuple[int, ...]

    def fits(self, shape: tuple[int, int, int]) -> bool:
        """Whether all of it lies in a grid of this shape."""
        return min(self.start) >= 0 and all(stop <= size for stop, size in zip(self.stop, shape, strict=True))

    def laid_in(self, shape: tuple[int, int, int], voxels: np.ndarray) -> np.ndarray:
        """Lay the block's voxels into a grid of zeros."""
        filled = np.zeros(shape, voxels.dtype)
        place = tuple(slice(start, stop) for start, stop in zip(self.start, self.stop, strict=True))
        turned = tuple(slice(None, None, sign) for sign in self.signs)
        filled[place] = voxels.transpose(self.order)[turned]
        return filled


def geometry_from_lps(
    size: tuple[int, int, int],
    origin: tuple[float, ...],
    spacing: tuple[float, ...],
    direction: tuple[float, ...],
) -> VolumeGeometry:
    """Take over the geometry of a SimpleITK image or a DICOM series.

    Args:
        size: voxels along the image axes x, y, z; they become the array axes i, j, k.
        origin: centre of the first voxel, LPS+ mm.
        spacing: mm along x, y, z.
        direction: 9 numbers row by row; column n is the unit vector of image axis n in LPS+.
    """
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(direction, (3, 3)) * np.asarray(spacing, dtype=np.float64)
    affine[:3, 3] = origin
    return VolumeGeometry(size, _LPS_TO_RAS @ affine)


def lps_from_geometry(
    geometry: VolumeGeometry,
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Turn :func:`geometry_from_lps` round: (origin, spacing, direction) as SimpleITK sets them."""
    affine = _LPS_TO_RAS @ geometry.affine
    spacing = geometry.spacing_mm
    direction = affine[:3, :3] / np.array(spacing)
    return (
        tuple(float(value) for value in affine[:3, 3]),
        spacing,
        tuple(float(value) for value in direction.ravel()),
    )


def _join(values: tuple[float, ...]) -> str:
    return " x ".join(f"{value:.6g}" for value in values)
