"""The honest baseline: a plain U-Net from image to classes, without any diffusion."""

from __future__ import annotations

import segmentation_models_pytorch as smp
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config


class PlainUNet(ModelMixin, ConfigMixin):
    """U-Net of segmentation_models_pytorch on a timm backbone, from random weights.

    Args:
        encoder_name: timm's name of the backbone, such as ``resnet34``.
        num_classes: counts the background.
    """

    @register_to_config
    def __init__(self, encoder_name: str = "resnet34", num_classes: int = 2) -> None:
        super().__init__()
        self.network = smp.Unet(f"tu-{encoder_name}", encoder_weights=None, classes=num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Segment images, float (B, 3, H, W) in [-1, 1], to logits (B, num_classes, H, W)."""
        return self.network(images)
