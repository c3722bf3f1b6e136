"""``sdseg autoencoder``: trains the small autoencoder of the masks, or a small decoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdseg_cli import console
from sdseg_cli.commands._options import Device, DeviceOption, JsonOption, OverwriteOption
from sdseg_cli.core.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from sdseg_cli.core.data.prepared import PreparedDataset

_SIZE = 256  # pixels, of generated masks
_CROP = 128
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
    size: Annotated[
        int | None,
        typer.Option(
            "--size",
            min=64,
            max=1024,
            help="Side of the generated masks; default 256, or the side of a model's images.",
            show_default=False,
        ),
    ] = None,
    crop: Annotated[
        int | None,
        typer.Option(
            "--crop",
            min=32,
            help="Side of the crops trained on; default 128. A small decoder learns whole masks.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DATASET",
            help="Prepared dataset whose train masks join the generated ones, and whose validation masks "
            "are measured too. Its test split is never read. Default with a run to distill: what it was "
            "trained on.",
            show_default=False,
        ),
    ] = None,
    distill: Annotated[
        str | None,
        typer.Option(
            "--distill",
            metavar="MODEL|KL",
            help="Train a small decoder instead, which sdseg predict --decoder uses: for a model on a KL "
            "autoencoder (run, model folder or hub id), from what it predicts for the training images too; "
            "or for the autoencoder alone (folder or hub id).",
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

    With --distill it trains a decoder instead, which stands in for the large one of photographs, and ends
    with the Dice between the masks of both, and of both with the true ones.

    Examples::

        sdseg autoencoder --out my-autoencoder
        sdseg autoencoder --out tubes --data data/vessels --steps 2000   # with your own masks
        sdseg train -r kseg-fast --set model.autoencoder=./my-autoencoder
        sdseg autoencoder --distill models/sdseg-cvc --data data/cvc --out small   # for a published model
        sdseg predict scans/ --model models/sdseg-cvc --decoder small --out masks/
        sdseg autoencoder --distill models/sdseg-cvc/autoencoder --out small       # without any data
    """
    from sdseg_cli.core.files import refuse_existing

    refuse_existing(out, overwrite=overwrite, ours="config.json")
    settings = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    if distill is not None:
        if crop is not None:
            raise UsageError(f"--crop {crop}: a small decoder learns whole masks. Leave it out.")
        _distil(distill, out, masks, size, data, settings, device, overwrite=overwrite, as_json=as_json)
    else:
        side, side_of_crops = size or _SIZE, crop or _CROP
        _train(out, masks, side, side_of_crops, data, settings, device, overwrite=overwrite, as_json=as_json)


