"""What is summed up between two lines of the metrics: losses, samples and time."""

from __future__ import annotations

import time

import torch
from accelerate import Accelerator


class Totals:
    """Sums of losses since the last record, kept on the device: reading them waits for it."""

    _NAMES = ("loss", "noise_loss", "latent_loss", "pixel_loss")

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(len(self._NAMES), device=self._accelerator.device)
        self._samples, self._samples_before, self._since = 0, 0, time.monotonic()

    def go_on(self, sums: list[float], samples: int) -> None:
        """Continue what :meth:`pending` gave when the run was left, by as many processes or by others."""
        self._reset()
        if samples:
            known = torch.tensor(sums, device=self._sums.device).view(-1, len(self._NAMES))
            count = self._accelerator.num_processes
            as_many = len(known) == count
            self._sums += known[self._accelerator.process_index] if as_many else known.sum(dim=0) / count
            self._samples_before = samples

    def add(self, losses: dict[str, torch.Tensor], samples: int) -> None:
        """Add the mean losses of so many samples, without waiting for the device."""
        zero = torch.zeros((), device=self._sums.device)
        found = torch.stack([losses.get(name, zero).detach().float() for name in self._NAMES])
        self._sums += found * samples
        self._samples += samples

    def leave_out(self, seconds: float) -> None:
        """Take time in which nothing was trained out of the speed."""
        self._since += seconds

    def pending(self) -> tuple[list[float], int]:
        """Give the sums of every process, one process after the other, and the images that are in them."""
        return self._accelerator.gather(self._sums).tolist(), self._all_samples

    def take(self) -> tuple[dict[str, float], float]:
        """Give the means over processes and parts, and images per second; start anew."""
        sums = self._accelerator.reduce(self._sums, reduction="sum").tolist()
        samples = max(1, self._all_samples)
        means = {name: total / samples for name, total in zip(self._NAMES, sums, strict=True)}
        seconds = time.monotonic() - self._since
        rate = self._samples * self._accelerator.num_processes / max(seconds, 1e-9)
        self._reset()
        return means, rate

    @property
    def _all_samples(self) -> int:
        return self._samples * self._accelerator.num_processes + self._samples_before
