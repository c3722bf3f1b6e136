"""A recipe whose networks train a step in a fraction of a second on a CPU; needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZE = 32  # of its images, in pixels


def tiny_values(dataset: Path) -> dict[str, Any]:
    """Values of a recipe, new at every call; how long it trains is left to the caller."""
    return {
        "name": "tiny",
        "data": {"dataset": str(dataset), "image_size": SIZE},
        "model": {
            "image_encoder": "kl",
            "image_encoder_channels": [32, 32, 32, 32],
            "image_encoder_blocks": 1,
            "image_encoder_dropout": 0.0,
            "unet_channels": [32, 32],
            "unet_blocks": 1,
            "unet_heads": 4,
            "unet_attention_strides": [2],
            "unet_dropout": 0.0,
        },
        "train": {
            "batch_size": 4,
            "learning_rate": 1e-4,
            "warmup_steps": 0,
            "ema_decay": 0.9,
            "trackers": [],
        },
    }
