"""Stability with a predictor whose draws are known."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from sdseg_cli.core.engine.inference import SliceInput
from sdseg_cli.core.engine.stability import (
    ROW_COLUMNS,
    measure_stability,
    slice_rows,
    stability_table,
    summarise_rows,
)
from sdseg_cli.core.errors import UsageError
from sdseg_cli.core.grid import Grid
from sdseg_cli.core.metrics.overlap import dice_agreement
from sdseg_cli.core.metrics.similarity import pair_scores
from sdseg_cli.core.reporting.tables import to_csv

SIDE = 24


def blob(shift, side=SIDE, peak=1.0):
    """Foreground probability: a bump that moves to the right with ``shift``."""
    y, x = np.mgrid[:side, :side]
    middle = side / 2
    distance = (y - middle) ** 2 + (x - middle - shift) ** 2
    return (peak * np.exp(-distance / (side / 3) ** 2)).astype(np.float32)


class Predictor:
    """Gives the samples it was made with for every slice."""

    def __init__(self, foregrounds, classes=("background", "polyp")):
        foregrounds = np.asarray(foregrounds, np.float32)  # (N, K - 1, H, W)
        background = 1 - foregrounds.sum(axis=1, keepdims=True)
        self.samples = np.concatenate([background, foregrounds], axis=1)
        self.classes, self.num_classes, self.threshold = classes, len(classes), 0.5
        self.num_samples = len(self.samples)

    def __call__(self, inputs):
        for item in inputs:
            yield SimpleNamespace(case_id=item.case_id, slice_index=item.slice_index, samples=self.samples)


def slices(*names):
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    return [SliceInput(name, 0, image, Grid(SIDE, SIDE, SIDE)) for name in names]


def measured(foregrounds, **options):
    (record,) = measure_stability(Predictor(foregrounds), slices("a"), **options)
    return record, {(entry.class_name, entry.kind): entry for entry in record.figures}


RUNS = np.stack([blob(shift)[None] for shift in (0, 1, 3)])


def test_every_run_is_compared_with_the_first_for_maps_and_for_scores():
    record, entries = measured(RUNS)
    masks = [(run[0] > 0.5).astype(np.uint8) * 255 for run in RUNS]
    scores = [np.rint(run[0] * 255).astype(np.uint8) for run in RUNS]
    for kind, pictures in (("maps", masks), ("scores", scores)):
        expected = [pair_scores(picture, pictures[0]) for picture in pictures[1:]]
        entry = entries["polyp", kind]
        assert entry.psnr == pytest.approx(np.mean([pair.psnr for pair in expected]))
        assert entry.ssim == pytest.approx(np.mean([pair.ssim for pair in expected]))
        assert (entry.pairs, entry.identical, entry.skipped) == (2, 0, 0)
    assert (record.label_maps * 255 == np.stack(masks)).all()
    assert (record.scores[:, 0] == np.stack(scores)).all()


def test_dice_agreement_is_the_mean_over_all_pairs_of_runs():
    _, entries = measured(RUNS)
    masks = [run[0] > 0.5 for run in RUNS]
    pairs = [(0, 1), (0, 2), (1, 2)]
    hard = np.mean([dice_agreement(masks[i], masks[j]) for i, j in pairs])
    soft = np.mean([dice_agreement(RUNS[i, 0], RUNS[j, 0]) for i, j in pairs])
    assert entries["polyp", "maps"].dice_agreement == pytest.approx(hard)
    assert entries["polyp", "scores"].dice_agreement == pytest.approx(soft)
    assert 0.5 < hard < 1


def test_the_protocol_reaches_the_figures():
    faint = RUNS * 0.6  # the scores' own range is not 255
    _, standard = measured(faint)
    _, official = measured(faint, protocol="sdseg")
    pictures = [np.rint(run[0] * 255).astype(np.uint8) for run in faint]
    expected = np.mean([pair_scores(picture, pictures[0], "sdseg").psnr for picture in pictures[1:]])
    assert official["polyp", "scores"].psnr == pytest.approx(expected)
    assert official["polyp", "scores"].psnr < standard["polyp", "scores"].psnr - 3


def test_equal_runs_agree_fully_and_are_told_apart_from_stable_ones():
    record, entries = measured(np.stack([blob(0)[None]] * 3))
    for entry in entries.values():
        assert entry.identical == entry.pairs == 2
        assert math.isnan(entry.psnr)
        assert entry.ssim == pytest.approx(1)
        assert entry.dice_agreement == 1
    summary = summarise_rows(slice_rows(record))
    assert summary.all_runs_equal
    assert "4 of 4 pairs are identical" in summary.reasons["psnr"]
    assert "this model draws no noise" in stability_table(summary, "t", "standard").caption


def test_a_black_first_run_is_skipped_by_the_official_protocol_and_counted():
    faint_first = np.stack([blob(0, peak=0.4)[None], blob(0)[None], blob(1)[None]])  # its mask is empty
    record, entries = measured(faint_first, protocol="sdseg")
    assert entries["polyp", "maps"].skipped == 2
    assert math.isnan(entries["polyp", "maps"].ssim)
    assert entries["polyp", "scores"].skipped == 0
    reasons = summarise_rows(slice_rows(record), protocol="sdseg").reasons
    assert reasons["pairs"] == "2 pairs are skipped by protocol 'sdseg': the first run's picture is black"


def test_classes_are_compared_each_on_its_own():
    left, right = blob(-5) * 0.9, blob(5) * 0.9
    moving = np.stack([np.stack([left, np.roll(right, shift, 0)]) * 0.5 for shift in (0, 4)])
    predictor = Predictor(moving, ("background", "liver", "kidney"))
    (record,) = measure_stability(predictor, slices("a"))
    entries = {(entry.class_name, entry.kind): entry for entry in record.figures}
    assert set(entries) == {(name, kind) for name in ("liver", "kidney") for kind in ("maps", "scores")}
    assert entries["liver", "scores"].dice_agreement == pytest.approx(1)
    assert entries["kidney", "scores"].dice_agreement < 0.9


def test_lpips_is_asked_with_the_pictures_of_the_runs_and_the_first():
    asked = []

    def perceptual(pictures, targets):
        asked.append((pictures.copy(), targets.copy()))
        return [0.25, 0.75]

    record, entries = measured(RUNS, perceptual=perceptual)
    assert entries["polyp", "maps"].lpips == 0.5
    pictures, targets = asked[1]
    assert (pictures == record.scores[1:, 0]).all()
    assert (targets == record.scores[0, 0]).all()


@pytest.mark.faults
def test_what_is_undefined_is_null_with_its_reason():
    record, entries = measured(RUNS)
    assert math.isnan(entries["polyp", "maps"].ms_ssim)
    assert math.isnan(entries["polyp", "maps"].lpips)
    rows = slice_rows(record)
    summary = summarise_rows(rows, lpips_reason="no backbone at hand")
    assert summary.reasons["ms_ssim"] == (
        "1 of 1 pictures have a side below 176 pixels (least: 24), which it needs"
    )
    assert summary.reasons["lpips"] == "no backbone at hand"
    assert math.isnan(summary.entries[0].measures["ms_ssim"].mean)
    header, first, _ = to_csv(rows, ROW_COLUMNS).splitlines()
    line = dict(zip(header.split(","), first.split(","), strict=True))
    assert line["ms_ssim"] == line["lpips"] == ""
    assert line["kind"] == "maps"
    assert float(line["ssim"]) == entries["polyp", "maps"].ssim


def test_a_negative_contrast_under_the_official_protocol_is_said():
    left_and_right = np.stack([blob(shift, side=192)[None] for shift in (-60, 60)])
    record, entries = measured(left_and_right, protocol="sdseg")
    assert math.isnan(entries["polyp", "maps"].ms_ssim)
    reasons = summarise_rows(slice_rows(record), protocol="sdseg").reasons
    assert reasons["ms_ssim"] == "2 of 2 comparisons have a negative contrast term, which has no real power"


@pytest.mark.faults
def test_one_run_is_refused():
    with pytest.raises(UsageError, match="--runs is 1; stability compares runs"):
        next(measure_stability(Predictor(RUNS[:1]), slices("a")))
