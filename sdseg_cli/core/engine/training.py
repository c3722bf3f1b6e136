"""The training loop. It yields records; what is shown of them is the console's business."""

from __future__ import annotations

import contextlib
import math
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast
from diffusers.training_utils import EMAModel

from sdseg_cli.core.data.augmentation import Augmentation
from sdseg_cli.core.data.prepared import PreparedDataset
from sdseg_cli.core.engine.acceleration import compile_networks, missing_compiler, use_channels_last
from sdseg_cli.core.engine.autoencoder_training import measure_scale
from sdseg_cli.core.engine.checkpoints import Progress, load_checkpoint, save_checkpoint, way_on
from sdseg_cli.core.engine.exactness import circumstances, no_longer_exact
from sdseg_cli.core.engine.familiarity import describe_images
from sdseg_cli.core.engine.inference import choose_device, choose_precision
from sdseg_cli.core.engine.latent_cache import (
    MOST_BYTES,
    LatentCache,
    as_distribution,
    bytes_of_all,
    masks_recur,
)
from sdseg_cli.core.engine.networks import (
    TrainableNetwork,
    build_networks,
    check_dataset,
    count_parameters,
    predicts_noise,
)
from sdseg_cli.core.engine.processes import Processes, is_lost
from sdseg_cli.core.engine.stopping import Stop, graceful_stop
from sdseg_cli.core.engine.trackers import check_trackers, start_trackers, track_picture
from sdseg_cli.core.engine.training_data import (
    DrawSettings,
    StepBatches,
    TrainingSamples,
    cache_room,
    make_loader,
    masks_of_classes,
    present_masks,
)
from sdseg_cli.core.engine.training_records import (
    Checkpointed,
    Finished,
    Record,
    Started,
    StepRecord,
    Validated,
)
from sdseg_cli.core.engine.training_totals import Totals
from sdseg_cli.core.engine.validation import Validation, validate
from sdseg_cli.core.errors import (
    DataError,
    Interrupted,
    OutOfMemoryError,
    SdsegError,
    UsageError,
    is_disk_full,
)
from sdseg_cli.core.files import atomic_folder
from sdseg_cli.core.integrity import MANIFEST_FILE
from sdseg_cli.core.manifest import made_with, write_manifest, write_run_manifest
from sdseg_cli.core.model.latents import decode_logits, posterior, sample_latents, spatial_factor
from sdseg_cli.core.model.losses import diffusion_loss, pixel_loss, segmentation_loss
from sdseg_cli.core.model.weights import quiet_diffusers
from sdseg_cli.core.recipe import Recipe
from sdseg_cli.core.reporting.figures import training_curves
from sdseg_cli.core.run_directory import RunDirectory, library_versions
from sdseg_cli.core.seeding import derive_seed

