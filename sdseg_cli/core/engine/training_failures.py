"""What a user is told when a training ends with an error that is not sdseg's own."""

from __future__ import annotations

import torch

from sdseg_cli.core.engine.checkpoints import way_on
from sdseg_cli.core.engine.processes import is_lost
from sdseg_cli.core.errors import OutOfMemoryError, SdsegError, is_disk_full
from sdseg_cli.core.recipe import Recipe
from sdseg_cli.core.run_directory import RunDirectory


def as_told(error: Exception, recipe: Recipe, run: RunDirectory, *, processes: int) -> Exception:
    """Give the error in words that say what to do: memory, disk or another process; else as it is.

    Args:
        error: what ended the training.
        recipe: what was trained.
        run: where.
        processes: of the training.
    """
    if _is_out_of_memory(error):
        return OutOfMemoryError(_out_of_memory_message(recipe))
    if is_disk_full(error) and not isinstance(error, SdsegError):
        return SdsegError(f"the disk is full: {error}. {way_on(run)}")
    if processes > 1 and is_lost(error):
        return SdsegError(
            "another process of this training has ended (killed, perhaps for lack of memory), and "
            f"this one cannot go on alone. Its own message is above, if it had one. Continue with "
            f"the same launcher and: sdseg train --resume {run.root}"
        )
    return error


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
