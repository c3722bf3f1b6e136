"""A small autoencoder for binary masks, so that no 335 MB autoencoder is needed to segment.

It speaks the language of diffusers' ``AutoencoderKL`` (``encode(x).latent_dist``, ``decode(z).sample``,
values in [-1, 1], eight pixels per latent pixel, four latent channels) and can stand in its place. A mask
holds far less than a photograph: two thirds of the published model's inference cost is a decoder for
photographs, this one costs about a two-hundredth of it.

There is no normalisation layer: what is decoded at one place then depends on its neighbourhood alone,
not on the rest of the image.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import nn
from torch.nn import functional

SPATIAL_FACTOR = 8
_PATCH = 4  # pixels per side that enter and leave as channels


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.conv2(functional.silu(self.conv1(functional.silu(hidden))))


def make_decoder(latent_channels: int, channels: tuple[int, int], out_channels: int) -> nn.Sequential:
    """Build a decoder from latents to the logits of masks; ``channels`` are its widths at strides 4 and 8."""
    fine, coarse = channels
    return nn.Sequential(
        nn.Conv2d(latent_channels, coarse, 3, padding=1),
        _ResidualBlock(coarse),
        _ResidualBlock(coarse),
        nn.SiLU(),
        nn.Conv2d(coarse, fine * 4, 1),
        nn.PixelShuffle(2),
        _ResidualBlock(fine),
        _ResidualBlock(fine),
        nn.SiLU(),
        nn.Conv2d(fine, out_channels * _PATCH**2, 3, padding=1),
        nn.PixelShuffle(_PATCH),
    )


class MaskAutoencoder(ModelMixin, ConfigMixin):
    """Autoencoder of single-channel masks with values in {-1, 1}.

    Args:
        latent_channels: channels of the latent.
        encoder_channels: widths at strides 4 and 8 of the encoder.
        decoder_channels: widths at strides 4 and 8 of the decoder.
        posterior_std: standard deviation of the posterior, the same everywhere; the amount of latent noise
            that the decoder was trained to ignore at least.
        scaling_factor: 1 / standard deviation of the latents of its training masks, about.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        latent_channels: int = 4,
        encoder_channels: tuple[int, int] = (48, 96),
        decoder_channels: tuple[int, int] = (64, 128),
        posterior_std: float = 0.05,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        fine, coarse = encoder_channels
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(_PATCH),
            nn.Conv2d(in_channels * _PATCH**2, fine, 3, padding=1),
            _ResidualBlock(fine),
            nn.SiLU(),
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1),
            _ResidualBlock(coarse),
            nn.SiLU(),
            nn.Conv2d(coarse, latent_channels, 1),
        )
        self.decoder = make_decoder(latent_channels, decoder_channels, in_channels)

    def encode(self, x: torch.Tensor) -> AutoencoderKLOutput:
        """Encode masks.

        Args:
            x: float, (B, 1, H, W), values in [-1, 1]; H and W are multiples of 8.

        Returns:
            The posterior over unscaled latents, (B, latent_channels, H/8, W/8).
        """
        mean = self.encoder(x)
        log_variance = torch.full_like(mean, 2.0 * float(torch.tensor(self.config.posterior_std).log()))
        return AutoencoderKLOutput(
            latent_dist=DiagonalGaussianDistribution(torch.cat([mean, log_variance], dim=1))
        )

    def decode_logits(self, z: torch.Tensor) -> torch.Tensor:
        """Decode unscaled latents (B, latent_channels, h, w) to the logits of the mask (B, 1, 8h, 8w)."""
        return self.decoder(z)

    def decode(self, z: torch.Tensor) -> DecoderOutput:
        """Decode unscaled latents to masks.

        Args:
            z: float, (B, latent_channels, h, w).

        Returns:
            ``sample``: float, (B, 1, 8h, 8w), in [-1, 1]; (sample + 1) / 2 is the probability of the mask.
        """
        return DecoderOutput(sample=torch.tanh(self.decode_logits(z) / 2))
