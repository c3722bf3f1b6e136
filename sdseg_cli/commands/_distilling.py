"""``sdseg autoencoder --distill``: a small decoder for a KL autoencoder, or for a model on one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdseg_cli import console
from sdseg_cli.commands._measured import Model
from sdseg_cli.core.errors import DataError, UsageError
from sdseg_cli.core.files import EXPORT_FILE

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import AutoencoderKL

    from sdseg_cli.core.data.prepared import PreparedDataset
    from sdseg_cli.core.engine.distillation import Chunk
    from sdseg_cli.core.model.mask_decoder import MaskDecoder
    from sdseg_cli.core.model.pipeline import SDSegPipeline

_MOST_COMPARED = 256  # images of the validation split


@dataclass(frozen=True)
class ModelOnData:
    """A model on latents of a KL autoencoder, and a dataset that fits it."""

    pipeline: SDSegPipeline
    dataset: PreparedDataset
    num_inference_steps: int

    def predictions(self, split: str, images: int, seed: int) -> Iterator[Chunk]:
        """Predict latents for so many images of a split; see ``predicted_latents``."""
        from sdseg_cli.core.engine.distillation import predicted_latents

        return predicted_latents(
            self.pipeline,
            self.dataset.split(split),
            count=images,
            seed=seed,
            num_inference_steps=self.num_inference_steps,
        )


@dataclass(frozen=True)
class Teacher:
    """What a small decoder is made for.

    Attributes:
        autoencoder: whose decoder it is to stand in for.
        evidence: what the small decoder's manifest says of the teacher.
        image_size: of the model that was named; None for an autoencoder.
        dataset: whose masks are learned too, if there is one.
        model: predicts latents to learn; None without a model or without data.
    """

    autoencoder: AutoencoderKL
    evidence: dict[str, Any]
    image_size: int | None
    dataset: PreparedDataset | None
    model: ModelOnData | None = None


def find_teacher(location: str, data: Path | None, device: torch.device) -> Teacher:
    """Load what ``--distill`` names.

    Args:
        location: folder or hub id of a KL autoencoder or of a diffusers model with a vae; or a run, model
            folder or hub id of a model of ours.
        data: prepared dataset; None means the one that a run was trained on.
        device: where to put the networks.

    Raises:
        UsageError: there is nothing of that name, or a model that has no KL autoencoder.
        ModelError: it cannot be read.
        DataError: the dataset does not fit the model, or cannot be read.
    """
    from sdseg_cli.core.data.prepared import PreparedDataset
    from sdseg_cli.core.model.latents import spatial_factor
    from sdseg_cli.core.model.weights import load_published_autoencoder, quiet_diffusers, refer_to_autoencoder

    quiet_diffusers()
    model = _find_model(location)
    if model is not None:
        teacher = _teacher_of(model, data, device)
    else:
        autoencoder = load_published_autoencoder(location)
        evidence = {"teacher": refer_to_autoencoder(location, autoencoder)}
        dataset = PreparedDataset.open(data) if data is not None else None
        teacher = Teacher(autoencoder.to(device), evidence, None, dataset)
    if (factor := spatial_factor(teacher.autoencoder)) != 8:
        raise UsageError(
            f"--distill {location}: {factor} pixels per latent pixel, expected 8 (a kl-f8 autoencoder)."
        )
    return teacher


def _find_model(location: str) -> Model | None:
    """The model of ours that is meant; None where it is an autoencoder or a model of another kind."""
    folder = Path(location).expanduser()
    if (folder / "config.json").is_file() or (folder / "vae").is_dir():
        return None
    model = Model.find(location, option="--distill", also="the folder of a KL autoencoder")
    place = Path(model.reference.location)
    if (place / EXPORT_FILE).is_file():
        raise UsageError(
            f"--distill {location} is an exported model, whose networks cannot be told apart. Name the model "
            "it was exported from."
        )
    is_ours = place.is_dir() or model.stated.get("_class_name") == "SDSegPipeline"
    return model if is_ours else None


def _teacher_of(model: Model, data: Path | None, device: torch.device) -> Teacher:
    from diffusers import AutoencoderKL

    from sdseg_cli.core.engine.evaluation import check_fit
    from sdseg_cli.core.engine.inference import Predictor
    from sdseg_cli.core.model.weights import load_pipeline, refer_to_autoencoder

    place = model.reference.location
    pipeline = load_pipeline(place)
    if not isinstance(pipeline.autoencoder, AutoencoderKL):
        raise UsageError(
            f"--distill {place}: the model has no KL autoencoder, whose decoder a small one could replace. "
            "Predict with it as it is."
        )
    referred = pipeline.config.get("autoencoder_reference")
    evidence = {
        "teacher": referred or refer_to_autoencoder(f"{place}/autoencoder", pipeline.autoencoder),
        "model": model.evidence(),
    }
    dataset, on_data = _dataset_of(model, data), None
    if dataset is not None:
        check_fit(Predictor(pipeline), dataset.manifest, dataset.root)
        steps = model.sampling(num_inference_steps=None).get("num_inference_steps", 1)
        on_data = ModelOnData(pipeline, dataset, steps)
    pipeline.to(device)
    return Teacher(pipeline.autoencoder, evidence, pipeline.config.image_size, dataset, on_data)


def _dataset_of(model: Model, data: Path | None) -> PreparedDataset | None:
    """The dataset of ``--data``, or of the run if it is still there; None without one, which is said."""
    gain = (
        "With --data the decoder learns from what the model predicts too, and is nearer to the full one "
        "where the model is not sure."
    )
    if data is None and model.recipe is None:
        console.warn(f"what the model was trained on is not known. {gain}")
        return None
    try:
        return model.dataset(data)
    except DataError as error:
        if data is not None:
            raise
        console.warn(f"{error} Going on without it. {gain}")
        return None


def distil(
    teacher: Teacher, masks: Sequence[np.ndarray], settings: Mapping[str, Any], device: torch.device
) -> tuple[MaskDecoder, int]:
    """Train a decoder.

    Args:
        teacher: whose answers it learns.
        masks: uint8, (S, S) each.
        settings: steps, batch_size, learning_rate and seed.
        device: where to train.

    Returns:
        The decoder, and how many of the latents that it learned from a model has predicted: half as many as
        there are masks, if there are a model and its data (figures: tests/benchmarks/README.md).
    """
    import torch

    from sdseg_cli.core.engine.distillation import (
        ask_teacher,
        exact_latents,
        gather_answers,
        make_mask_decoder,
        train_mask_decoder,
        with_unsure_latents,
    )

    seed = settings["seed"]
    chunks = with_unsure_latents(exact_latents(teacher.autoencoder, masks), seed=seed)
    predicted = 0
    model = teacher.model
    if model is not None and model.dataset.manifest.splits["train"]:
        images = max(1, len(masks) // 2 // model.pipeline.masks_an_image)
        predicted = images * model.pipeline.masks_an_image
        chunks = chain(chunks, model.predictions("train", images, seed))
    total = len(masks) + predicted
    asked = ask_teacher(teacher.autoencoder, chunks)
    answers = console.progress(asked, total, "asking the full decoder", unit="masks")
    latents, wanted = gather_answers(answers, total)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = make_mask_decoder(teacher.autoencoder, latents).to(device)
    with console.training_progress(settings["steps"]) as bar:
        for report in train_mask_decoder(decoder, latents, wanted, device=device, **settings):
            bar.update(report.step, loss=report.loss, samples_per_second=report.samples_per_second)
    return decoder, predicted


def compare_with_teacher(
    decoder: MaskDecoder, teacher: Teacher, held_out: Mapping[str, Sequence[np.ndarray]], seed: int
) -> dict[str, dict[str, float]]:
    """Compare both decoders on held-out masks, and on what the model predicts for the validation split."""
    from sdseg_cli.core.engine.distillation import compare_decoders, exact_latents

    parts = {name: exact_latents(teacher.autoencoder, masks) for name, masks in held_out.items()}
    if (model := teacher.model) is not None:
        images = min(_MOST_COMPARED, model.dataset.manifest.splits["validation"])
        parts["predictions for validation"] = model.predictions("validation", images, seed)
    scores = {}
    with console.working("comparing with the full decoder"):
        for name, chunks in parts.items():
            found = compare_decoders(decoder, teacher.autoencoder, chunks)
            if len(found.agreement):
                scores[name] = {
                    "mean": float(found.agreement.mean()),
                    "worst": float(found.agreement.min()),
                    "with_truth": float(found.small_with_truth.mean()),
                    "full_with_truth": float(found.full_with_truth.mean()),
                }
    return scores
