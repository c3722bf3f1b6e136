"""From a volume to a stack of slices and back, without interpolation, so that masks lie where they belong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from sdseg_cli.core.data.geometry import VolumeGeometry

Axis = Literal["axial", "coronal", "sagittal"]
AXES: tuple[Axis, ...] = get_args(Axis)

# (slices, rows, columns), each as (RAS axis, direction): what a radiologist sees. Columns run from the
# patient's right to the left, rows from the front to the back or from the head down.
_RIGHT, _FRONT, _TOP = 0, 1, 2
_LAYOUTS: dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "axial": ((_TOP, 1), (_FRONT, -1), (_RIGHT, -1)),
    "coronal": ((_FRONT, -1), (_TOP, -1), (_RIGHT, -1)),
    "sagittal": ((_RIGHT, -1), (_TOP, -1), (_FRONT, -1)),
}
_SAMPLE = 4_000_000  # voxels that a percentile is taken over


@dataclass(frozen=True)
class SliceStack:
    """How a volume is cut into slices along the array axis nearest to an anatomical one.

    Only transposes and flips are used, so cutting is exactly invertible whatever the affine. Slices come
    in a fixed orientation, as viewers show them: axial ones from the feet up with the front at the top,
    coronal ones from the front, sagittal ones from the right, both with the head at the top; the patient's
    right is at the left of axial and coronal slices, the front at the left of sagittal ones.
    """

    geometry: VolumeGeometry
    axis: Axis

    @property
    def count(self) -> int:
        """Number of slices."""
        return self.geometry.shape[self._order[0]]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of a slice."""
        _, rows, columns = self._order
        return self.geometry.shape[rows], self.geometry.shape[columns]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Millimetres between slices, rows and columns."""
        spacing = self.geometry.spacing_mm
        slices, rows, columns = self._order
        return spacing[slices], spacing[rows], spacing[columns]

    def cut(self, array: np.ndarray) -> np.ndarray:
        """See an array (I, J, K) as slices (N, H, W); a view, nothing is copied."""
        if array.shape != self.geometry.shape:
            raise ValueError(f"array is {array.shape}, expected {self.geometry.shape}")
        return array.transpose(self._order)[self._flips]

    def join(self, slices: np.ndarray) -> np.ndarray:
        """Undo :meth:`cut`: see slices (N, H, W) as an array (I, J, K)."""
        expected = (self.count, *self.shape)
        if slices.shape != expected:
            raise ValueError(f"slices are {slices.shape}, expected {expected}")
        return slices[self._flips].transpose(np.argsort(self._order))

    @property
    def _oriented(self) -> np.ndarray:
        """(3, 2): for each array axis the RAS axis it is nearest to, and 1 or -1."""
        from nibabel.orientations import io_orientation

        return io_orientation(self.geometry.affine).astype(int)

    @property
    def _order(self) -> tuple[int, int, int]:
        nearest = self._oriented[:, 0].tolist()
        slices, rows, columns = (nearest.index(axis) for axis, _ in _LAYOUTS[self.axis])
        return slices, rows, columns

    @property
    def _flips(self) -> tuple[slice, slice, slice]:
        signs = self._oriented[:, 1]
        wanted = [direction for _, direction in _LAYOUTS[self.axis]]
        first, second, third = (
            slice(None, None, 1 if signs[axis] == direction else -1)
            for axis, direction in zip(self._order, wanted, strict=True)
        )
        return first, second, third


def apply_window(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Map a window of values to bytes, clipping what lies outside.

    Args:
        values: any real dtype and shape, finite.
        window: (low, high): low becomes 0, high 255.

    Returns:
        uint8, the same shape.
    """
    low, high = window
    if not low < high:
        raise ValueError(f"window is ({low}, {high}), expected low below high")
    scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255.0 / (high - low))
    return np.rint(np.clip(scaled, 0, 255, out=scaled), out=scaled).astype(np.uint8)


def own_window(values: np.ndarray) -> tuple[float, float]:
    """The window of a volume without a stated one: its 0.5 and 99.5 percentiles.

    Of more than four million voxels a regular sample is looked at.

    Args:
        values: any real dtype and shape, finite.

    Returns:
        (low, high) with low below high, also for a constant volume.
    """
    flat = values.ravel(order="K")
    step = max(1, flat.size // _SAMPLE) | 1  # odd, so that it never stays in step with rows of even length
    low, high = (float(value) for value in np.percentile(flat[::step].astype(np.float64), (0.5, 99.5)))
    # Beside 1e20 a one is nothing: the width grows with the value.
    return (low, high) if low < high else (low, low + max(1.0, abs(low) * 1e-6))
