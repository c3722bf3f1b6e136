"""What is summed up between two lines of the metrics: losses that must be numbers, and an honest speed."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from sdseg_cli.core.engine import learner, training, training_totals
from sdseg_cli.core.errors import SdsegError
from sdseg_cli.core.run_directory import RunDirectory


@pytest.mark.faults
def test_a_training_that_diverged_between_two_lines_replaces_no_good_checkpoint(
    tiny_recipe, trained, tmp_path, monkeypatch
):
    original = learner.diffusion_loss
    calls = itertools.count()

    def diverging(*args):
        parts = original(*args)
        broken = parts.noise * float("nan") if next(calls) >= 2 else parts.noise
        return type(parts)(broken, parts.latent, parts.predicted_original)

    monkeypatch.setattr(learner, "diffusion_loss", diverging)
    recipe = tiny_recipe(
        {"train.steps": 9, "train.checkpoint_every": 2, "train.keep_checkpoints": 1, "train.log_every": 9}
    )
    with pytest.raises(SdsegError, match=r"the loss is nan at step 4; training has diverged.*step-000002"):
        trained(recipe, tmp_path / "run")
    kept = RunDirectory.open(tmp_path / "run").all_checkpoints()
    assert [checkpoint.name for checkpoint in kept] == ["step-000002"]


def test_the_speed_leaves_out_the_time_of_validations_and_checkpoints(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(training_totals.time, "monotonic", lambda: now[0])
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=2, reduce=lambda sums, reduction: 2 * sums
    )
    totals = training.Totals(accelerator)
    totals.add({"loss": torch.tensor(0.5)}, samples=8)
    now[0] += 4.0  # two seconds of training, two of validation
    totals.leave_out(2.0)
    means, rate = totals.take()
    assert means["loss"] == 0.5
    assert rate == 8.0  # 16 images of two processes in 2 s
