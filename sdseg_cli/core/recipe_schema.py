"""The recipe: every setting of a training, typed, bounded and explained in one place.

A recipe is one self-contained YAML file. An unknown key, a value out of its bounds and a combination that
makes no sense are errors, and all of them are told at once with the line they stand in.
:mod:`sdseg_cli.core.recipe` reads the files; ``docs/recipes.md`` is written from this schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from sdseg_cli.core.errors import RecipeError


@dataclass(frozen=True)
class Form:
    """What a value must look like, in words, where its type alone does not tell."""

    text: str
    words: tuple[str, ...] = ()  # values with a meaning of their own, to find a misspelt one


class Settings(BaseModel):
    """A section of a recipe: immutable, strictly typed, no unknown keys, every key explained."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True
    )


def key(default: Any, description: str, *, unit: str = "", **bounds: Any) -> Any:
    """Declare a key: its default, its meaning, its unit and its bounds (as pydantic's ``Field``)."""
    return Field(default, description=description, json_schema_extra={"unit": unit}, **bounds)


_NAME = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"),
    Form("up to 64 letters, digits, dots, dashes and underscores, the first a letter or a digit"),
]
_PATH = Annotated[str, StringConstraints(min_length=1, max_length=1024), Form("a path")]
_AUTOENCODER = Annotated[
    str,
    StringConstraints(pattern=r"^(builtin|[^/].*/.+|/.+)$"),
    Form("builtin, a hub id (owner/name), or a folder written with a slash (./kl-f8)", ("builtin",)),
]
_IMAGE_ENCODER = Annotated[
    str,
    StringConstraints(pattern=r"^(kl|timm:[A-Za-z0-9_.-]+)$"),
    Form("kl, or timm: followed by the name of a timm network (timm:resnet18)", ("kl",)),
]
_ENCODER_WEIGHTS = Annotated[
    str,
    StringConstraints(pattern=r"^(random|autoencoder|pretrained|.*/.+)$"),
    Form(
        "random, autoencoder, pretrained, or a file written with a slash (./encoder.safetensors)",
        ("random", "autoencoder", "pretrained"),
    ),
]
_UNET_WEIGHTS = Annotated[
    str,
    StringConstraints(pattern=r"^(random|.*/.+)$"),
    Form("random, or a file or folder written with a slash (weights/lsun_churches)", ("random",)),
]
_WIDTH = Annotated[int, Field(ge=32, le=2048, multiple_of=32)]
_STRIDE = Annotated[int, Field(ge=1, le=32)]


class AugmentationSettings(Settings):
    """Random changes of the training images; image and mask move together."""

    horizontal_flip: float = key(0.5, "Chance of a left-right flip.", unit="probability", ge=0, le=1)
    vertical_flip: float = key(0.5, "Chance of an upside-down flip.", unit="probability", ge=0, le=1)
    affine: float = key(
        0.0,
        "Chance of a random rotation, shift, zoom and shear, as bounded by the next four keys.",
        unit="probability",
        ge=0,
        le=1,
    )
    rotation_degrees: float = key(15.0, "Largest rotation to either side.", unit="degrees", ge=0, le=180)
    translate: float = key(
        0.1, "Largest shift along each axis.", unit="fraction of the image's side", ge=0, le=1
    )
    scale: float = key(
        0.2, "Largest zoom: the factor lies between 1 - scale and 1 + scale.", unit="factor", ge=0, lt=1
    )
    shear_degrees: float = key(0.0, "Largest shear to either side.", unit="degrees", ge=0, le=60)
    colour: float = key(
        0.0,
        "Chance of a random change of colour, as bounded by the next four keys.",
        unit="probability",
        ge=0,
        le=1,
    )
    brightness: float = key(
        0.2, "The factor lies between 1 - brightness and 1 + brightness.", unit="factor", ge=0, le=1
    )
    contrast: float = key(
        0.2, "The factor lies between 1 - contrast and 1 + contrast.", unit="factor", ge=0, le=1
    )
    saturation: float = key(
        0.2, "The factor lies between 1 - saturation and 1 + saturation.", unit="factor", ge=0, le=1
    )
    hue: float = key(0.05, "Largest turn of the colour wheel to either side.", unit="turns", ge=0, le=0.5)
    blur: float = key(0.0, "Chance of a Gaussian blur.", unit="probability", ge=0, le=1)
    noise: float = key(0.0, "Chance of added Gaussian noise.", unit="probability", ge=0, le=1)


