"""Validation during training: what is counted of a volume, and which slice of it is shown."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from sdseg_cli.core.data.prepared import PreparedSlice
from sdseg_cli.core.engine import validation
from sdseg_cli.core.engine.processes import Processes
from sdseg_cli.core.grid import Grid
from sdseg_cli.core.recipe_schema import SamplingSettings

SIDE = 8


class Slices(list):
    """A split of prepared slices."""

    @property
    def case_ids(self) -> list[str]:
        return [item.case_id for item in self]


def volume() -> Slices:
    """Four slices of one case, the first without anything to find."""
    truth = np.zeros((4, SIDE, SIDE), np.uint8)
    truth[1:, 1:3, 1:3] = 1
    grid = Grid(SIDE, SIDE, SIDE)
    return Slices(
        PreparedSlice("v", index, "v", np.full((SIDE, SIDE, 3), index, np.uint8), truth[index], grid, None)
        for index in range(4)
    )


@pytest.fixture
def predictions(monkeypatch) -> np.ndarray:
    """What the predictor answers: the truth, and in slice 2 alone a larger piece apart from it."""
    answers = np.stack([item.label_map for item in volume()])
    answers[2, 4:8, 4:7] = 1  # 12 pixels, as many as the true piece has voxels; less one it is the smaller
    answers[2, 4, 4] = 0

    class Answers:
        def __init__(self, pipeline, **options) -> None:
            assert not options.get("largest_component")

        def __call__(self, inputs):
            for item in inputs:
                label_map = answers[item.slice_index]
                yield SimpleNamespace(
                    case_id=item.case_id,
                    slice_index=item.slice_index,
                    label_map=label_map,
                    probabilities=np.stack([1.0 - label_map, label_map]),
                )

    monkeypatch.setattr(validation, "Predictor", Answers)
    return answers


def validated(*, largest_component: bool) -> validation.Validation:
    pipeline = SimpleNamespace(
        set_progress_bar_config=lambda **_: None, num_classes=2, classes=("background", "organ")
    )
    return validation.validate(
        pipeline,  # type: ignore[arg-type]
        volume(),  # type: ignore[arg-type]
        Processes(cpu=True),
        sampling=SamplingSettings(largest_component=largest_component),
        seed=0,
        precision="fp32",
        limit=0,
        batch_size=2,
    )


def test_the_largest_component_is_that_of_the_volume(predictions):
    assert validated(largest_component=True).dice == 1.0
    assert validated(largest_component=False).dice == pytest.approx(2 * 12 / (12 + 23))


def test_the_first_slice_with_something_to_find_is_shown(predictions):
    ((case_id, image, truth, label_map, foreground),) = validated(largest_component=True).pictures
    assert (case_id, int(image[0, 0, 0])) == ("v", 1)
    assert np.array_equal(truth, label_map)
    assert np.array_equal(foreground, label_map)
