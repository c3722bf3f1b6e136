"""The trained image encoders: from an image to the conditioning of the U-Net."""

from __future__ import annotations

from collections.abc import Sequence

import timm
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Encoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FeaturePyramidNetwork

_FIRST_STRIDE = 8


MOST_LEVELS = 8
MOST_BLOCKS = 16  # residual blocks per stride


class KLImageEncoder(ModelMixin, ConfigMixin):
    """The paper's encoder: that of the KL autoencoder, plus a 1x1 convolution (34.2 M weights).

    Its output is the conditioning as it is: not sampled, not scaled. For ``levels`` > 1 (multiscale fusion)
    the last features before the output are carried on to strides 16, 32, ...

    Args:
        conditioning_channels: channels of each output.
        levels: number of outputs, at strides 8, 16, ...
        channels: widths at strides 1, 2, 4 and 8.
        blocks: residual blocks per stride.
        dropout: in every residual block.
        code_channels: channels between the autoencoder's encoder and the 1x1 convolution.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        conditioning_channels: int = 4,
        levels: int = 1,
        channels: Sequence[int] = (128, 256, 512, 512),
        blocks: int = 2,
        dropout: float = 0.2,
        code_channels: int = 8,
    ) -> None:
        super().__init__()
        if not (1 <= levels <= MOST_LEVELS and 1 <= blocks <= MOST_BLOCKS):  # a damaged file: days to build
            raise ValueError(
                f"{levels} levels of {blocks} blocks; expected 1 to {MOST_LEVELS} of 1 to {MOST_BLOCKS}"
            )
        self.encoder = Encoder(
            in_channels=3,
            out_channels=code_channels,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            block_out_channels=tuple(channels),
            layers_per_block=blocks,
            double_z=False,
        )
        for module in self.encoder.modules():
            if isinstance(module, ResnetBlock2D):  # the Encoder has no argument for it
                module.dropout.p = dropout
        self.out = nn.Conv2d(code_channels, conditioning_channels, 1)
        width = channels[-1]
        self.stages = nn.ModuleList(
            nn.Sequential(
                # By its default name the convolution is registered twice, and cannot be saved.
                Downsample2D(width, use_conv=True, name="op"),
                _TimelessResnet(in_channels=width, temb_channels=None, dropout=dropout),
            )
            for _ in range(levels - 1)
        )
        self.stage_outs = nn.ModuleList(nn.Conv2d(width, conditioning_channels, 1) for _ in range(levels - 1))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Encode images, float (B, 3, H, W) in [-1, 1], to (B, F, H / 8 / 2**i, W / 8 / 2**i) per level i."""
        if not len(self.stages):
            return [self.out(self.encoder(images))]
        hidden = self.encoder.conv_in(images)
        recompute = self.encoder.gradient_checkpointing and torch.is_grad_enabled()
        for block in [*self.encoder.down_blocks, self.encoder.mid_block]:
            hidden = checkpoint(block, hidden, use_reentrant=False) if recompute else block(hidden)
        code = self.encoder.conv_out(self.encoder.conv_act(self.encoder.conv_norm_out(hidden)))
        features = [self.out(code)]
        for stage, out in zip(self.stages, self.stage_outs, strict=True):
            hidden = stage(hidden)
            features.append(out(hidden))
        return features


class _TimelessResnet(ResnetBlock2D):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(hidden, None)


class TimmImageEncoder(ModelMixin, ConfigMixin):
    """Any feature-pyramid backbone of timm, its levels joined top-down (Lin et al. 2017).

    Args:
        name: timm's name, such as ``resnet18``.
        conditioning_channels: channels of each output.
        levels: number of outputs, at strides 8, 16, ...; strides beyond the backbone's are made by
            strided convolutions.
        pyramid_channels: width of the pyramid.
    """

    @register_to_config
    def __init__(
        self,
        name: str = "resnet18",
        conditioning_channels: int = 4,
        levels: int = 1,
        pyramid_channels: int = 128,
    ) -> None:
        super().__init__()
        self.backbone = timm.create_model(name, pretrained=False, features_only=True)
        info = self.backbone.feature_info
        self._kept = [i for i, stride in enumerate(info.reduction()) if stride >= _FIRST_STRIDE]
        strides = [info.reduction()[i] for i in self._kept]
        if strides != [_FIRST_STRIDE * 2**i for i in range(len(strides))] or not strides:
            raise ValueError(
                f"timm:{name} has features at strides {info.reduction()}; "
                "needed are 8, 16, ... without a gap. Choose a backbone such as timm:resnet18."
            )
        self.pyramid = FeaturePyramidNetwork([info.channels()[i] for i in self._kept], pyramid_channels)
        for level in range(levels, len(strides)):  # weights without a gradient would stop several processes
            self.pyramid.layer_blocks[level] = nn.Identity()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(pyramid_channels, pyramid_channels, 3, stride=2, padding=1), nn.SiLU())
            for _ in range(levels - len(strides))
        )
        self.outs = nn.ModuleList(
            nn.Conv2d(pyramid_channels, conditioning_channels, 1) for _ in range(levels)
        )
        data = self.backbone.pretrained_cfg
        self.register_buffer("mean", torch.tensor(data["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(data["std"]).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Encode images, float (B, 3, H, W) in [-1, 1], to (B, F, H / 8 / 2**i, W / 8 / 2**i) per level i."""
        maps = self.backbone(((images + 1) / 2 - self.mean) / self.std)
        pyramid = list(self.pyramid({str(i): maps[i] for i in self._kept}).values())
        for stage in self.stages:
            pyramid.append(stage(pyramid[-1]))
        return [out(features) for out, features in zip(self.outs, pyramid, strict=False)]


ImageEncoder = KLImageEncoder | TimmImageEncoder