class DataSettings(Settings):
    """The prepared dataset and how its training images are varied."""

    dataset: _PATH = Field(
        description="Folder made by `sdseg prepare`, relative to the working directory.",
        json_schema_extra={"unit": ""},
    )
    image_size: int = key(
        256,
        "Side of the model's square grid. Must equal the dataset's, and be a multiple of "
        "8 x 2^(levels of the U-Net - 1).",
        unit="pixels",
        ge=32,
        le=1024,
        multiple_of=8,
    )
    augmentation: AugmentationSettings = key(AugmentationSettings(), AugmentationSettings.__doc__ or "")
    workers: int = key(
        0, "Loading processes beside each training process; 0 loads in it.", unit="processes", ge=0, le=64
    )
    cache: bool = key(
        True, "Keep decoded slices in memory after their first use, in at most half of what is free."
    )


class ModelSettings(Settings):
    """The three networks: frozen mask autoencoder, image encoder and U-Net."""

    autoencoder: _AUTOENCODER = key(
        "builtin",
        "The frozen autoencoder of the masks: `builtin` (shipped, no download), or the hub id or folder of "
        "a diffusers AutoencoderKL.",
    )
    image_encoder: _IMAGE_ENCODER = key(
        "kl", "The trained encoder of the images: the paper's `kl`, or `timm:` and the name of a backbone."
    )
    image_encoder_weights: _ENCODER_WEIGHTS = key(
        "random",
        "Where the image encoder starts: `random`, `autoencoder` (copied from the KL autoencoder's encoder), "
        "`pretrained` (timm's weights from the hub) or a file.",
    )
    image_encoder_channels: Annotated[tuple[_WIDTH, ...], Field(min_length=4, max_length=4)] = key(
        (128, 256, 512, 512), "Widths of the `kl` encoder at strides 1, 2, 4 and 8.", unit="channels"
    )
    image_encoder_blocks: int = key(
        2, "Residual blocks of the `kl` encoder at each stride.", unit="blocks", ge=1, le=8
    )
    image_encoder_dropout: float = key(
        0.2, "Dropout in the residual blocks of the `kl` encoder.", unit="probability", ge=0, lt=1
    )
    freeze_image_encoder: bool = key(False, "Keep the image encoder as it starts, untrained.")
    conditioning_channels: int = key(
        4, "Width of what the image encoder hands to the U-Net.", unit="channels", ge=1, le=512
    )
    fusion: Literal["input", "multiscale", "attention"] = key(
        "input",
        "Where image and latent meet: `input` (once, at the U-Net's input, as published), `multiscale` "
        "(also at every level of the U-Net) or `attention` (the U-Net sees the latent alone and attends to "
        "the image at its levels with attention).",
    )
    multiclass: Literal["class_conditional", "joint"] = key(
        "class_conditional",
        "Several classes: `class_conditional` (one reverse process for each class and the background, as "
        "published) or `joint` (the latents of all class masks denoised at once, in one).",
    )
    unet_channels: Annotated[tuple[_WIDTH, ...], Field(min_length=1, max_length=6)] = key(
        (192, 384, 384, 768, 768),
        "Widths of the U-Net's levels; each level halves the grid.",
        unit="channels",
    )
    unet_blocks: int = key(2, "Residual blocks in each level of the U-Net.", unit="blocks", ge=1, le=8)
    unet_heads: int = key(8, "Heads of every attention, whatever its width.", unit="heads", ge=1, le=64)
    unet_attention_strides: Annotated[tuple[_STRIDE, ...], Field(max_length=6)] = key(
        (1, 2, 4, 8),
        "Levels with attention, by their stride on the latent grid; [] = no attention at all, otherwise the "
        "middle has it too.",
        unit="latent pixels",
    )
    unet_dropout: float = key(
        0.2, "Dropout in the residual blocks of the U-Net.", unit="probability", ge=0, lt=1
    )
    unet_weights: _UNET_WEIGHTS = key(
        "random", "Where the U-Net starts: `random`, or the file or folder of the published start."
    )
    latent_scale: Literal["measured"] | Annotated[float, Field(gt=0, le=1000)] = key(
        "measured",
        "Factor on the autoencoder's latents: `measured` = 1 / their standard deviation over the training "
        "split.",
    )


