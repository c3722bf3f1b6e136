"""What a resumed run says about being exact: nothing where it is, and what is lost where it is not."""

from __future__ import annotations

import pytest
from torch import nn

from sdseg_cli.core.engine.exactness import circumstances, no_longer_exact

BEFORE = circumstances(processes=2, device="cpu", precision="fp32", gradient_accumulation=1, compiled=False)


def test_what_goes_on_as_it_was_has_nothing_to_say():
    assert no_longer_exact(BEFORE, dict(BEFORE), nn.Dropout(0.5), 4) == ""


def test_a_checkpoint_of_an_older_version_knows_nothing_and_nothing_is_claimed():
    assert no_longer_exact({}, BEFORE, nn.Dropout(0.5), 4) == ""


@pytest.mark.parametrize(
    ("network", "lost"),
    [
        (nn.Conv2d(1, 1, 1), "rounding (gradients are summed in another order)."),
        (nn.Dropout(0.0), "rounding (gradients are summed in another order)."),
        (nn.Dropout(0.1), "order), dropout (drawn for each process and part)."),
        (nn.BatchNorm2d(1), "order), BatchNorm (its statistics are those of each part)."),
    ],
)
def test_another_number_of_processes_keeps_the_batch_and_loses_what_is_drawn_per_part(network, lost):
    remark = no_longer_exact(BEFORE, {**BEFORE, "processes": 1}, network, 4)
    assert remark.startswith("since the checkpoint was saved: processes 2 -> 1. Each step keeps its 4 images")
    assert remark.endswith(lost)


@pytest.mark.parametrize(("device", "is_told"), [("cpu (2 threads)", True), ("NVIDIA H100", False)])
def test_another_processor_is_told_where_it_does_the_sums(device, is_told, monkeypatch):
    def on(processor: str) -> dict:
        monkeypatch.setattr("sdseg_cli.core.engine.exactness.processor_name", lambda: processor)
        return circumstances(
            processes=1, device=device, precision="fp32", gradient_accumulation=1, compiled=False
        )

    remark = no_longer_exact(on("AMD EPYC"), on("Intel Xeon"), nn.Conv2d(1, 1, 1), 4)
    assert ("processor AMD EPYC -> Intel Xeon" in remark) == is_told
    assert bool(remark) == is_told


def test_another_device_or_version_is_named_and_costs_rounding_alone():
    after = {**BEFORE, "device": "NVIDIA H100", "torch": "9.9"}
    remark = no_longer_exact(BEFORE, after, nn.Dropout(0.5), 8)
    assert "device cpu -> NVIDIA H100" in remark
    assert "-> 9.9" in remark
    assert "dropout" not in remark
