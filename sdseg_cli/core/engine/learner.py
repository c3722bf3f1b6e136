"""What a training optimises: networks, optimizer and averages, and what one step does to them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers.training_utils import EMAModel

from sdseg_cli.core.data.prepared import DatasetManifest, SplitView
from sdseg_cli.core.engine.acceleration import compile_networks, missing_compiler, use_channels_last
from sdseg_cli.core.engine.autoencoder_training import measure_scale
from sdseg_cli.core.engine.latent_cache import (
    MOST_BYTES,
    LatentCache,
    as_distribution,
    bytes_of_all,
    masks_recur,
)
from sdseg_cli.core.engine.networks import TrainableNetwork, build_networks
from sdseg_cli.core.engine.processes import Processes
from sdseg_cli.core.engine.training_data import masks_of_classes, present_masks
from sdseg_cli.core.engine.training_totals import Totals
from sdseg_cli.core.errors import DataError, UsageError
from sdseg_cli.core.model.latents import decode_logits, posterior, sample_latents, spatial_factor
from sdseg_cli.core.model.losses import diffusion_loss, pixel_loss, segmentation_loss
from sdseg_cli.core.recipe import Recipe
from sdseg_cli.core.seeding import derive_seed

_SCALE_SAMPLE = 1024  # slices at most that the latents' scale is measured on


class Learner:
    """The networks of a recipe on their device, with all that a step of training changes.

    Args:
        recipe: what to train.
        manifest: of its dataset.
        accelerator: has chosen the device.
        processes: of the training.

    Raises:
        SdsegError: weights cannot be loaded, or a compiler is missing.
    """

    def __init__(
        self, recipe: Recipe, manifest: DatasetManifest, accelerator: Accelerator, processes: Processes
    ) -> None:
        self.recipe = recipe
        self.manifest = manifest
        self.accelerator = accelerator
        self.processes = processes
        self.device = accelerator.device
        self.networks = build_networks(recipe, manifest.num_classes)
        self.network = TrainableNetwork(
            self.networks,
            freeze_image_encoder=recipe.model.freeze_image_encoder,
            recompute=recipe.train.gradient_checkpointing,
        )
        for part in (self.networks.autoencoder, self.networks.image_encoder):
            if part is not None:
                part.to(self.device)
        self.network.to(self.device)
        parts = [part for part in (self.network, self.networks.autoencoder) if part is not None]
        use_channels_last(parts, self.device, training=True)
        self.latents = self._make_latent_cache()
        self.ema = self._make_ema()
        optimizer = torch.optim.AdamW(
            [parameter for parameter in self.network.parameters() if parameter.requires_grad],
            lr=recipe.train.learning_rate,
            weight_decay=recipe.train.weight_decay,
            fused=True if self.device.type == "cuda" else None,
        )
        if recipe.train.compile:
            _check_compiler(self.device)
            compile_networks([self.network])
        # A function of its own when it is compiled: the autoencoder also runs as written, in validation.
        compiles = recipe.train.compile and recipe.objective.pixel_weight > 0
        self._decode_logits = torch.compile(decode_logits, dynamic=False) if compiles else decode_logits
        self.prepared, self.optimizer = accelerator.prepare(self.network, optimizer)

    # One step -------------------------------------------------------------------------------------

    def step(
        self,
        number: int,
        parts: Iterator[dict[str, torch.Tensor]],
        totals: Totals,
        *,
        learning_rate: float,
        latent_scale: float,
    ) -> None:
        """Take one optimizer step.

        Args:
            number: of the step, from 1; names its draws.
            parts: the step's batches, as the loader gives them.
            totals: the losses are added to them.
            learning_rate: of this step.
            latent_scale: what latents are multiplied by.
        """
        settings = self.recipe.train
        # Dropout is the only draw left to the global generator; seeded here, it does not depend on what
        # came before, and a resumed run needs no saved state of it.
        torch.manual_seed(derive_seed("dropout", settings.seed, number, self.processes.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.prepared.train()
        for index, part in enumerate(parts):
            is_last = index == settings.gradient_accumulation - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.prepared):
                if self.latents is not None:
                    part["posterior"] = self.latents(self._masks(part).flatten(0, 1)[:, None], self.device)
                losses = self._losses(
                    {k: v.to(self.device, non_blocking=True) for k, v in part.items()}, latent_scale
                )
                self.accelerator.backward(losses["loss"] / settings.gradient_accumulation)
            totals.add(losses, len(part["image"]))
        if settings.gradient_clip > 0:
            self.accelerator.clip_grad_norm_(self.prepared.parameters(), settings.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.step(self.network.averaged_parameters(self.recipe.train.ema_scope))

    def _losses(self, batch: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
        objective = self.recipe.objective
        images = batch["image"].float() / 127.5 - 1
        if self.networks.scheduler is None or self.networks.autoencoder is None:
            with self.accelerator.autocast():
                logits = self.prepared(images)
            pixels = segmentation_loss(logits, batch["label_map"].long()).mean()
            return {"loss": objective.pixel_weight * pixels, "pixel_loss": pixels.detach()}

        scheduler = self.networks.scheduler
        masks = self._masks(batch)
        with torch.no_grad():
            if "posterior" in batch:
                encoded = as_distribution(batch["posterior"])
            else:
                encoded = posterior(self.networks.autoencoder, masks)  # in float32, as latents are kept
            clean = sample_latents(encoded, batch["posterior_noise"], scale)
            if objective.timesteps == "last":
                noisy = batch["noise"]  # pure noise: at t = 999 the mixture still shows 2.6 % of the truth
            else:
                noisy = scheduler.add_noise(clean, batch["noise"], batch["timestep"])
        labels = batch["class_label"] if self.is_class_conditional else None
        with self.accelerator.autocast():
            output = self.prepared(images, noisy, batch["timestep"], labels)
        parts = diffusion_loss(scheduler, output, clean, noisy, batch["noise"], batch["timestep"])
        noise_loss, latent_loss = parts.noise.mean(), parts.latent.mean()
        loss = objective.noise_weight * noise_loss + objective.latent_weight * latent_loss
        reported = {"noise_loss": noise_loss.detach(), "latent_loss": latent_loss.detach()}
        if objective.pixel_weight > 0:
            with self.accelerator.autocast():
                logits = self._decode_logits(self.networks.autoencoder, parts.predicted_original, scale)
            pixels = pixel_loss(logits, masks).mean()
            loss = loss + objective.pixel_weight * pixels
            reported["pixel_loss"] = pixels.detach()
        return {"loss": loss, **reported}

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Put the averaged weights in place, in evaluation mode; the raw ones are back afterwards."""
        parameters = self.network.averaged_parameters(self.recipe.train.ema_scope)
        if self.processes.count > 1:
            # BatchNorm's statistics are each process's own; scored must be those that are exported.
            for buffer in self.network.buffers():
                broadcast(buffer)
        self.network.eval()
        if self.ema is None:
            yield
            return
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)

    # Masks and latents ----------------------------------------------------------------------------

    @property
    def is_class_conditional(self) -> bool:
        """Whether the network is told which class's mask it denoises."""
        return self.manifest.num_classes > 2 and not self._is_joint

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of the noise of one image, (C, h, w); (1, 1, 1) where there is no autoencoder."""
        autoencoder = self.networks.autoencoder
        if autoencoder is None:
            return (1, 1, 1)
        side = self.manifest.image_size // spatial_factor(autoencoder)
        return (self.networks.unet.config["latent_channels"], side, side)

    def latent_scale(self, split: SplitView) -> float:
        """What latents are to be multiplied by: as the recipe says, or measured on the training split.

        Raises:
            DataError: no slice of it shows any class.
        """
        wanted = self.recipe.model.latent_scale
        if self.networks.autoencoder is None:
            return 1.0
        if wanted != "measured":
            return float(wanted)
        chosen = np.random.default_rng(derive_seed("latent scale")).permutation(len(split))[:_SCALE_SAMPLE]
        for slices in ((split[int(i)] for i in chosen), split):  # all of them where the sample is empty
            masks = list(
                present_masks(slices, class_conditional=self.is_class_conditional, joint=self._is_joint)
            )
            if masks:
                return measure_scale(self.networks.autoencoder, masks, device=self.device)
        raise DataError(
            f"dataset {self.recipe.data.dataset}: no training slice shows any class, so there is nothing to "
            "learn. Check the masks, or prepare it with other --fractions."
        )

    @property
    def _is_joint(self) -> bool:
        return self.recipe.model.multiclass == "joint"

    def _masks(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The masks that are encoded, float (B, M, S, S): one an image, or with ``joint`` one a class."""
        if self._is_joint:
            return masks_of_classes(batch["label_map"], self.manifest.num_classes)
        return batch["mask"]

    def _make_ema(self) -> EMAModel | None:
        settings = self.recipe.train
        if settings.ema_decay == 0:
            return None
        parameters = self.network.averaged_parameters(settings.ema_scope)
        return EMAModel(parameters, decay=settings.ema_decay, use_ema_warmup=False, foreach=True)

    def _make_latent_cache(self) -> LatentCache | None:
        autoencoder = self.networks.autoencoder
        if autoencoder is None or not masks_recur(self.recipe.data.augmentation):
            return None
        side = self.manifest.image_size // spatial_factor(autoencoder)
        masks = self.manifest.splits["train"] * (self.manifest.num_classes - (not self.is_class_conditional))
        if bytes_of_all(masks, (autoencoder.config["latent_channels"], side, side)) > MOST_BYTES:
            return None
        return LatentCache(autoencoder)


def _check_compiler(device: torch.device) -> None:
    reason = missing_compiler(device)
    if reason is not None:
        raise UsageError(f"train.compile: {reason}. Install one, or use --set train.compile=false.")