class ObjectiveSettings(Settings):
    """What the network predicts, from which noise, and which losses are summed."""

    diffusion: Literal["on", "off"] = key(
        "on",
        "`off` trains a plain U-Net on the image encoder's features, the baseline to beat; the keys of "
        "latent, noise and U-Net then have no part in it.",
    )
    prediction: Literal["epsilon", "sample", "velocity"] = key(
        "epsilon", "What the U-Net answers: the noise, the clean latent, or their velocity."
    )
    timesteps: Literal["uniform", "last"] = key(
        "uniform",
        "Timesteps trained on: all of them, or only the `last`, with pure noise and no trace of the truth.",
    )
    noise: Literal["gaussian", "zeros"] = key(
        "gaussian", "What the U-Net starts from: Gaussian noise, or `zeros` (deterministic)."
    )
    num_train_timesteps: int = key(1000, "Length of the noise schedule.", unit="timesteps", ge=2, le=10_000)
    beta_start: float = key(0.0015, "Noise variance of the first timestep.", unit="variance", gt=0, lt=1)
    beta_end: float = key(
        0.0155,
        "Noise variance of the last timestep; square roots between are linear.",
        unit="variance",
        gt=0,
        lt=1,
    )
    noise_weight: float = key(
        1.0, "Weight of the L1 loss on the network's own target (`prediction`).", unit="factor", ge=0, le=1000
    )
    latent_weight: float = key(
        1.0,
        "Weight of the L1 loss on the predicted clean latent; 0 with `prediction: sample`, where both are "
        "one.",
        unit="factor",
        ge=0,
        le=1000,
    )
    pixel_weight: float = key(
        0.0,
        "Weight of soft Dice + cross-entropy on the mask decoded by the frozen decoder.",
        unit="factor",
        ge=0,
        le=1000,
    )


class TrainSettings(Settings):
    """Length, optimiser, precision and bookkeeping of the training."""

    steps: int = key(100_000, "Length of the training.", unit="optimizer steps", ge=1, le=10_000_000)
    batch_size: int = key(
        4,
        "Images per optimizer step, over all processes and accumulated batches.",
        unit="images",
        ge=1,
        le=65_536,
    )
    gradient_accumulation: int = key(
        1, "Parts the batch is worked off in, to save memory.", unit="parts", ge=1, le=1024
    )
    learning_rate: float = key(
        4e-5, "Learning rate of AdamW at this batch size, after the warm-up.", unit="per step", gt=0, le=1
    )
    schedule: Literal["constant", "cosine"] = key(
        "constant", "Learning rate after the warm-up: unchanged, or down to 0 along a cosine."
    )
    warmup_steps: int = key(
        10_000, "Linear rise of the learning rate from 0.", unit="optimizer steps", ge=0, le=10_000_000
    )
    weight_decay: float = key(0.01, "Weight decay of AdamW.", unit="factor", ge=0, le=1)
    gradient_clip: float = key(
        0.0, "Largest norm of the gradient; 0 = no clipping.", unit="norm", ge=0, le=1e6
    )
    ema_decay: float = key(
        0.9999,
        "Decay of the averaged weights, approached as (1 + n) / (10 + n); 0 = off.",
        unit="factor",
        ge=0,
        lt=1,
    )
    ema_scope: Literal["unet", "all"] = key(
        "unet", "Networks that are averaged: the U-Net alone (as published), or the image encoder too."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = key(
        "auto",
        "Arithmetic of the networks: `auto` = bf16 on a GPU that has it, else fp32; always fp32 with "
        "`prediction: epsilon`, since one step multiplies the error of a predicted noise by 38.67.",
    )
    gradient_checkpointing: bool = key(
        False, "Recompute activations in the backward pass: less memory, slower."
    )
    embed_autoencoder: bool = key(
        True,
        "Copy the autoencoder into the exported model; false = the model refers to its folder or hub id, "
        "is 335 MB smaller (kl-f8), and can be read where that is at hand.",
    )
    compile: bool = key(
        False,
        "Compile the trained networks: faster steps after a minute or more, for long trainings on a GPU. "
        "Checkpoints and the exported model stay the same kind; figures differ by rounding.",
    )
    seed: int = key(0, "Seed of weights, order, augmentation and noise.", ge=0, le=2**31 - 1)
    validate_every: int = key(1000, "Steps between validations.", unit="optimizer steps", ge=1, le=10_000_000)
    checkpoint_every: int = key(
        1000, "Steps between checkpoints to resume from.", unit="optimizer steps", ge=1, le=10_000_000
    )
    keep_checkpoints: int = key(2, "Newest checkpoints kept.", unit="checkpoints", ge=1, le=1000)
    log_every: int = key(
        10, "Steps between lines of metrics.jsonl.", unit="optimizer steps", ge=1, le=1_000_000
    )
    validation_cases: int = key(
        0, "Cases of the validation split scored during training; 0 = all.", unit="cases", ge=0, le=1_000_000
    )
    patience: int = key(
        0,
        "Validations without a better Dice before the training stops; 0 = never.",
        unit="validations",
        ge=0,
        le=10_000,
    )
    max_minutes: float = key(
        0.0, "Wall-clock time after which the training stops; 0 = no limit.", unit="minutes", ge=0, le=100_000
    )
    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow"], ...], Field(max_length=3)] = key(
        ("tensorboard",), "Trackers that follow the training beside metrics.jsonl; [] = none."
    )


