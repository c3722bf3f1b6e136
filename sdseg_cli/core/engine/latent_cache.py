"""Latents of masks that are met again are encoded once: under flips a mask has four forms at most."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from sdseg_cli.core.model.latents import Autoencoder, posterior
from sdseg_cli.core.recipe_schema import AugmentationSettings

_MOST_BYTES = 2 * 2**30  # on the device; masks beyond are encoded every time


def masks_recur(augmentation: AugmentationSettings) -> bool:
    """Whether a slice's mask takes few forms: flips alone move it (colour, blur and noise leave it be)."""
    return augmentation.affine == 0


class LatentCache:
    """The posteriors of masks, each kept by the mask's content on the autoencoder's device.

    What is kept is what the autoencoder said, in its own precision: training reads the same values.

    Args:
        autoencoder: frozen.
        most_bytes: bound of what is kept.
    """

    def __init__(self, autoencoder: Autoencoder, most_bytes: int = _MOST_BYTES) -> None:
        self._autoencoder = autoencoder
        self._kept: dict[bytes, torch.Tensor] = {}
        self._most_bytes = most_bytes
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @torch.no_grad()
    def __call__(self, masks: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Give the posterior's parameters.

        Args:
            masks: float, (B, 1, S, S), in {0, 1}, on the CPU, where their contents are compared.
            device: the autoencoder's.

        Returns:
            (B, 2C, h, w) on ``device``: mean and log-variance, for ``DiagonalGaussianDistribution``.
        """
        packed = np.packbits(masks.numpy() > 0.5, axis=-1)
        names = [hashlib.blake2b(mask.tobytes(), digest_size=16).digest() for mask in packed]
        new = {name: index for index, name in enumerate(names) if name not in self._kept}
        found = {name: self._kept[name] for name in names if name in self._kept}
        if new:
            encoded = posterior(self._autoencoder, masks[list(new.values())].to(device)).parameters
            for name, parameters in zip(new, encoded, strict=True):
                found[name] = parameters
                size = parameters.numel() * parameters.element_size()
                if self._bytes + size <= self._most_bytes:
                    self._kept[name] = parameters.clone()
                    self._bytes += size
        return torch.stack([found[name] for name in names])


def as_distribution(parameters: torch.Tensor) -> DiagonalGaussianDistribution:
    """The posterior of parameters (B, 2C, h, w)."""
    return DiagonalGaussianDistribution(parameters)
