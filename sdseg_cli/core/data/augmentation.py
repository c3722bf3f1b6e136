"""Random changes of a training image and its label map, which move together.

Every change follows from one seed, so that a resumed run sees the pictures that an uninterrupted one sees.
"""

from __future__ import annotations

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

BLUR_DEVIATION = (0.003, 0.01)  # of the Gaussian, as a fraction of the image's side
NOISE_DEVIATION = (0.01, 0.05)  # as a fraction of the range of grey values


class Augmentation:
    """Flips, affine maps, and changes of colour, sharpness and noise; each with its own chance.

    Args:
        horizontal_flip: chance of a left-right flip.
        vertical_flip: chance of an upside-down flip.
        affine: chance of a rotation, shift, zoom and shear, all at once, bounded by the next four.
        rotation_degrees: largest rotation to either side.
        translate: largest shift along each axis, as a fraction of the side.
        scale: the zoom lies between 1 - scale and 1 + scale.
        shear_degrees: largest shear to either side.
        colour: chance of a change of colour, bounded by the next four.
        brightness: the factor lies between 1 - brightness and 1 + brightness.
        contrast: likewise.
        saturation: likewise.
        hue: largest turn of the colour wheel to either side, in turns, at most 0.5.
        blur: chance of a Gaussian blur.
        noise: chance of added Gaussian noise.
    """

    def __init__(
        self,
        *,
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.5,
        affine: float = 0.0,
        rotation_degrees: float = 15.0,
        translate: float = 0.1,
        scale: float = 0.2,
        shear_degrees: float = 0.0,
        colour: float = 0.0,
        brightness: float = 0.2,
        contrast: float = 0.2,
        saturation: float = 0.2,
        hue: float = 0.05,
        blur: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        self.blur = blur
        self.noise = noise
        steps: list[v2.Transform] = []
        if horizontal_flip > 0:
            steps.append(v2.RandomHorizontalFlip(horizontal_flip))
        if vertical_flip > 0:
            steps.append(v2.RandomVerticalFlip(vertical_flip))
        if affine > 0:
            # Label maps are taken by nearest neighbour whatever the interpolation; outside is background.
            moved = v2.RandomAffine(
                degrees=rotation_degrees,
                translate=(translate, translate),
                scale=(1 - scale, 1 + scale),
                shear=(-shear_degrees, shear_degrees, -shear_degrees, shear_degrees),
                interpolation=v2.InterpolationMode.BILINEAR,
                fill=0,
            )
            steps.append(v2.RandomApply([moved], p=affine))
        if colour > 0:
            jitter = v2.ColorJitter(brightness, contrast, saturation, hue)
            steps.append(v2.RandomApply([jitter], p=colour))
        self.transform = v2.Compose(steps) if steps else None

    def __call__(
        self, image: torch.Tensor, label_map: torch.Tensor, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Change one pair.

        Args:
            image: uint8, (3, S, S), range [0, 255].
            label_map: uint8, (S, S), class indices.
            seed: of every draw, in [0, 2**63). The generators of the process are left as they were.

        Returns:
            The image and the label map, of the same types and shapes; every label is one that was there,
            or 0 where the affine map shows what lies outside the image.
        """
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: that would also reseed the accelerators, which nothing restores.
            torch.default_generator.manual_seed(seed)
            if self.transform is not None:
                image, label_map = self.transform(tv_tensors.Image(image), tv_tensors.Mask(label_map))
            image = self._blurred(image.as_subclass(torch.Tensor))
            image = self._noisy(image)
        return image, label_map.as_subclass(torch.Tensor)

    def _blurred(self, image: torch.Tensor) -> torch.Tensor:
        if float(torch.rand(())) >= self.blur:
            return image
        # Below half a pixel a Gaussian changes nothing.
        deviation = max(0.5, _between(BLUR_DEVIATION) * image.shape[-1])
        reach = max(1, int(3 * deviation + 0.5))
        return v2.functional.gaussian_blur(image, [2 * reach + 1, 2 * reach + 1], [deviation, deviation])

    def _noisy(self, image: torch.Tensor) -> torch.Tensor:
        if float(torch.rand(())) >= self.noise:
            return image
        noise = torch.randn(image.shape) * (_between(NOISE_DEVIATION) * 255)
        return (image + noise).round().clamp(0, 255).to(torch.uint8)


def _between(bounds: tuple[float, float]) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * float(torch.rand(()))