class SamplingSettings(Settings):
    """How a trained model predicts, unless the command line says otherwise."""

    num_inference_steps: int = key(
        1, "Reverse steps: 1 = one-step, more = DDIM.", unit="steps", ge=1, le=10_000
    )
    num_samples: int = key(
        1,
        "Noise draws whose probabilities are averaged; their spread is the uncertainty.",
        unit="draws",
        ge=1,
        le=1000,
    )
    threshold: float = key(
        0.5, "Probability from which a pixel is foreground (two classes).", unit="probability", gt=0, lt=1
    )
    flips: Annotated[tuple[Literal["horizontal", "vertical"], ...], Field(max_length=2)] = key(
        (),
        "Mirrored images that are predicted too, mirrored back and averaged (both: the one mirrored twice as "
        "well); they count as further draws. Not where left and right are different classes.",
    )
    largest_component: bool = key(
        False,
        "Keep only the largest connected component of every class, of the whole volume where there is one.",
    )


class EvaluateSettings(Settings):
    """How predictions are scored, unless the command line says otherwise."""

    convention: Literal["standard", "sdseg"] = key(
        "standard",
        "Scores of empty masks: undefined and counted (`standard`), or as the official code (`sdseg`).",
    )
    grid: Literal["case", "model"] = key(
        "case",
        "Where masks are compared: in the case's own pixels, or on the model's square grid as in the paper.",
    )


class Recipe(Settings):
    """Every setting of one training. Equal recipes train equal models."""

    name: _NAME = Field(description="Names the run directories.", json_schema_extra={"unit": ""})
    data: DataSettings = Field(description=DataSettings.__doc__)
    model: ModelSettings = key(ModelSettings(), ModelSettings.__doc__ or "")
    objective: ObjectiveSettings = key(ObjectiveSettings(), ObjectiveSettings.__doc__ or "")
    train: TrainSettings = key(TrainSettings(), TrainSettings.__doc__ or "")
    sampling: SamplingSettings = key(SamplingSettings(), SamplingSettings.__doc__ or "")
    evaluate: EvaluateSettings = key(EvaluateSettings(), EvaluateSettings.__doc__ or "")

    @model_validator(mode="after")
    def _refuse_senseless_combinations(self) -> Recipe:
        refused = refusals(self)
        if refused:
            raise PydanticCustomError(
                "refused", "{reasons}", {"reasons": "; ".join(r.reason for r in refused)}
            )
        return self

    def values(self) -> dict[str, Any]:
        """The recipe as nested dictionaries of plain values (lists, not tuples), in the schema's order."""
        return self.model_dump(mode="json")

    def replace(self, changes: Mapping[str, Any]) -> Recipe:
        """Make a changed copy; the same checks as for a file.

        Args:
            changes: dotted keys and their values, ``{"train.steps": 500}``.

        Raises:
            RecipeError: an unknown key, a value out of bounds or a senseless combination.
        """
        from sdseg_cli.core.recipe import recipe_from_values

        values = self.values()
        for dotted, value in changes.items():
            *sections, last = dotted.split(".")
            place = values
            for section in sections:
                place = place.get(section) if isinstance(place, dict) else None  # type: ignore[assignment]
            if not isinstance(place, dict):
                raise RecipeError(
                    f"recipe {self.name!r} has no key {dotted!r}. See docs/recipes.md for the keys."
                )
            place[last] = value
        return recipe_from_values(values)


