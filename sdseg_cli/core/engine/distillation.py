"""Trains a small decoder to read the latents that a KL autoencoder gives to masks, or a model predicts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from sdseg_cli.core.engine.autoencoder_training import (
    CHUNK_OF_KL,
    AutoencoderStep,
    chunks_of,
    dice_of_masks,
)
from sdseg_cli.core.model.latents import decode_latents, posterior
from sdseg_cli.core.model.mask_decoder import MaskDecoder, fingerprint
from sdseg_cli.core.seeding import generator_for

if TYPE_CHECKING:
    from sdseg_cli.core.data.prepared import PreparedSlice
    from sdseg_cli.core.model.pipeline import SDSegPipeline

# Unscaled latents, float32 (N, C, h, w) on the autoencoder's device, and the true masks, bool (N, S, S):
# as many as go through the autoencoder at once.
Chunk: TypeAlias = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def exact_latents(autoencoder: AutoencoderKL, masks: Sequence[np.ndarray]) -> Iterator[Chunk]:
    """Encode masks, (S, S) each with values in {0, 1}, a few at a time."""
    for truth in chunks_of(masks, autoencoder):
        latents = posterior(autoencoder, truth.to(autoencoder.device)).mode()
        yield latents.float(), truth[:, 0] > 0.5


def predicted_latents(
    pipeline: SDSegPipeline,
    slices: Sequence[PreparedSlice],
    *,
    count: int,
    seed: int,
    num_inference_steps: int = 1,
) -> Iterator[Chunk]:
    """Predict latents for images of a split.

    Where a model is not sure it predicts no exact latent, and what it does predict, nobody else knows.

    Args:
        pipeline: a model on latents of a KL autoencoder.
        slices: of a split, on the model's grid.
        count: images to predict for: evenly spread over the split, or every image more than once, with other
            noise.
        seed: names the noise.
        num_inference_steps: reverse steps.

    Yields:
        A few latents; those of all masks of an image come one after another.
    """
    at_once = max(1, CHUNK_OF_KL // pipeline.masks_an_image)
    chosen = iter(_spread(count, len(slices)))
    while batch := list(islice(chosen, at_once)):
        items = [(slices[position], sample) for position, sample in batch]
        latents = pipeline.predict_latents(
            np.stack([item.image for item, _ in items]),
            [(seed, item.case_id, item.slice_index, sample) for item, sample in items],
            num_inference_steps=num_inference_steps,
        )
        masks = [pipeline.masks_of(item.grid.labels_to_model(item.label_map)) for item, _ in items]
        truths = torch.from_numpy(np.concatenate(masks))
        yield from zip(latents.flatten(0, 1).split(CHUNK_OF_KL), truths.split(CHUNK_OF_KL), strict=True)


def _spread(count: int, length: int) -> list[tuple[int, int]]:
    """Give positions in a sequence, evenly spread, and how often each was given before."""
    if count <= length:
        return [(k * length // count, 0) for k in range(count)]
    return [(k % length, k // length) for k in range(count)]


def with_unsure_latents(chunks: Iterable[Chunk], *, seed: int, max_noise: float = 0.5) -> Iterator[Chunk]:
    """Put in the place of every second latent what a denoiser that is not sure may say.

    That is something between the latents of several masks, and noise. A decoder that was taught exact ones
    alone parts from the full one on a model's predictions.

    Args:
        chunks: exact latents of a few masks at a time.
        seed: names the mixtures and the noise.
        max_noise: noise at most, in the standard deviations of latents.
    """
    start = 0
    for latents, truth in chunks:
        generator = generator_for("distillation", "latents", seed, start)
        count = len(latents)
        weights = -torch.rand(count, count, generator=generator).clamp(min=1e-7).log()
        weights /= weights.sum(dim=1, keepdim=True)  # a flat Dirichlet's
        exact = latents.cpu()
        level = max_noise * torch.rand(count, 1, 1, 1, generator=generator)
        noise = level * exact.std() * torch.randn(exact.shape, generator=generator)
        unsure = torch.einsum("mn,nchw->mchw", weights, exact) + noise
        mixed = latents.clone()
        mixed[1::2] = unsure[1::2].to(latents)
        yield mixed, truth
        start += count


@torch.no_grad()
def ask_teacher(
    autoencoder: AutoencoderKL, chunks: Iterable[Chunk]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Decode latents with the full decoder.

    Yields:
        Every latent, float32 (C, h, w), and what the full decoder makes of it, float16 (8h, 8w),
        probabilities, on the CPU. What a small decoder should say is this and not the true mask: the two
        differ where the autoencoder does not reproduce it, or the model does not find it.
    """
    for latents, _ in chunks:
        decoded = decode_latents(autoencoder, latents, scale=1.0)[:, 0]
        yield from zip(latents.float().cpu(), decoded.half().cpu(), strict=True)


def gather_answers(
    answers: Iterable[tuple[torch.Tensor, torch.Tensor]], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put ``count`` answers of :func:`ask_teacher` together: (N, C, h, w) and (N, 8h, 8w)."""
    latents, wanted = torch.empty(0), torch.empty(0)
    for index, (latent, said) in enumerate(answers):
        if index == 0:  # at once, since a list and what is stacked of it would be twice as large
            latents, wanted = latent.new_empty(count, *latent.shape), said.new_empty(count, *said.shape)
        latents[index], wanted[index] = latent, said
    return latents, wanted


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
        latents: float32, (N, C, h, w), exact and unsure ones.
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
        loss = soft_mask_loss(decoder.decode_logits(latents[chosen].to(device)), target)
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


def soft_mask_loss(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Cross-entropy for every pixel plus a soft Dice for every mask, both least where the two are the same.

    The usual soft Dice is least at zeros and ones whatever is wanted, and rather at ones: where many pixels
    were in doubt, masks grew by 4 %. This is the Dice semimetric loss (Wang et al., MICCAI 2023,
    arXiv 2303.16296).

    Args:
        logits: float, (B, 1, S, S).
        wanted: float, (B, 1, S, S), probabilities.
    """
    probability = logits.sigmoid()
    apart = (probability - wanted).abs().sum(dim=(1, 2, 3))
    total = (probability + wanted).sum(dim=(1, 2, 3))
    return functional.binary_cross_entropy_with_logits(logits, wanted) * 4 + (apart / (total + 1)).mean()


@dataclass(frozen=True)
class DecoderComparison:
    """Dice of masks, one value a mask, float64: of both decoders with each other and with the true masks."""

    agreement: np.ndarray
    small_with_truth: np.ndarray
    full_with_truth: np.ndarray


@torch.no_grad()
def compare_decoders(
    decoder: MaskDecoder, autoencoder: AutoencoderKL, chunks: Iterable[Chunk]
) -> DecoderComparison:
    """Compare the small decoder with the full one on latents; those of empty true masks are left out."""
    found: list[torch.Tensor] = []
    for latents, truths in chunks:
        filled = truths.flatten(1).any(dim=1)
        if not filled.any():
            continue
        kept, truth = latents[filled.to(latents.device)], truths[filled]
        small, full = (
            (decode_latents(network, kept, scale=1.0)[:, 0] > 0.5).cpu() for network in (decoder, autoencoder)
        )
        pairs = ((small, full), (small, truth), (full, truth))
        found.append(torch.stack([dice_of_masks(*pair) for pair in pairs], dim=1))
    scores = torch.cat(found).numpy() if found else np.empty((0, 3))
    return DecoderComparison(scores[:, 0], scores[:, 1], scores[:, 2])
