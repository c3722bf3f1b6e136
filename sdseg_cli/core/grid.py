"""The way from a case's own grid to the model's square grid, and back.

The paper squeezes every image to a square; ``pad`` keeps the aspect ratio instead. Either way the
transform is a value that is recorded with the data and inverted exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

Resize = Literal["squeeze", "pad"]


@dataclass(frozen=True)
class Grid:
    """How one slice of ``height`` x ``width`` pixels lies on the model's ``size`` x ``size`` grid."""

    height: int
    width: int
    size: int
    resize: Resize = "squeeze"

    @property
    def content(self) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the image on the model's grid, in pixels."""
        if self.resize == "squeeze":
            return 0, 0, self.size, self.size
        scale = self.size / max(self.height, self.width)
        height = max(1, round(self.height * scale))
        width = max(1, round(self.width * scale))
        return (self.size - height) // 2, (self.size - width) // 2, height, width

    def image_to_model(self, image: np.ndarray) -> np.ndarray:
        """Resample an image.

        Args:
            image: uint8, (height, width, 3), range [0, 255].

        Returns:
            uint8, (size, size, 3); with ``pad``, black outside the content.
        """
        self._check(image, "image")
        top, left, height, width = self.content
        resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
        return self._place(resized, top, left)

    def labels_to_model(self, label_map: np.ndarray) -> np.ndarray:
        """Resample a label map by nearest neighbour: labels are never interpolated.

        Args:
            label_map: uint8, (height, width).

        Returns:
            uint8, (size, size); with ``pad``, 0 outside the content.
        """
        self._check(label_map, "label map")
        top, left, height, width = self.content
        resized = np.asarray(Image.fromarray(label_map).resize((width, height), Image.Resampling.NEAREST))
        return self._place(resized, top, left)

    def probabilities_to_case(self, probabilities: np.ndarray) -> np.ndarray:
        """Bring probabilities back bilinearly; thresholding comes after.

        Args:
            probabilities: float32, (..., size, size).

        Returns:
            float32, (..., height, width).
        """
        top, left, height, width = self.content
        inside = probabilities[..., top : top + height, left : left + width]
        if (height, width) == (self.height, self.width):
            return np.ascontiguousarray(inside, dtype=np.float32)
        planes = inside.reshape(-1, height, width).astype(np.float32)
        bilinear = Image.Resampling.BILINEAR
        resized = [Image.fromarray(plane).resize((self.width, self.height), bilinear) for plane in planes]
        return np.stack([np.asarray(plane) for plane in resized]).reshape(
            *probabilities.shape[:-2], self.height, self.width
        )

    def _check(self, array: np.ndarray, name: str) -> None:
        if array.shape[:2] != (self.height, self.width):
            raise ValueError(
                f"{name} is {array.shape[1]}x{array.shape[0]} pixels, the grid is for "
                f"{self.width}x{self.height}"
            )

    def _place(self, resized: np.ndarray, top: int, left: int) -> np.ndarray:
        if self.resize == "squeeze":
            return resized
        placed = np.zeros((self.size, self.size, *resized.shape[2:]), resized.dtype)
        placed[top : top + resized.shape[0], left : left + resized.shape[1]] = resized
        return placed
