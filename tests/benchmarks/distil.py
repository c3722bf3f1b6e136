"""A small KL autoencoder is trained on masks, then a small decoder for it: how well do they agree?

::

    python tests/benchmarks/distil.py --out results/distil [--zip kvasir-seg.zip]

The autoencoder has the paper's form (three channels, four levels, eight pixels per latent pixel) at small
widths. With an archive of Kvasir-SEG its masks are measured too; none of them is trained on.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from sdseg_cli.core.engine.autoencoder_training import generated_masks, reconstruction_dice
from sdseg_cli.core.engine.distillation import agreement, encode_masks, make_mask_decoder, train_mask_decoder
from sdseg_cli.core.seeding import generator_for

CPU = torch.device("cpu")


def small_kl(widths: tuple[int, ...]) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def train_kl(network: AutoencoderKL, masks: list[np.ndarray], steps: int, batch: int, rate: float) -> None:
    """Reconstruction of {-1, 1} in three channels, with the posterior's noise and a faint KL term."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    network.train()
    for step in range(steps):
        generator = generator_for("kl", step)
        chosen = torch.randint(len(masks), (batch,), generator=generator)
        pixels = torch.from_numpy(np.stack([masks[int(i)] for i in chosen])).float()[:, None] * 2 - 1
        pixels = pixels.expand(-1, 3, -1, -1)
        encoded = network.encode(pixels).latent_dist
        decoded = network.decode(encoded.sample(generator=generator)).sample
        loss = (decoded - pixels).abs().mean() + 1e-6 * encoded.kl().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"autoencoder {step}/{steps}: {loss.item():.4f}", file=sys.stderr)
    network.eval().requires_grad_(False)


def kvasir_masks(archive: Path, size: int, count: int = 64) -> list[np.ndarray]:
    found = []
    with zipfile.ZipFile(archive) as opened:
        names = sorted(name for name in opened.namelist() if "/masks/" in name and not name.endswith("/"))
        for name in names[:count]:
            picture = Image.open(io.BytesIO(opened.read(name))).convert("L").resize((size, size), 0)
            found.append((np.asarray(picture) > 127).astype(np.uint8))
    return found


def main(arguments: list[str] | None = None) -> dict:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--masks", type=int, default=800)
    parser.add_argument("--widths", type=int, nargs=4, default=(16, 32, 32, 32))
    parser.add_argument("--kl-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--zip", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    masks = list(generated_masks(options.masks, options.size, 0))
    held_out = {"generated and phantom": list(generated_masks(64, options.size, 1_000_003))}
    if options.zip is not None:
        held_out["Kvasir-SEG"] = kvasir_masks(options.zip, options.size)
    teacher = small_kl(tuple(options.widths))
    train_kl(teacher, masks, options.kl_steps, 8, 2e-3)
    latents = torch.stack(list(encode_masks(teacher, masks, device=CPU)))
    torch.manual_seed(0)
    decoder = make_mask_decoder(teacher, latents)
    training = {"steps": options.steps, "batch_size": 16, "learning_rate": 2e-3, "seed": 0, "device": CPU}
    for report in train_mask_decoder(decoder, latents, masks, report_every=100, **training):
        print(f"decoder {report.step}/{options.steps}: {report.loss:.4f}", file=sys.stderr)
    scores = {}
    for name, part in held_out.items():
        with_full, with_truth = agreement(decoder, teacher, part, device=CPU)
        scores[name] = {
            "agreement_with_the_full_decoder": round(float(with_full.mean()), 5),
            "worst_agreement": round(float(with_full.min()), 5),
            "small_decoder_with_truth": round(float(with_truth.mean()), 5),
            "full_decoder_with_truth": round(float(reconstruction_dice(teacher, part, device=CPU).mean()), 5),
        }
    print(json.dumps(scores, indent=2))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "distil.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    return scores


if __name__ == "__main__":
    main()