@dataclass(frozen=True)
class Refusal:
    """Keys that make no sense together, the first being the one to point at, and the reason with a remedy."""

    keys: tuple[str, ...]
    reason: str


def refusals(recipe: Recipe) -> list[Refusal]:
    """List the combinations of valid values that make no sense, each with its reason."""
    return [
        *_objective_refusals(recipe),
        *_baseline_refusals(recipe),
        *_encoder_refusals(recipe.model),
        *_unet_refusals(recipe),
        *_train_refusals(recipe.train),
        *_sampling_refusals(recipe),
        *_export_refusals(recipe),
    ]


def _objective_refusals(recipe: Recipe) -> list[Refusal]:
    found = []
    objective = recipe.objective
    if objective.prediction == "epsilon" and objective.timesteps == "last":
        found.append(
            Refusal(
                ("objective.prediction", "objective.timesteps"),
                "epsilon with timesteps: last: the input is the noise itself, so the answer is already "
                "there. Use prediction: sample or velocity",
            )
        )
    if objective.noise == "zeros" and objective.prediction == "epsilon":
        found.append(
            Refusal(
                ("objective.noise", "objective.prediction"),
                "zeros with prediction: epsilon: the noise to predict is always 0. Use prediction: sample",
            )
        )
    if objective.noise == "zeros" and objective.timesteps == "uniform":
        found.append(
            Refusal(
                ("objective.noise", "objective.timesteps"),
                "zeros with timesteps: uniform: without noise the truth shows through. Use timesteps: last",
            )
        )
    if objective.prediction == "sample" and objective.latent_weight != 0:
        found.append(
            Refusal(
                ("objective.latent_weight", "objective.prediction"),
                f"{objective.latent_weight:g} with prediction: sample, where the network's target is the "
                "clean latent and noise_weight already weighs it. Set latent_weight: 0",
            )
        )
    if objective.beta_start >= objective.beta_end:
        found.append(
            Refusal(
                ("objective.beta_start", "objective.beta_end"),
                f"{objective.beta_start:g} is not below beta_end {objective.beta_end:g}: noise must grow",
            )
        )
    weights = (objective.noise_weight, objective.latent_weight, objective.pixel_weight)
    if objective.diffusion == "on" and not any(weights):
        found.append(
            Refusal(
                ("objective.noise_weight", "objective.latent_weight", "objective.pixel_weight"),
                "all three loss weights are 0, so there is nothing to learn. Set one of them above 0",
            )
        )
    return found


def _baseline_refusals(recipe: Recipe) -> list[Refusal]:
    if recipe.objective.diffusion == "on":
        return []
    found = []
    if recipe.model.image_encoder == "kl":
        found.append(
            Refusal(
                ("objective.diffusion", "model.image_encoder"),
                "off needs a backbone to decode from. Set model.image_encoder: timm:resnet34, for instance",
            )
        )
    if recipe.model.fusion != "input":
        found.append(
            Refusal(
                ("model.fusion", "objective.diffusion"),
                f"{recipe.model.fusion} with diffusion: off: there is no latent to join. Set fusion: input",
            )
        )
    if recipe.model.multiclass == "joint":
        found.append(
            Refusal(
                ("model.multiclass", "objective.diffusion"),
                "joint with diffusion: off, whose plain U-Net gives all classes at once anyway. "
                "Set class_conditional",
            )
        )
    if recipe.objective.pixel_weight == 0:
        found.append(
            Refusal(
                ("objective.pixel_weight", "objective.diffusion"),
                "0 with diffusion: off, whose only loss it is. Set pixel_weight: 1",
            )
        )
    for name in ("image_encoder_weights", "unet_weights"):
        if (weights := getattr(recipe.model, name)) != "random":
            found.append(
                Refusal(
                    (f"model.{name}", "objective.diffusion"),
                    f"{weights} with diffusion: off, whose plain U-Net starts at random. Set random",
                )
            )
    if recipe.model.freeze_image_encoder:
        found.append(
            Refusal(
                ("model.freeze_image_encoder", "objective.diffusion"),
                "true with diffusion: off, which trains the whole of its plain U-Net. Set false",
            )
        )
    if recipe.sampling.num_samples > 1:
        found.append(
            Refusal(
                ("sampling.num_samples", "objective.diffusion"),
                f"{recipe.sampling.num_samples} with diffusion: off: all draws would be equal. "
                "Set num_samples: 1",
            )
        )
    if recipe.sampling.num_inference_steps > 1:
        found.append(
            Refusal(
                ("sampling.num_inference_steps", "objective.diffusion"),
                f"{recipe.sampling.num_inference_steps} with diffusion: off, which has no reverse steps. "
                "Set num_inference_steps: 1",
            )
        )
    return found


