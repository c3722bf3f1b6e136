"""Training draws: the same whatever loads them, and what the objective needs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sdseg_cli.core.data.augmentation import Augmentation
from sdseg_cli.core.data.prepared import PreparedDataset, PreparedSlice
from sdseg_cli.core.engine.training_data import (
    DrawSettings,
    StepBatches,
    TrainingSamples,
    cache_room,
    make_loader,
    on_model_grid,
    present_masks,
)
from sdseg_cli.core.grid import Grid

UNMOVED = Augmentation(
    horizontal_flip=0, vertical_flip=0, affine=0, rotation_degrees=0, translate=0, scale=0, shear_degrees=0,
    colour=0, brightness=0, contrast=0, saturation=0, hue=0, blur=0, noise=0,
)  # fmt: skip
MOVED = Augmentation(
    horizontal_flip=0.5, vertical_flip=0.5, affine=0.7, rotation_degrees=30, translate=0.1, scale=0.2,
    shear_degrees=5, colour=0.7, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05, blur=0.3, noise=0.3,
)  # fmt: skip
SETTINGS = DrawSettings(
    seed=0,
    class_conditional=False,
    num_train_timesteps=1000,
    last_timestep_only=False,
    zero_noise=False,
    latent_shape=(4, 4, 4),
)


def one_slice(label_map: np.ndarray, case_id: str = "a") -> PreparedSlice:
    height, width = label_map.shape
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return PreparedSlice(case_id, 0, case_id, image, label_map, Grid(height, width, 8), None)


class Split(list):
    def __init__(self, *label_maps: np.ndarray) -> None:
        super().__init__(one_slice(labels, str(i)) for i, labels in enumerate(label_maps))


def numbered(count: int) -> Split:
    """Slices that are told apart by their first pixel."""
    split = Split(*(np.zeros((8, 8), np.uint8) for _ in range(count)))
    for index, item in enumerate(split):
        item.image[...] = index
    return split


def equal(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


# Which images


def test_every_epoch_shows_every_image_once_in_another_order():
    samples = TrainingSamples(numbered(7), UNMOVED, SETTINGS, cache=True)
    epochs = [[int(samples[7 * e + i]["image"][0, 0, 0]) for i in range(7)] for e in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_another_seed_gives_another_order_and_other_noise():
    first = TrainingSamples(numbered(7), UNMOVED, SETTINGS, cache=True)
    second = TrainingSamples(numbered(7), UNMOVED, replace(SETTINGS, seed=1), cache=True)
    orders = [[int(s[i]["image"][0, 0, 0]) for i in range(7)] for s in (first, second)]
    assert orders[0] != orders[1]
    assert not torch.equal(first[0]["noise"], second[0]["noise"])


@pytest.mark.parametrize(("parts", "processes"), [(1, 1), (2, 1), (1, 2), (3, 2), (2, 3), (6, 2)])
def test_processes_and_parts_share_the_same_draws_of_each_step(parts, processes):
    drawn = [
        list(
            StepBatches(first_step=2, last_step=5, batch_size=12, parts=parts, rank=rank, processes=processes)
        )
        for rank in range(processes)
    ]
    for rank in drawn:
        assert len(rank) == 3 * parts
        assert {len(batch) for batch in rank} == {12 // (parts * processes)}
    for step in range(3):
        of_step = [d for rank in drawn for batch in rank[step * parts : (step + 1) * parts] for d in batch]
        assert sorted(of_step) == list(range((2 + step) * 12, (3 + step) * 12))


def test_a_resumed_run_goes_on_with_the_next_draw():
    arguments = {"batch_size": 4, "parts": 2, "rank": 0, "processes": 1}
    whole = list(StepBatches(first_step=0, last_step=6, **arguments))
    resumed = list(StepBatches(first_step=4, last_step=6, **arguments))
    assert len(StepBatches(first_step=4, last_step=6, **arguments)) == 4
    assert resumed == whole[8:]


# The same draw whoever makes it


def test_a_draw_is_the_same_in_any_order_and_with_or_without_the_cache(polyps):
    split = PreparedDataset.open(polyps).split("train")
    forward = TrainingSamples(split, MOVED, SETTINGS, cache=True)
    backward = TrainingSamples(split, MOVED, SETTINGS, cache=False)
    later = [backward[draw] for draw in reversed(range(40))][::-1]
    torch.manual_seed(123)  # global randomness has no part in it
    np.random.seed(5)  # noqa: NPY002  (that is the point)
    assert all(equal(forward[draw], later[draw]) for draw in range(40))


def test_augmentation_does_not_change_what_is_cached(polyps):
    samples = TrainingSamples(PreparedDataset.open(polyps).split("train"), MOVED, SETTINGS, cache=True)
    first = samples[3]
    for draw in range(30):
        samples[draw]
    assert equal(samples[3], first)


def test_the_cache_of_decoded_slices_stays_within_its_room_and_changes_nothing(polyps):
    split = PreparedDataset.open(polyps).split("train")
    one = sum(tensor.nbytes for tensor in on_model_grid(split[0]))
    bounded = TrainingSamples(split, MOVED, SETTINGS, cache=True, most_bytes=3.5 * one)
    free = TrainingSamples(split, MOVED, SETTINGS, cache=False)
    for draw in range(2 * len(split)):
        assert equal(bounded[draw], free[draw])
    assert len(bounded._cache) == 3


def test_the_room_of_the_cache_is_shared_by_the_loading_processes(monkeypatch):
    free = SimpleNamespace(available=800)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    assert cache_room(0, 1) == cache_room(1, 1) == 400
    assert cache_room(2, 2) == 100


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_processes_give_the_same_batches(workers, polyps):
    split = PreparedDataset.open(polyps).split("train")

    def batches(count: int) -> list:
        steps = StepBatches(first_step=0, last_step=6, batch_size=4, parts=1, rank=0, processes=1)
        samples = TrainingSamples(split, MOVED, SETTINGS, cache=True)
        return list(make_loader(samples, steps, workers=count, pin=False))

    alone, helped = batches(0), batches(workers)
    assert len(alone) == len(helped) == 6
    assert all(equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_image_and_masks_of_a_batch_have_the_documented_types_and_shapes(polyps):
    split = PreparedDataset.open(polyps).split("train")
    steps = StepBatches(first_step=0, last_step=1, batch_size=4, parts=1, rank=0, processes=1)
    (batch,) = make_loader(TrainingSamples(split, MOVED, SETTINGS, cache=True), steps, workers=0, pin=False)
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()}
    assert found == {
        "image": (torch.uint8, (4, 3, 32, 32)),
        "label_map": (torch.uint8, (4, 32, 32)),
        "mask": (torch.float32, (4, 1, 32, 32)),
        "class_label": (torch.int64, (4,)),
        "timestep": (torch.int64, (4,)),
        "noise": (torch.float32, (4, 4, 4, 4)),
        "posterior_noise": (torch.float32, (4, 4, 4, 4)),
    }


# What is drawn


def test_binary_masks_are_the_foreground_whatever_its_label():
    labels = np.zeros((8, 8), np.uint8)
    labels[2:4, 2:4] = 1
    sample = TrainingSamples(Split(labels), UNMOVED, SETTINGS, cache=True)[0]
    assert sample["mask"].sum() == 4
    assert int(sample["class_label"]) == 1


def test_classes_are_drawn_evenly_from_those_present_and_the_background_means_anything_else():
    labels = np.zeros((8, 8), np.uint8)
    labels[:2], labels[6:] = 1, 3  # class 2 is absent
    samples = TrainingSamples(Split(labels), UNMOVED, replace(SETTINGS, class_conditional=True), cache=True)
    pixels = {0: labels != 0, 1: labels == 1, 3: labels == 3}
    counts: Counter[int] = Counter()
    for draw in range(600):
        sample = samples[draw]
        label = int(sample["class_label"])
        counts[label] += 1
        np.testing.assert_array_equal(sample["mask"][0].numpy(), pixels[label])
    assert set(counts) == {0, 1, 3}
    assert min(counts.values()) > 150


def test_an_empty_slice_draws_the_background_with_an_empty_mask():
    samples = TrainingSamples(
        Split(np.zeros((8, 8), np.uint8)), UNMOVED, replace(SETTINGS, class_conditional=True), cache=True
    )
    assert {int(samples[draw]["class_label"]) for draw in range(20)} == {0}
    assert samples[0]["mask"].sum() == 0


def test_timesteps_are_uniform_or_the_last_alone():
    uniform = TrainingSamples(numbered(2), UNMOVED, replace(SETTINGS, num_train_timesteps=10), cache=True)
    counts = Counter(int(uniform[draw]["timestep"]) for draw in range(1000))
    assert set(counts) == set(range(10))
    assert min(counts.values()) > 60
    last = TrainingSamples(
        numbered(2),
        UNMOVED,
        replace(SETTINGS, num_train_timesteps=10, last_timestep_only=True),
        cache=True,
    )
    assert {int(last[draw]["timestep"]) for draw in range(20)} == {9}


def test_noise_is_standard_normal_or_zero_and_differs_from_draw_to_draw():
    samples = TrainingSamples(numbered(2), UNMOVED, replace(SETTINGS, latent_shape=(4, 16, 16)), cache=True)
    drawn = torch.stack([samples[draw]["noise"] for draw in range(20)])
    assert abs(drawn.mean()) < 0.03
    assert abs(drawn.std() - 1) < 0.03
    assert len({float(noise[0, 0, 0]) for noise in drawn}) == 20
    assert not torch.equal(samples[0]["noise"], samples[0]["posterior_noise"])
    zeros = TrainingSamples(numbered(2), UNMOVED, replace(SETTINGS, zero_noise=True), cache=True)
    assert not zeros[0]["noise"].any()
    assert zeros[0]["posterior_noise"].any()


def test_image_and_mask_are_moved_together(polyps):
    split = PreparedDataset.open(polyps).split("train")
    flips = replace(SETTINGS, seed=4)
    always = Augmentation(
        horizontal_flip=1, vertical_flip=0, affine=0, rotation_degrees=0, translate=0, scale=0,
        shear_degrees=0, colour=0, brightness=0, contrast=0, saturation=0, hue=0, blur=0, noise=0,
    )  # fmt: skip
    plain, flipped = (TrainingSamples(split, a, flips, cache=True)[5] for a in (UNMOVED, always))
    assert torch.equal(flipped["image"], plain["image"].flip(-1))
    assert torch.equal(flipped["mask"], plain["mask"].flip(-1))
    assert torch.equal(flipped["label_map"], plain["label_map"].flip(-1))


def test_label_maps_come_to_the_model_grid_without_new_labels():
    labels = np.zeros((20, 12), np.uint8)
    labels[5:15, 3:9] = 3
    image, on_model = on_model_grid(one_slice(labels))
    assert image.shape == (3, 8, 8)
    assert on_model.shape == (8, 8)
    assert set(np.unique(on_model)) == {0, 3}


def test_the_masks_that_are_encoded_are_those_that_are_trained_on():
    labels = np.zeros((8, 8), np.uint8)
    labels[:2], labels[6:] = 1, 3
    empty = np.zeros((8, 8), np.uint8)
    split = Split(labels, empty)
    sums = [int(mask.sum()) for mask in present_masks(split, class_conditional=True)]
    assert sums == [32, 16, 16, 0]  # anything, class 1, class 3; the background of the empty slice
    assert [int(m.sum()) for m in present_masks(split, class_conditional=False)] == [32, 0]
