"""The dry run: weights, data, memory and the reconstruction ceiling, without training."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from sdseg_cli.core.data.prepared import PreparedDataset
from sdseg_cli.core.engine import dry_run
from sdseg_cli.core.engine.dry_run import examine
from sdseg_cli.core.engine.networks import TrainableNetwork, build_networks
from sdseg_cli.core.errors import DataError, UsageError

TIMM = {
    "model.image_encoder": "timm:test_efficientnet_gn",
    "model.image_encoder_channels": [128, 256, 512, 512],
    "model.image_encoder_blocks": 2,
    "model.image_encoder_dropout": 0.2,
}


def size_of(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_are_counted_as_they_are_built(tiny_recipe):
    found = examine(tiny_recipe(), device="cpu")
    networks = build_networks(tiny_recipe(), 2)
    assert found.parameters == {
        "unet": size_of(networks.unet),
        "image_encoder": size_of(networks.image_encoder),
        "autoencoder": size_of(networks.autoencoder),
    }
    assert found.trained_parameters == size_of(networks.unet) + size_of(networks.image_encoder)


def test_a_frozen_encoder_is_not_counted_as_trained(tiny_recipe):
    found = examine(tiny_recipe({"model.freeze_image_encoder": True}), device="cpu")
    assert found.trained_parameters == found.parameters["unet"]


def test_the_dataset_and_the_length_are_summed_up(tiny_recipe, polyps):
    manifest = PreparedDataset.open(polyps).manifest
    found = examine(tiny_recipe({"train.steps": 21}), device="cpu")
    assert found.dataset == {
        "name": "phantom",
        "classes": ["background", "polyp"],
        "splits": manifest.splits,
        "fingerprint": manifest.fingerprint,
    }
    assert found.epochs == pytest.approx(21 * 4 / manifest.splits["train"])
    assert (found.device, found.precision) == ("cpu", "fp32")


def test_the_ceiling_is_the_mean_dice_of_encoded_and_decoded_validation_masks(tiny_recipe, monkeypatch):
    asked = []

    def known(autoencoder, masks, *, device):
        asked.extend(masks)
        return np.array([0.9, 1.0])

    monkeypatch.setattr(dry_run, "reconstruction_dice", known)
    found = examine(tiny_recipe(), device="cpu")
    assert found.ceiling_dice == pytest.approx(0.95)
    assert found.ceiling_masks == 2
    assert len(asked) == 5  # the validation split
    assert {mask.shape for mask in asked} == {(32, 32)}


def test_several_classes_are_reconstructed_mask_by_mask(tiny_recipe, organs):
    found = examine(tiny_recipe({"data.dataset": str(organs)}), device="cpu")
    validation = PreparedDataset.open(organs).split("validation")
    masks = sum(len(np.unique(item.grid.labels_to_model(item.label_map))) for item in validation)
    assert found.ceiling_masks == masks
    assert 0 <= found.ceiling_dice <= 1


def test_the_baseline_has_no_ceiling(tiny_recipe):
    recipe = tiny_recipe({**TIMM, "objective.diffusion": "off", "objective.pixel_weight": 1.0})
    found = examine(recipe, device="cpu")
    assert found.ceiling_dice is None
    assert set(found.parameters) == {"unet"}
    assert "reconstruction ceiling" not in found.facts()


def test_memory_counts_weights_gradients_moments_and_averages(tiny_recipe):
    found = examine(tiny_recipe(), device="cpu")
    gib = 2**30
    trained, frozen = found.trained_parameters, found.parameters["autoencoder"]
    parts = found.memory_parts_gib
    assert parts["weights"] == pytest.approx(4 * (trained + frozen) / gib)
    assert parts["gradients"] == pytest.approx(4 * trained / gib)
    assert parts["optimizer"] == pytest.approx(8 * trained / gib)
    assert parts["averages"] == pytest.approx(4 * found.parameters["unet"] / gib)
    assert found.memory_gib == pytest.approx(sum(parts.values()))
    without = examine(tiny_recipe({"train.ema_decay": 0.0}), device="cpu")
    assert without.memory_parts_gib["averages"] == 0


@pytest.mark.parametrize("encoder", [{}, TIMM], ids=["kl", "timm"])
def test_the_activations_are_a_little_more_than_what_the_backward_pass_keeps(encoder, tiny_recipe):
    recipe = tiny_recipe({**encoder, "train.batch_size": 2, "model.fusion": "multiscale"})
    network = TrainableNetwork(build_networks(recipe, 2), freeze_image_encoder=False, recompute=False).train()
    own = {tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, int] = {}
    alive = []

    def note(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        network(torch.zeros(2, 3, 32, 32), torch.zeros(2, 4, 4, 4), torch.zeros(2, dtype=torch.long), None)
    estimate = examine(recipe, device="cpu").memory_parts_gib["activations"] * 2**30
    # The gradient of one weight is there before it is added to the others.
    gradient = max(4 * parameter.numel() for parameter in network.parameters())
    assert sum(kept.values()) < estimate < 1.2 * sum(kept.values()) + 2 * gradient


def test_recomputed_activations_are_fewer_and_not_only_those_that_are_kept(tiny_recipe):
    changes = {"model.unet_channels": [64, 64], "model.unet_blocks": 3}
    recipe = tiny_recipe({**changes, "train.batch_size": 1})
    frugal = tiny_recipe({**changes, "train.batch_size": 1, "train.gradient_checkpointing": True})
    whole, less = (
        examine(chosen, device="cpu").memory_parts_gib["activations"] for chosen in (recipe, frugal)
    )
    network = TrainableNetwork(build_networks(frugal, 2), freeze_image_encoder=False, recompute=True).train()
    kept = []
    with saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor):
        network(torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 4, 4), torch.zeros(1, dtype=torch.long), None)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    outside = sum(size for place, size in storages.items() if place not in own) / 2**30
    assert 1.2 * outside < less < 0.8 * whole


def test_activations_grow_with_the_batch_and_shrink_with_parts_and_precision(tiny_recipe):
    def activations(**changes) -> float:
        recipe = tiny_recipe({f"train.{key}": value for key, value in changes.items()})
        return examine(recipe, device="cpu").memory_parts_gib["activations"]

    one = activations(batch_size=4)
    assert activations(batch_size=8) == pytest.approx(2 * one, rel=0.2)
    assert activations(batch_size=8, gradient_accumulation=2) == pytest.approx(one)
    assert activations(batch_size=4, precision="bf16") == pytest.approx(one / 2, rel=1e-3)


def test_what_is_found_is_plain_and_told_in_sentences(tiny_recipe):
    found = examine(tiny_recipe(), device="cpu")
    json.dumps(found.values())
    facts = found.facts()
    assert list(facts) == [
        "device", "weights", "dataset", "classes", "length", "memory", "reconstruction ceiling",
    ]  # fmt: skip
    assert facts["classes"] == "background, polyp"
    assert "trained" in facts["weights"]


def test_nothing_is_trained_and_nothing_is_written(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = torch.random.get_rng_state()
    examine(tiny_recipe(), device="cpu")
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.faults
def test_a_missing_dataset_another_size_and_a_missing_device_are_refused(tiny_recipe, tmp_path):
    with pytest.raises(DataError, match=r"not a prepared dataset.*sdseg prepare"):
        examine(tiny_recipe({"data.dataset": str(tmp_path / "none")}), device="cpu")
    with pytest.raises(DataError, match="is prepared at 32 pixels"):
        examine(tiny_recipe({"data.image_size": 64}), device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="finds no GPU"):
            examine(tiny_recipe(), device="cuda")
    with pytest.raises(UsageError, match=r"timm has no network named 'resnet1'; near: \w+"):
        examine(tiny_recipe({**TIMM, "model.image_encoder": "timm:resnet1"}), device="cpu")
