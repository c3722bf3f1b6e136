"""Trains a small decoder to read the latents that a KL autoencoder gives to masks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL

from sdseg_cli.core.engine.autoencoder_training import AutoencoderStep, mask_loss
from sdseg_cli.core.model.latents import decode_latents, posterior
from sdseg_cli.core.model.mask_decoder import MaskDecoder, fingerprint
from sdseg_cli.core.seeding import generator_for

_CHUNK = 4  # masks at a time through the KL autoencoder: these take about 1 GiB at 256 pixels


@torch.no_grad()
def ask_teacher(
    autoencoder: AutoencoderKL,
    masks: Sequence[np.ndarray],
    *,
    seed: int,
    device: torch.device,
    max_latent_noise: float = 0.5,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Encode masks and decode them again, with the full decoder.

    Every second latent is an exact one. The others are what a denoiser that is not sure may say: something
    between the latents of several masks, and noise. A decoder that was taught exact ones alone parts from the
    full one on a model's predictions.

    Args:
        autoencoder: frozen, on ``device``.
        masks: (S, S) each, values in {0, 1}.
        seed: names the mixtures and the noise.
        device: where to compute.
        max_latent_noise: noise on every second latent, at most, in the standard deviations of latents.

    Yields:
        For each mask, on the CPU: an unscaled latent, float32 (C, S/8, S/8), and what the full decoder makes
        of that, float16 (S, S), probabilities. What a small decoder should say is this and not the mask: the
        two differ where the autoencoder does not reproduce it.
    """
    for start in range(0, len(masks), _CHUNK):
        chunk = torch.from_numpy(np.stack(masks[start : start + _CHUNK])).float().unsqueeze(1)
        latents = posterior(autoencoder, chunk.to(device)).mode()
        generator = generator_for("distillation", "latents", seed, start)
        latents[1::2] = _unsure(latents.cpu().float(), generator, max_latent_noise)[1::2].to(latents)
        decoded = decode_latents(autoencoder, latents, scale=1.0)[:, 0]
        yield from zip(latents.float().cpu(), decoded.half().cpu(), strict=True)


def _unsure(latents: torch.Tensor, generator: torch.Generator, max_noise: float) -> torch.Tensor:
    """Means of the latents (N, C, h, w), each with weights of its own from a flat Dirichlet, and noise."""
    count = len(latents)
    weights = -torch.rand(count, count, generator=generator).clamp(min=1e-7).log()
    weights /= weights.sum(dim=1, keepdim=True)
    mixed = torch.einsum("mn,nchw->mchw", weights, latents)
    level = max_noise * torch.rand(count, 1, 1, 1, generator=generator)
    return mixed + level * latents.std() * torch.randn(latents.shape, generator=generator)


def make_mask_decoder(
    autoencoder: AutoencoderKL, latents: torch.Tensor, channels: tuple[int, int] = (64, 128)
) -> MaskDecoder:
    """Make an untrained decoder for an autoencoder, with the mean and spread of its latents (N, C, h, w)."""
    return MaskDecoder(
        latent_channels=autoencoder.config["latent_channels"],
        decoder_channels=channels,
        latent_mean=float(latents.mean()),
        latent_std=max(float(latents.std()), 1e-6),
        made_for=fingerprint(autoencoder),
    )


def train_mask_decoder(
    decoder: MaskDecoder,
    latents: torch.Tensor,
    wanted: torch.Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: torch.device,
    report_every: int = 50,
) -> Iterator[AutoencoderStep]:
    """Train in place; an unread iterator trains nothing.

    Args:
        decoder: already on ``device``.
        latents: float32, (N, C, h, w), exact and mixed ones, see :func:`ask_teacher`.
        wanted: float16, (N, S, S), probabilities: what the full decoder says of these latents.
        steps: optimizer steps.
        batch_size: masks per step.
        learning_rate: peak of a cosine schedule with 5 % warm-up.
        seed: names every random draw.
        device: where to train.
        report_every: steps between two reports.

    Yields:
        A report every ``report_every`` steps and after the last one.
    """
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=learning_rate, weight_decay=1e-4)
    decoder.train()
    losses: list[float] = []
    started = time.monotonic()
    for step in range(1, steps + 1):
        rate = min(1.0, step / max(1, steps // 20)) * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        generator = generator_for("distillation", seed, step)
        chosen = torch.randint(len(latents), (batch_size,), generator=generator)
        target = wanted[chosen].float().unsqueeze(1).to(device)
        loss = mask_loss(decoder.decode_logits(latents[chosen].to(device)), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % report_every == 0 or step == steps:
            per_second = step * batch_size / (time.monotonic() - started)
            yield AutoencoderStep(step, float(np.mean(losses)), per_second)
            losses.clear()
    decoder.eval()


@torch.no_grad()
def agreement(
    decoder: MaskDecoder, autoencoder: AutoencoderKL, masks: Sequence[np.ndarray], *, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Compare both decoders on the latents of masks (S, S) in {0, 1}.

    Returns:
        Dice of the small decoder's masks with the full decoder's, and with the true masks, float64; empty
        masks are left out.
    """
    with_full: list[float] = []
    with_truth: list[float] = []
    filled = [mask for mask in masks if mask.any()]
    for start in range(0, len(filled), _CHUNK):
        truth = torch.from_numpy(np.stack(filled[start : start + _CHUNK])).float().unsqueeze(1).to(device)
        latents = posterior(autoencoder, truth).mode()
        small = decode_latents(decoder, latents, scale=1.0) > 0.5
        full = decode_latents(autoencoder, latents, scale=1.0) > 0.5
        with_full += _dice(small, full)
        with_truth += _dice(small, truth > 0.5)
    return np.asarray(with_full), np.asarray(with_truth)


def _dice(one: torch.Tensor, other: torch.Tensor) -> list[float]:
    overlap = (one & other).sum(dim=(1, 2, 3)).double()
    total = (one.sum(dim=(1, 2, 3)) + other.sum(dim=(1, 2, 3))).double()
    return torch.where(total > 0, 2 * overlap / total.clamp(min=1), 1.0).cpu().tolist()
