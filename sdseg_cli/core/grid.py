"""The way from a case's own grid to the model's square grid, and back.

The paper squeezes every image to a square; ``pad`` keeps the aspect ratio instead, and a crop shows the
model a part of the image alone. Either way the transform is a value that is recorded with the data and
inverted exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

Resize = Literal["squeeze", "pad"]
Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels."""


@dataclass(frozen=True)
class Grid:
    """How one slice of ``height`` x ``width`` pixels lies on the model's ``size`` x ``size`` grid.

    ``crop`` is the part of the slice that the model sees, inside the slice; None is all of it.
    """

    height: int
    width: int
    size: int
    resize: Resize = "squeeze"
    crop: Box | None = None

    def __post_init__(self) -> None:
        top, left, height, width = self.seen
        fits = top >= 0 and left >= 0 and top + height <= self.height and left + width <= self.width
        if not fits or min(height, width) < 1:
            raise ValueError(f"crop {self.crop} does not lie inside {self.height}x{self.width} pixels")

    @property
    def seen(self) -> Box:
        """The part of the slice that the model sees."""
        return self.crop if self.crop is not None else (0, 0, self.height, self.width)

    @property
    def content(self) -> Box:
        """Where the part that is seen lies on the model's grid."""
        if self.resize == "squeeze":
            return 0, 0, self.size, self.size
        _, _, height, width = self.seen
        scale = self.size / max(height, width)
        height = max(1, round(height * scale))
        width = max(1, round(width * scale))
        return (self.size - height) // 2, (self.size - width) // 2, height, width

    def image_to_model(self, image: np.ndarray) -> np.ndarray:
        """Resample an image.

        Args:
            image: uint8, (height, width, 3), range [0, 255].

        Returns:
            uint8, (size, size, 3); with ``pad``, black outside the content.
        """
        image = self._cropped(image, "image")
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
        label_map = self._cropped(label_map, "label map")
        top, left, height, width = self.content
        resized = np.asarray(Image.fromarray(label_map).resize((width, height), Image.Resampling.NEAREST))
        return self._place(resized, top, left)

    def probabilities_to_case(self, probabilities: np.ndarray) -> np.ndarray:
        """Bring probabilities back bilinearly; thresholding comes after.

        Args:
            probabilities: float32, (..., K, size, size) with the background first where there is a crop,
                any (..., size, size) else.

        Returns:
            float32, (..., height, width); outside the crop all is background.
        """
        top, left, height, width = self.content
        inside = probabilities[..., top : top + height, left : left + width]
        rows, columns = self.seen[2:]
        if (height, width) == (rows, columns):
            seen = np.ascontiguousarray(inside, dtype=np.float32)
        else:
            planes = inside.reshape(-1, height, width).astype(np.float32)
            bilinear = Image.Resampling.BILINEAR
            resized = [Image.fromarray(plane).resize((columns, rows), bilinear) for plane in planes]
            seen = np.stack([np.asarray(plane) for plane in resized])
            seen = seen.reshape(*probabilities.shape[:-2], rows, columns)
        if self.crop is None:
            return seen
        top, left = self.crop[:2]
        whole = np.zeros((*seen.shape[:-2], self.height, self.width), np.float32)
        whole[..., 0, :, :] = 1
        whole[..., top : top + rows, left : left + columns] = seen
        return whole

    def _cropped(self, array: np.ndarray, name: str) -> np.ndarray:
        if array.shape[:2] != (self.height, self.width):
            raise ValueError(
                f"{name} is {array.shape[1]}x{array.shape[0]} pixels, the grid is for "
                f"{self.width}x{self.height}"
            )
        if self.crop is None:
            return array
        top, left, height, width = self.crop
        return np.ascontiguousarray(array[top : top + height, left : left + width])

    def _place(self, resized: np.ndarray, top: int, left: int) -> np.ndarray:
        if self.resize == "squeeze":
            return resized
        placed = np.zeros((self.size, self.size, *resized.shape[2:]), resized.dtype)
        placed[top : top + resized.shape[0], left : left + resized.shape[1]] = resized
        return placed