def _train(
    out: Path,
    masks: int,
    size: int,
    crop: int,
    data: Path | None,
    settings: dict[str, Any],
    device: Device,
    *,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Train an autoencoder, write it, and report what it reconstructs."""
    _check_size(size)
    if crop % 8 or crop > size:
        raise UsageError(f"--crop {crop}: expected a multiple of 8, at most --size ({size}).")

    import torch

    from sdseg_cli.core.data.prepared import PreparedDataset
    from sdseg_cli.core.engine.autoencoder_training import train_mask_autoencoder
    from sdseg_cli.core.engine.inference import choose_device
    from sdseg_cli.core.files import whole_folder
    from sdseg_cli.core.manifest import made_with, write_manifest
    from sdseg_cli.core.model.mask_autoencoder import MaskAutoencoder
    from sdseg_cli.core.model.weights import quiet_diffusers

    quiet_diffusers()
    chosen = choose_device(device)
    pool = _gather_masks(masks, size, PreparedDataset.open(data) if data is not None else None, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["seed"])
        network = MaskAutoencoder().to(chosen)
    with console.training_progress(settings["steps"]) as bar:
        for report in train_mask_autoencoder(network, pool.train, crop=crop, device=chosen, **settings):
            bar.update(report.step, loss=report.loss, samples_per_second=report.samples_per_second)
    scores = {name: _reconstruction(network, part, chosen) for name, part in pool.held_out.items()}
    with whole_folder(out, overwrite=overwrite, ours="config.json") as folder:
        network.save_pretrained(folder)
        write_manifest(folder, "autoencoder", **settings, crop=crop, **pool.made_from, **made_with())
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
    location: str,
    out: Path,
    masks: int,
    size: int | None,
    data: Path | None,
    settings: dict[str, Any],
    device: Device,
    *,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Train a small decoder for ``location``, write it, and report how well it agrees with the full one."""
    _check_size(size or _SIZE)

    from sdseg_cli.commands._distilling import compare_with_teacher, distil, find_teacher
    from sdseg_cli.core.engine.inference import choose_device
    from sdseg_cli.core.files import whole_folder
    from sdseg_cli.core.manifest import made_with, write_manifest

    chosen = choose_device(device)
    with console.working("loading the full decoder"):
        teacher = find_teacher(location, data, chosen)
    side = teacher.image_size or size or _SIZE
    if size not in (None, side):
        raise UsageError(f"--size {size}: the model's images have {side} pixels. Leave it out.")
    pool = _gather_masks(masks, side, teacher.dataset, settings)
    decoder, predicted = distil(teacher, pool.train, settings, chosen)
    scores = compare_with_teacher(decoder, teacher, pool.held_out, settings["seed"])
    with whole_folder(out, overwrite=overwrite, ours="config.json") as folder:
        decoder.save_pretrained(folder)
        made_from = {**pool.made_from, **teacher.evidence, "predicted_latents": predicted}
        write_manifest(folder, "decoder", **settings, **made_from, **made_with())
    if as_json:
        console.show_json({"folder": str(out), "agreement_dice": scores, "predicted_latents": predicted})
        return
    console.show_table(
        ["masks", "Dice with the full decoder", "worst", "with the true masks", "the full decoder's"],
        [[name, *score.values()] for name, score in scores.items()],
        title="Agreement with the full decoder",
        caption="held-out masks, encoded, or predicted by the model, and decoded by both",
    )
    model = "MODEL" if teacher.image_size is None else location
    console.done(f"{out}. Use it with: sdseg predict scans/ --decoder {out} --model {model} --out masks/")


@dataclass(frozen=True)
class _Masks:
    """Masks to learn from and, by name, to measure on, uint8 (S, S); and what the manifest says of them."""

    train: list[np.ndarray]
    held_out: dict[str, list[np.ndarray]]
    made_from: dict[str, Any]


def _gather_masks(count: int, size: int, dataset: PreparedDataset | None, settings: dict[str, Any]) -> _Masks:
    """Generate masks, and add those of a dataset's train and validation splits."""
    from sdseg_cli.core.engine.autoencoder_training import generated_masks

    seed = settings["seed"]
    console.say(
        f"{count:,} masks of {size} pixels, {settings['steps']:,} steps of {settings['batch_size']} ..."
    )
    made = generated_masks(count, size, seed)
    pool = list(console.progress(made, count, "generating masks", unit="masks"))
    held_out = {"generated": list(generated_masks(_HELD_OUT, size, _HELD_OUT_SEED))}
    made_from: dict[str, Any] = {"masks": {"generated": count, "size": size, "seed": seed}}
    if dataset is not None:
        where = {"path": str(dataset.root.resolve()), "fingerprint": dataset.manifest.fingerprint}
        made_from["dataset"] = where
        pool += _dataset_masks(dataset, "train", size)
        if validation := _dataset_masks(dataset, "validation", size):
            held_out[f"{dataset.root.name} validation"] = validation
    return _Masks(pool, held_out, made_from)


def _check_size(size: int) -> None:
    if size % 8:
        raise UsageError(f"--size {size}: expected a multiple of 8, like {round(size / 8) * 8}.")


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
