"""A small decoder that reads the latents of a KL autoencoder, and stands in for its large one.

A decoder for photographs spends two thirds of a prediction on what a mask does not hold. This one inverts a
given KL autoencoder on masks alone, so that a model trained on that autoencoder's latents runs without it.
"""

from __future__ import annotations

import hashlib

import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import nn

from sdseg_cli.core.model.mask_autoencoder import make_decoder


class MaskDecoder(ModelMixin, ConfigMixin):
    """Decoder of masks from the latents of one KL autoencoder, eight pixels per latent pixel.

    Args:
        latent_channels: channels of the latent.
        decoder_channels: widths at strides 4 and 8.
        latent_mean: of the unscaled latents of masks; taken off before decoding.
        latent_std: their standard deviation; divided by.
        made_for: fingerprint of the KL autoencoder, see :func:`fingerprint`.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        decoder_channels: tuple[int, int] = (64, 128),
        latent_mean: float = 0.0,
        latent_std: float = 1.0,
        made_for: str = "",
    ) -> None:
        super().__init__()
        self.decoder = make_decoder(latent_channels, decoder_channels, 1)

    def decode_logits(self, z: torch.Tensor) -> torch.Tensor:
        """Decode unscaled latents (B, latent_channels, h, w) to the logits of the mask (B, 1, 8h, 8w)."""
        return self.decoder((z - self.config["latent_mean"]) / self.config["latent_std"])

    def decode(self, z: torch.Tensor) -> DecoderOutput:
        """Decode unscaled latents, float (B, C, h, w), to ``sample``, (B, 1, 8h, 8w), in [-1, 1]."""
        return DecoderOutput(sample=torch.tanh(self.decode_logits(z) / 2))


@torch.no_grad()
def fingerprint(autoencoder: AutoencoderKL | nn.Module) -> str:
    """SHA-256 of an autoencoder's weights, rounded to 16-bit floats: a copy at half size has the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(autoencoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().to(torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()
