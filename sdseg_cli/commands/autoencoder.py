"""``sdseg autoencoder``: trains the small autoencoder of the masks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdseg_cli import console
from sdseg_cli.commands._options import Device, DeviceOption, JsonOption, OverwriteOption

if TYPE_CHECKING:
    import numpy as np

    from sdseg_cli.core.data.prepared import PreparedDataset

_HELD_OUT_SEED = 1_000_003  # names masks that no training seed generates
_HELD_OUT = 256


def autoencoder(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the autoencoder.")],
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps.")] = 1600,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Masks per step.")] = 16,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", min=1e-7, max=0.1, help="Peak of the cosine schedule.")
    ] = 2e-3,
    masks: Annotated[int, typer.Option("--masks", min=16, help="Generated masks to train on.")] = 2000,
    size: Annotated[int, typer.Option("--size", min=64, max=1024, help="Side of the generated masks.")] = 256,
    crop: Annotated[int, typer.Option("--crop", min=32, help="Side of the crops trained on.")] = 128,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DATASET",
            help="Prepared dataset whose train masks join the generated ones, and whose validation masks "
            "are measured too. Its test split is never read.",
            show_default=False,
        ),
    ] = None,
    distill: Annotated[
        str | None,
        typer.Option(
            "--distill",
            metavar="KL",
            help="Train a small decoder for this KL autoencoder (folder or hub id) instead: "
            "sdseg predict --decoder uses it.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=999_999, help="Seed of masks and weights.")] = 0,
    device: DeviceOption = Device.auto,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train the small autoencoder of the masks, on generated and phantom masks.

    The one that is shipped was made by this command with its defaults. Name the folder in a recipe as
    model.autoencoder to use another. Ends with the Dice of masks encoded and decoded again, which is the
    most that a model on top of it can reach.

    Examples::

        sdseg autoencoder --out my-autoencoder
        sdseg autoencoder --out tubes --data data/vessels --steps 2000   # with your own masks
        sdseg train -r kseg-fast --set model.autoencoder=./my-autoencoder
        sdseg autoencoder --distill models/sdseg-cvc/autoencoder --out small   # for a published model
        sdseg predict scans/ --model models/sdseg-cvc --decoder small --out masks/
    """
    from sdseg_cli.core.errors import UsageError
    from sdseg_cli.core.files import refuse_existing, whole_folder
    from sdseg_cli.core.manifest import made_with, write_manifest

    if size % 8:
        raise UsageError(f"--size {size}: expected a multiple of 8, like {round(size / 8) * 8}.")
    if distill is None and (crop % 8 or crop > size):
        raise UsageError(f"--crop {crop}: expected a multiple of 8, at most --size ({size}).")
    refuse_existing(out, overwrite=overwrite, ours="config.json")
    console.say(f"{masks:,} masks of {size} pixels, {steps:,} steps of {batch_size} ...")

    import torch

    from sdseg_cli.core.data.prepared import PreparedDataset
    from sdseg_cli.core.engine.autoencoder_training import generated_masks, train_mask_autoencoder
    from sdseg_cli.core.engine.inference import choose_device
    from sdseg_cli.core.model.latents import spatial_factor
    from sdseg_cli.core.model.mask_autoencoder import MaskAutoencoder
    from sdseg_cli.core.model.weights import (
        load_published_autoencoder,
        quiet_diffusers,
        refer_to_autoencoder,
    )

    quiet_diffusers()
    teacher = load_published_autoencoder(distill) if distill is not None else None  # before minutes of work
    if teacher is not None and spatial_factor(teacher) != 8:
        raise UsageError(
            f"--distill {distill}: {spatial_factor(teacher)} pixels per latent pixel, expected 8 (a kl-f8 "
            "autoencoder)."
        )
    dataset = PreparedDataset.open(data) if data is not None else None
    chosen = choose_device(device)
    pool = list(console.progress(generated_masks(masks, size, seed), masks, "generating masks", unit="masks"))
    held_out = {"generated": list(generated_masks(_HELD_OUT, size, _HELD_OUT_SEED))}
    made_from: dict[str, Any] = {"masks": {"generated": masks, "size": size, "seed": seed}}
    if data is not None and dataset is not None:
        made_from["dataset"] = {"path": str(data.resolve()), "fingerprint": dataset.manifest.fingerprint}
        pool += _dataset_masks(dataset, "train", size)
        held_out[f"{data.name} validation"] = _dataset_masks(dataset, "validation", size)
    if distill is not None and teacher is not None:
        made_from["teacher"] = refer_to_autoencoder(distill, teacher)
        _distil(
            teacher.to(chosen),
            pool,
            held_out,
            out,
            {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed},
            made_from,
            device=chosen,
            overwrite=overwrite,
            as_json=as_json,
        )
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = MaskAutoencoder().to(chosen)
    with console.training_progress(steps) as bar:
        reports = train_mask_autoencoder(
            network,
            pool,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            crop=crop,
            seed=seed,
            device=chosen,
        )
        for report in reports:
            bar.update(report.step, loss=report.loss, samples_per_second=report.samples_per_second)
    scores = {name: _reconstruction(network, part, chosen) for name, part in held_out.items() if part}
    with whole_folder(out, overwrite=overwrite, ours="config.json") as folder:
        network.save_pretrained(folder)
        write_manifest(
            folder,
            "autoencoder",
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            crop=crop,
            seed=seed,
            **made_from,
            **made_with(),
        )
    if as_json:
        console.show_json({"folder": str(out), "reconstruction_dice": scores})
        return
    console.show_table(
        ["masks", "mean Dice", "median", "worst", "mean with latent noise"],
        [[name, *score.values()] for name, score in scores.items()],
        title="Reconstruction",
        caption="latent noise: half a standard deviation of the latents",
    )
    here = out if out.is_absolute() else f"./{out}"
    console.done(f"{out}. Use it with: --set model.autoencoder={here}")


