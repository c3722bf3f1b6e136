"""A small KL autoencoder is trained on masks, then a small decoder for it: how well do they agree?

::

    python tests/benchmarks/distil.py --out results/distil [--zip kvasir-seg.zip]
    python tests/benchmarks/distil.py --teacher KL --decoder SMALL     # of sdseg autoencoder --distill KL

The autoencoder has the paper's form (three channels, four levels, eight pixels per latent pixel) at small
widths. With an archive of Kvasir-SEG its masks are measured too; none of them is trained on.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from sdseg_cli.core.data.phantom import PHANTOM_KINDS, make_phantom
from sdseg_cli.core.engine.autoencoder_training import generated_masks
from sdseg_cli.core.engine.distillation import (
    ask_teacher,
    compare_decoders,
    exact_latents,
    gather_answers,
    make_mask_decoder,
    train_mask_decoder,
    with_unsure_latents,
)
from sdseg_cli.core.model.mask_decoder import MaskDecoder
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


def train_kl(
    network: AutoencoderKL, masks: list[np.ndarray], steps: int, crop: int, rate: float
) -> Iterator[float]:
    """Reconstruction of {-1, 1} in three channels, with the posterior's noise and a faint KL term.

    Yields:
        The loss after every step. Crops of twice the side come in turn with those of ``crop``, four times as
        few of them, so that the group norms get to know larger images.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    network.train()
    for step in range(steps):
        generator = generator_for("kl", step)
        side, batch = (crop, 8) if step % 2 else (min(2 * crop, masks[0].shape[0]), 2)
        truth = torch.stack([random_crop(masks, side, generator) for _ in range(batch)])
        pixels = truth[:, None].expand(-1, 3, -1, -1) * 2 - 1
        encoded = network.encode(pixels).latent_dist
        decoded = network.decode(encoded.sample(generator=generator)).sample
        probability = ((decoded.mean(dim=1) + 1) / 2).clamp(0, 1)
        dice = 1 - (2 * (probability * truth).sum() + 1) / (probability.sum() + truth.sum() + 1)
        loss = (decoded - pixels).abs().mean() + 0.5 * dice + 1e-6 * encoded.kl().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()
    network.eval().requires_grad_(False)


def random_crop(masks: list[np.ndarray], side: int, generator: torch.Generator) -> torch.Tensor:
    """A crop (side, side), float in {0, 1}; one with both values if four draws find it."""
    for _ in range(4):
        mask = masks[int(torch.randint(len(masks), (), generator=generator))]
        top, left = (int(torch.randint(length - side + 1, (), generator=generator)) for length in mask.shape)
        found = torch.from_numpy(mask[top : top + side, left : left + side]).float()
        if 0 < found.mean() < 1:
            break
    return found


def phantom_masks(kind: str, size: int, count: int = 64) -> list[np.ndarray]:
    """One structure of each phantom, a class in turn; phantoms without foreground are passed over."""
    found: list[np.ndarray] = []
    index = 0
    while len(found) < count:
        _, label_map = make_phantom(kind, seed=4711, index=index, size=size)
        labels = np.unique(label_map[label_map > 0])
        if len(labels):
            picture = Image.fromarray((label_map == labels[index % len(labels)]).astype(np.uint8))
            found.append(np.asarray(picture.resize((size, size), 0)))
        index += 1
    return found


def kvasir_masks(archive: Path, size: int, count: int = 64) -> list[np.ndarray]:
    found = []
    with zipfile.ZipFile(archive) as opened:
        names = sorted(name for name in opened.namelist() if "/masks/" in name and not name.endswith("/"))
        for name in names[:count]:
            picture = Image.open(io.BytesIO(opened.read(name))).convert("L").resize((size, size), 0)
            found.append((np.asarray(picture) > 127).astype(np.uint8))
    return found


def find_teacher(options: argparse.Namespace, masks: list[np.ndarray]) -> AutoencoderKL:
    """Load the KL autoencoder of an earlier run, or train it and keep it."""
    if options.teacher is not None and options.teacher.exists():
        return AutoencoderKL.from_pretrained(options.teacher).eval().requires_grad_(False)
    teacher = small_kl(tuple(options.widths))
    for step, loss in enumerate(train_kl(teacher, masks, options.kl_steps, options.crop, 2e-3)):
        if step % 50 == 0:
            print(f"autoencoder {step}/{options.kl_steps}: {loss:.4f}", file=sys.stderr)
    if options.teacher is not None:
        teacher.save_pretrained(options.teacher)
    return teacher


def find_decoder(options: argparse.Namespace, teacher: AutoencoderKL, masks: list[np.ndarray]) -> MaskDecoder:
    """Load a decoder that ``sdseg autoencoder --distill`` made, or train one here."""
    if options.decoder is not None:
        return MaskDecoder.from_pretrained(options.decoder).eval()
    taught = masks[: options.taught]
    chunks = with_unsure_latents(exact_latents(teacher, taught), seed=0)
    latents, wanted = gather_answers(ask_teacher(teacher, chunks), len(taught))
    torch.manual_seed(0)
    decoder = make_mask_decoder(teacher, latents)
    training = {"steps": options.steps, "batch_size": options.batch, "learning_rate": 2e-3, "seed": 0}
    for report in train_mask_decoder(decoder, latents, wanted, report_every=50, device=CPU, **training):
        print(f"decoder {report.step}/{options.steps}: {report.loss:.4f}", file=sys.stderr)
    return decoder


def main(arguments: list[str] | None = None) -> dict:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--masks", type=int, default=1200)
    parser.add_argument("--widths", type=int, nargs=4, default=(16, 32, 64, 64))
    parser.add_argument("--crop", type=int, default=64, help="side of the crops the autoencoder trains on")
    parser.add_argument("--kl-steps", type=int, default=1000)
    parser.add_argument("--teacher", type=Path, help="folder the autoencoder is kept in, and taken from")
    parser.add_argument("--decoder", type=Path, help="folder of a small decoder to measure; none is trained")
    parser.add_argument("--taught", type=int, default=500, help="masks the small decoder trains on")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--zip", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    masks = list(generated_masks(options.masks, options.size, 0))
    held_out = {"shapes and phantoms, as trained on": list(generated_masks(64, options.size, 1_000_003))}
    held_out |= {f"{kind} phantom": phantom_masks(kind, options.size) for kind in PHANTOM_KINDS}
    if options.zip is not None:
        held_out["Kvasir-SEG"] = kvasir_masks(options.zip, options.size)
    teacher = find_teacher(options, masks)
    decoder = find_decoder(options, teacher, masks)
    scores = {}
    for name, part in held_out.items():
        found = compare_decoders(decoder, teacher, exact_latents(teacher, part))
        scores[name] = {
            "agreement_with_the_full_decoder": round(float(found.agreement.mean()), 5),
            "median_agreement": round(float(np.median(found.agreement)), 5),
            "worst_agreement": round(float(found.agreement.min()), 5),
            "small_decoder_with_truth": round(float(found.small_with_truth.mean()), 5),
            "full_decoder_with_truth": round(float(found.full_with_truth.mean()), 5),
        }
    print(json.dumps(scores, indent=2))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "distil.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    return scores


if __name__ == "__main__":
    main()
