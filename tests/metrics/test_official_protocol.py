"""The official scoring, written down a second time as loops over whole cases, against ours."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from sdseg_cli.core.engine.inference import SliceInput
from sdseg_cli.core.engine.stability import measure_stability, slice_rows, summarise_rows
from sdseg_cli.core.grid import Grid
from sdseg_cli.core.metrics.overlap import count_classes, dice, iou, sum_counts

SIDE = 48
RUNS = 4


def official_overlap(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Dice and IoU of one class of one whole case: an invented structure scores 1, two empty masks 0."""
    if prediction.any() and truth.any():
        agreed = np.logical_and(prediction, truth).sum()
        return 2 * agreed / (prediction.sum() + truth.sum()), agreed / np.logical_or(prediction, truth).sum()
    return (1.0, 1.0) if prediction.any() else (0.0, 0.0)


def volumes(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Label volumes (slices, H, W) of four classes: 1 in both, 2 missed, 3 invented by the prediction."""
    generator = np.random.default_rng(seed)
    truth = generator.choice([0, 1, 2], (5, 6, 7), p=[0.6, 0.3, 0.1]).astype(np.uint8)
    prediction = np.where(generator.random(truth.shape) < 0.3, 1, truth * (truth < 2)).astype(np.uint8)
    prediction[0, 0, :2] = 3
    return prediction, truth


@pytest.mark.parametrize("seed", range(3))
def test_every_class_of_a_volume_is_scored_over_the_whole_case_as_officially(seed):
    prediction, truth = volumes(seed)
    counts = [
        sum_counts(parts)
        for parts in zip(
            *(count_classes(p, t, 5) for p, t in zip(prediction, truth, strict=True)), strict=True
        )
    ]
    found = [(dice(own, "sdseg"), iou(own, "sdseg")) for own in counts]
    expected = [official_overlap(prediction == k, truth == k) for k in range(1, 5)]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert found[1] == (0, 0)  # missed
    assert found[2] == (1, 1)  # invented
    assert found[3] == (0, 0)  # in neither
    by_slice = [
        official_overlap(p == 1, t == 1)[0] for p, t in zip(prediction, truth, strict=True)
    ]  # what a mean over slices would say instead
    assert abs(np.mean(by_slice) - found[0][0]) > 1e-4


# Stability


def bump(shift: float, peak: float = 0.9) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    return (peak * np.exp(-((y - 24) ** 2 + (x - 24 - shift) ** 2) / 150)).astype(np.float32)


CASES = {
    "moving": [bump(0), bump(1), bump(2), bump(-3)],
    "partly identical": [bump(0, 0.8), bump(0, 0.8), bump(2, 0.8), bump(0, 0.8)],
    "faint": [bump(0, 0.3), bump(1, 0.3), bump(0, 0.35), bump(1, 0.2)],
    "black": [np.zeros((SIDE, SIDE), np.float32), bump(0), bump(1), bump(2)],
}


class Predictor:
    """Gives each case the draws of ``CASES``."""

    classes, num_classes, threshold, num_samples = ("background", "polyp"), 2, 0.5, RUNS

    def __call__(self, inputs):
        for item in inputs:
            draws = np.stack(CASES[item.case_id])
            samples = np.stack([1 - draws, draws], axis=1)
            yield SimpleNamespace(case_id=item.case_id, slice_index=0, samples=samples)


def as_rgb(probabilities: np.ndarray) -> torch.Tensor:
    """A soft prediction as an 8-bit RGB picture, floats from 0 to 255, (1, 3, H, W)."""
    grey = torch.from_numpy(np.rint(probabilities * 255).astype(np.uint8).astype(np.float64))
    return grey.expand(1, 3, -1, -1)


def official_pairs() -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(case, picture, first run) without those whose first run is black."""
    return [
        (name, as_rgb(picture), as_rgb(draws[0]))
        for name, draws in CASES.items()
        for picture in draws[1:]
        if np.rint(draws[0] * 255).any()
    ]


def official_psnr(picture: torch.Tensor, target: torch.Tensor) -> float:
    """torchmetrics' of today with the range that its version 0.7 inferred."""
    inferred = max(float(target.max()), 0.0) - min(float(target.min()), 0.0)
    return float(peak_signal_noise_ratio(picture, target, data_range=inferred))


def official_ssim(picture: torch.Tensor, target: torch.Tensor) -> float:
    """As :func:`official_psnr`; that version also left out where the window hangs over the edge."""
    inferred = max(float(picture.max() - picture.min()), float(target.max() - target.min()))
    _, full = structural_similarity_index_measure(
        picture, target, data_range=inferred, return_full_image=True
    )
    return float(full[..., 5:-5, 5:-5].mean())


@pytest.fixture(scope="module")
def entry():
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    inputs = [SliceInput(name, 0, image, Grid(SIDE, SIDE, SIDE)) for name in CASES]

    def perceptual(pictures, targets):
        return [float(np.abs(p.astype(float) - t).mean()) for p, t in zip(pictures, targets, strict=True)]

    rows = [
        row
        for record in measure_stability(Predictor(), inputs, protocol="sdseg", perceptual=perceptual)
        for row in slice_rows(record)
    ]
    summary = summarise_rows(rows, protocol="sdseg")
    return next(entry for entry in summary.entries if entry.kind == "scores")


def test_soft_predictions_score_as_8_bit_rgb_pictures_do_in_torchmetrics(entry):
    pairs = official_pairs()
    assert entry.measures["ssim"].mean == pytest.approx(
        np.mean([official_ssim(picture, target) for _, picture, target in pairs]), abs=1e-3
    )
    by_image = [
        np.mean([official_psnr(p, t) for name, p, t in pairs if name == case and not torch.equal(p, t)])
        for case in ("moving", "partly identical", "faint")
    ]
    assert entry.measures["psnr"].mean == pytest.approx(np.mean(by_image), abs=1e-3)


def test_black_and_identical_pictures_are_left_out_as_officially(entry):
    assert entry.skipped_pairs == RUNS - 1  # the first run of "black"
    assert entry.identical_pairs == 2
    assert entry.measures["ssim"].n == len(CASES) - 1
    assert all(math.isfinite(entry.measures[name].mean) for name in ("psnr", "ssim", "lpips"))


def test_lpips_is_the_mean_over_the_set_however_it_is_batched(entry):
    distances = [float((picture - target).abs().mean()) for _, picture, target in official_pairs()]
    assert entry.measures["lpips"].mean == pytest.approx(np.mean(distances), abs=1e-3)