_SCALE_SAMPLE = 1024  # slices at most that the latents' scale is measured on


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Learning rate of optimizer step ``step`` (from 1): linear warm-up, then constant or cosine to 0."""
    settings = recipe.train
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_augmentation(recipe: Recipe) -> Augmentation:
    """Make the augmentation of a recipe."""
    return Augmentation(**recipe.data.augmentation.model_dump())


def train(
    recipe: Recipe, run: RunDirectory, *, resume: bool = False, device: str = "auto"
) -> Iterator[Record]:
    """Train a recipe into a run directory; an unread iterator trains nothing. See :class:`Training`."""
    yield from Training(recipe, device=device).run(run, resume=resume)


def _out_of_memory_message(recipe: Recipe) -> str:
    settings = recipe.train
    more = range(settings.gradient_accumulation + 1, settings.batch_size + 1)
    parts = next((count for count in more if settings.batch_size % count == 0), None)
    remedies = []
    if parts is not None:
        remedies.append(f"--set train.gradient_accumulation={parts}")
    if not settings.gradient_checkpointing:
        remedies.append("--set train.gradient_checkpointing=true")
    return (
        "the device's memory does not hold a part of "
        f"{settings.batch_size // settings.gradient_accumulation} images (train.batch_size "
        f"{settings.batch_size} in {settings.gradient_accumulation} parts). "
        + (
            f"Try {' or '.join(remedies)}; the images of a step stay the same."
            if remedies
            else "Use smaller networks (model.unet_channels, model.image_encoder) or smaller images."
        )
    )


def _is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU's or the machine's memory ran out; PyTorch says the latter in words only."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


class Training:
    """A training that can begin: device, dataset and weights are at hand, networks and optimizer built.

    Args:
        recipe: what to train.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        SdsegError: whatever is known to be wrong before the first step, so that no run directory need be made
            for a training that cannot begin.
    """

    directory: RunDirectory

    def __init__(self, recipe: Recipe, *, device: str = "auto") -> None:
        quiet_diffusers()
        self.recipe = recipe
        chosen = choose_device(device)
        self.precision = choose_precision(
            recipe.train.precision, chosen, predicts_noise=predicts_noise(recipe)
        )
        self.processes = Processes(cpu=chosen.type == "cpu")
        _check_batch(recipe, self.processes.count)
        check_trackers(recipe)
        self.accelerator = Accelerator(
            mixed_precision="no" if self.precision == "fp32" else self.precision,
            cpu=chosen.type == "cpu",
            log_with=list(recipe.train.trackers) or None,
            project_dir=".",  # nothing is written before the run directory takes its place
        )
        self.device = self.accelerator.device
        self.dataset = PreparedDataset.open(recipe.data.dataset)
        self.manifest = self.dataset.manifest
        check_dataset(recipe, self.manifest)

        self.networks = build_networks(recipe, self.manifest.num_classes)
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
        self.prepared, self.optimizer = self.accelerator.prepare(self.network, optimizer)
        self.progress = Progress()
        self._totals = Totals(self.accelerator)
        self._started = time.monotonic()

    # The course of a run --------------------------------------------------------------------------

    def run(self, run: RunDirectory, *, resume: bool = False) -> Iterator[Record]:
        """Train into a run directory.

        Args:
            run: made or opened by the caller, who holds its lock.
            resume: continue from the run's newest checkpoint.

        Yields:
            Records of what happens, the same on every process; files are written by the main one.

        Raises:
            Interrupted: a signal asked for the end; a checkpoint is saved.
            SdsegError: anything a user can mend; the run's status says so.
        """
        self.directory = run
        self.accelerator.project_configuration = ProjectConfiguration(str(run.root), str(run.tensorboard))
        try:
            with graceful_stop() as stop:
                yield from self._run(stop, resume=resume)
        except Interrupted:
            self._mark("interrupted")
            raise
        except Exception as error:
            self._mark("failed")
            if _is_out_of_memory(error):
                raise OutOfMemoryError(_out_of_memory_message(self.recipe)) from error
            if is_disk_full(error) and not isinstance(error, SdsegError):
                raise SdsegError(f"the disk is full: {error}. {way_on(run)}") from error
            if self.processes.count > 1 and is_lost(error):
                raise SdsegError(
                    "another process of this training has ended (killed, perhaps for lack of memory), and "
                    f"this one cannot go on alone. Its own message is above, if it had one. Continue with "
                    f"the same launcher and: sdseg train --resume {run.root}"
                ) from error
            raise
        finally:
            self.accelerator.end_training()

    def _run(self, stop: Stop, *, resume: bool) -> Iterator[Record]:
        settings = self.recipe.train
        remark = self._begin(resume)
        yield Started(
            self.progress.step,
            settings.steps,
            str(self.device),
            self.precision,
            self.processes.count,
            self.progress.latent_scale,
            remark,
        )
        reason = "steps"
        for step, parts in self._steps():
            self._train_step(step, parts)
            self.progress.step = step
            last = step == settings.steps
            if step % settings.log_every == 0 or last:
                yield self._log()
            out_of_time = self.processes.any(0 < settings.max_minutes * 60 <= self._seconds())
            if step % settings.validate_every == 0 or last or out_of_time:
                yield self._validate()
            out_of_patience = 0 < settings.patience <= self.progress.validations_without_improvement
            ended = last or out_of_time or out_of_patience
            stopped = self.processes.any(stop.signal_number is not None)
            if stopped or ended or step % settings.checkpoint_every == 0:
                yield self._checkpoint()
            if ended:
                reason = "steps" if last else "early stop" if out_of_patience else "time limit"
                break
            if stopped:
                raise self._interrupted(stop.signal_number or signal.SIGTERM)
        self._finish(reason)
        yield Finished(
            self.progress.step,
            reason,
            self.progress.best_dice,
            self.progress.best_step,
            self._seconds(),
            self.directory.model,
        )

    def _begin(self, resume: bool) -> str:
        """Take up where the run was left; the answer says what is no longer exact."""
        loaded, remark = None, ""
        if resume:
            fingerprint = self.manifest.fingerprint
            loaded = load_checkpoint(self.accelerator, self.directory, self.ema, fingerprint=fingerprint)
        if loaded is not None:
            self.progress = loaded
            self._totals.go_on(loaded.pending_losses, loaded.pending_samples)
            batch_size = self.recipe.train.batch_size
            remark = no_longer_exact(loaded.made_on, self._circumstances, self.network, batch_size)
        else:
            self.progress.latent_scale = self._latent_scale()
        if self.ema is not None:
            self.ema.to(self.device)
        if self.processes.is_main:
            if resume:
                self.directory.remove_leftovers()
                (self.directory.root / MANIFEST_FILE).unlink(missing_ok=True)  # until the run ends again
                self.directory.drop_metrics_after(self.progress.step)
            self.directory.validation.mkdir(exist_ok=True)
            self.directory.write_run_json(
                status="running",
                device=_device_name(self.device),
                precision=self.precision,
                processes=self.processes.count,
                seed=self.recipe.train.seed,
                latent_scale=self.progress.latent_scale,
                dataset={
                    "path": self.recipe.data.dataset,
                    "name": self.manifest.name,
                    "fingerprint": self.manifest.fingerprint,
                    "splits": self.manifest.splits,
                    "classes": self.manifest.classes,
                },
                parameters=count_parameters(self.networks),
                sessions=[*self.directory.read_run_json().get("sessions", []), self._session(remark)],
            )
        if self.recipe.train.trackers:
            start_trackers(self.accelerator, self.recipe, self.directory)
        self._started = time.monotonic() - self.progress.trained_seconds
        return remark

    def _session(self, remark: str) -> dict[str, Any]:
        """What run.json says about this part of a run: a resumed one has several."""
        return {"first_step": self.progress.step, **made_with(), **self._circumstances, "remark": remark}

    @cached_property
    def _circumstances(self) -> dict[str, Any]:
        return circumstances(
            processes=self.processes.count,
            device=_device_name(self.device),
            precision=self.precision,
            gradient_accumulation=self.recipe.train.gradient_accumulation,
            compiled=self.recipe.train.compile,
        )

    def _finish(self, reason: str) -> None:
        if self.processes.is_main:
            training_curves(self.directory.read_metrics(), self.directory.root / "curves.png")
            self.directory.finish(
                "finished",
                reason=reason,
                steps=self.progress.step,
                trained_seconds=round(self._seconds(), 1),
                best={"step": self.progress.best_step, "validation_dice": self.progress.best_dice},
            )
            write_run_manifest(self.directory)
        self.processes.wait()

    def _interrupted(self, number: int) -> Interrupted:
        name = signal.Signals(number).name
        return Interrupted(
            f"{name}: stopped after step {self.progress.step}, and everything is saved. "
            f"Continue with: sdseg train --resume {self.directory.root}",
            number,
        )

    def _mark(self, status: str) -> None:
        if self.processes.is_main:
            # A full disk must not hide the error that is being told.
            with contextlib.suppress(OSError):
                self.directory.finish(
                    status,  # type: ignore[arg-type]
                    steps=self.progress.step,
                    trained_seconds=round(self._seconds(), 1),
                )
                write_run_manifest(self.directory)

    # One step -------------------------------------------------------------------------------------

    def _steps(self) -> Iterator[tuple[int, Iterator[dict[str, torch.Tensor]]]]:
        settings = self.recipe.train
        split = self.dataset.split("train")
        autoencoder = self.networks.autoencoder
        latent_shape = (1, 1, 1)
        if autoencoder is not None:
            side = self.manifest.image_size // spatial_factor(autoencoder)
            latent_shape = (self.networks.unet.config["latent_channels"], side, side)
        samples = TrainingSamples(
            split,
            make_augmentation(self.recipe),
            DrawSettings(
                seed=settings.seed,
                class_conditional=self._class_conditional,
                num_train_timesteps=self.recipe.objective.num_train_timesteps,
                last_timestep_only=self.recipe.objective.timesteps == "last",
                zero_noise=self.recipe.objective.noise == "zeros",
                latent_shape=latent_shape,
            ),
            cache=self.recipe.data.cache,
            most_bytes=cache_room(self.recipe.data.workers, self.processes.count),
        )
        batches = StepBatches(
            first_step=self.progress.step,
            last_step=settings.steps,
            batch_size=settings.batch_size,
            parts=settings.gradient_accumulation,
            rank=self.processes.rank,
            processes=self.processes.count,
        )
        loader = make_loader(
            samples, batches, workers=self.recipe.data.workers, pin=self.device.type == "cuda"
        )
        stream = iter(loader)
        for step in range(self.progress.step + 1, settings.steps + 1):
            yield step, (next(stream) for _ in range(settings.gradient_accumulation))

    def _train_step(self, step: int, parts: Iterator[dict[str, torch.Tensor]]) -> None:
        settings = self.recipe.train
        # Dropout is the only draw left to the global generator; seeded here, it does not depend on what
        # came before, and a resumed run needs no saved state of it.
        torch.manual_seed(derive_seed("dropout", settings.seed, step, self.processes.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, self.recipe)
        self.prepared.train()
        for index, part in enumerate(parts):
            is_last = index == settings.gradient_accumulation - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.prepared):
                if self.latents is not None:
                    part["posterior"] = self.latents(self._masks(part).flatten(0, 1)[:, None], self.device)
                losses = self._losses({k: v.to(self.device, non_blocking=True) for k, v in part.items()})
                self.accelerator.backward(losses["loss"] / settings.gradient_accumulation)
            self._totals.add(losses, len(part["image"]))
        if settings.gradient_clip > 0:
            self.accelerator.clip_grad_norm_(self.prepared.parameters(), settings.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.step(self.network.averaged_parameters(self.recipe.train.ema_scope))

    def _losses(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        objective = self.recipe.objective
        images = batch["image"].float() / 127.5 - 1
        if self.networks.scheduler is None or self.networks.autoencoder is None:
            with self.accelerator.autocast():
                logits = self.prepared(images)
            pixels = segmentation_loss(logits, batch["label_map"].long()).mean()
            return {"loss": objective.pixel_weight * pixels, "pixel_loss": pixels.detach()}

        scale, scheduler = self.progress.latent_scale, self.networks.scheduler
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
        labels = batch["class_label"] if self._class_conditional else None
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

    # Between steps --------------------------------------------------------------------------------

    def _log(self) -> StepRecord:
        means, rate = self._totals.take()
        step = self.progress.step
        self._refuse_divergence(means["loss"])
        record = StepRecord(
            step=step,
            learning_rate=learning_rate_at(step, self.recipe),
            samples_per_second=rate,
            memory_gib=_peak_memory_gib(self.device),
            seconds=self._seconds(),
            **means,
        )
        self._record(asdict(record))
        return record

    def _refuse_divergence(self, loss: float) -> None:
        if math.isfinite(loss):
            return
        last = self.directory.latest_checkpoint()
        raise SdsegError(
            f"the loss is {loss} at step {self.progress.step}; training has diverged. Lower "
            f"train.learning_rate ({self.recipe.train.learning_rate:g}) or set train.gradient_clip=1. "
            + (f"The last checkpoint is {last}." if last else "There is no checkpoint yet.")
        )

    def _validate(self) -> Validated:
        started = time.monotonic()
        step = self.progress.step
        with self._averaged_weights():
            result = validate(
                self.networks.pipeline(self.manifest, self.recipe, self.progress.latent_scale),
                self.dataset.split("validation"),
                self.processes,
                sampling=self.recipe.sampling,
                seed=self.recipe.train.seed,
                precision=self.precision,
                limit=self.recipe.train.validation_cases,
                batch_size=max(1, self.recipe.train.batch_size // self.processes.count),
            )
            is_best = result.dice > self.progress.best_dice
            if is_best:
                self.progress.best_dice, self.progress.best_step = result.dice, step
                self.progress.validations_without_improvement = 0
                self._export()
            else:
                self.progress.validations_without_improvement += 1
        picture = self.directory.validation / f"step-{step:06d}.png"
        if self.processes.is_main:
            drawn = result.write_picture(picture)
            track_picture(self.accelerator, "validation", picture, drawn, step)
            self._record({"step": step, "validation_dice": result.dice, **_per_class(result)})
            training_curves(self.directory.read_metrics(), self.directory.root / "curves.png")
        self.processes.wait()
        seconds = time.monotonic() - started
        self._totals.leave_out(seconds)
        return Validated(step, result.dice, result.dice_per_class, is_best, picture, seconds)

    def _checkpoint(self) -> Checkpointed:
        self.progress.trained_seconds = self._seconds()
        self.progress.pending_losses, self.progress.pending_samples = self._totals.pending()
        self.progress.made_on = self._circumstances
        self._refuse_divergence(sum(self.progress.pending_losses))  # before it replaces a good checkpoint
        folder = save_checkpoint(
            self.accelerator,
            self.directory,
            self.progress,
            self.ema,
            keep=self.recipe.train.keep_checkpoints,
            fingerprint=self.manifest.fingerprint,
            processes=self.processes,
        )
        self._totals.leave_out(self._seconds() - self.progress.trained_seconds)
        return Checkpointed(self.progress.step, folder)

    def _export(self) -> None:
        if self.processes.is_main:
            pipeline = self.networks.pipeline(self.manifest, self.recipe, self.progress.latent_scale)
            known = {**pipeline.config.training_data, "images": self._images}
            pipeline.register_to_config(training_data=known)
            with atomic_folder(self.directory.model) as folder:
                pipeline.save_pretrained(folder)
                write_manifest(
                    folder,
                    "model",
                    recipe=self.recipe.name,
                    seed=self.recipe.train.seed,
                    step=self.progress.step,
                    dataset=self.manifest.fingerprint,
                    versions=library_versions(),
                )
        self.processes.wait()

    @contextlib.contextmanager
    def _averaged_weights(self) -> Iterator[None]:
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

    def _record(self, fields: dict[str, Any]) -> None:
        if self.processes.is_main:
            self.directory.append_metrics(fields)
        numbers = {k: v for k, v in fields.items() if k != "step" and isinstance(v, int | float)}
        self.accelerator.log(numbers, step=fields["step"])

    @cached_property
    def _images(self) -> dict[str, Any]:
        return describe_images(self.dataset.split("train"))

    # Small things ---------------------------------------------------------------------------------

    @property
    def _joint(self) -> bool:
        return self.recipe.model.multiclass == "joint"

    @property
    def _class_conditional(self) -> bool:
        return self.manifest.num_classes > 2 and not self._joint

    def _masks(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The masks that are encoded, float (B, M, S, S): one an image, or with ``joint`` one a class."""
        if self._joint:
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
        masks = self.manifest.splits["train"] * (self.manifest.num_classes - (not self._class_conditional))
        if bytes_of_all(masks, (autoencoder.config["latent_channels"], side, side)) > MOST_BYTES:
            return None
        return LatentCache(autoencoder)

    def _latent_scale(self) -> float:
        wanted = self.recipe.model.latent_scale
        if self.networks.autoencoder is None:
            return 1.0
        if wanted != "measured":
            return float(wanted)
        split = self.dataset.split("train")
        chosen = np.random.default_rng(derive_seed("latent scale")).permutation(len(split))[:_SCALE_SAMPLE]
        for slices in ((split[int(i)] for i in chosen), split):  # all of them where the sample is empty
            masks = list(present_masks(slices, class_conditional=self._class_conditional, joint=self._joint))
            if masks:
                return measure_scale(self.networks.autoencoder, masks, device=self.device)
        raise DataError(
            f"dataset {self.recipe.data.dataset}: no training slice shows any class, so there is nothing to "
            "learn. Check the masks, or prepare it with other --fractions."
        )

    def _seconds(self) -> float:
        return time.monotonic() - self._started


def _per_class(result: Validation) -> dict[str, float]:
    return {f"validation_dice_{name}": dice for name, dice in result.dice_per_class.items()}


def _check_batch(recipe: Recipe, processes: int) -> None:
    settings = recipe.train
    if settings.batch_size % (settings.gradient_accumulation * processes):
        raise UsageError(
            f"train.batch_size {settings.batch_size} cannot be shared by {processes} processes in "
            f"{settings.gradient_accumulation} parts each. Expected a multiple of "
            f"{settings.gradient_accumulation * processes}."
        )


def _check_compiler(device: torch.device) -> None:
    reason = missing_compiler(device)
    if reason is not None:
        raise UsageError(f"train.compile: {reason}. Install one, or use --set train.compile=false.")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"


def _peak_memory_gib(device: torch.device) -> float:
    """Most memory used so far: the GPU's, or this process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
