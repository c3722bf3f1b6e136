"""Checkpoints to resume from: whole or absent, checked before they are read, without frozen weights."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sdseg_cli.core.engine.processes import Processes
from sdseg_cli.core.errors import ModelError, SdsegError, is_disk_full
from sdseg_cli.core.files import atomic_folder
from sdseg_cli.core.integrity import DAMAGE, MANIFEST_FILE, checked_sums, first_altered, read_object
from sdseg_cli.core.manifest import write_manifest
from sdseg_cli.core.run_directory import RunDirectory

_AVERAGES = "averages.safetensors"
_NO_ROOM = 1 << 20  # bytes; what is left where a large file did not fit


@dataclass
class Progress:
    """How far a run has come; everything that a resumed run must know beside weights and optimizer.

    Attributes:
        step: optimizer steps done.
        best_dice: best validation Dice so far; -1 before the first validation.
        best_step: its step.
        validations_without_improvement: since then.
        trained_seconds: time spent, over all sessions of the run.
        latent_scale: what latents are multiplied by.
        pending_losses: sums of the losses since the last line of the metrics, which the next one continues:
            those of the first process, then those of the second, and so on.
        pending_samples: images that went into them, over all processes.
        made_on: what its last digits depend on, see ``exactness.py``; {} in older checkpoints.
    """

    step: int = 0
    best_dice: float = -1.0
    best_step: int = 0
    validations_without_improvement: int = 0
    trained_seconds: float = 0.0
    latent_scale: float = 1.0
    pending_losses: list[float] = field(default_factory=list)
    pending_samples: int = 0
    made_on: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    accelerator: Accelerator,
    run: RunDirectory,
    progress: Progress,
    averages: EMAModel | None,
    *,
    keep: int,
    fingerprint: str,
    processes: Processes,
) -> Path:
    """Save a checkpoint under its final name only when it is whole, then drop the oldest ones.

    Called by every process.

    Raises:
        SdsegError: it cannot be written (a full disk, say); the previous checkpoint is untouched.
    """
    final = run.checkpoint(progress.step)
    shared = run.checkpoints / f".step-{progress.step:06d}.partial"
    failure: Exception | None = None
    try:
        if processes.is_main:
            shutil.rmtree(shared, ignore_errors=True)
            shared.mkdir(parents=True, exist_ok=True)
        processes.wait()
        try:
            accelerator.save_state(str(shared), safe_serialization=True)
            if processes.is_main and averages is not None:
                _save_averages(averages, shared / _AVERAGES)
        except (OSError, RuntimeError, SafetensorError) as error:
            failure = _told_plainly(error, shared)
        failed = processes.any(failure is not None)
        if processes.is_main and not failed:
            try:
                _publish(shared, final, progress, fingerprint)
            except OSError as error:
                failure = error
        failed = processes.any(failure is not None)
    finally:
        if processes.is_main:
            shutil.rmtree(shared, ignore_errors=True)
    if failed:
        raise SdsegError(
            f"checkpoint {final} could not be written: {failure or 'another process failed'}. {way_on(run)}"
        ) from failure
    if processes.is_main:
        for old in run.all_checkpoints()[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def _told_plainly(error: Exception, folder: Path) -> Exception:
    """PyTorch says of a full disk only that a position in the file is not the expected one."""
    if is_disk_full(error) or shutil.disk_usage(folder).free > _NO_ROOM:
        return error
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def way_on(run: RunDirectory) -> str:
    """What is left of a run whose disk is full, and what to do; sentences for a message."""
    last = run.latest_checkpoint()
    return (
        f"The last whole checkpoint is {last}. " if last else "There is no earlier checkpoint. "
    ) + f"Free space on the disk of {run.root}, then continue with: sdseg train --resume {run.root}"


def _save_averages(averages: EMAModel, path: Path) -> None:
    save_file(
        {f"{index:05d}": tensor.contiguous() for index, tensor in enumerate(averages.shadow_params)}, path
    )


def _publish(shared: Path, final: Path, progress: Progress, fingerprint: str) -> None:
    with atomic_folder(final) as folder:
        for file in sorted(shared.iterdir()):
            file.rename(folder / file.name)
        write_manifest(folder, "checkpoint", progress=asdict(progress), dataset=fingerprint)


def load_checkpoint(
    accelerator: Accelerator, run: RunDirectory, averages: EMAModel | None, *, fingerprint: str
) -> Progress | None:
    """Load the newest checkpoint into what was prepared; None if the run has none yet.

    Raises:
        ModelError: it is torn or altered, or the dataset is another one; the last good one is named.
    """
    checkpoint = run.latest_checkpoint()
    if checkpoint is None:
        return None
    manifest = _verify(run, checkpoint)
    if manifest["dataset"] != fingerprint:
        raise ModelError(
            f"checkpoint {checkpoint} was trained on another dataset (fingerprint "
            f"{manifest['dataset'][:12]}, now {fingerprint[:12]}). Restore the dataset, or start a new run."
        )
    progress = Progress(**manifest["progress"])
    try:
        accelerator.load_state(str(checkpoint))  # its pickles are read with weights_only
        saved = load_file(checkpoint / _AVERAGES) if averages is not None else {}
    except Exception as error:  # each reader has a family of its own for a file that does not fit
        raise ModelError(
            f"checkpoint {checkpoint} does not fit the run's recipe: {str(error).strip().splitlines()[0]} "
            f"Restore {run.recipe_file} as it was, or start a new run."
        ) from error
    if averages is not None:
        averages.shadow_params = [saved[name] for name in sorted(saved)]
        averages.optimization_step = progress.step  # one update per optimizer step
    return progress


def _verify(run: RunDirectory, checkpoint: Path) -> dict:
    try:
        manifest = read_object(checkpoint / MANIFEST_FILE)
        problem = _altered(checkpoint, manifest)
    except (OSError, *DAMAGE) as error:
        problem = str(error)
    if problem:
        good = next((c for c in reversed(run.all_checkpoints()[:-1]) if _is_whole(c)), None)
        remedy = (
            f"The last good checkpoint is {good}; delete {checkpoint} to continue from there."
            if good
            else "There is no other whole checkpoint: train anew with --overwrite."
        )
        raise ModelError(f"checkpoint {checkpoint} cannot be used: {problem}. {remedy}")
    return manifest


def _altered(checkpoint: Path, manifest: dict) -> str:
    """Name the first file that is not as it was written, or give ""; a manifest of another form raises."""
    Progress(**manifest["progress"])
    str.encode(manifest["dataset"])
    return first_altered(checkpoint, checked_sums(manifest["files"]))


def _is_whole(checkpoint: Path) -> bool:
    try:
        return not _altered(checkpoint, read_object(checkpoint / MANIFEST_FILE))
    except (OSError, *DAMAGE):
        return False
