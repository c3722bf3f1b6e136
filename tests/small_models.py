"""Networks of a few weights that several tests build."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL


def small_kl(seed: int = 0) -> AutoencoderKL:
    """A KL autoencoder in the published form, eight pixels per latent pixel, frozen."""
    torch.manual_seed(seed)
    network = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    return network.eval().requires_grad_(False)
