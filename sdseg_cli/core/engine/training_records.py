"""What a training tells while it runs: frozen records, one kind per event."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Started:
    """The training begins; ``first_step`` > 0 for a resumed run, ``remark`` says what is inexact about it.

    ``seconds_left`` are those until ``train.max_minutes`` end it, None where there is no such limit.
    """

    first_step: int
    steps: int
    device: str
    precision: str
    processes: int
    latent_scale: float
    remark: str = ""
    seconds_left: float | None = None


@dataclass(frozen=True)
class StepRecord:
    """Means since the last record; one line of metrics.jsonl."""

    step: int
    loss: float
    noise_loss: float
    latent_loss: float
    pixel_loss: float
    learning_rate: float
    samples_per_second: float
    memory_gib: float
    seconds: float


@dataclass(frozen=True)
class Validated:
    """Dice on the validation split after ``step`` steps, of the weights that are exported."""

    step: int
    dice: float
    dice_per_class: dict[str, float]
    is_best: bool
    picture: Path
    seconds: float


@dataclass(frozen=True)
class Checkpointed:
    """A checkpoint is whole on the disk."""

    step: int
    folder: Path


@dataclass(frozen=True)
class Finished:
    """The training ended; ``reason`` is steps, early stop or time limit."""

    step: int
    reason: str
    best_dice: float
    best_step: int
    seconds: float
    model: Path


Record = Started | StepRecord | Validated | Checkpointed | Finished
