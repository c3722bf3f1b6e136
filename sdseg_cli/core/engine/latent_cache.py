"""Latents of masks that are met again are encoded once: under flips a mask has four forms at most."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from sdseg_cli.core.model.latents import Autoencoder, posterior
from sdseg_cli.core.recipe_schema import AugmentationSettings

MOST_BYTES = 2 * 2**30  # on the device; a dataset with more is encoded as it comes
_FORMS = 4  # of a mask under left-right and upside-down flips


def masks_recur(augmentation: AugmentationSettings) -> bool:
    """Whether a slice's mask takes few forms: flips alone move it (colour, blur and noise leave it be)."""
    return augmentation.affine == 0


def bytes_of_all(masks: int, latent_shape: tuple[int, int, int]) -> int:
    """Bytes that the latents of so many masks take in all their forms, in float32."""
    channels, height, width = latent_shape
    return masks * _FORMS * 2 * channels * height * width * 4


class LatentCache:
    """The posteriors of masks, each kept by the mask's content on the autoencoder's device.

    Each is encoded by itself: batched, its last bits would depend on its neighbours, and a resumed run would
    not be the uninterrupted one.

    Args:
        autoencoder: frozen.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder
        self._kept: dict[bytes, torch.Tensor] = {}

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
        found = []
        for index, content in enumerate(packed):
            name = hashlib.blake2b(content.tobytes(), digest_size=16).digest()
            if name not in self._kept:
                mask = masks[index : index + 1].to(device)
                self._kept[name] = posterior(self._autoencoder, mask).parameters[0]
            found.append(self._kept[name])
        return torch.stack(found)


def as_distribution(parameters: torch.Tensor) -> DiagonalGaussianDistribution:
    """The posterior of parameters (B, 2C, h, w)."""
    return DiagonalGaussianDistribution(parameters)