def _distil(
    teacher: Any,
    masks: list[np.ndarray],
    held_out: dict[str, list[np.ndarray]],
    out: Path,
    settings: dict[str, Any],
    made_from: dict[str, Any],
    *,
    device: Any,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Train a decoder for the latents of ``teacher``, and report how well it agrees with the full one."""
    import torch

    from sdseg_cli.core.engine.distillation import (
        agreement,
        ask_teacher,
        make_mask_decoder,
        train_mask_decoder,
    )
    from sdseg_cli.core.files import whole_folder
    from sdseg_cli.core.manifest import made_with, write_manifest

    asked = ask_teacher(teacher, masks, seed=settings["seed"], device=device)
    answers = list(console.progress(asked, len(masks), "asking the full decoder", unit="masks"))
    latents, wanted = (torch.stack(column) for column in zip(*answers, strict=True))
    answers.clear()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["seed"])
        decoder = make_mask_decoder(teacher, latents).to(device)
    with console.training_progress(settings["steps"]) as bar:
        for report in train_mask_decoder(decoder, latents, wanted, device=device, **settings):
            bar.update(report.step, loss=report.loss, samples_per_second=report.samples_per_second)
    scores: dict[str, dict[str, float]] = {}
    with console.working("comparing with the full decoder"):
        for name, part in held_out.items():
            if part:
                with_full, with_truth = agreement(decoder, teacher, part, device=device)
                scores[name] = {
                    "mean": float(with_full.mean()),
                    "worst": float(with_full.min()),
                    "with_truth": float(with_truth.mean()),
                }
    with whole_folder(out, overwrite=overwrite, ours="config.json") as folder:
        decoder.save_pretrained(folder)
        write_manifest(folder, "decoder", **settings, **made_from, **made_with())
    if as_json:
        console.show_json({"folder": str(out), "agreement_dice": scores})
        return
    console.show_table(
        ["masks", "mean Dice", "worst", "mean with the true masks"],
        [[name, *score.values()] for name, score in scores.items()],
        title="Agreement with the full decoder",
        caption="held-out masks, encoded and decoded by both",
    )
    console.done(f"{out}. Use it with: sdseg predict scans/ --decoder {out} --model MODEL --out masks/")


def _dataset_masks(dataset: PreparedDataset, split: str, size: int) -> list[np.ndarray]:
    """Every foreground class of every slice, on a square grid of ``size``."""
    import numpy as np

    masks = []
    for item in dataset.split(split):
        labels = replace(item.grid, size=size).labels_to_model(item.label_map)
        masks += [(labels == label).astype(np.uint8) for label in np.unique(labels) if label]
    return masks


def _reconstruction(network: Any, masks: list[np.ndarray], device: Any) -> dict[str, float]:
    import numpy as np

    from sdseg_cli.core.engine.autoencoder_training import reconstruction_dice

    clean = reconstruction_dice(network, masks, device=device)
    noisy = reconstruction_dice(network, masks, device=device, latent_noise=0.5)
    return {
        "mean": float(clean.mean()),
        "median": float(np.median(clean)),
        "worst": float(clean.min()),
        "with_latent_noise": float(noisy.mean()),
    }
