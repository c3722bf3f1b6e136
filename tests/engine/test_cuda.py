"""What only a GPU does: recorded calls, weights in half precision, a resumed training. Skipped elsewhere."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from sdseg_cli.core.engine import cuda_graphs
from sdseg_cli.core.engine.inference import Predictor, load_predictor
from sdseg_cli.core.engine.training import train
from sdseg_cli.core.engine.training_records import StepRecord
from sdseg_cli.core.run_directory import RunDirectory, resolve_model
from tests.engine.test_inference import inputs, make

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

ORGANS = ("background", "liver", "kidney")
CLOSE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def replays(monkeypatch) -> Counter:
    counted: Counter = Counter()
    replay = cuda_graphs._Recording.replay

    def counting(self, leaves):
        counted["replays"] += 1
        return replay(self, leaves)

    monkeypatch.setattr(cuda_graphs._Recording, "replay", counting)
    return counted


def probabilities(predictor, items) -> np.ndarray:
    return np.stack([found.probabilities for found in predictor(items)])


@pytest.mark.parametrize("settings", [{}, {"num_samples": 3}, {"flips": ("horizontal", "vertical")}], ids=str)
@pytest.mark.parametrize("classes", [("background", "polyp"), ORGANS], ids=["binary", "organs"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_replayed_calls_predict_what_the_networks_do(tmp_path, replays, classes, precision, settings):
    make(classes).save_pretrained(tmp_path / "model")
    reference = resolve_model(str(tmp_path / "model"))
    given = inputs(15)  # the last batch is of another size
    recorded = load_predictor(reference, precision=precision, batch_size=4, **settings)
    found = probabilities(recorded, given)
    assert replays["replays"] > 0
    as_written = Predictor(make(classes).to("cuda"), precision=precision, batch_size=4, **settings)
    np.testing.assert_allclose(found, probabilities(as_written, given), atol=CLOSE[precision])
    again = probabilities(recorded, given)  # of what lies where the first ones were computed
    np.testing.assert_allclose(again, found, atol=CLOSE[precision])


def test_weights_held_in_half_change_little_on_a_gpu(tmp_path):
    make().save_pretrained(tmp_path / "model")
    held = load_predictor(resolve_model(str(tmp_path / "model")), precision="bf16", batch_size=4)
    cast = Predictor(make().to("cuda").to(memory_format=torch.channels_last), precision="bf16", batch_size=4)
    np.testing.assert_allclose(probabilities(held, inputs(4)), probabilities(cast, inputs(4)), atol=1e-3)


def test_compiled_and_recorded_networks_predict_the_same(tmp_path, replays):
    make().save_pretrained(tmp_path / "model")
    reference = resolve_model(str(tmp_path / "model"))
    expected = probabilities(load_predictor(reference, precision="fp32", batch_size=4), inputs(10))
    compiled = load_predictor(reference, precision="fp32", batch_size=4)
    assert compiled.compile() is None
    replays.clear()
    found = probabilities(compiled, inputs(10))
    assert replays["replays"] >= 3 * 2  # three networks, from the second batch on
    np.testing.assert_allclose(found, expected, atol=CLOSE["fp32"])


def test_what_cannot_be_recorded_runs_as_it_is(tmp_path, replays, monkeypatch):
    def refuses(*arguments, **options):
        raise torch.OutOfMemoryError("no room for a graph")

    make().save_pretrained(tmp_path / "model")
    reference = resolve_model(str(tmp_path / "model"))
    expected = probabilities(load_predictor(reference, precision="fp32", batch_size=4), inputs(12))
    monkeypatch.setattr(torch.cuda, "graph", refuses)
    replays.clear()
    found = probabilities(load_predictor(reference, precision="fp32", batch_size=4), inputs(12))
    np.testing.assert_allclose(found, expected, atol=CLOSE["fp32"])
    assert not replays


@pytest.mark.parametrize("compiled", [False, True], ids=["as written", "compiled"])
def test_a_training_resumed_on_a_gpu_equals_an_uninterrupted_one(tiny_recipe, tmp_path, compiled):
    def run(name: str, steps: int, *, resume: bool = False) -> tuple[list[float], torch.Tensor]:
        AcceleratorState._reset_state(reset_partial_state=True)
        recipe = tiny_recipe({"train.steps": steps, "train.compile": compiled, "objective.pixel_weight": 0.5})
        root = tmp_path / name
        directory = RunDirectory.open(root) if resume else RunDirectory.create(root, recipe)
        records = list(train(recipe, directory, resume=resume, device="cuda"))
        weights = load_file(directory.latest_checkpoint() / "model.safetensors")
        losses = [record.loss for record in records if isinstance(record, StepRecord)]
        return losses, torch.cat([weights[key].flatten().float() for key in sorted(weights)])

    losses, whole = run("whole", 6)
    run("parts", 3)
    resumed_losses, resumed = run("parts", 6, resume=True)
    np.testing.assert_allclose(resumed_losses, losses[3:], rtol=1e-3)
    # Biases before a normalisation have no gradient but rounding, of which Adam makes steps of full length.
    assert ((resumed - whole).abs() < 1e-5).float().mean() > 0.95
