"""What predict, evaluate and stability take from the model's recipe, and refuse because of it."""

from __future__ import annotations

import json

import pytest

from sdseg_cli.commands._measured import Model
from sdseg_cli.core.errors import RecipeError
from sdseg_cli.core.run_directory import ModelReference

LAST = {"objective.prediction": "velocity", "objective.timesteps": "last"}


def model(recipe) -> Model:
    return Model(ModelReference("model", None, "a model"), recipe)


def test_what_is_given_wins_over_the_recipe_and_the_rest_is_taken_from_it(tiny_recipe):
    known = model(tiny_recipe({"sampling.num_samples": 3, "sampling.threshold": 0.4}))
    given = known.sampling(num_inference_steps=5, num_samples=None, threshold=1.0)
    assert given == {"num_inference_steps": 5, "num_samples": 3, "threshold": 1.0}


def test_without_a_recipe_only_what_is_given_counts():
    assert model(None).sampling(num_inference_steps=None, num_samples=2) == {"num_samples": 2}


@pytest.mark.parametrize("name", ["model_index.json", "export.json"])
def test_a_model_without_its_run_is_used_as_it_was_trained_to_be(name, tmp_path):
    stated = {"training_data": {"sampling": {"threshold": 0.3, "num_samples": 4}}}
    (tmp_path / name).write_text(json.dumps(stated))
    copied = Model(ModelReference(str(tmp_path), None, "a model"), None)
    assert copied.sampling(num_samples=None, threshold=None) == {"num_samples": 4, "threshold": 0.3}
    assert copied.sampling(num_samples=1, threshold=None) == {"num_samples": 1, "threshold": 0.3}


@pytest.mark.faults
@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        (LAST, {"num_inference_steps": 10}, "10 with timesteps: last"),
        ({**LAST, "objective.noise": "zeros"}, {"num_samples": 2}, "2 with noise: zeros"),
    ],
)
def test_steps_and_samples_that_the_model_was_not_trained_for_are_refused(
    changes, given, message, tiny_recipe
):
    with pytest.raises(RecipeError, match=message):
        model(tiny_recipe(changes)).sampling(**given)
