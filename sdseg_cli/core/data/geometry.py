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

    def _directions(self) -> np.ndarray:
        return self.affine[:3, :3] / np.array(self.spacing_mm)


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
