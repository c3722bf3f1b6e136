"""From a recipe to networks: the one place where the recipe's words become modules."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import nn

from sdseg_cli.core.data.prepared import DatasetManifest
from sdseg_cli.core.errors import DataError, UsageError
from sdseg_cli.core.model.image_encoder import ImageEncoder, KLImageEncoder
from sdseg_cli.core.model.latents import Autoencoder
from sdseg_cli.core.model.pipeline import SDSegPipeline
from sdseg_cli.core.model.plain_unet import PlainUNet
from sdseg_cli.core.model.schedule import make_scheduler
from sdseg_cli.core.model.unet import SDSegUNet
from sdseg_cli.core.model.weights import (
    build_image_encoder,
    build_plain_unet,
    build_unet,
    load_autoencoder,
    refer_to_autoencoder,
)
from sdseg_cli.core.recipe import Recipe
from sdseg_cli.core.seeding import derive_seed

READING: tuple[str, ...] = ("window", "axis", "crop", "channels")
"""Parameters of the preparation that predictions on new images need."""


@dataclass(frozen=True)
class Networks:
    """The networks of a run; without diffusion only ``unet`` is there."""

    unet: SDSegUNet | PlainUNet
    image_encoder: ImageEncoder | None
    autoencoder: Autoencoder | None
    scheduler: DDIMScheduler | None
    autoencoder_reference: dict[str, str] | None = None  # None: saved with the model

    def pipeline(self, manifest: DatasetManifest, recipe: Recipe, latent_scale: float) -> SDSegPipeline:
        """Join them to a pipeline."""
        return SDSegPipeline(
            unet=self.unet,
            image_encoder=self.image_encoder,
            autoencoder=self.autoencoder,
            scheduler=self.scheduler,
            classes=manifest.classes,
            image_size=manifest.image_size,
            resize=manifest.resize,
            latent_scale=latent_scale,
            noise=recipe.objective.noise,
            training_data={
                "name": manifest.name,
                "fingerprint": manifest.fingerprint,
                # What a new image must be given before the model sees it; absent where it does not apply.
                **{key: manifest.preparation[key] for key in READING if key in manifest.preparation},
                "sampling": recipe.sampling.model_dump(mode="json"),
            },
            autoencoder_reference=self.autoencoder_reference,
        )


def build_networks(recipe: Recipe, num_classes: int) -> Networks:
    """Build and fill the networks of a recipe; equal recipes give equal weights.

    Raises:
        UsageError: weights that were asked for cannot be had or do not fit.
    """
    model, objective = recipe.model, recipe.objective
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("networks", recipe.train.seed))
        if objective.diffusion == "off":
            return Networks(build_plain_unet(model.image_encoder, num_classes), None, None, None)
        autoencoder = load_autoencoder(model.autoencoder)
        joint = model.multiclass == "joint"
        masks = num_classes - 1 if joint else 1
        image_encoder = build_image_encoder(
            model.image_encoder,
            weights=model.image_encoder_weights,
            conditioning_channels=model.conditioning_channels,
            levels=len(model.unet_channels) if model.fusion == "multiscale" else 1,
            channels=model.image_encoder_channels,
            blocks=model.image_encoder_blocks,
            dropout=model.image_encoder_dropout,
            autoencoder=autoencoder,
        )
        unet = build_unet(
            weights=model.unet_weights,
            sample_size=recipe.data.image_size // 8,
            latent_channels=autoencoder.config["latent_channels"] * masks,
            conditioning_channels=model.conditioning_channels,
            fusion=model.fusion,
            channels=model.unet_channels,
            blocks=model.unet_blocks,
            heads=model.unet_heads,
            attention_strides=model.unet_attention_strides,
            dropout=model.unet_dropout,
            num_class_embeds=num_classes if num_classes > 2 and not joint else None,
        )
    scheduler = make_scheduler(
        objective.prediction, objective.num_train_timesteps, objective.beta_start, objective.beta_end
    )
    reference = None
    if not recipe.train.embed_autoencoder:
        reference = refer_to_autoencoder(model.autoencoder, autoencoder)
    return Networks(unet, image_encoder, autoencoder, scheduler, reference)


def count_parameters(networks: Networks) -> dict[str, int]:
    """Count the weights of each network."""
    parts = {name: getattr(networks, name) for name in ("unet", "image_encoder", "autoencoder")}
    return {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in parts.items()
        if part is not None
    }


def predicts_noise(recipe: Recipe) -> bool:
    """Whether the U-Net's answer is the noise, whose error one step magnifies."""
    return recipe.objective.diffusion == "on" and recipe.objective.prediction == "epsilon"