def _encoder_refusals(model: ModelSettings) -> list[Refusal]:
    found = []
    keys = ("model.image_encoder_weights", "model.image_encoder", "model.autoencoder")
    is_kl = model.image_encoder == "kl"
    if model.image_encoder_weights == "autoencoder" and not is_kl:
        found.append(
            Refusal(keys, f"autoencoder does not fit {model.image_encoder}. Use random, pretrained or a file")
        )
    if model.image_encoder_weights == "autoencoder" and is_kl and model.autoencoder == "builtin":
        found.append(
            Refusal(
                keys,
                "autoencoder needs a KL autoencoder, and the builtin one encodes masks, not images. "
                "Use random, or name a KL autoencoder in model.autoencoder",
            )
        )
    if model.image_encoder_weights == "pretrained" and is_kl:
        found.append(
            Refusal(
                keys,
                "pretrained means timm's weights, and image_encoder is kl. Use random, autoencoder or a file",
            )
        )
    if not is_kl:
        for name in ("image_encoder_channels", "image_encoder_blocks", "image_encoder_dropout"):
            value, default = getattr(model, name), ModelSettings.model_fields[name].default
            if value != default:
                found.append(
                    Refusal(
                        (f"model.{name}", "model.image_encoder"),
                        f"has no effect with image_encoder: {model.image_encoder}, it shapes the kl encoder. "
                        "Remove the key",
                    )
                )
    return found


def _unet_refusals(recipe: Recipe) -> list[Refusal]:
    found = []
    model, size = recipe.model, recipe.data.image_size
    levels = len(model.unet_channels)
    factor = 8 * 2 ** (levels - 1)
    if size % factor:
        found.append(
            Refusal(
                ("data.image_size", "model.unet_channels"),
                f"{size} is not a multiple of {factor}, which {levels} U-Net levels on a latent of 1/8 need. "
                f"Use {_nearest_multiple(size, factor)}, or fewer levels",
            )
        )
    elif model.image_encoder != "kl" and size % 32:
        found.append(
            Refusal(
                ("data.image_size", "model.image_encoder"),
                f"{size} is not a multiple of 32, which {model.image_encoder} needs. "
                f"Use {_nearest_multiple(size, 32)}",
            )
        )
    elif size == factor and levels > 1 and 32 in _deepest_widths(model):
        found.append(
            Refusal(
                ("data.image_size", "model.unet_channels", "model.image_encoder_channels"),
                f"{size} leaves a single latent pixel at the deepest of {levels} levels, where 32 channels "
                f"have nothing to be normalised over. Use {2 * factor}, fewer levels, or 64 channels in the "
                "last two",
            )
        )
    if model.fusion == "attention" and not model.unet_attention_strides:
        found.append(
            Refusal(
                ("model.fusion", "model.unet_attention_strides"),
                "attention without any level that has it: the U-Net would never see the image. "
                f"Set unet_attention_strides: [{2 ** (levels - 1)}], or another fusion",
            )
        )
    strides = [2**level for level in range(levels)]
    strange = [stride for stride in model.unet_attention_strides if stride not in strides]
    repeated = len(set(model.unet_attention_strides)) != len(model.unet_attention_strides)
    if strange or repeated:
        problem = f"{strange} is no stride of" if strange else "a stride is given twice for"
        found.append(
            Refusal(
                ("model.unet_attention_strides", "model.unet_channels"),
                f"{problem} a U-Net of {levels} levels. Choose from {strides}, each once",
            )
        )
    attended = {
        width
        for stride, width in zip(strides, model.unet_channels, strict=True)
        if stride in model.unet_attention_strides
    }
    if model.unet_attention_strides:
        attended.add(model.unet_channels[-1])
    undivided = sorted(width for width in attended if width % model.unet_heads)
    if undivided:
        found.append(
            Refusal(
                ("model.unet_heads", "model.unet_channels", "model.unet_attention_strides"),
                f"{model.unet_heads} heads do not divide the widths {undivided} that have attention. "
                "Choose a common divisor",
            )
        )
    return found


