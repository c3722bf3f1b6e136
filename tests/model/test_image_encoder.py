"""Image encoders: strides, levels, dropout, backbones with and without BatchNorm."""

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from sdseg_cli.core.model.image_encoder import KLImageEncoder, TimmImageEncoder

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def tiny_kl(**changes) -> KLImageEncoder:
    torch.manual_seed(0)
    return KLImageEncoder(**{"channels": (32, 32, 32, 32), "blocks": 1, **changes}).eval()


def tiny_timm(name: str = "test_resnet", **changes) -> TimmImageEncoder:
    torch.manual_seed(0)
    return TimmImageEncoder(name, pyramid_channels=16, **changes).eval()


def has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, nn.BatchNorm2d) for part in module.modules())


@pytest.mark.parametrize("make", [tiny_kl, tiny_timm])
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_outputs_begin_at_stride_8_and_halve_at_every_level(make, levels):
    with torch.no_grad():
        features = make(levels=levels, conditioning_channels=5)(IMAGES)
    assert [tuple(map_.shape) for map_ in features] == [
        (2, 5, max(8 >> i, 1), max(8 >> i, 1)) for i in range(levels)
    ]


@pytest.mark.parametrize("make", [tiny_kl, tiny_timm])
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_every_weight_gets_a_gradient(make, levels):
    encoder = make(levels=levels).train()
    sum(map_.square().mean() for map_ in encoder(IMAGES)).backward()
    without = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
    assert without == []


@pytest.mark.parametrize("make", [tiny_kl, tiny_timm])
def test_an_encoder_survives_saving_and_loading(make, tmp_path):
    encoder = make(levels=2, conditioning_channels=6)
    encoder.save_pretrained(tmp_path)
    loaded = type(encoder).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        for saved, again in zip(encoder(IMAGES), loaded(IMAGES), strict=True):
            torch.testing.assert_close(saved, again, rtol=0, atol=1e-5)


# KL


def test_the_first_output_is_the_same_for_one_level_and_for_several():
    one, several = tiny_kl(levels=1), tiny_kl(levels=3)
    several.load_state_dict(one.state_dict(), strict=False)
    with torch.no_grad():
        assert torch.allclose(one(IMAGES)[0], several(IMAGES)[0], atol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.35])
def test_dropout_is_set_in_every_residual_block(rate):
    blocks = [
        module for module in tiny_kl(dropout=rate, levels=3).modules() if isinstance(module, ResnetBlock2D)
    ]
    assert len(blocks) == 4 + 2 + 2  # one per stride, two in the middle, one per further level
    assert {block.dropout.p for block in blocks} == {rate}


def test_dropout_acts_in_training_and_not_in_prediction():
    encoder = tiny_kl(dropout=0.5)
    with torch.no_grad():
        assert torch.equal(encoder(IMAGES)[0], encoder(IMAGES)[0])
        encoder.train()
        assert not torch.equal(encoder(IMAGES)[0], encoder(IMAGES)[0])


def test_the_papers_dropout_is_the_default_and_is_in_the_configuration():
    assert tiny_kl().config["dropout"] == 0.2


@pytest.mark.parametrize("levels", [1, 3])
def test_recomputing_activations_changes_no_gradient(levels):
    plain, thrifty = tiny_kl(levels=levels, dropout=0.0), tiny_kl(levels=levels, dropout=0.0)
    thrifty.enable_gradient_checkpointing()
    for encoder in (plain, thrifty):
        sum(map_.square().mean() for map_ in encoder.train()(IMAGES)).backward()
    for (name, a), b in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name


# timm


def test_a_backbone_without_batch_norm_gives_an_image_its_features_whatever_is_beside_it():
    encoder = tiny_timm("test_convnext", levels=3).train()
    assert not has_batch_norm(encoder)
    with torch.no_grad():
        together, alone = encoder(IMAGES), encoder(IMAGES[:1])
    for several, one in zip(together, alone, strict=True):
        assert torch.allclose(several[:1], one, atol=1e-5)


def test_a_backbone_with_batch_norm_keeps_its_statistics_when_saved(tmp_path):
    encoder = tiny_timm("test_resnet").train()
    assert has_batch_norm(encoder)
    for _ in range(3):
        encoder(IMAGES)
    encoder.eval().save_pretrained(tmp_path)
    loaded = TimmImageEncoder.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder(IMAGES)[0], loaded(IMAGES)[0], rtol=0, atol=1e-5)


def test_deeper_levels_reach_the_first_through_the_pyramid():
    encoder = tiny_timm(levels=1)
    deepest = encoder.backbone.feature_info.channels()[-1]
    with torch.no_grad():
        before = encoder(IMAGES)[0]
        inner = encoder.pyramid.inner_blocks[-1][0]
        assert inner.weight.shape[1] == deepest
        inner.weight.add_(0.1)
        assert not torch.allclose(before, encoder(IMAGES)[0], atol=1e-4)


def test_images_are_standardised_as_the_backbone_was_trained():
    encoder = tiny_timm()
    seen = []
    encoder.backbone.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        encoder(torch.ones(1, 3, 64, 64))
    mean, std = (torch.tensor(encoder.backbone.pretrained_cfg[key]) for key in ("mean", "std"))
    assert torch.allclose(seen[0][0, :, 0, 0], (1 - mean) / std)


@pytest.mark.faults
def test_a_backbone_without_features_at_stride_8_is_refused():
    with pytest.raises(ValueError, match=r"test_vit.* has features at strides .* needed are 8, 16"):
        tiny_timm("test_vit")
