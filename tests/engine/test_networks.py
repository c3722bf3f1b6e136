"""From the words of a recipe to networks."""

from __future__ import annotations

import pytest
import torch

from sdseg_cli.core.engine.inference import choose_device, choose_precision
from sdseg_cli.core.engine.networks import TrainableNetwork, build_networks, predicts_noise
from sdseg_cli.core.errors import UsageError

TIMM = {
    "model.image_encoder_channels": [128, 256, 512, 512],
    "model.image_encoder_blocks": 2,
    "model.image_encoder_dropout": 0.2,
}
SAMPLE = {"objective.prediction": "sample", "objective.latent_weight": 0.0}
OFF = {"objective.diffusion": "off", "objective.pixel_weight": 1.0}


@pytest.mark.faults
@pytest.mark.parametrize("objective", [{}, OFF], ids=["diffusion", "baseline"])
@pytest.mark.parametrize("name", ["resnet9000", "vit_tiny_patch16_224"])
def test_a_backbone_that_cannot_serve_is_refused_by_name(name, objective, tiny_recipe):
    recipe = tiny_recipe({**TIMM, **objective, "model.image_encoder": f"timm:{name}"})
    with pytest.raises(UsageError, match=f"model.image_encoder: .*{name}"):
        build_networks(recipe, 2)


@pytest.mark.faults
def test_a_backbone_that_cannot_recompute_its_activations_is_refused_with_a_remedy(tiny_recipe, monkeypatch):
    recipe = tiny_recipe({**TIMM, "model.image_encoder": "timm:test_efficientnet_gn"})
    networks = build_networks(recipe, 2)

    def unable(enable):
        raise AssertionError("gradient checkpointing not supported")

    monkeypatch.setattr(networks.image_encoder.backbone, "set_grad_checkpointing", unable)
    with pytest.raises(UsageError, match=r"--set train\.gradient_checkpointing=false"):
        TrainableNetwork(networks, freeze_image_encoder=False, recompute=True)


def test_a_predicted_noise_is_computed_in_fp32_unless_told_otherwise(tiny_recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    gpu = torch.device("cuda")
    noise, clean, off = (
        predicts_noise(tiny_recipe(changes))
        for changes in ({}, SAMPLE, {**TIMM, **OFF, "model.image_encoder": "timm:test_efficientnet_gn"})
    )
    assert (noise, clean, off) == (True, False, False)
    assert choose_precision("auto", gpu, predicts_noise=noise) == "fp32"
    assert choose_precision("bf16", gpu, predicts_noise=noise) == "bf16"
    assert choose_precision("auto", gpu, predicts_noise=clean) == "bf16"


@pytest.mark.parametrize(
    ("num_classes", "multiclass", "rows", "channels"),
    [(2, "class_conditional", None, 4), (5, "class_conditional", 5, 4), (5, "joint", None, 16)],
)
def test_several_classes_are_a_class_embedding_or_latents_side_by_side(
    num_classes, multiclass, rows, channels, tiny_recipe
):
    unet = build_networks(tiny_recipe({"model.multiclass": multiclass}), num_classes).unet
    assert unet.config["num_class_embeds"] == rows
    assert unet.config["latent_channels"] == channels
    assert unet.conv_in.in_channels == channels + 4


@pytest.mark.faults
@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an Apple GPU here")
def test_an_apple_gpu_that_is_not_there_is_said():
    with pytest.raises(UsageError, match="--device mps: PyTorch finds no Apple GPU here"):
        choose_device("mps")
