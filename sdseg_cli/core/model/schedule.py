"""The noise schedule, and the way from a network's output to the clean latent."""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import DDIMScheduler

Prediction = Literal["epsilon", "sample", "velocity"]
_DIFFUSERS_NAME = {"epsilon": "epsilon", "sample": "sample", "velocity": "v_prediction"}


def make_scheduler(
    prediction: Prediction = "epsilon",
    num_train_timesteps: int = 1000,
    beta_start: float = 0.0015,
    beta_end: float = 0.0155,
) -> DDIMScheduler:
    """Make the schedule of SDSeg: betas linear in their square roots, no clipping of latents.

    With ``trailing`` spacing any number of steps begins at the last timestep, so that one step is the
    paper's single reverse step and more steps refine it.
    """
    return DDIMScheduler(
        num_train_timesteps=num_train_timesteps,
        beta_start=beta_start,
        beta_end=beta_end,
        beta_schedule="scaled_linear",
        prediction_type=_DIFFUSERS_NAME[prediction],
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def predicted_original(
    scheduler: DDIMScheduler, output: torch.Tensor, noisy_latent: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """Estimate the clean latent.

    Computed in float32: at the last timestep of the paper's schedule the error of a predicted noise is
    multiplied by 38.67.

    Args:
        scheduler: the schedule and the kind of prediction.
        output: float, (B, C, h, w), the network's output.
        noisy_latent: float, (B, C, h, w), scaled.
        timestep: int64, (B,).

    Returns:
        float32, (B, C, h, w), scaled.

    Source:
        Ho et al. 2020, Eq. (15), for the noise; Salimans and Ho 2022, appendix D, for the velocity.
    """
    output, noisy_latent = output.float(), noisy_latent.float()
    kind = scheduler.config["prediction_type"]
    if kind == "sample":
        return output
    alphas_cumprod = scheduler.alphas_cumprod.to(noisy_latent.device)[timestep].view(-1, 1, 1, 1)
    signal, spread = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    if kind == "epsilon":
        return (noisy_latent - spread * output) / signal
    return signal * noisy_latent - spread * output


def reverse_step(
    scheduler: DDIMScheduler,
    output: torch.Tensor,
    latent: torch.Tensor,
    timestep: int,
    following: int | None,
) -> torch.Tensor:
    """Take one deterministic reverse step.

    The scheduler's own step takes ``timestep - T // steps`` for the timestep that follows, which is not the
    one that follows where the number of steps does not divide T, and ends before the clean latent.

    Args:
        scheduler: the schedule and the kind of prediction.
        output: float, (B, C, h, w), the network's output.
        latent: float, (B, C, h, w), scaled, at ``timestep``.
        timestep: in [0, T).
        following: the timestep to go to; None ends at the clean latent.

    Returns:
        float32, (B, C, h, w), scaled.

    Source:
        Song et al. 2021 (DDIM), Eq. (12) with sigma = 0.
    """
    latent = latent.float()
    timesteps = torch.full((len(latent),), timestep, device=latent.device)
    estimate = predicted_original(scheduler, output, latent, timesteps)
    if following is None:
        return estimate
    now, then = (float(scheduler.alphas_cumprod[index]) for index in (timestep, following))
    direction = (latent - now**0.5 * estimate) / (1 - now) ** 0.5
    return then**0.5 * estimate + (1 - then) ** 0.5 * direction
