"""Checkpoints to resume from: whole or absent, checked before they are read, without frozen weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError

from sdseg_cli.core.errors import ModelError, SdsegError
from sdseg_cli.core.files import sha256_of
from sdseg_cli.core.run_directory import RunDirectory, atomic_folder, atomic_write

_MANIFEST = "manifest.json"


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
    """

    step: int = 0
    best_dice: float = -1.0
    best_step: int = 0
    validations_without_improvement: int = 0
    trained_seconds: float = 0.0
    latent_scale: float = 1.0


def save_checkpoint(
    accelerator: Accelerator,
    run: RunDirectory,
    progress: Progress,
    *,
    keep: int,
    fingerprint: str,
    wait: Callable[[], None],
) -> Path:
    """Save a checkpoint under its final name only when it is whole, then drop the oldest ones.

    Called by every process.

    Raises:
        SdsegError: it cannot be written (a full disk, say); the previous checkpoint is untouched.
    """
    final = run.checkpoint(progress.step)
    shared = run.checkpoints / f".step-{progress.step:06d}.partial"
    failure: Exception | None = None
    if accelerator.is_main_process:
        shutil.rmtree(shared, ignore_errors=True)
        shared.mkdir(parents=True, exist_ok=True)
    wait()
    try:
        accelerator.save_state(str(shared), safe_serialization=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        failure = error
    wait()
    if accelerator.is_main_process and failure is None:
        try:
            _publish(shared, final, progress, fingerprint)
        except OSError as error:
            failure = error
    if accelerator.is_main_process:
        shutil.rmtree(shared, ignore_errors=True)
    wait()
    if failure is not None:
        last = run.latest_checkpoint()
        kept = f"The last whole checkpoint is {last}." if last else "There is no earlier checkpoint."
        raise SdsegError(
            f"checkpoint {final} could not be written: {failure}. {kept} "
            f"Free space on the disk of {run.root}, then continue with: sdseg train --resume {run.root}"
        ) from failure
    if accelerator.is_main_process:
        for old in run.all_checkpoints()[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def _publish(shared: Path, final: Path, progress: Progress, fingerprint: str) -> None:
    with atomic_folder(final) as folder:
        for file in sorted(shared.iterdir()):
            file.rename(folder / file.name)
        manifest = {
            "progress": asdict(progress),
            "dataset": fingerprint,
            "files": {file.name: sha256_of(file) for file in sorted(folder.iterdir())},
        }
        atomic_write(folder / _MANIFEST, json.dumps(manifest, indent=2) + "\n")


def load_checkpoint(accelerator: Accelerator, run: RunDirectory, *, fingerprint: str) -> Progress | None:
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
    accelerator.load_state(str(checkpoint))
    return Progress(**manifest["progress"])


def _verify(run: RunDirectory, checkpoint: Path) -> dict:
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
        problem = _altered(checkpoint, manifest)
    except (OSError, ValueError, KeyError) as error:
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
    """Name the first file that is not as it was written, or give ""."""
    for name, expected in manifest["files"].items():
        found = sha256_of(checkpoint / name)
        if found != expected:
            return f"{name} is altered: SHA-256 {found[:12]}, expected {expected[:12]}"
    return ""


def _is_whole(checkpoint: Path) -> bool:
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
        return not _altered(checkpoint, manifest)
    except (OSError, ValueError, KeyError):
        return False
