"""What a training writes down of itself in its run directory: status, sessions, metrics and curves."""

from __future__ import annotations

import contextlib
from functools import cached_property
from typing import Any, Literal

import torch
from accelerate import Accelerator

from sdseg_cli.core.data.prepared import DatasetManifest
from sdseg_cli.core.engine.checkpoints import Progress
from sdseg_cli.core.engine.exactness import circumstances
from sdseg_cli.core.engine.processes import Processes
from sdseg_cli.core.integrity import MANIFEST_FILE
from sdseg_cli.core.manifest import made_with, write_run_manifest
from sdseg_cli.core.recipe import Recipe
from sdseg_cli.core.reporting.figures import training_curves
from sdseg_cli.core.run_directory import RunDirectory


class RunKeeper:
    """Keeps the run directory of a training; called by every process, written by the main one.

    Args:
        directory: of the run.
        recipe: what is trained.
        manifest: of its dataset.
        accelerator: holds the trackers.
        processes: of the training.
        precision: of the training.
    """

    def __init__(
        self,
        directory: RunDirectory,
        recipe: Recipe,
        manifest: DatasetManifest,
        accelerator: Accelerator,
        processes: Processes,
        precision: str,
    ) -> None:
        self.directory = directory
        self.recipe = recipe
        self.manifest = manifest
        self.accelerator = accelerator
        self.processes = processes
        self.precision = precision

    @cached_property
    def circumstances(self) -> dict[str, Any]:
        """What the result depends on besides the recipe."""
        return circumstances(
            processes=self.processes.count,
            device=_device_name(self.accelerator.device),
            precision=self.precision,
            gradient_accumulation=self.recipe.train.gradient_accumulation,
            compiled=self.recipe.train.compile,
        )

    def begin(self, progress: Progress, parameters: dict[str, int], remark: str, *, resume: bool) -> None:
        """Write down that a session begins; of a resumed run, take back what it will do again.

        Args:
            progress: where it begins.
            parameters: network -> number of its weights.
            remark: what is no longer exact.
            resume: whether the run has had sessions before.
        """
        if self.processes.is_main:
            if resume:
                self.directory.remove_leftovers()
                (self.directory.root / MANIFEST_FILE).unlink(missing_ok=True)  # until the run ends again
                self.directory.drop_metrics_after(progress.step)
            self.directory.validation.mkdir(exist_ok=True)
            self.directory.write_run_json(
                status="running",
                device=_device_name(self.accelerator.device),
                precision=self.precision,
                processes=self.processes.count,
                seed=self.recipe.train.seed,
                latent_scale=progress.latent_scale,
                dataset={
                    "path": self.recipe.data.dataset,
                    "name": self.manifest.name,
                    "fingerprint": self.manifest.fingerprint,
                    "splits": self.manifest.splits,
                    "classes": self.manifest.classes,
                },
                parameters=parameters,
                sessions=[
                    *self.directory.read_run_json().get("sessions", []),
                    self._session(progress.step, remark),
                ],
            )

    def _session(self, first_step: int, remark: str) -> dict[str, Any]:
        """What run.json says about this part of a run: a resumed one has several."""
        return {"first_step": first_step, **made_with(), **self.circumstances, "remark": remark}

    def record(self, fields: dict[str, Any]) -> None:
        """Add a line to the metrics, and its numbers to the trackers."""
        if self.processes.is_main:
            self.directory.append_metrics(fields)
        numbers = {k: v for k, v in fields.items() if k != "step" and isinstance(v, int | float)}
        self.accelerator.log(numbers, step=fields["step"])

    def draw_curves(self) -> None:
        """Draw the curves of the metrics so far; for the main process."""
        training_curves(self.directory.read_metrics(), self.directory.root / "curves.png")

    def finish(self, reason: str, progress: Progress, seconds: float) -> None:
        """Write down that the run is finished, and why."""
        if self.processes.is_main:
            self.draw_curves()
            self.directory.finish(
                "finished",
                reason=reason,
                steps=progress.step,
                trained_seconds=round(seconds, 1),
                best={"step": progress.best_step, "validation_dice": progress.best_dice},
            )
            write_run_manifest(self.directory)
        self.processes.wait()

    def mark(self, status: Literal["interrupted", "failed"], progress: Progress, seconds: float) -> None:
        """Write down that the run has ended early."""
        if self.processes.is_main:
            # A full disk must not hide the error that is being told.
            with contextlib.suppress(OSError):
                self.directory.finish(status, steps=progress.step, trained_seconds=round(seconds, 1))
                write_run_manifest(self.directory)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"
