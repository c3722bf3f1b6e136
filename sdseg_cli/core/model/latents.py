"""Masks to latents and back, through a frozen autoencoder.

Any autoencoder with the interface of diffusers' ``AutoencoderKL`` serves: a KL autoencoder for RGB
photographs (the paper's) or the built-in :class:`MaskAutoencoder` of one channel.
"""

from __future__ import annotations

from typing import TypeAlias, Union

import torch
from diffusers import AutoencoderKL, ModelMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from sdseg_cli.core.model.mask_autoencoder import SPATIAL_FACTOR, MaskAutoencoder
from sdseg_cli.core.model.mask_decoder import MaskDecoder

Autoencoder: TypeAlias = Union[AutoencoderKL, MaskAutoencoder]  # noqa: UP007  (diffusers is opaque to mypy)

_STEEPEST = 0.99  # score beyond which the log-odds go on in a straight line


def input_dtype(network: ModelMixin, device: torch.device) -> torch.dtype:
    """What a network is to be given: under autocast float32, which is rounded where that does no harm."""
    return torch.float32 if torch.is_autocast_enabled(device.type) else network.dtype


def spatial_factor(autoencoder: Autoencoder) -> int:
    """Pixels per latent pixel and side."""
    if isinstance(autoencoder, MaskAutoencoder | MaskDecoder):
        return SPATIAL_FACTOR
    return 2 ** (len(autoencoder.config["block_out_channels"]) - 1)


def posterior(autoencoder: Autoencoder, masks: torch.Tensor) -> DiagonalGaussianDistribution:
    """Encode masks.

    Args:
        autoencoder: frozen.
        masks: float, (B, M, H, W), values in [0, 1]; each of the M is a mask of its own.

    Returns:
        The posterior over unscaled latents, (B * M, C, h, w). A mask goes in as {-1, 1}, repeated to the
        autoencoder's input channels (SDSeg, section 2.1).
    """
    pixels = (masks.flatten(0, 1)[:, None] * 2 - 1).expand(-1, autoencoder.config["in_channels"], -1, -1)
    return autoencoder.encode(pixels.to(autoencoder.dtype)).latent_dist


def sample_latents(
    distribution: DiagonalGaussianDistribution, noise: torch.Tensor, scale: float
) -> torch.Tensor:
    """Sample scaled latents: (mean + std * noise) * scale, with the noise given.

    Args:
        distribution: over (B * M, C, h, w).
        noise: float, (B, M * C, h, w); the latents of an image's M masks lie behind one another.
        scale: factor.

    Returns:
        float, of the noise's shape.
    """
    drawn = noise.to(distribution.mean).reshape(distribution.mean.shape)
    return ((distribution.mean + distribution.std * drawn) * scale).reshape(noise.shape)


def decode_scores(autoencoder: Autoencoder, latents: torch.Tensor, scale: float) -> torch.Tensor:
    """Decode scaled latents.

    Args:
        autoencoder: frozen.
        latents: float, (B, M * C, h, w), scaled; M masks are decoded in one batch.
        scale: what the latents were multiplied by.

    Returns:
        float32, (B, M, H, W), the mean over the decoder's channels; about -1 outside and 1 inside a mask.
    """
    unscaled = (_apart(autoencoder, latents) / scale).to(input_dtype(autoencoder, latents.device))
    decoded = autoencoder.decode(unscaled).sample
    return _together(decoded.float().mean(dim=1), latents)


def decode_logits(autoencoder: Autoencoder, latents: torch.Tensor, scale: float) -> torch.Tensor:
    """Decode scaled latents to log-odds of the mask, for a loss on its pixels.

    Args:
        autoencoder: frozen.
        latents: float, (B, M * C, h, w), scaled.
        scale: what the latents were multiplied by.

    Returns:
        float32, (B, M, H, W). Every pixel has a gradient, also one that is certain and wrong.
    """
    if isinstance(autoencoder, MaskAutoencoder | MaskDecoder):
        unscaled = (_apart(autoencoder, latents) / scale).to(input_dtype(autoencoder, latents.device))
        return _together(autoencoder.decode_logits(unscaled).float()[:, 0], latents)
    # A KL decoder's score is tanh(logit / 2) read backwards; it overshoots its range, where the tangent goes
    # on: cut off there, a wrong pixel could not be mended.
    scores = decode_scores(autoencoder, latents, scale)
    inner = scores.clamp(-_STEEPEST, _STEEPEST)
    return 2 * torch.atanh(inner) + 2 / (1 - _STEEPEST**2) * (scores - inner)


def decode_latents(autoencoder: Autoencoder, latents: torch.Tensor, scale: float) -> torch.Tensor:
    """Decode scaled latents to probabilities, float32, (B, M, H, W), in [0, 1]."""
    return ((decode_scores(autoencoder, latents, scale) + 1) / 2).clamp(0, 1)


def masks_per_latent(autoencoder: Autoencoder, channels: int) -> int:
    """How many masks a latent of so many channels holds."""
    return channels // autoencoder.config["latent_channels"]


def _apart(autoencoder: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """From (B, M * C, h, w) to (B * M, C, h, w)."""
    return latents.reshape(-1, autoencoder.config["latent_channels"], *latents.shape[2:])


def _together(decoded: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """From (B * M, H, W) to (B, M, H, W)."""
    return decoded.reshape(len(latents), -1, *decoded.shape[1:])
