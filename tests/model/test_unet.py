"""The denoiser: the paper's size, its constant head count, its attention and its two fusions."""

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention

from sdseg_cli.core.model.image_encoder import KLImageEncoder
from sdseg_cli.core.model.unet import SDSegUNet


def tiny(**changes) -> SDSegUNet:
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "channels": (32, 64, 64),
        "blocks": 1,
        "heads": 4,
        "attention_strides": (1, 2),
        "dropout": 0.0,
    }
    return SDSegUNet(**{**settings, **changes}).eval()


def inputs(levels: int = 3, channels: int = 4, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    conditioning = [torch.randn(2, channels, 8 >> i, 8 >> i, generator=generator) for i in range(levels)]
    return noisy, torch.tensor([999, 3]), conditioning


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def attentions(unet: SDSegUNet) -> dict[str, Attention]:
    return {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}


# Size


def test_the_default_has_exactly_the_weights_of_the_papers_unet():
    with torch.device("meta"):
        assert count(SDSegUNet()) == 294_973_828


def test_the_default_image_encoder_has_exactly_the_weights_of_the_papers():
    with torch.device("meta"):
        assert count(KLImageEncoder()) == 34_163_628


def test_a_kl_f8_autoencoder_has_exactly_the_weights_of_the_papers():
    with torch.device("meta"):
        autoencoder = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    assert count(autoencoder) == 83_653_863


def test_every_row_of_a_class_embedding_adds_one_time_embedding():
    with torch.device("meta"):
        assert count(SDSegUNet(num_class_embeds=14)) == 294_973_828 + 14 * 4 * 192


# Heads and attention


def test_every_attention_has_the_same_head_count_and_its_own_head_width():
    for name, attention in attentions(tiny(heads=8)).items():
        assert attention.heads == 8, name
        assert attention.scale == pytest.approx((attention.inner_dim / 8) ** -0.5), name
    assert len({attention.inner_dim for attention in attentions(tiny()).values()}) == 2


def test_the_head_count_survives_saving_and_loading(tmp_path):
    unet = tiny(heads=8)
    unet.save_pretrained(tmp_path)
    loaded = SDSegUNet.from_pretrained(tmp_path).eval()
    assert {attention.heads for attention in attentions(loaded).values()} == {8}
    assert loaded.config["heads"] == 8
    with torch.no_grad():
        torch.testing.assert_close(loaded(*inputs()), unet(*inputs()), rtol=0, atol=1e-5)


def test_the_head_count_changes_the_output_and_not_the_weights():
    few, many = tiny(heads=1), tiny(heads=8)
    assert all(torch.equal(a, b) for a, b in zip(few.parameters(), many.parameters(), strict=True))
    with torch.no_grad():
        assert not torch.allclose(few(*inputs()), many(*inputs()), atol=1e-4)


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        ((), set()),
        ((1,), {"down_blocks.0", "up_blocks.2", "mid_block"}),
        ((2, 4), {"down_blocks.1", "down_blocks.2", "up_blocks.0", "up_blocks.1", "mid_block"}),
    ],
)
def test_attention_sits_at_the_strides_asked_for_and_in_the_middle(strides, expected):
    unet = tiny(attention_strides=strides)
    assert {name.split(".attentions")[0] for name in attentions(unet)} == expected
    with torch.no_grad():
        assert unet(*inputs()).shape == (2, 4, 8, 8)


def test_resampling_is_done_by_residual_blocks_at_every_level():
    unet = tiny(attention_strides=())
    names = {name.rsplit(".", 1)[0] for name, _ in unet.named_parameters()}
    for sampler in (
        "down_blocks.0.downsamplers.0",
        "down_blocks.1.downsamplers.0",
        "up_blocks.0.upsamplers.0",
    ):
        assert f"{sampler}.conv1" in names
        assert f"{sampler}.time_emb_proj" in names


def test_dropout_is_in_every_residual_block_and_acts_in_training_only():
    unet = tiny(dropout=0.5)
    rates = [module.p for name, module in unet.named_modules() if name.endswith("dropout")]
    assert rates
    assert set(rates) == {0.5}
    with torch.no_grad():
        assert torch.equal(unet(*inputs()), unet(*inputs()))
        unet.train()
        assert not torch.equal(unet(*inputs()), unet(*inputs()))


# Inputs


def test_the_time_and_the_conditioning_and_the_latent_each_change_the_output():
    unet = tiny()
    noisy, timestep, conditioning = inputs()
    with torch.no_grad():
        output = unet(noisy, timestep, conditioning)
        assert not torch.allclose(output, unet(noisy, timestep - 3, conditioning), atol=1e-5)
        assert not torch.allclose(output, unet(noisy, timestep, [conditioning[0] + 1]), atol=1e-5)
        assert not torch.allclose(output, unet(noisy + 1, timestep, conditioning), atol=1e-5)


def test_the_noisy_latent_comes_before_the_conditioning():
    unet = tiny()
    noisy, _, conditioning = inputs()
    seen = []
    unet.conv_in.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        unet(noisy, torch.tensor([5, 5]), conditioning)
    assert torch.equal(seen[0], torch.cat([noisy, conditioning[0]], dim=1))


def test_classes_change_the_output():
    unet = tiny(num_class_embeds=3)
    noisy, timestep, conditioning = inputs()
    with torch.no_grad():
        outputs = [unet(noisy, timestep, conditioning, torch.full((2,), index)) for index in range(3)]
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert not torch.allclose(outputs[1], outputs[2], atol=1e-5)


# Fusion


def test_input_fusion_reads_the_finest_features_only():
    unet = tiny(fusion="input")
    noisy, timestep, conditioning = inputs()
    with torch.no_grad():
        assert torch.equal(unet(noisy, timestep, conditioning), unet(noisy, timestep, conditioning[:1]))


def test_multiscale_fusion_begins_as_the_identity_on_the_hidden_state():
    unet = tiny(fusion="multiscale")
    hidden, features = torch.randn(1, 32, 4, 4), torch.zeros(1, 4, 4, 4)
    with torch.no_grad():
        assert torch.allclose(unet.fusions[0](hidden, features), hidden, atol=1e-6)


@pytest.mark.parametrize("level", [1, 2])
def test_multiscale_fusion_uses_the_features_of_every_deeper_level(level):
    unet = tiny(fusion="multiscale")
    noisy, timestep, conditioning = inputs()
    changed = [features + (i == level) for i, features in enumerate(conditioning)]
    with torch.no_grad():
        difference = unet(noisy, timestep, conditioning) - unet(noisy, timestep, changed)
    assert difference.abs().max() > 1e-3


def test_multiscale_fusion_sends_a_gradient_to_the_features_of_every_level():
    unet = tiny(fusion="multiscale")
    noisy, timestep, conditioning = inputs()
    for features in conditioning:
        features.requires_grad_()
    unet(noisy, timestep, conditioning).square().mean().backward()
    assert all(features.grad.abs().max() > 0 for features in conditioning)


def test_multiscale_fusion_survives_saving_and_loading(tmp_path):
    unet = tiny(fusion="multiscale", conditioning_channels=7)
    unet.save_pretrained(tmp_path)
    loaded = SDSegUNet.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(*inputs(channels=7)), unet(*inputs(channels=7)), rtol=0, atol=1e-5)


def test_recomputing_activations_changes_neither_output_nor_gradient():
    plain, thrifty = tiny(fusion="multiscale").train(), tiny(fusion="multiscale").train()
    thrifty.enable_gradient_checkpointing()
    for unet in (plain, thrifty):
        unet(*inputs()).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name
