"""The denoising U-Net of SDSeg: it sees [noisy latent, conditioning] and predicts what was added."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ModelMixin, UNet2DModel  # noqa: F401  (ModelMixin: from_pretrained looks for it here)
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import nn

from sdseg_cli.core.model.image_encoder import MOST_BLOCKS


class SDSegUNet(UNet2DModel):
    """``UNet2DModel`` with a constant head count, and image features joined at its input or at every level.

    The paper's network is the default: 294.97 M weights for binary masks. Residual blocks do the down- and
    upsampling, the time embedding scales and shifts, and every attention has ``heads`` heads, so that the
    width of a head differs by level (diffusers' own argument fixes the width instead).

    Args:
        latent_channels: channels of the noisy latent and of the output; for masks denoised jointly, those of
            all of them.
        conditioning_channels: channels of each feature map of the image encoder.
        fusion: ``input`` concatenates the features of stride 8 to the noisy latent; ``multiscale`` also
            concatenates the features of every deeper stride where the U-Net works at that stride;
            ``attention`` concatenates nothing: at every level with attention, on the way down and up and in
            the middle, the U-Net attends to the features of stride 8.
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
        if not 1 <= blocks <= MOST_BLOCKS:  # a damaged file: days to build
            raise ValueError(f"{blocks} residual blocks per level; expected 1 to {MOST_BLOCKS}")
        attended = [2**level in attention_strides for level in range(len(channels))]
        # Undecorated, so that the configuration holds this class's arguments and not the parent's as well.
        UNet2DModel.__init__.__wrapped__(  # type: ignore[attr-defined]
            self,
            sample_size=sample_size,
            in_channels=latent_channels + (conditioning_channels if fusion != "attention" else 0),
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
        # By level and direction: widths are those with which a block is entered.
        entered = {f"down{i}": (channels[0], *channels)[i] for i, at in enumerate(attended) if at}
        entered |= {f"up{i}": (*channels, channels[-1])[i + 1] for i, at in enumerate(attended) if at}
        entered |= {"middle": channels[-1]} if any(attended) else {}
        self.attentions = nn.ModuleDict(
            {
                place: _CrossAttention(width, conditioning_channels, heads)
                for place, width in entered.items()
                if fusion == "attention"
            }
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
            conditioning: float, (B, F, h / 2**i, w / 2**i) for level i; only ``multiscale`` fusion reads more
                than the first.
            class_labels: int64, (B,), for class-conditional masks.

        Returns:
            float, (B, C, h, w): the noise, the clean latent or the velocity, as trained.
        """
        embedding = self.time_embedding(self.time_proj(timestep).to(dtype=noisy_latent.dtype))
        if class_labels is not None:
            embedding = embedding + self.class_embedding(class_labels)

        joined = [noisy_latent] if len(self.attentions) else [noisy_latent, conditioning[0]]
        hidden = self.conv_in(torch.cat(joined, dim=1))
        skips: tuple[torch.Tensor, ...] = (hidden,)
        for level, block in enumerate(self.down_blocks):
            if level > 0 and len(self.fusions):
                hidden = self.fusions[level - 1](hidden, conditioning[level])
            hidden = self._attend(f"down{level}", hidden, conditioning[0])
            hidden, residuals = block(hidden_states=hidden, temb=embedding)
            skips += residuals

        hidden = self.mid_block(self._attend("middle", hidden, conditioning[0]), embedding)

        for index, block in enumerate(self.up_blocks):
            hidden = self._attend(f"up{len(self.up_blocks) - 1 - index}", hidden, conditioning[0])
            taken = len(block.resnets)
            hidden = block(hidden, skips[-taken:], embedding)
            skips = skips[:-taken]
        return self.conv_out(self.conv_act(self.conv_norm_out(hidden)))

    def _attend(self, place: str, hidden: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return self.attentions[place](hidden, features) if place in self.attentions else hidden


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


class _CrossAttention(nn.Module):
    """The hidden state attends to image features; starts as the identity on it.

    Both sides carry their place in the image (sines and cosines on the features' grid): which feature
    belongs to a latent pixel would have to be guessed otherwise.
    """

    def __init__(self, channels: int, conditioning_channels: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.project = nn.Linear(conditioning_channels, channels)
        self.attention = Attention(channels, channels, heads, dim_head=max(1, channels // heads))
        nn.init.zeros_(self.attention.to_out[0].weight)
        nn.init.zeros_(self.attention.to_out[0].bias)

    def forward(self, hidden: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        grid = features.shape[2:]
        tokens = self.project(features.flatten(2).mT) + _places(hidden.shape[1], grid, grid[0], features)
        queries = self.norm(hidden.flatten(2).mT) + _places(
            hidden.shape[1], hidden.shape[2:], grid[0], hidden
        )
        return hidden + self.attention(queries, tokens).mT.reshape(hidden.shape)


def _places(channels: int, grid: torch.Size, base: int, like: torch.Tensor) -> torch.Tensor:
    """Position of every pixel of a grid, (h * w, channels), in units of 1 / ``base`` of the image's side."""
    return get_2d_sincos_pos_embed(channels, tuple(grid), base_size=base, device=like.device).to(like.dtype)
