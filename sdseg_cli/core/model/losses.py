"""The training losses of SDSeg, one value per sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch.nn import functional

from sdseg_cli.core.model.schedule import predicted_original


@dataclass(frozen=True)
class DiffusionLoss:
    """``noise``: L1 on the network's own target; ``latent``: L1 on the predicted clean latent; both (B,)."""

    noise: torch.Tensor
    latent: torch.Tensor
    predicted_original: torch.Tensor


def diffusion_loss(
    scheduler: DDIMScheduler,
    output: torch.Tensor,
    clean_latent: torch.Tensor,
    noisy_latent: torch.Tensor,
    noise: torch.Tensor,
    timestep: torch.Tensor,
) -> DiffusionLoss:
    """Compute the noise loss and the latent estimation loss.

    Args:
        scheduler: the schedule and the kind of prediction.
        output: float, (B, C, h, w), what the U-Net said.
        clean_latent: float, (B, C, h, w), scaled.
        noisy_latent: float, (B, C, h, w), what the U-Net saw.
        noise: float, (B, C, h, w).
        timestep: int64, (B,).

    Returns:
        Both losses in float32, means over (C, h, w).

    Source:
        SDSeg, Eqs. (2) and (3).
    """
    estimate = predicted_original(scheduler, output, noisy_latent, timestep)
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        target = noise
    elif kind == "sample":
        target = clean_latent
    else:
        target = scheduler.get_velocity(clean_latent, noise, timestep)
    return DiffusionLoss(
        noise=_l1(output, target), latent=_l1(estimate, clean_latent), predicted_original=estimate
    )


def pixel_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Compare decoded masks with the truth: cross-entropy plus soft Dice.

    The background's log-odds are 0: with one mask the softmax is then the mask's own probability, with
    several a pixel is background where no mask is likelier than not.

    Args:
        logits: float, (B, M, H, W), log-odds of each mask.
        masks: float, (B, M, H, W), in {0, 1}, at most one of them at a pixel.

    Returns:
        float32, (B,).
    """
    background = torch.zeros_like(logits[:, :1])
    numbers = torch.arange(1, masks.shape[1] + 1, device=masks.device).view(1, -1, 1, 1)
    label_maps = (masks.long() * numbers).amax(dim=1)
    return segmentation_loss(torch.cat([background, logits], dim=1), label_maps)


def segmentation_loss(logits: torch.Tensor, label_maps: torch.Tensor) -> torch.Tensor:
    """Cross-entropy plus soft Dice over the foreground classes.

    Args:
        logits: float, (B, K, H, W), K counts the background.
        label_maps: int64, (B, H, W).

    Returns:
        float32, (B,).
    """
    logits = logits.float()
    cross_entropy = functional.cross_entropy(logits, label_maps, reduction="none").mean(dim=(1, 2))
    probability = logits.softmax(dim=1)[:, 1:]
    truth = functional.one_hot(label_maps, logits.shape[1]).movedim(-1, 1)[:, 1:].to(probability.dtype)
    overlap = (probability * truth).sum(dim=(2, 3))
    total = probability.sum(dim=(2, 3)) + truth.sum(dim=(2, 3))
    dice = 1 - (2 * overlap + 1) / (total + 1)
    return cross_entropy + dice.mean(dim=1)


def _l1(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (prediction.float() - target.float()).abs().mean(dim=(1, 2, 3))