def _deepest_widths(model: ModelSettings) -> tuple[int, ...]:
    """Widths of the layers at the deepest level: a level's last layers work on the next one's grid."""
    widths = model.unet_channels[-2:]
    if model.fusion == "multiscale" and model.image_encoder == "kl":
        widths += model.image_encoder_channels[-1:]
    return widths


def _nearest_multiple(size: int, factor: int) -> int:
    return min(max(factor, round(size / factor) * factor), 1024 // factor * factor)


def _train_refusals(train: TrainSettings) -> list[Refusal]:
    found = []
    if train.steps < train.warmup_steps:
        found.append(
            Refusal(
                ("train.warmup_steps", "train.steps"),
                f"{train.warmup_steps} is more than steps {train.steps}: the learning rate would never be "
                f"reached. Set warmup_steps to {train.steps // 10}, for instance",
            )
        )
    if train.batch_size % train.gradient_accumulation:
        found.append(
            Refusal(
                ("train.batch_size", "train.gradient_accumulation"),
                f"{train.batch_size} images cannot be split into {train.gradient_accumulation} equal parts "
                "(gradient_accumulation). Choose a divisor",
            )
        )
    if len(set(train.trackers)) != len(train.trackers):
        found.append(Refusal(("train.trackers",), "a tracker is given twice. Remove one"))
    return found


def _export_refusals(recipe: Recipe) -> list[Refusal]:
    to_refer_to = recipe.objective.diffusion == "on" and recipe.model.autoencoder != "builtin"
    if recipe.train.embed_autoencoder or to_refer_to:
        return []
    return [
        Refusal(
            ("train.embed_autoencoder", "model.autoencoder"),
            "false without a folder or hub id in model.autoencoder to refer to: the builtin one is "
            "always copied (4 MB), and diffusion: off has none. Set true",
        )
    ]


def _sampling_refusals(recipe: Recipe) -> list[Refusal]:
    found = []
    objective, sampling = recipe.objective, recipe.sampling
    if sampling.num_inference_steps > 1 and objective.timesteps == "last" and objective.diffusion == "on":
        found.append(
            Refusal(
                ("sampling.num_inference_steps", "objective.timesteps"),
                f"{sampling.num_inference_steps} with timesteps: last: the network only ever saw the last "
                "timestep. Set num_inference_steps: 1",
            )
        )
    if sampling.num_inference_steps > objective.num_train_timesteps:
        found.append(
            Refusal(
                ("sampling.num_inference_steps", "objective.num_train_timesteps"),
                f"{sampling.num_inference_steps} is more than num_train_timesteps "
                f"{objective.num_train_timesteps}. Choose at most that",
            )
        )
    if sampling.num_samples > 1 and objective.noise == "zeros" and objective.diffusion == "on":
        found.append(
            Refusal(
                ("sampling.num_samples", "objective.noise"),
                f"{sampling.num_samples} with noise: zeros: all draws would be equal. Set num_samples: 1",
            )
        )
    return found + _flip_refusals(recipe)


def _flip_refusals(recipe: Recipe) -> list[Refusal]:
    found = []
    flips, augmentation = recipe.sampling.flips, recipe.data.augmentation
    if len(set(flips)) != len(flips):
        found.append(Refusal(("sampling.flips",), "a flip is given twice. Remove one"))
    for flip in dict.fromkeys(flips):
        name = f"{flip}_flip"
        if getattr(augmentation, name) == 0:
            found.append(
                Refusal(
                    ("sampling.flips", f"data.augmentation.{name}"),
                    f"{flip} with {name}: 0: the network never saw an image mirrored so. Take it out of "
                    f"flips, or train with {name}: 0.5",
                )
            )
    return found
