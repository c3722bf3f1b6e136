"""Masks to latents and back, through a frozen autoencoder.

Any autoencoder with the interface of diffusers' ``AutoencoderKL`` serves: a KL autoencoder for RGB
photographs (the paper's) or the built-in :class:`MaskAutoencoder` of one channel.
"""

from __future__ import annotations

from typing import TypeAlias, Union

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from sdseg_cli.core.model.mask_autoencoder import SPATIAL_FACTOR, MaskAutoencoder
from sdseg_cli.core.model.mask_decoder import MaskDecoder

Autoencoder: TypeAlias = Union[AutoencoderKL, MaskAutoencoder]  # noqa: UP007  (diffusers is opaque to mypy)

_STEEPEST = 0.99  # score beyond which the log-odds go on in a straight line


def spatial_factor(autoencoder: Autoencoder) -> int:
    """Pixels per latent pixel and side."""
    if isinstance(autoencoder, MaskAutoencoder | MaskDecoder):
        return SPATIAL_FACTOR
    return 2 ** (len(autoencoder.config["block_out_channels"]) - 1)


def posterior(autoencoder: Autoencoder, masks: torch.Tensor) -> DiagonalGaussianDistribution:
    """Encode masks.

    Args:
        autoencoder: frozen.
        masks: float, (B, 1, H, W), values in [0, 1].

    Returns:
        The posterior over unscaled latents. The mask goes in as {-1, 1}, repeated to the autoencoder's input
        channels (SDSeg, section 2.1).
    """
    pixels = (masks * 2 - 1).expand(-1, autoencoder.config["in_channels"], -1, -1)
    return autoencoder.encode(pixels.to(autoencoder.dtype)).latent_dist


def sample_latents(
    distribution: DiagonalGaussianDistribution, noise: torch.Tensor, scale: float
) -> torch.Tensor:
    """Sample scaled latents: (mean + std * noise) * scale, with the noise given."""
    return (distribution.mean + distribution.std * noise.to(distribution.mean)) * scale


def decode_scores(autoencoder: Autoencoder, latents: torch.Tensor, scale: float) -> torch.Tensor:
    """Decode scaled latents.

    Args:
        autoencoder: frozen.
        latents: float, (B, C, h, w), scaled.
        scale: what the latents were multiplied by.

    Returns:
        float32, (B, 1, H, W), the mean over the decoder's channels; about -1 outside and 1 inside the mask.
    """
    decoded = autoencoder.decode((latents / scale).to(autoencoder.dtype)).sample
    return decoded.float().mean(dim=1, keepdim=True)


def decode_logits(autoencoder: Autoencoder, latents: torch.Tensor, scale: float) -> torch.Tensor:
    """Decode scaled latents to log-odds of the mask, for a loss on its pixels.

    Args:
        autoencoder: frozen.
        latents: float, (B, C, h, w), scaled.
        scale: what the latents were multiplied by.

    Returns:
        float32, (B, 1, H, W). Every pixel has a gradient, also one that is certain and wrong.
    """
    if isinstance(autoencoder, MaskAutoencoder | MaskDecoder):
        return autoencoder.decode_logits((latents / scale).to(autoencoder.dtype)).float()
    # A KL decoder's score is tanh(logit / 2) read backwards; it overshoots its range, where the tangent goes
    # on: cut off there, a wrong pixel could not be mended.
    scores = decode_scores(autoencoder, latents, scale)
    inner = scores.clamp(-_STEEPEST, _STEEPEST)
    return 2 * torch.atanh(inner) + 2 / (1 - _STEEPEST**2) * (scores - inner)


def decode_latents(autoencoder: Autoencoder, latents: torch.Tensor, scale: float) -> torch.Tensor:
    """Decode scaled latents to probabilities, float32, (B, 1, H, W), in [0, 1]."""
    return ((decode_scores(autoencoder, latents, scale) + 1) / 2).clamp(0, 1)
