"""The denoising U-Net of SDSeg: it sees [noisy latent, conditioning] and predicts what was added."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ModelMixin, UNet2DModel  # noqa: F401  (ModelMixin: from_pretrained looks for it here)
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from torch import nn


class SDSegUNet(UNet2DModel):
    """``UNet2DModel`` with a constant head count, and image features joined at its input or at every level.

    The paper's network is the default: 294.97 M weights for binary masks. Residual blocks do the down- and
    upsampling, the time embedding scales and shifts, and every attention has ``heads`` heads, so that the
    width of a head differs by level (diffusers' own argument fixes the width instead).

    Args:
        latent_channels: channels of the noisy latent and of the output.
        conditioning_channels: channels of each feature map of the image encoder.
        fusion: ``input`` concatenates the features of stride 8 to the noisy latent; ``multiscale`` also
            concatenates the features of every deeper stride where the U-Net works at that stride.
        channels: width at each level; level i works at stride 2**i of the latent.
        blocks: residual blocks per level.
        heads: heads at every attention.
        attention_strides: strides of the latent with attention; the middle has it if any has.
        dropout: in the residual blocks.
        num_class_embeds: rows of the class embedding, or None for binary masks.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        latent_channels: int = 4,
        conditioning_channels: int = 4,
        fusion: str = "input",
        channels: Sequence[int] = (192, 384, 384, 768, 768),
        blocks: int = 2,
        heads: int = 8,
        attention_strides: Sequence[int] = (1, 2, 4, 8),
        dropout: float = 0.2,
        num_class_embeds: int | None = None,
    ) -> None:
        attended = [2**level in attention_strides for level in range(len(channels))]
        # Undecorated, so that the configuration holds this class's arguments and not the parent's as well.
        UNet2DModel.__init__.__wrapped__(  # type: ignore[attr-defined]
            self,
            sample_size=sample_size,
            in_channels=latent_channels + conditioning_channels,
            out_channels=latent_channels,
            block_out_channels=tuple(channels),
            layers_per_block=blocks,
            down_block_types=tuple("AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attended),
            up_block_types=tuple("AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in attended[::-1]),
            downsample_type="resnet",
            upsample_type="resnet",
            dropout=dropout,
            attention_head_dim=None,
            attn_norm_num_groups=32,
            add_attention=any(attended),
            resnet_time_scale_shift="scale_shift",
            num_class_embeds=num_class_embeds,
        )
        for module in self.modules():
            if isinstance(module, Attention):
                module.heads = module.sliceable_head_dim = heads
                module.scale = (module.inner_dim // heads) ** -0.5
        self.fusions = nn.ModuleList(
            _Fusion(width, conditioning_channels) for width in channels[:-1] if fusion == "multiscale"
        )

    def forward(  # type: ignore[override]
        self,
        noisy_latent: torch.Tensor,
        timestep: torch.Tensor,
        conditioning: Sequence[torch.Tensor],
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict from a noisy latent.

        Args:
            noisy_latent: float, (B, C, h, w), scaled.
            timestep: int64, (B,), in [0, 1000).
            conditioning: float, (B, F, h / 2**i, w / 2**i) for level i; ``input`` fusion reads the first.
            class_labels: int64, (B,), for class-conditional masks.

        Returns:
            float, (B, C, h, w): the noise, the clean latent or the velocity, as trained.
        """
        embedding = self.time_embedding(self.time_proj(timestep).to(dtype=noisy_latent.dtype))
        if class_labels is not None:
            embedding = embedding + self.class_embedding(class_labels)

        hidden = self.conv_in(torch.cat([noisy_latent, conditioning[0]], dim=1))
        skips: tuple[torch.Tensor, ...] = (hidden,)
        for level, block in enumerate(self.down_blocks):
            if level > 0 and len(self.fusions):
                hidden = self.fusions[level - 1](hidden, conditioning[level])
            hidden, residuals = block(hidden_states=hidden, temb=embedding)
            skips += residuals

        hidden = self.mid_block(hidden, embedding)

        for block in self.up_blocks:
            taken = len(block.resnets)
            hidden = block(hidden, skips[-taken:], embedding)
            skips = skips[:-taken]
        return self.conv_out(self.conv_act(self.conv_norm_out(hidden)))


class _Fusion(nn.Module):
    """Concatenates features to the hidden state and returns to its width; starts as the identity on it."""

    def __init__(self, channels: int, conditioning_channels: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels + conditioning_channels, channels, 1)
        with torch.no_grad():
            nn.init.dirac_(self.project.weight[:, :channels])
            nn.init.zeros_(self.project.bias)  # type: ignore[arg-type]

    def forward(self, hidden: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return self.project(torch.cat([hidden, features], dim=1))
