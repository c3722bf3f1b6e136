"""The training loop. It yields records; what is shown of them is the console's business."""

from __future__ import annotations

import math
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from sdseg_cli.core.data.augmentation import Augmentation
from sdseg_cli.core.data.prepared import PreparedDataset
from sdseg_cli.core.engine.checkpoints import Progress, load_checkpoint, save_checkpoint
from sdseg_cli.core.engine.exactness import no_longer_exact
from sdseg_cli.core.engine.familiarity import describe_images
from sdseg_cli.core.engine.inference import choose_device, choose_precision
from sdseg_cli.core.engine.learner import Learner
from sdseg_cli.core.engine.networks import check_dataset, count_parameters, predicts_noise
from sdseg_cli.core.engine.processes import Processes
from sdseg_cli.core.engine.run_keeping import RunKeeper
from sdseg_cli.core.engine.stopping import Stop, graceful_stop
from sdseg_cli.core.engine.trackers import check_trackers, start_trackers, track_picture
from sdseg_cli.core.engine.training_data import (
    DrawSettings,
    StepBatches,
    TrainingSamples,
    cache_room,
    make_loader,
)
from sdseg_cli.core.engine.training_failures import as_told
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
from sdseg_cli.core.errors import Interrupted, SdsegError, UsageError
from sdseg_cli.core.files import atomic_folder
from sdseg_cli.core.manifest import write_manifest
from sdseg_cli.core.model.weights import quiet_diffusers
from sdseg_cli.core.recipe import Recipe
from sdseg_cli.core.run_directory import RunDirectory, library_versions


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
    keeper: RunKeeper

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
        self.learner = Learner(recipe, self.manifest, self.accelerator, self.processes)
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
        self.keeper = RunKeeper(
            run, self.recipe, self.manifest, self.accelerator, self.processes, self.precision
        )
        self.accelerator.project_configuration = ProjectConfiguration(str(run.root), str(run.tensorboard))
        try:
            with graceful_stop() as stop:
                yield from self._run(stop, resume=resume)
        except Interrupted:
            self.keeper.mark("interrupted", self.progress, self._seconds())
            raise
        except Exception as error:
            self.keeper.mark("failed", self.progress, self._seconds())
            told = as_told(error, self.recipe, run, processes=self.processes.count)
            if told is not error:
                raise told from error
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
            settings.max_minutes * 60 - self._seconds() if settings.max_minutes > 0 else None,
        )
        reason = "steps"
        for step, parts in self._steps():
            self.learner.step(
                step,
                parts,
                self._totals,
                learning_rate=learning_rate_at(step, self.recipe),
                latent_scale=self.progress.latent_scale,
            )
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
        self.keeper.finish(reason, self.progress, self._seconds())
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
        loaded, remark, ema = None, "", self.learner.ema
        if resume:
            fingerprint = self.manifest.fingerprint
            loaded = load_checkpoint(self.accelerator, self.directory, ema, fingerprint=fingerprint)
        if loaded is not None:
            self.progress = loaded
            self._totals.go_on(loaded.pending_losses, loaded.pending_samples)
            batch_size = self.recipe.train.batch_size
            remark = no_longer_exact(
                loaded.made_on, self.keeper.circumstances, self.learner.network, batch_size
            )
        else:
            self.progress.latent_scale = self.learner.latent_scale(self.dataset.split("train"))
        if ema is not None:
            ema.to(self.device)
        self.keeper.begin(self.progress, count_parameters(self.learner.networks), remark, resume=resume)
        if self.recipe.train.trackers:
            start_trackers(self.accelerator, self.recipe, self.directory)
        self._started = time.monotonic() - self.progress.trained_seconds
        return remark

    def _interrupted(self, number: int) -> Interrupted:
        name = signal.Signals(number).name
        return Interrupted(
            f"{name}: stopped after step {self.progress.step}, and everything is saved. "
            f"Continue with: sdseg train --resume {self.directory.root}",
            number,
        )

    def _steps(self) -> Iterator[tuple[int, Iterator[dict[str, torch.Tensor]]]]:
        settings = self.recipe.train
        split = self.dataset.split("train")
        samples = TrainingSamples(
            split,
            make_augmentation(self.recipe),
            DrawSettings(
                seed=settings.seed,
                class_conditional=self.learner.is_class_conditional,
                num_train_timesteps=self.recipe.objective.num_train_timesteps,
                last_timestep_only=self.recipe.objective.timesteps == "last",
                zero_noise=self.recipe.objective.noise == "zeros",
                latent_shape=self.learner.latent_shape,
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
        self.keeper.record(asdict(record))
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
        with self.learner.averaged_weights():
            result = validate(
                self.learner.networks.pipeline(self.manifest, self.recipe, self.progress.latent_scale),
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
            self.keeper.record({"step": step, "validation_dice": result.dice, **_per_class(result)})
            self.keeper.draw_curves()
        self.processes.wait()
        seconds = time.monotonic() - started
        self._totals.leave_out(seconds)
        return Validated(step, result.dice, result.dice_per_class, is_best, picture, seconds)

    def _checkpoint(self) -> Checkpointed:
        self.progress.trained_seconds = self._seconds()
        self.progress.pending_losses, self.progress.pending_samples = self._totals.pending()
        self.progress.made_on = self.keeper.circumstances
        self._refuse_divergence(sum(self.progress.pending_losses))  # before it replaces a good checkpoint
        folder = save_checkpoint(
            self.accelerator,
            self.directory,
            self.progress,
            self.learner.ema,
            keep=self.recipe.train.keep_checkpoints,
            fingerprint=self.manifest.fingerprint,
            processes=self.processes,
        )
        self._totals.leave_out(self._seconds() - self.progress.trained_seconds)
        return Checkpointed(self.progress.step, folder)

    def _export(self) -> None:
        if self.processes.is_main:
            pipeline = self.learner.networks.pipeline(self.manifest, self.recipe, self.progress.latent_scale)
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

    @cached_property
    def _images(self) -> dict[str, Any]:
        return describe_images(self.dataset.split("train"))

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


def _peak_memory_gib(device: torch.device) -> float:
    """Most memory used so far: the GPU's, or this process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
