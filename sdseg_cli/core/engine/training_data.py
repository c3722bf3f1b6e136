"""Training samples: every random choice is drawn from (seed, number of the draw), and from nothing else.

Draw ``d`` is the same image with the same augmentation, class, timestep and noise, whatever the number of
processes, loader workers or accumulated parts, and whether or not the run was interrupted before it.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypedDict

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sdseg_cli.core.data.augmentation import Augmentation
from sdseg_cli.core.data.prepared import PreparedSlice, SplitView
from sdseg_cli.core.engine.stopping import stop_signals
from sdseg_cli.core.seeding import derive_seed, generator_for


class TrainingSample(TypedDict):
    """One draw; a batch has the same keys with a first axis.

    Attributes:
        image: uint8, (3, S, S).
        label_map: uint8, (S, S).
        mask: float32, (1, S, S), in {0, 1}: the foreground, or the mask of ``class_label``.
        class_label: int64, (); the class to segment, 0 meaning "anything but background".
        timestep: int64, ().
        noise: float32, (C, h, w).
        posterior_noise: float32, (C, h, w), for sampling the latent of the mask.
    """

    image: torch.Tensor
    label_map: torch.Tensor
    mask: torch.Tensor
    class_label: torch.Tensor
    timestep: torch.Tensor
    noise: torch.Tensor
    posterior_noise: torch.Tensor


@dataclass(frozen=True)
class DrawSettings:
    """What a draw depends on beside its number."""

    seed: int
    class_conditional: bool
    num_train_timesteps: int
    last_timestep_only: bool
    zero_noise: bool
    latent_shape: tuple[int, int, int]


class TrainingSamples(Dataset):
    """Draws by number: draw ``d`` is image ``permutation(d // N)[d % N]`` of the N of the split.

    With ``cache``, decoded slices of up to ``most_bytes`` stay in memory, in each loading process.
    """

    def __init__(
        self,
        split: SplitView,
        augmentation: Augmentation,
        settings: DrawSettings,
        *,
        cache: bool,
        most_bytes: float = math.inf,
    ) -> None:
        self._split = split
        self._augmentation = augmentation
        self._settings = settings
        self._cache: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = {} if cache else None
        self._room = most_bytes

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, draw: int) -> TrainingSample:
        settings = self._settings
        epoch, position = divmod(draw, len(self._split))
        image, label_map = self._decoded(int(_permutation(settings.seed, epoch, len(self._split))[position]))
        image, label_map = self._augmentation(image, label_map, derive_seed("augment", settings.seed, draw))

        generator = generator_for("train", settings.seed, draw)
        class_label = _draw_class(label_map, generator) if settings.class_conditional else 1
        wanted = label_map != 0 if class_label == 0 or not settings.class_conditional else None
        mask = label_map == class_label if wanted is None else wanted
        last = settings.num_train_timesteps - 1
        timestep = last
        if not settings.last_timestep_only:
            timestep = int(torch.randint(last + 1, (), generator=generator))
        noise = torch.randn(settings.latent_shape, generator=generator)
        return TrainingSample(
            image=image,
            label_map=label_map,
            mask=mask[None].float(),
            class_label=torch.tensor(class_label),
            timestep=torch.tensor(timestep),
            noise=torch.zeros_like(noise) if settings.zero_noise else noise,
            posterior_noise=torch.randn(settings.latent_shape, generator=generator),
        )

    def _decoded(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        pair = on_model_grid(self._split[index])
        size = sum(tensor.nbytes for tensor in pair)
        if self._cache is not None and size <= self._room:  # the rest of a large dataset is decoded each time
            self._room -= size
            self._cache[index] = pair
        return pair


def cache_room(workers: int, processes: int) -> float:
    """Bytes that decoded slices may take in one loading process: half of the free memory, shared out."""
    return psutil.virtual_memory().available / 2 / (max(1, workers) * processes)


def on_model_grid(item: PreparedSlice) -> tuple[torch.Tensor, torch.Tensor]:
    """Give image, uint8 (3, S, S), and label map, uint8 (S, S), of a prepared slice."""
    labels = np.array(item.grid.labels_to_model(item.label_map))
    return torch.from_numpy(np.ascontiguousarray(item.image)).movedim(-1, 0), torch.from_numpy(labels)


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> torch.Tensor:
    return torch.randperm(length, generator=generator_for("order", seed, epoch))


def _draw_class(label_map: torch.Tensor, generator: torch.Generator) -> int:
    """Draw uniformly from the classes present (SDSeg draws one class per slice and step)."""
    present = torch.unique(label_map)
    return int(present[torch.randint(len(present), (), generator=generator)])


class StepBatches(Sampler[list[int]]):
    """The draws of each step, cut into parts for processes and accumulation.

    Step ``s`` (from 0) owns the draws s * B to (s + 1) * B - 1; part ``a`` of process ``r`` is a contiguous
    piece of them.
    """

    def __init__(
        self, *, first_step: int, last_step: int, batch_size: int, parts: int, rank: int, processes: int
    ) -> None:
        self._steps = range(first_step, last_step)
        self._batch_size = batch_size
        self._parts = parts
        self._rank = rank
        self._processes = processes

    def __len__(self) -> int:
        return len(self._steps) * self._parts

    def __iter__(self) -> Iterator[list[int]]:
        size = self._batch_size // (self._parts * self._processes)
        for step in self._steps:
            for part in range(self._parts):
                start = step * self._batch_size + (part * self._processes + self._rank) * size
                yield list(range(start, start + size))


def make_loader(samples: TrainingSamples, batches: StepBatches, *, workers: int, pin: bool) -> DataLoader:
    """Make the loader; draws are the same for any number of workers."""
    return DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=workers > 0,
        worker_init_fn=_begin_worker,
    )


def _begin_worker(_: int) -> None:
    torch.set_num_threads(1)  # workers share the cores with the training process
    # A signal to the whole group (Ctrl-C, a scheduler's SIGTERM) is answered by the training process, which
    # still needs its batches to end its step; it ends the workers itself.
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)


def masks_of_classes(label_maps: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Give the mask of every foreground class, float32 (B, K - 1, S, S), of label maps (B, S, S)."""
    classes = torch.arange(1, num_classes, device=label_maps.device).view(1, -1, 1, 1)
    return (label_maps[:, None] == classes).float()


def present_masks(
    split: Iterable[PreparedSlice], *, class_conditional: bool, joint: bool = False
) -> Iterator[np.ndarray]:
    """Yield the masks that training encodes, uint8 (S, S) in {0, 1}, for every slice of a split.

    A class that a slice does not show has no mask here; a joint training encodes its empty mask too, but the
    scale of the latents is that of masks with something in them.
    """
    for item in split:
        labels = item.grid.labels_to_model(item.label_map)
        if not (class_conditional or joint):
            yield (labels != 0).astype(np.uint8)
            continue
        for label in np.unique(labels):
            if label != 0:
                yield (labels == label).astype(np.uint8)
            elif not joint:  # class 0 is "anything but background"
                yield (labels != 0).astype(np.uint8)
