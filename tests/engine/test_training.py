"""The training loop: every word of a recipe does something, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import hashlib
import itertools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import timm
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdseg_cli.core.engine import learner, training
from sdseg_cli.core.engine.networks import TrainableNetwork, build_networks
from sdseg_cli.core.engine.training import learning_rate_at
from sdseg_cli.core.engine.training_records import Checkpointed, Finished, Started, StepRecord, Validated
from sdseg_cli.core.errors import DataError, Interrupted, OutOfMemoryError, SdsegError, UsageError
from sdseg_cli.core.model.mask_autoencoder import MaskAutoencoder
from sdseg_cli.core.model.weights import load_pipeline
from sdseg_cli.core.recipe import recipe_keys
from sdseg_cli.core.recipe_schema import Recipe, refusals

TIMM = {
    "model.image_encoder": "timm:test_efficientnet_gn",
    "model.image_encoder_channels": [128, 256, 512, 512],
    "model.image_encoder_blocks": 2,
    "model.image_encoder_dropout": 0.2,
}
SAMPLE = {"objective.prediction": "sample", "objective.latent_weight": 0.0}
VELOCITY = {"objective.prediction": "velocity"}
LAST = {"objective.timesteps": "last"}
OFF = {**TIMM, "objective.diffusion": "off", "objective.pixel_weight": 1.0}
STILL = {f"data.augmentation.{name}": 0.0 for name in ("horizontal_flip", "vertical_flip")}
MOVED = {
    **STILL,
    "data.augmentation.affine": 1.0,
    **{
        f"data.augmentation.{name}": 0.0
        for name in ("rotation_degrees", "translate", "scale", "shear_degrees")
    },
}
TINTED = {
    **STILL,
    "data.augmentation.colour": 1.0,
    **{f"data.augmentation.{name}": 0.0 for name in ("brightness", "contrast", "saturation", "hue")},
}


# Every word of the recipe does something ------------------------------------------------------------

LOSS, WEIGHTS, MODEL, PICTURE = "losses", "weights", "model", "picture"
EFFECTS: list[tuple[dict[str, Any], str, Any, str]] = [
    # (what the base has beside the tiny recipe, key, value, what changes)
    ({}, "data.dataset", "ORGANS", LOSS),
    (STILL, "data.augmentation.horizontal_flip", 1.0, LOSS),
    (STILL, "data.augmentation.vertical_flip", 1.0, LOSS),
    (STILL, "data.augmentation.affine", 1.0, LOSS),
    (MOVED, "data.augmentation.rotation_degrees", 90.0, LOSS),
    (MOVED, "data.augmentation.translate", 0.5, LOSS),
    (MOVED, "data.augmentation.scale", 0.5, LOSS),
    (MOVED, "data.augmentation.shear_degrees", 30.0, LOSS),
    (STILL, "data.augmentation.colour", 1.0, LOSS),
    (TINTED, "data.augmentation.brightness", 0.5, LOSS),
    (TINTED, "data.augmentation.contrast", 0.5, LOSS),
    (TINTED, "data.augmentation.saturation", 0.5, LOSS),
    (TINTED, "data.augmentation.hue", 0.2, LOSS),
    (STILL, "data.augmentation.blur", 1.0, LOSS),
    (STILL, "data.augmentation.noise", 1.0, LOSS),
    ({}, "model.autoencoder", "KL", LOSS),
    ({}, "model.autoencoder", "OTHER_MASK_AUTOENCODER", LOSS),
    ({}, "model.image_encoder_weights", "ENCODER_FILE", LOSS),
    ({"model.autoencoder": "KL"}, "model.image_encoder_weights", "autoencoder", LOSS),
    ({}, "model.image_encoder_channels", [32, 32, 64, 64], LOSS),
    ({}, "model.image_encoder_blocks", 2, LOSS),
    ({}, "model.image_encoder_dropout", 0.5, LOSS),
    ({}, "model.freeze_image_encoder", True, LOSS),
    (TIMM, "model.freeze_image_encoder", True, LOSS),
    ({}, "model.conditioning_channels", 8, LOSS),
    (TIMM, "model.conditioning_channels", 8, LOSS),
    ({}, "model.fusion", "multiscale", LOSS),
    (TIMM, "model.fusion", "multiscale", LOSS),
    ({}, "model.fusion", "attention", LOSS),
    (TIMM, "model.fusion", "attention", LOSS),
    ({"data.dataset": "ORGANS"}, "model.multiclass", "joint", LOSS),
    ({}, "model.unet_channels", [32, 64], LOSS),
    ({}, "model.unet_channels", [64, 64, 64], LOSS),
    ({"model.unet_attention_strides": []}, "model.unet_channels", [32], LOSS),
    ({}, "model.unet_blocks", 2, LOSS),
    ({}, "model.unet_heads", 8, LOSS),
    ({}, "model.unet_attention_strides", [], LOSS),
    ({}, "model.unet_attention_strides", [1], LOSS),
    ({}, "model.unet_attention_strides", [1, 2], LOSS),
    ({}, "model.unet_dropout", 0.5, LOSS),
    ({}, "model.unet_weights", "UNET_FILE", LOSS),
    ({}, "model.unet_weights", "UNET_FOLDER", LOSS),
    ({}, "model.latent_scale", 0.05, LOSS),
    (SAMPLE, "objective.num_train_timesteps", 10, LOSS),
    ({}, "objective.beta_start", 0.01, LOSS),
    ({}, "objective.beta_end", 0.002, LOSS),
    ({}, "objective.noise_weight", 0.5, LOSS),
    ({}, "objective.noise_weight", 0.0, LOSS),
    ({}, "objective.latent_weight", 0.5, LOSS),
    ({}, "objective.latent_weight", 0.0, LOSS),
    ({}, "objective.pixel_weight", 1.0, LOSS),
    (SAMPLE, "objective.pixel_weight", 1.0, LOSS),
    (OFF, "objective.pixel_weight", 2.0, LOSS),
    ({}, "train.steps", 3, LOSS),
    ({}, "train.batch_size", 2, LOSS),
    ({}, "train.learning_rate", 1e-5, LOSS),
    ({}, "train.schedule", "cosine", LOSS),
    ({}, "train.warmup_steps", 2, LOSS),
    ({}, "train.weight_decay", 0.9, WEIGHTS),
    ({}, "train.gradient_clip", 1e-6, WEIGHTS),
    ({}, "train.ema_decay", 0.05, MODEL),
    ({}, "train.ema_decay", 0.0, MODEL),
    ({}, "train.ema_scope", "all", MODEL),
    ({"model.autoencoder": "KL"}, "train.embed_autoencoder", False, MODEL),
    ({}, "train.precision", "bf16", LOSS),
    ({}, "train.seed", 1, LOSS),
    ({"objective.num_train_timesteps": 50}, "sampling.num_inference_steps", 3, PICTURE),
    ({}, "sampling.num_samples", 3, PICTURE),
    ({}, "sampling.threshold", 0.01, PICTURE),
    ({}, "sampling.flips", ["horizontal"], PICTURE),
    ({}, "sampling.flips", ["vertical"], PICTURE),
    ({}, "sampling.flips", ["horizontal", "vertical"], PICTURE),
    ({}, "sampling.largest_component", True, PICTURE),
]
TESTED_BY_NAME = {
    "data.image_size": "test_the_size_of_the_images_changes_what_is_learnt",
    "data.workers": "test_losses_are_the_same_for_any_number_of_loader_workers",
    "data.cache": "test_losses_are_the_same_with_and_without_the_cache",
    "train.gradient_accumulation": "test_accumulation_gives_the_same_losses",
    "train.gradient_checkpointing": "test_gradient_checkpointing_changes_nothing_but_the_memory",
    "train.compile": "test_compiled_training_learns_the_same_and_its_checkpoints_are_of_the_same_kind",
    "train.validate_every": "test_validations_checkpoints_and_records_come_when_asked_for",
    "train.checkpoint_every": "test_validations_checkpoints_and_records_come_when_asked_for",
    "train.keep_checkpoints": "test_validations_checkpoints_and_records_come_when_asked_for",
    "train.log_every": "test_validations_checkpoints_and_records_come_when_asked_for",
    "train.validation_cases": "test_validations_checkpoints_and_records_come_when_asked_for",
    "train.patience": "test_training_stops_early_when_the_dice_no_longer_improves",
    "train.max_minutes": "test_training_stops_when_its_time_is_over",
    "train.trackers": "test_the_tensorboard_tracker_writes_its_file_and_no_tracker_writes_none",
}
# Literal words trained by the objectives' test, or refused on this device.
OBJECTIVE_WORDS = {
    "model.image_encoder",
    "objective.diffusion",
    "objective.prediction",
    "objective.timesteps",
    "objective.noise",
}
NOT_OF_TRAINING = {"name", "evaluate.convention", "evaluate.grid"}  # a label; `sdseg evaluate` reads these


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_recipe, organs) -> dict[str, str]:
    """Weights and datasets that recipes name."""
    root = tmp_path_factory.mktemp("made")
    torch.manual_seed(5)
    kl = AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        sample_size=32,
    )
    kl.save_pretrained(root / "kl")
    MaskAutoencoder().save_pretrained(root / "mask")
    other = build_networks(tiny_recipe({"train.seed": 9}), 2)
    other.unet.save_pretrained(root / "unet")
    other.image_encoder.save_pretrained(root / "encoder")
    weights = "diffusion_pytorch_model.safetensors"
    return {
        "ORGANS": str(organs),
        "KL": str(root / "kl"),
        "OTHER_MASK_AUTOENCODER": str(root / "mask"),
        "ENCODER_FILE": str(root / "encoder" / weights),
        "UNET_FILE": str(root / "unet" / weights),
        "UNET_FOLDER": str(root / "unet"),
    }


def outcome(result: SimpleNamespace) -> SimpleNamespace:
    """What a training left: losses, trained weights, exported model, validation picture, by content."""
    return SimpleNamespace(
        losses=tuple(result.losses),
        weights=_digest([result.run.latest_checkpoint() / "model.safetensors"]),
        model=_digest(sorted(result.run.model.rglob("*.safetensors"))),
        picture=_digest(sorted(result.run.validation.iterdir())[-1:]),
    )


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def bases() -> dict[str, SimpleNamespace]:
    """Outcomes of the recipes that others are compared with."""
    return {}


def filled(changes: dict[str, Any], made: dict[str, str]) -> dict[str, Any]:
    return {
        key: made.get(value, value) if isinstance(value, str) else value for key, value in changes.items()
    }


@pytest.mark.parametrize(
    ("base", "key", "value", "changed"),
    EFFECTS,
    ids=[f"{key}={value}-{index}" for index, (_, key, value, _) in enumerate(EFFECTS)],
)
def test_every_key_changes_what_is_trained(
    base, key, value, changed, made, bases, tiny_recipe, trained, tmp_path
):
    name = repr(sorted(base.items()))
    if name not in bases:
        bases[name] = outcome(trained(tiny_recipe(filled(base, made)), tmp_path / "base"))
    recipe = tiny_recipe(filled({**base, key: value}, made))
    found = outcome(trained(recipe, tmp_path / "changed"))
    assert np.isfinite(found.losses).all()
    assert getattr(found, changed) != getattr(bases[name], changed)


def test_no_key_and_no_word_of_the_recipe_is_left_out_of_these_tests():
    tried = {key: {repr(value) for _, other, value, _ in EFFECTS if other == key} for _, key, _, _ in EFFECTS}
    for path in recipe_keys():
        dotted = ".".join(path)
        if dotted in NOT_OF_TRAINING or dotted in OBJECTIVE_WORDS:
            continue
        if dotted in TESTED_BY_NAME:
            assert callable(globals()[TESTED_BY_NAME[dotted]])
            continue
        assert dotted in tried, f"{dotted} is trained in no test"
        section: Any = Recipe
        for part in path[:-1]:
            section = section.model_fields[part].annotation
        annotation = section.model_fields[path[-1]].annotation
        default = section.model_fields[path[-1]].default
        words = get_args(annotation) if get_origin(annotation) is Literal else ()
        missing = {repr(word) for word in words if word != default} - tried[dotted]
        assert missing <= {"'fp32'", "'fp16'"}, f"{dotted}: {missing} are trained in no test"


def valid_objectives() -> Iterator[dict[str, Any]]:
    for prediction, timesteps, noise in itertools.product(
        ("epsilon", "sample", "velocity"), ("uniform", "last"), ("gaussian", "zeros")
    ):
        if noise == "zeros" and (timesteps == "uniform" or prediction == "epsilon"):
            continue
        if prediction == "epsilon" and timesteps == "last":
            continue
        yield {
            "objective.prediction": prediction,
            "objective.timesteps": timesteps,
            "objective.noise": noise,
            "objective.latent_weight": 0.0 if prediction == "sample" else 1.0,
        }


@pytest.mark.parametrize("encoder", ["kl", "timm"])
@pytest.mark.parametrize("fusion", ["input", "multiscale", "attention"])
def test_every_objective_learns_something_else_with_every_encoder_and_fusion(
    encoder, fusion, tiny_recipe, trained, tmp_path
):
    networks = {"model.fusion": fusion, **(TIMM if encoder == "timm" else {})}
    found = [
        outcome(trained(tiny_recipe({**networks, **objective}), tmp_path / str(index)))
        for index, objective in enumerate(valid_objectives())
    ]
    assert len(found) == 7
    assert np.isfinite([losses for result in found for losses in result.losses]).all()
    for changed in (LOSS, WEIGHTS, MODEL):  # two networks of two steps may well draw the same black picture
        assert len({getattr(result, changed) for result in found}) == 7


@pytest.mark.parametrize("multiclass", ["class_conditional", "joint"])
def test_every_objective_learns_several_classes(multiclass, organs, tiny_recipe, trained, tmp_path):
    several = {
        "data.dataset": str(organs),
        "model.fusion": "multiscale",
        "model.multiclass": multiclass,
        "objective.pixel_weight": 1.0,
    }
    found = [
        trained(tiny_recipe({**several, **objective}), tmp_path / str(index))
        for index, objective in enumerate(valid_objectives())
    ]
    assert len({tuple(result.losses) for result in found}) == 7
    pipeline = load_pipeline(str(found[0].run.model))
    assert (pipeline.unet.config.num_class_embeds, pipeline.unet.config.latent_channels) == (
        (None, 12) if multiclass == "joint" else (4, 4)
    )
    image = np.full((32, 32, 3), 90, np.uint8)
    assert pipeline(image).probabilities[0].shape == (4, 32, 32)


@pytest.mark.parametrize("dataset", ["polyps", "organs"])
def test_the_baseline_without_diffusion_learns_from_pixels_alone(
    dataset, request, tiny_recipe, trained, tmp_path
):
    folder = str(request.getfixturevalue(dataset))
    recipe = tiny_recipe({**OFF, "data.dataset": folder, "train.steps": 12, "train.learning_rate": 3e-3})
    result = trained(recipe, tmp_path / "run")
    assert result.losses[-1] < result.losses[0]
    assert all(record.latent_loss == 0 for record in result.records if isinstance(record, StepRecord))
    pipeline = load_pipeline(str(result.run.model))
    assert pipeline.autoencoder is None
    image = np.full((32, 32, 3), 90, np.uint8)
    probabilities = pipeline(image).probabilities[0]
    assert len(probabilities) == (2 if dataset == "polyps" else 4)
    np.testing.assert_array_equal(probabilities, pipeline(image, seed=1).probabilities[0])


def test_pretrained_weights_of_a_backbone_are_the_start(tiny_recipe, trained, tmp_path, monkeypatch):
    create = timm.create_model

    def from_a_filled_cache(name, pretrained=False, **options):
        backbone = create(name, pretrained=False, **options)
        if pretrained:
            with torch.no_grad():
                for parameter in backbone.parameters():
                    parameter.fill_(0.01)
        return backbone

    monkeypatch.setattr(timm, "create_model", from_a_filled_cache)
    pretrained = tiny_recipe({**TIMM, "model.image_encoder_weights": "pretrained"})
    encoder = build_networks(pretrained, 2).image_encoder
    assert all((parameter == 0.01).all() for parameter in encoder.backbone.parameters())
    found = outcome(trained(pretrained, tmp_path / "pretrained"))
    assert found.losses != outcome(trained(tiny_recipe(TIMM), tmp_path / "random")).losses


def test_the_size_of_the_images_changes_what_is_learnt(tiny_recipe, trained, tmp_path):
    from sdseg_cli.commands.prepare import phantom

    phantom(cases=6, size=64, seed=0, fractions="0.5,0.25,0.25", out=tmp_path / "larger", workers=1)
    recipe = tiny_recipe({"data.dataset": str(tmp_path / "larger"), "data.image_size": 64})
    result = trained(recipe, tmp_path / "run")
    assert np.isfinite(result.losses).all()
    assert load_pipeline(str(result.run.model)).latent_shape() == (4, 8, 8)


def test_a_frozen_encoder_stays_as_it_starts_and_is_not_in_the_checkpoints(tiny_recipe, trained, tmp_path):
    recipe = tiny_recipe({"model.freeze_image_encoder": True, "train.ema_scope": "all"})
    result = trained(recipe, tmp_path / "run")
    saved = load_file(result.run.latest_checkpoint() / "model.safetensors")
    assert all(name.startswith("unet.") for name in saved)
    exported = load_pipeline(str(result.run.model)).image_encoder.state_dict()
    for name, value in build_networks(recipe, 2).image_encoder.state_dict().items():
        assert torch.equal(value, exported[name]), name


def test_checkpoints_hold_no_autoencoder_but_the_exported_model_does(tiny_recipe, trained, tmp_path):
    result = trained(tiny_recipe(), tmp_path / "run")
    saved = load_file(result.run.latest_checkpoint() / "model.safetensors")
    assert {name.split(".")[0] for name in saved} == {"unet", "image_encoder"}
    assert (result.run.model / "autoencoder" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize("scope", ["unet", "all"])
def test_the_exported_model_has_the_averaged_weights_of_the_networks_in_scope(
    scope, tiny_recipe, trained, tmp_path
):
    result = trained(tiny_recipe({"train.ema_scope": scope, "train.steps": 3}), tmp_path / "run")
    raw = load_file(result.run.latest_checkpoint() / "model.safetensors")
    pipeline = load_pipeline(str(result.run.model))
    unet, encoder = pipeline.unet.state_dict(), pipeline.image_encoder.state_dict()
    assert not torch.equal(unet["conv_in.weight"], raw["unet.conv_in.weight"])
    is_raw = torch.equal(encoder["out.weight"], raw["image_encoder.out.weight"])
    assert is_raw == (scope == "unet")


def test_fp16_without_a_gpu_is_refused(tiny_recipe, trained, tmp_path):
    with pytest.raises(UsageError, match="fp16 needs a GPU"):
        trained(tiny_recipe({"train.precision": "fp16"}), tmp_path / "run")


def test_fp32_is_what_auto_means_on_a_cpu(tiny_recipe, trained, tmp_path):
    chosen = outcome(trained(tiny_recipe({"train.precision": "fp32"}), tmp_path / "fp32"))
    assert chosen == outcome(trained(tiny_recipe(), tmp_path / "auto"))


# What must not change anything ----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_losses_are_the_same_for_any_number_of_loader_workers(workers, tiny_recipe, trained, tmp_path):
    changes = {"train.steps": 6, "data.augmentation.affine": 1.0, "data.augmentation.colour": 1.0}
    alone = outcome(trained(tiny_recipe(changes), tmp_path / "alone"))
    helped = outcome(trained(tiny_recipe({**changes, "data.workers": workers}), tmp_path / "helped"))
    assert helped == alone


def test_losses_are_the_same_with_and_without_the_cache(tiny_recipe, trained, tmp_path, monkeypatch):
    reads: list[int] = []
    original = training.TrainingSamples._decoded

    def counted(samples, index):
        reads.append(samples._cache is not None)
        return original(samples, index)

    monkeypatch.setattr(training.TrainingSamples, "_decoded", counted)
    kept = outcome(trained(tiny_recipe({"train.steps": 8}), tmp_path / "kept"))
    assert all(reads)
    reads.clear()
    read = outcome(trained(tiny_recipe({"train.steps": 8, "data.cache": False}), tmp_path / "read"))
    assert not any(reads)
    assert read == kept


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize(
    "networks", [{}, {**VELOCITY, "objective.pixel_weight": 1.0}], ids=["paper", "pixels"]
)
def test_accumulation_gives_the_same_losses(parts, networks, tiny_recipe, trained, tmp_path):
    changes = {**networks, "train.steps": 4, "train.gradient_clip": 1.0, "train.learning_rate": 1e-5}
    whole = trained(tiny_recipe(changes), tmp_path / "whole")
    parted = trained(tiny_recipe({**changes, "train.gradient_accumulation": parts}), tmp_path / "parted")
    assert parted.losses == pytest.approx(whole.losses, rel=1e-3)
    assert parted.losses[0] == pytest.approx(whole.losses[0], rel=1e-6)


@pytest.mark.parametrize("encoder", [{}, TIMM, OFF], ids=["kl", "timm", "off"])
def test_gradient_checkpointing_changes_nothing_but_the_memory(encoder, tiny_recipe, trained, tmp_path):
    from sdseg_cli.core.engine.dry_run import examine

    changes = {**encoder, "model.unet_dropout": 0.2}
    recomputed = tiny_recipe({**changes, "train.gradient_checkpointing": True})
    plain = tiny_recipe(changes)
    losses = trained(recomputed, tmp_path / "recomputed").losses
    assert losses == pytest.approx(trained(plain, tmp_path / "plain").losses, rel=1e-5)
    memory = [examine(recipe, device="cpu").memory_parts_gib["activations"] for recipe in (recomputed, plain)]
    assert memory[0] < 0.9 * memory[1]


# Several masks at once ------------------------------------------------------------------------------


def test_a_joint_training_sees_the_noisy_latents_of_all_class_masks(
    organs, seen, trained, tiny_recipe, tmp_path, monkeypatch
):
    encoded = []
    posterior = learner.posterior
    monkeypatch.setattr(learner, "posterior", lambda *a: (encoded.append(a[1]), posterior(*a))[1])
    monkeypatch.setattr(learner.Learner, "_make_latent_cache", lambda self: None)
    batches = []
    losses = learner.Learner._losses
    monkeypatch.setattr(
        learner.Learner,
        "_losses",
        lambda self, batch, scale: (batches.append(batch), losses(self, batch, scale))[1],
    )
    trained(tiny_recipe({"data.dataset": str(organs), "model.multiclass": "joint"}), tmp_path / "run")
    assert {latent.shape for latent, _ in seen} == {(4, 12, 4, 4)}
    for masks, batch in zip(encoded, batches, strict=True):
        assert masks.shape == (4, 3, 32, 32)
        rebuilt = sum(masks[:, index] * (index + 1) for index in range(3))
        assert torch.equal(rebuilt, batch["label_map"].float())
        assert len(torch.unique(rebuilt)) > 2


def test_the_scale_of_joint_latents_is_that_of_the_classes_masks(organs, trained, tiny_recipe, tmp_path):
    changes = {"data.dataset": str(organs)}
    scales = [
        trained(tiny_recipe({**changes, "model.multiclass": word}), tmp_path / word).run.read_run_json()[
            "latent_scale"
        ]
        for word in ("joint", "class_conditional")
    ]
    assert 0 < scales[0] < 100
    assert scales[0] != scales[1]  # the latter also counts the masks of "anything but background"


@pytest.mark.faults
def test_a_joint_training_on_a_single_class_is_refused_with_the_remedy(tiny_recipe, trained, tmp_path):
    with pytest.raises(DataError, match=r"single foreground class.*multiclass=class_conditional"):
        trained(tiny_recipe({"model.multiclass": "joint"}), tmp_path / "run")


@pytest.mark.parametrize("networks", [{}, {"train.precision": "bf16"}, OFF], ids=["fp32", "bf16", "off"])
def test_compiled_training_learns_the_same_and_its_checkpoints_are_of_the_same_kind(
    networks, tiny_recipe, trained, tmp_path, monkeypatch
):
    """Traced and run without code generation, which takes minutes on a CPU."""
    graphs = []

    def traced(modules):
        for module in modules:
            module.compile(backend=lambda graph, _: (graphs.append(graph), graph)[1], dynamic=False)

    monkeypatch.setattr(learner, "compile_networks", traced)
    monkeypatch.setattr(learner, "missing_compiler", lambda device: None)
    torch._dynamo.reset()
    plain = trained(tiny_recipe(networks), tmp_path / "plain")
    assert not graphs
    compiled = trained(tiny_recipe({**networks, "train.compile": True}), tmp_path / "compiled")
    assert graphs
    assert compiled.losses == pytest.approx(plain.losses, rel=2e-2 if "train.precision" in networks else 1e-4)
    saved, known = (
        load_file(result.run.latest_checkpoint() / "model.safetensors") for result in (compiled, plain)
    )
    assert saved.keys() == known.keys()
    load_pipeline(str(compiled.run.model))
    resumed = trained(tiny_recipe({**networks, "train.steps": 3}), tmp_path / "compiled", resume=True)
    assert resumed.finished.step == 3


@pytest.mark.faults
def test_compiled_training_without_a_compiler_is_refused(tiny_recipe, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match=r"no C\+\+ compiler was found .*--set train.compile=false"):
        trained(tiny_recipe({"train.compile": True}), tmp_path / "run")


@pytest.mark.parametrize(
    ("data", "multiclass"),
    [("polyps", "class_conditional"), ("organs", "class_conditional"), ("organs", "joint")],
)
def test_latents_that_were_kept_train_the_same(
    data, multiclass, made, request, tiny_recipe, trained, tmp_path, monkeypatch
):
    folder = str(request.getfixturevalue(data))
    changes = {"model.autoencoder": "KL", "data.dataset": folder, "train.steps": 8}
    changes = filled({**changes, "model.multiclass": multiclass}, made)
    caches = []
    make = learner.Learner._make_latent_cache

    def noted(trainer):
        caches.append(make(trainer))
        return caches[-1]

    monkeypatch.setattr(learner.Learner, "_make_latent_cache", noted)
    kept = trained(tiny_recipe(changes), tmp_path / "kept")
    most = 8 * 4 * (3 if multiclass == "joint" else 1)
    assert 0 < len(caches[0]) < most  # draws, some of a mask that was met before
    monkeypatch.setattr(learner.Learner, "_make_latent_cache", lambda trainer: None)
    encoded = trained(tiny_recipe(changes), tmp_path / "encoded")
    assert kept.losses[0] == pytest.approx(encoded.losses[0], rel=1e-6)
    assert kept.losses == pytest.approx(
        encoded.losses, rel=1e-3
    )  # AdamW carries rounding on from step to step


def test_latents_are_kept_only_where_masks_recur_and_fit(tiny_recipe, monkeypatch):
    flips = training.Training(tiny_recipe(), device="cpu")
    assert flips.learner.latents is not None
    moved = training.Training(tiny_recipe({"data.augmentation.affine": 0.5}), device="cpu")
    assert moved.learner.latents is None
    monkeypatch.setattr(learner, "MOST_BYTES", 1000)
    assert training.Training(tiny_recipe(), device="cpu").learner.latents is None


def test_weights_in_the_layout_of_tensor_cores_train_save_and_resume(
    tiny_recipe, trained, tmp_path, monkeypatch
):
    def laid_out(networks, device, *, training):
        for network in networks:
            network.to(memory_format=torch.channels_last)

    plain = trained(tiny_recipe(), tmp_path / "plain")
    monkeypatch.setattr(learner, "use_channels_last", laid_out)
    changed = trained(tiny_recipe({"train.ema_scope": "all"}), tmp_path / "changed")
    assert changed.losses == pytest.approx(plain.losses, rel=1e-4)
    assert load_pipeline(str(changed.run.model)).unet.conv_in.weight.is_contiguous()
    resumed = trained(
        tiny_recipe({"train.ema_scope": "all", "train.steps": 3}), tmp_path / "changed", resume=True
    )
    assert np.isfinite(resumed.losses).all()


# The objective --------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Noisy latents and timesteps that the network was given in training."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    forward = TrainableNetwork.forward

    def spied(network, images, noisy_latent=None, timestep=None, class_labels=None):
        if network.training:
            found.append((noisy_latent.clone(), timestep.clone()))
        return forward(network, images, noisy_latent, timestep, class_labels)

    monkeypatch.setattr(TrainableNetwork, "forward", spied)
    return found


def latents_for(truth: Callable, seen, monkeypatch, trained, recipe, root) -> torch.Tensor:
    """The noisy latents of a training whose label maps were all replaced by ``truth(label_map)``."""
    from sdseg_cli.core.engine import training_data

    seen.clear()
    original = training_data.on_model_grid
    with monkeypatch.context() as patch:
        patch.setattr(
            training_data, "on_model_grid", lambda item: (original(item)[0], truth(original(item)[1]))
        )
        trained(recipe, root)
    return torch.cat([latent for latent, _ in seen])


@pytest.mark.parametrize("objective", [{**SAMPLE, **LAST}, {**VELOCITY, **LAST}], ids=["sample", "velocity"])
def test_the_last_timestep_alone_is_pure_noise_without_a_trace_of_the_truth(
    objective, seen, monkeypatch, trained, tiny_recipe, tmp_path
):
    recipe = tiny_recipe({**objective, "model.latent_scale": 1.0, "train.steps": 4})
    empty = latents_for(torch.zeros_like, seen, monkeypatch, trained, recipe, tmp_path / "empty")
    full = latents_for(torch.ones_like, seen, monkeypatch, trained, recipe, tmp_path / "full")
    assert torch.equal(empty, full)
    assert {int(t) for _, timestep in seen for t in timestep} == {999}
    assert abs(empty.mean()) < 0.1
    assert abs(empty.std() - 1) < 0.1


def test_uniform_timesteps_mix_the_truth_into_the_noise(seen, monkeypatch, trained, tiny_recipe, tmp_path):
    recipe = tiny_recipe({"model.latent_scale": 1.0, "train.steps": 4})
    empty = latents_for(torch.zeros_like, seen, monkeypatch, trained, recipe, tmp_path / "empty")
    full = latents_for(torch.ones_like, seen, monkeypatch, trained, recipe, tmp_path / "full")
    assert not torch.equal(empty, full)
    assert len({int(t) for _, timestep in seen for t in timestep}) > 8


def test_zeros_are_zeros_in_training_and_in_prediction(seen, trained, tiny_recipe, tmp_path):
    result = trained(tiny_recipe({**SAMPLE, **LAST, "objective.noise": "zeros"}), tmp_path / "run")
    assert all((latent == 0).all() for latent, _ in seen)
    pipeline = load_pipeline(str(result.run.model))
    image = np.full((32, 32, 3), 90, np.uint8)
    first, second = pipeline(image, seed=0), pipeline(image, seed=1)
    np.testing.assert_array_equal(first.probabilities[0], second.probabilities[0])


def test_the_latents_scale_is_measured_once_and_kept(trained, tiny_recipe, tmp_path):
    result = trained(tiny_recipe(), tmp_path / "run")
    scale = result.run.read_run_json()["latent_scale"]
    assert 0 < scale < 100
    assert load_pipeline(str(result.run.model)).config.latent_scale == scale
    again = trained(tiny_recipe({"train.seed": 3}), tmp_path / "again")
    assert again.run.read_run_json()["latent_scale"] == scale


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_learning_rate_warms_up_and_then_follows_its_schedule(schedule, tiny_recipe):
    recipe = tiny_recipe({"train.steps": 14, "train.warmup_steps": 4, "train.schedule": schedule})
    rates = [learning_rate_at(step, recipe) / 1e-4 for step in range(1, 15)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    if schedule == "constant":
        assert rates[4:] == pytest.approx([1.0] * 10)
    else:
        assert rates[4:] == sorted(rates[4:], reverse=True)
        assert rates[8] == pytest.approx(0.5)
        assert rates[-1] == pytest.approx(0.0, abs=1e-12)


# What happens when ----------------------------------------------------------------------------------


def test_validations_checkpoints_and_records_come_when_asked_for(tiny_recipe, trained, tmp_path):
    recipe = tiny_recipe(
        {
            "train.steps": 7,
            "train.validate_every": 3,
            "train.checkpoint_every": 2,
            "train.log_every": 2,
            "train.keep_checkpoints": 2,
            "train.validation_cases": 1,
        }
    )
    result = trained(recipe, tmp_path / "run")
    records = result.records
    assert isinstance(records[0], Started)
    assert [r.step for r in records if isinstance(r, StepRecord)] == [2, 4, 6, 7]
    assert [r.step for r in records if isinstance(r, Validated)] == [3, 6, 7]
    assert [r.step for r in records if isinstance(r, Checkpointed)] == [2, 4, 6, 7]
    assert isinstance(records[-1], Finished)
    assert [path.name for path in result.run.all_checkpoints()] == ["step-000006", "step-000007"]
    assert sorted(path.name for path in result.run.validation.iterdir()) == [
        "step-000003.png", "step-000006.png", "step-000007.png",
    ]  # fmt: skip
    metrics = result.run.read_metrics()
    assert [m["step"] for m in metrics if "loss" in m] == [2, 4, 6, 7]
    assert [m["step"] for m in metrics if "validation_dice" in m] == [3, 6, 7]
    fields = result.run.read_run_json()
    assert (fields["status"], fields["reason"], fields["steps"]) == ("finished", "steps", 7)


def test_validation_scores_as_many_cases_as_asked_for(tiny_recipe, trained, tmp_path, monkeypatch):
    scored: list[list[str]] = []
    share = training.Processes.share

    def noted(processes, items):
        scored.append(list(items))
        return share(processes, items)

    monkeypatch.setattr(training.Processes, "share", noted)
    trained(tiny_recipe({"train.validation_cases": 3}), tmp_path / "three")
    trained(tiny_recipe({"train.validation_cases": 0}), tmp_path / "all")
    assert [len(cases) for cases in scored] == [3, 5]


def test_training_stops_early_when_the_dice_no_longer_improves(tiny_recipe, trained, tmp_path):
    changes = {"train.steps": 50, "train.validate_every": 1, "train.patience": 2, "train.learning_rate": 1e-9}
    result = trained(tiny_recipe(changes), tmp_path / "run")
    assert result.finished.reason == "early stop"
    assert [record.step for record in result.validated] == [1, 2, 3]
    assert (result.finished.step, result.finished.best_step) == (3, 1)
    assert result.run.read_run_json()["status"] == "finished"


def test_training_stops_when_its_time_is_over(tiny_recipe, trained, tmp_path):
    result = trained(tiny_recipe({"train.steps": 50, "train.max_minutes": 1e-6}), tmp_path / "run")
    assert result.finished.reason == "time limit"
    assert result.finished.step == 1
    assert len(result.validated) == 1  # what is there is validated and exported
    assert result.run.has_model


def test_the_tensorboard_tracker_writes_its_file_and_no_tracker_writes_none(tiny_recipe, trained, tmp_path):
    with_tracker = trained(tiny_recipe({"train.trackers": ["tensorboard"]}), tmp_path / "with")
    without = trained(tiny_recipe(), tmp_path / "without")
    files = list(with_tracker.run.tensorboard.rglob("events.out.tfevents.*"))  # the settings have their own
    seen = [EventAccumulator(str(file)).Reload() for file in files]
    (picture,) = [one for each in seen if each.Tags()["images"] for one in each.Images("validation")]
    assert picture.step == 2
    written = Image.open(with_tracker.run.validation / "step-000002.png")
    assert (picture.width, picture.height) == written.size
    assert not without.run.tensorboard.exists()


def test_the_best_model_is_kept_not_the_last(tiny_recipe, trained, tmp_path, monkeypatch):
    dice = iter([0.3, 0.6, 0.5])
    validate = training.validate

    def judged(*args, **options):
        result = validate(*args, **options)
        return type(result)(next(dice), result.dice_per_class, result.pictures)

    monkeypatch.setattr(training, "validate", judged)
    exported: list[int] = []
    export = training.Training._export
    monkeypatch.setattr(
        training.Training,
        "_export",
        lambda trainer: (exported.append(trainer.progress.step), export(trainer)),
    )
    result = trained(tiny_recipe({"train.steps": 3, "train.validate_every": 1}), tmp_path / "run")
    assert exported == [1, 2]
    assert [record.is_best for record in result.validated] == [True, True, False]
    assert (result.finished.best_dice, result.finished.best_step) == (0.6, 2)


def test_an_unread_training_trains_nothing(tiny_recipe, tmp_path):
    from sdseg_cli.core.run_directory import RunDirectory

    run = RunDirectory.create(tmp_path / "run", tiny_recipe())
    training.train(tiny_recipe(), run)
    assert not run.metrics_file.exists()


# A resumed run is the uninterrupted one -------------------------------------------------------------

RESUMED = {
    "train.steps": 7,
    "train.log_every": 2,
    "train.validate_every": 4,
    "train.checkpoint_every": 3,
    "train.keep_checkpoints": 9,
    "train.ema_scope": "all",
    "train.schedule": "cosine",
    "train.warmup_steps": 2,
    "model.unet_dropout": 0.2,
    "data.augmentation.affine": 0.5,
    "data.augmentation.colour": 0.5,
    "data.augmentation.noise": 0.5,
}


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, dict]:
    return {}


@pytest.mark.faults(19)
@pytest.mark.parametrize(
    ("networks", "stop_at", "number"),
    [
        *(("kl", step, signal.SIGTERM) for step in (1, 3, 4, 5)),
        ("kl", 3, signal.SIGINT),
        *(("BatchNorm", step, signal.SIGTERM) for step in (3, 5)),
        *(("organs", step, signal.SIGTERM) for step in (3, 5)),
        ("joint", 5, signal.SIGTERM),
    ],
)
def test_a_run_that_was_stopped_and_resumed_equals_an_uninterrupted_one(
    stop_at, networks, number, uninterrupted, organs, tiny_recipe, trained, tmp_path, monkeypatch, state_of
):
    changes = {
        "kl": {"model.image_encoder_dropout": 0.2},
        "BatchNorm": {
            **TIMM,
            "model.image_encoder": "timm:test_efficientnet",
            "model.fusion": "multiscale",
        },
        "organs": {"data.dataset": str(organs), **VELOCITY, "objective.pixel_weight": 0.5},
        "joint": {
            "data.dataset": str(organs),
            "model.multiclass": "joint",
            "model.fusion": "attention",
            "objective.pixel_weight": 0.5,
        },
    }[networks]
    recipe = tiny_recipe({**RESUMED, **changes})
    if networks not in uninterrupted:
        uninterrupted[networks] = state_of(trained(recipe, tmp_path / "whole").run)

    with monkeypatch.context() as patch:
        rate = training.learning_rate_at

        def signalled(step, recipe):
            if step == stop_at:
                signal.raise_signal(number)
            return rate(step, recipe)

        patch.setattr(training, "learning_rate_at", signalled)
        with pytest.raises(
            Interrupted, match=f"stopped after step {stop_at}, and everything is saved"
        ) as stop:
            trained(recipe, tmp_path / "run")
    assert stop.value.exit_code == 128 + number
    root = tmp_path / "run"
    resumed = trained(recipe, root, resume=True)
    assert resumed.records[0].first_step == stop_at
    assert state_of(resumed.run) == uninterrupted[networks]


@pytest.mark.faults(19)
def test_a_run_stopped_at_every_step_equals_an_uninterrupted_one(
    tiny_recipe, trained, tmp_path, monkeypatch, state_of
):
    recipe = tiny_recipe({**RESUMED, "train.log_every": 4})
    whole = state_of(trained(recipe, tmp_path / "whole").run)
    rate = training.learning_rate_at

    def signalled(step, recipe):
        signal.raise_signal(signal.SIGTERM)
        return rate(step, recipe)

    with monkeypatch.context() as patch:
        patch.setattr(training, "learning_rate_at", signalled)
        for attempt in range(recipe.train.steps - 1):
            with pytest.raises(Interrupted):
                trained(recipe, tmp_path / "run", resume=attempt > 0)
    resumed = trained(recipe, tmp_path / "run", resume=True)
    assert state_of(resumed.run) == whole


@pytest.mark.faults
def test_a_resumed_run_with_kept_latents_equals_an_uninterrupted_one(tiny_recipe, trained, tmp_path, made):
    changes = filled({"model.autoencoder": "KL", "train.ema_scope": "all"}, made)
    whole = trained(tiny_recipe({**changes, "train.steps": 6}), tmp_path / "whole")
    trained(tiny_recipe({**changes, "train.steps": 3}), tmp_path / "run")
    resumed = trained(tiny_recipe({**changes, "train.steps": 6}), tmp_path / "run", resume=True)
    assert resumed.losses == whole.losses[3:]


def test_a_run_can_be_resumed_with_other_workers_and_parts(tiny_recipe, trained, tmp_path):
    whole = trained(tiny_recipe({"train.steps": 6}), tmp_path / "whole")
    trained(tiny_recipe({"train.steps": 3}), tmp_path / "run")
    resumed = trained(tiny_recipe({"train.steps": 6, "data.workers": 1}), tmp_path / "run", resume=True)
    assert resumed.losses == whole.losses[3:]


@pytest.mark.faults
def test_resuming_with_another_dataset_is_refused(tiny_recipe, trained, tmp_path):
    from sdseg_cli.commands.prepare import phantom

    trained(tiny_recipe(), tmp_path / "run")
    phantom(cases=6, size=32, seed=8, fractions="0.5,0.25,0.25", out=tmp_path / "other", workers=1)
    recipe = tiny_recipe({"data.dataset": str(tmp_path / "other"), "train.steps": 4})
    with pytest.raises(SdsegError, match="was trained on another dataset"):
        trained(recipe, tmp_path / "run", resume=True)


# Faults ---------------------------------------------------------------------------------------------


@pytest.mark.faults(28)
def test_ctrl_c_twice_ends_at_once(tiny_recipe, trained, tmp_path, monkeypatch):
    rate = training.learning_rate_at

    def impatient(step, recipe):
        if step == 3:
            # Asked as Python would ask it: a signal proper could end the process that runs the tests.
            ask = signal.getsignal(signal.SIGINT)
            ask(signal.SIGINT, None)
            ask(signal.SIGINT, None)
        return rate(step, recipe)

    monkeypatch.setattr(training, "learning_rate_at", impatient)
    recipe = tiny_recipe({"train.steps": 9, "train.checkpoint_every": 2})
    with pytest.raises(KeyboardInterrupt):
        trained(recipe, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    from sdseg_cli.core.run_directory import RunDirectory

    run = RunDirectory.open(tmp_path / "run")
    assert run.status == "interrupted"
    assert run.latest_checkpoint().name == "step-000002"


@pytest.mark.faults(20)
@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
            "tried to allocate 400000000000 bytes. Error code 12 (Cannot allocate memory)"
        ),
    ],
    ids=["gpu", "cpu"],
)
def test_out_of_memory_says_which_setting_to_change(problem, tiny_recipe, trained, tmp_path, monkeypatch):
    def too_much(*_):
        raise problem

    monkeypatch.setattr(learner, "diffusion_loss", too_much)
    with pytest.raises(OutOfMemoryError) as error:
        trained(tiny_recipe(), tmp_path / "run")
    assert "a part of 4 images" in str(error.value)
    assert "--set train.gradient_accumulation=2" in str(error.value)
    assert "--set train.gradient_checkpointing=true" in str(error.value)
    from sdseg_cli.core.run_directory import RunDirectory

    assert RunDirectory.open(tmp_path / "run").status == "failed"


@pytest.mark.faults
def test_out_of_memory_with_single_images_advises_something_that_helps(
    tiny_recipe, trained, tmp_path, monkeypatch
):
    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(learner, "diffusion_loss", too_much)
    recipe = tiny_recipe({"train.gradient_accumulation": 4, "train.gradient_checkpointing": True})
    with pytest.raises(OutOfMemoryError) as error:
        trained(recipe, tmp_path / "run")
    assert "gradient_accumulation=8" not in str(error.value)  # 4 images have no 8 parts
    assert "smaller" in str(error.value)


@pytest.mark.faults
def test_another_error_of_the_networks_is_not_taken_for_out_of_memory(
    tiny_recipe, trained, tmp_path, monkeypatch
):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(learner, "diffusion_loss", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trained(tiny_recipe(), tmp_path / "run")


@pytest.mark.faults
def test_a_training_that_diverges_says_so_and_keeps_the_last_checkpoint(
    tiny_recipe, trained, tmp_path, monkeypatch
):
    original = learner.diffusion_loss
    calls = itertools.count()

    def diverging(*args):
        parts = original(*args)
        if next(calls) >= 3:
            return type(parts)(parts.noise * float("nan"), parts.latent, parts.predicted_original)
        return parts

    monkeypatch.setattr(learner, "diffusion_loss", diverging)
    recipe = tiny_recipe({"train.steps": 9, "train.checkpoint_every": 2})
    with pytest.raises(SdsegError, match=r"the loss is nan at step 4; training has diverged.*step-000002"):
        trained(recipe, tmp_path / "run")


@pytest.mark.faults
def test_a_dataset_of_another_size_is_refused_with_both_remedies(tiny_recipe, trained, tmp_path):
    with pytest.raises(DataError, match=r"is prepared at 32 pixels.*asks for data.image_size 64") as error:
        trained(tiny_recipe({"data.image_size": 64}), tmp_path / "run")
    assert "--size 64" in str(error.value)
    assert "--set data.image_size=32" in str(error.value)


@pytest.mark.faults
def test_a_dataset_without_validation_cases_is_refused(tiny_recipe, trained, tmp_path):
    from sdseg_cli.commands.prepare import phantom

    phantom(cases=3, size=32, seed=0, fractions="1,0,0", out=tmp_path / "data", workers=1)
    with pytest.raises(DataError, match="has no validation cases"):
        trained(tiny_recipe({"data.dataset": str(tmp_path / "data")}), tmp_path / "run")


@pytest.mark.faults
def test_a_tracker_that_is_not_installed_is_refused_before_the_networks_are_built(
    tiny_recipe, trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(learner, "build_networks", lambda *_: pytest.fail("the networks were built"))
    with pytest.raises(UsageError, match=r"mlflow is not installed.*pip install mlflow"):
        trained(tiny_recipe({"train.trackers": ["mlflow"]}), tmp_path / "run")


@pytest.mark.faults
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_said_before_the_networks_are_built(tiny_recipe, tmp_path, monkeypatch):
    from sdseg_cli.core.run_directory import RunDirectory

    monkeypatch.setattr(learner, "build_networks", lambda *_: pytest.fail("the networks were built"))
    run = RunDirectory.create(tmp_path / "run", tiny_recipe())
    with pytest.raises(UsageError, match="PyTorch finds no GPU here"):
        list(training.train(tiny_recipe(), run, device="cuda"))


@pytest.mark.faults
@pytest.mark.parametrize("channels", [[32, 32, 32], [64, 32, 64], [64, 64, 32]])
def test_a_single_latent_pixel_that_cannot_be_normalised_is_refused(channels, tiny_recipe):
    with pytest.raises(UsageError, match="32 leaves a single latent pixel at the deepest of 3 levels"):
        tiny_recipe({"model.unet_channels": channels})


def test_no_shipped_objective_is_refused():
    assert not refusals(Recipe(name="a", data={"dataset": "b"}))
