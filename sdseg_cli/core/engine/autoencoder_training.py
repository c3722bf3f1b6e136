"""Trains the mask autoencoder on generated masks, and measures what it can reconstruct."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from sdseg_cli.core.data.phantom import PHANTOM_KINDS, make_phantom, random_masks
from sdseg_cli.core.model.latents import Autoencoder, decode_latents, posterior
from sdseg_cli.core.model.mask_autoencoder import MaskAutoencoder
from sdseg_cli.core.seeding import derive_seed, generator_for

_CHUNK = 64  # masks at a time
CHUNK_OF_KL = 4  # it has 128 channels at full resolution: these take about 1 GiB at 256 pixels


@dataclass(frozen=True)
class AutoencoderStep:
    """One report of the training; ``loss`` is the mean since the last one."""

    step: int
    loss: float
    samples_per_second: float


def generated_masks(count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Yield binary masks, three quarters random shapes and one quarter phantom structures.

    Args:
        count: number of masks.
        size: pixels per side.
        seed: names the sequence; different seeds share no mask.

    Yields:
        uint8, (size, size), values in {0, 1}.
    """
    for index in range(count):
        if index % 4 < 3:
            yield random_masks(seed, index, size)
            continue
        kind = PHANTOM_KINDS[(index // 4) % len(PHANTOM_KINDS)]
        _, label_map = make_phantom(kind, seed=derive_seed("autoencoder", seed), index=index, size=size)
        labels = np.unique(label_map[label_map > 0])
        chosen = labels[index % len(labels)] if len(labels) else 1
        yield _square((label_map == chosen).astype(np.uint8), size)


def _square(mask: np.ndarray, size: int) -> np.ndarray:
    """Crop or pad to (size, size); a phantom's sides vary around ``size``."""
    padded = np.pad(mask, [(0, max(0, size - side)) for side in mask.shape])
    return padded[:size, :size]


def train_mask_autoencoder(
    autoencoder: MaskAutoencoder,
    masks: Sequence[np.ndarray],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    crop: int,
    seed: int,
    device: torch.device,
    report_every: int = 50,
    max_latent_noise: float = 0.75,
) -> Iterator[AutoencoderStep]:
    """Train in place; an unread iterator trains nothing.

    The latents get noise of up to ``max_latent_noise`` of their own standard deviation, drawn per mask, so
    that the decoder forgives a denoiser's errors.

    Args:
        autoencoder: the network, already on ``device``.
        masks: uint8, (S, S) each, values in {0, 1}.
        steps: optimizer steps.
        batch_size: masks per step.
        learning_rate: peak of a cosine schedule with 5 % warm-up.
        crop: side of the random crops trained on, pixels; a multiple of 8.
        seed: names every random draw.
        device: where to train.
        report_every: steps between two reports.
        max_latent_noise: see above.

    Yields:
        A report every ``report_every`` steps and after the last one.
    """
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / max(1, steps // 20)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        ),
    )
    autoencoder.train()
    losses: list[float] = []
    started = time.monotonic()
    for step in range(1, steps + 1):
        generator = generator_for("autoencoder", seed, step)
        batch = _batch(masks, batch_size, crop, generator).to(device)
        mean = autoencoder.encode(batch * 2 - 1).latent_dist.mode()
        spread = mean.detach().std()
        level = torch.rand(batch_size, 1, 1, 1, generator=generator).to(device) * max_latent_noise
        noise = torch.randn(mean.shape, generator=generator).to(device)
        logits = autoencoder.decode_logits(mean + level * spread * noise)
        # A fixed spread keeps the relative noise from being bought off by ever larger latents.
        loss = mask_loss(logits, batch) + 0.01 * (mean.square().mean() - 1).square()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % report_every == 0 or step == steps:
            rate = step * batch_size / (time.monotonic() - started)
            yield AutoencoderStep(step, float(np.mean(losses)), rate)
            losses.clear()
    autoencoder.eval()
    autoencoder.register_to_config(scaling_factor=measure_scale(autoencoder, masks[:256], device=device))


def mask_loss(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Cross-entropy for every pixel plus soft Dice for every mask, so that small masks count."""
    probability = logits.sigmoid()
    overlap = (probability * mask).sum(dim=(1, 2, 3))
    total = probability.sum(dim=(1, 2, 3)) + mask.sum(dim=(1, 2, 3))
    dice = 1 - (2 * overlap + 1) / (total + 1)
    return functional.binary_cross_entropy_with_logits(logits, mask) * 4 + dice.mean()


def _batch(masks: Sequence[np.ndarray], size: int, crop: int, generator: torch.Generator) -> torch.Tensor:
    """Random crops with random flips, (size, 1, crop, crop), float in {0, 1}."""

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    out = []
    for _ in range(size):
        mask = masks[draw(len(masks))]
        top, left = draw(mask.shape[0] - crop + 1), draw(mask.shape[1] - crop + 1)
        patch = mask[top : top + crop, left : left + crop]
        patch = np.rot90(patch, draw(4))
        out.append(np.ascontiguousarray(patch[:, ::-1] if draw(2) else patch))
    return torch.from_numpy(np.stack(out)).float().unsqueeze(1)


@torch.no_grad()
def measure_scale(autoencoder: Autoencoder, masks: Sequence[np.ndarray], *, device: torch.device) -> float:
    """Measure 1 / standard deviation of the latents (LDM's scaling factor) over masks (S, S) in {0, 1}."""
    total, squares, count = 0.0, 0.0, 0
    for chunk in chunks_of(masks, autoencoder):
        latents = posterior(autoencoder, chunk.to(device)).mode().double()
        total += latents.sum().item()
        squares += latents.square().sum().item()
        count += latents.numel()
    variance = squares / count - (total / count) ** 2
    return 1.0 / math.sqrt(max(variance, 1e-12))


@torch.no_grad()
def reconstruction_dice(
    autoencoder: Autoencoder,
    masks: Sequence[np.ndarray],
    *,
    device: torch.device,
    latent_noise: float = 0.0,
    seed: int = 0,
) -> np.ndarray:
    """Measure the ceiling that an autoencoder sets: Dice of masks encoded and decoded again.

    Args:
        autoencoder: a KL or mask autoencoder on ``device``.
        masks: uint8, (S, S) each, values in {0, 1}; empty masks are left out, Dice is undefined there.
        device: where to compute.
        latent_noise: noise added to the latents, in their own standard deviations.
        seed: names the noise.

    Returns:
        float64, one Dice per mask that is not empty.
    """
    scores: list[float] = []
    scale = measure_scale(autoencoder, masks[:64], device=device) if latent_noise else 1.0
    filled = [mask for mask in masks if mask.any()]
    for index, chunk in enumerate(chunks_of(filled, autoencoder)):
        truth = chunk.to(device)
        latents = posterior(autoencoder, truth).mode()
        if latent_noise:
            noise = torch.randn(latents.shape, generator=generator_for("reconstruction", seed, index))
            latents = latents + noise.to(device) * latent_noise / scale
        predicted = decode_latents(autoencoder, latents, scale=1.0) > 0.5
        wanted = truth > 0.5
        scores.extend(dice_of_masks(predicted, wanted).tolist())
    return np.asarray(scores)


def dice_of_masks(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Dice of masks, bool (N, ...), float64 (N,) on the CPU; 1 where both are empty."""
    overlap = (one & other).flatten(1).sum(dim=1).cpu().double()
    total = (one.flatten(1).sum(dim=1) + other.flatten(1).sum(dim=1)).cpu().double()
    return torch.where(total > 0, 2 * overlap / total.clamp(min=1), 1.0)


def chunks_of(masks: Sequence[np.ndarray], autoencoder: Autoencoder) -> Iterator[torch.Tensor]:
    """Yield masks (S, S), float (N, 1, S, S), as many at a time as go through the autoencoder at once."""
    size = _CHUNK if isinstance(autoencoder, MaskAutoencoder) else CHUNK_OF_KL
    for start in range(0, len(masks), size):
        yield torch.from_numpy(np.stack(masks[start : start + size])).float().unsqueeze(1)