class TrainableNetwork(nn.Module):
    """What is trained, as one module, so that several processes see one forward pass.

    A frozen image encoder is used but not registered: it then has no part in checkpoints or gradients.
    """

    def __init__(self, networks: Networks, *, freeze_image_encoder: bool, recompute: bool) -> None:
        super().__init__()
        self.unet = networks.unet
        self._frozen: list[ImageEncoder] = []
        if networks.image_encoder is not None:
            if freeze_image_encoder:
                self._frozen.append(networks.image_encoder.eval().requires_grad_(False))
            else:
                self.image_encoder = networks.image_encoder
        if recompute:
            _recompute_activations(networks)

    def forward(
        self,
        images: torch.Tensor,
        noisy_latent: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict from images (B, 3, S, S) in [-1, 1] and noisy latents; the plain U-Net reads no latents."""
        if isinstance(self.unet, PlainUNet):
            return self.unet(images)
        if self._frozen:
            with torch.no_grad():
                conditioning = self._frozen[0](images)
        else:
            conditioning = self.image_encoder(images)
        return self.unet(noisy_latent, timestep, conditioning, class_labels)

    def averaged_parameters(self, scope: str) -> list[nn.Parameter]:
        """The parameters that the EMA follows: those of the U-Net, or all that are trained."""
        module: nn.Module = self.unet if scope == "unet" else self
        return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _recompute_activations(networks: Networks) -> None:
    if isinstance(networks.unet, SDSegUNet):
        networks.unet.enable_gradient_checkpointing()
    else:
        _recompute_backbone(networks.unet.network.encoder.model)
    if isinstance(networks.image_encoder, KLImageEncoder):
        networks.image_encoder.enable_gradient_checkpointing()
    elif networks.image_encoder is not None:
        _recompute_backbone(networks.image_encoder.backbone)


def _recompute_backbone(backbone: nn.Module) -> None:
    # Some of timm's wrappers hand it on to the network that they wrap, others do not.
    able = next((m for m in (backbone, *backbone.children()) if hasattr(m, "set_grad_checkpointing")), None)
    refusal = UsageError(
        "train.gradient_checkpointing: this backbone of timm cannot recompute its activations. Use "
        "--set train.gradient_checkpointing=false; --set train.gradient_accumulation=N saves memory too."
    )
    if able is None:
        raise refusal
    try:
        able.set_grad_checkpointing(True)  # type: ignore[operator]
    except AssertionError as error:  # timm's way to say no
        raise refusal from error


def check_dataset(recipe: Recipe, manifest: DatasetManifest) -> None:
    """Refuse a dataset that does not match the recipe.

    Raises:
        DataError: says what was found, what was expected and how to mend it.
    """
    if manifest.image_size != recipe.data.image_size:
        raise DataError(
            f"dataset {recipe.data.dataset} is prepared at {manifest.image_size} pixels, recipe "
            f"{recipe.name!r} asks for data.image_size {recipe.data.image_size}. Prepare it again with "
            f"--size {recipe.data.image_size}, or train with --set data.image_size={manifest.image_size}."
        )
    if recipe.model.multiclass == "joint" and manifest.num_classes == 2:
        raise DataError(
            f"dataset {recipe.data.dataset} has a single foreground class, {manifest.classes[1]}; "
            "model.multiclass: joint denoises several masks at once. Use --set "
            "model.multiclass=class_conditional, which is the plain binary model there."
        )
    for split in ("train", "validation"):
        if not manifest.splits.get(split):
            raise DataError(
                f"dataset {recipe.data.dataset} has no {split} cases; training needs some. "
                "Prepare it with other --fractions or another split file."
            )
