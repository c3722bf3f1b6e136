"""What a resumed run can no longer repeat bit for bit, because something that rounding depends on changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sdseg_cli.core.run_directory import processor_name

_LABELS = {
    "processes": "processes",
    "device": "device",
    "precision": "precision",
    "processor": "processor",
    "torch": "PyTorch",
    "gradient_accumulation": "train.gradient_accumulation",
    "compile": "train.compile",
}
_PARTS = ("processes", "gradient_accumulation")  # of a batch: what is drawn or measured for each part differs


def circumstances(
    *, processes: int, device: str, precision: str, gradient_accumulation: int, compiled: bool
) -> dict[str, Any]:
    """What the last digits of a training depend on beside its recipe and its data; kept in checkpoints."""
    return {
        "processes": processes,
        "device": device,
        # Its vector units decide the order of the sums; beside a GPU it adds up nothing.
        "processor": processor_name() if device.startswith("cpu") else None,
        "precision": precision,
        "torch": torch.__version__,
        "gradient_accumulation": gradient_accumulation,
        "compile": compiled,
    }


def no_longer_exact(
    before: Mapping[str, Any], after: Mapping[str, Any], network: nn.Module, batch_size: int
) -> str:
    """Say what changed since a checkpoint was saved, what stays as it was and what does not.

    Args:
        before: :func:`circumstances` of the checkpoint; what older ones do not know is taken as unchanged.
        after: those of now.
        network: that is trained.
        batch_size: images of one optimizer step, over all processes.

    Returns:
        A remark for the user; "" where the run goes on bit for bit.
    """
    changed = [name for name in _LABELS if name in before and before[name] != after[name]]
    if not changed:
        return ""
    lost = ["rounding (gradients are summed in another order)"]
    if any(name in _PARTS for name in changed):
        modules = list(network.modules())
        if any(isinstance(module, nn.Dropout) and module.p > 0 for module in modules):
            lost.append("dropout (drawn for each process and part)")
        if any(isinstance(module, _BatchNorm) for module in modules):
            lost.append("BatchNorm (its statistics are those of each part)")
    changes = ", ".join(f"{_LABELS[name]} {before[name]} -> {after[name]}" for name in changed)
    return (
        f"since the checkpoint was saved: {changes}. Each step keeps its {batch_size} images with their "
        f"augmentation, timesteps and noise; no longer bit for bit as without the break: {', '.join(lost)}."
    )
