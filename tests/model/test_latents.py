"""Masks to latents and back."""

import pytest
import torch
from diffusers import AutoencoderKL

from sdseg_cli.core.model.latents import (
    decode_latents,
    decode_logits,
    decode_scores,
    masks_per_latent,
    posterior,
    sample_latents,
    spatial_factor,
)
from sdseg_cli.core.model.mask_autoencoder import MaskAutoencoder


def tiny_kl(levels: int = 4) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(32,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    ).eval()


def tiny_mask() -> MaskAutoencoder:
    torch.manual_seed(0)
    return MaskAutoencoder(encoder_channels=(8, 8), decoder_channels=(8, 8)).eval()


MASKS = (torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) > 0.5).float()


@pytest.mark.parametrize("autoencoder", [tiny_kl(), tiny_mask()], ids=["kl", "mask"])
def test_a_latent_pixel_stands_for_eight_by_eight(autoencoder):
    assert spatial_factor(autoencoder) == 8
    with torch.no_grad():
        latents = posterior(autoencoder, MASKS).mean
        assert latents.shape == (2, 4, 4, 4)
        assert decode_scores(autoencoder, latents, 1.0).shape == (2, 1, 32, 32)


def test_the_factor_is_that_of_the_autoencoder():
    assert spatial_factor(tiny_kl(levels=3)) == 4


@pytest.mark.parametrize(("autoencoder", "channels"), [(tiny_kl(), 3), (tiny_mask(), 1)], ids=["kl", "mask"])
def test_a_mask_goes_in_as_minus_one_and_one_in_every_channel(autoencoder, channels):
    seen = []
    first = next(module for module in autoencoder.encoder.modules() if not list(module.children()))
    first.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        posterior(autoencoder, MASKS)
    assert torch.equal(seen[0], (MASKS * 2 - 1).expand(-1, channels, -1, -1))


def test_latents_are_mean_plus_std_times_the_given_noise_all_scaled():
    with torch.no_grad():
        distribution = posterior(tiny_kl(), MASKS)
        noise = torch.randn(2, 4, 4, 4)
        latents = sample_latents(distribution, noise, 0.125)
        assert torch.equal(latents, (distribution.mean + distribution.std * noise) * 0.125)
        assert torch.equal(sample_latents(distribution, noise * 0, 2.0), distribution.mean * 2)


def test_scores_are_the_mean_over_the_decoders_channels_of_the_unscaled_latent():
    autoencoder, latents = tiny_kl(), torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        decoded = autoencoder.decode(latents / 0.2).sample
        scores = decode_scores(autoencoder, latents, 0.2)
    assert decoded.shape[1] == 3
    assert torch.allclose(scores[:, 0], (decoded[:, 0] + decoded[:, 1] + decoded[:, 2]) / 3, atol=1e-6)


def test_probabilities_are_half_of_one_plus_the_score_within_zero_and_one():
    autoencoder, latents = tiny_kl(), torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        autoencoder.decoder.conv_out.weight.mul_(10)
        scores = decode_scores(autoencoder, latents, 1.0)
        probabilities = decode_latents(autoencoder, latents, 1.0)
    assert scores.abs().max() > 1
    assert torch.allclose(probabilities, ((scores + 1) / 2).clamp(0, 1))


def test_a_half_precision_autoencoder_gives_float32_scores():
    autoencoder = tiny_mask().to(torch.bfloat16)
    with torch.no_grad():
        assert posterior(autoencoder, MASKS).mean.dtype == torch.bfloat16
        assert decode_scores(autoencoder, torch.randn(2, 4, 4, 4), 1.0).dtype == torch.float32


# Log-odds for the loss on pixels


def test_log_odds_of_the_mask_autoencoder_are_its_logits():
    autoencoder, latents = tiny_mask(), torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        logits = decode_logits(autoencoder, latents, 0.5)
        assert torch.equal(logits, autoencoder.decode_logits(latents / 0.5))
        assert torch.allclose(logits.sigmoid(), decode_latents(autoencoder, latents, 0.5), atol=1e-6)


def test_log_odds_of_a_kl_autoencoder_are_those_of_its_probabilities_inside_its_range():
    autoencoder, latents = tiny_kl(), torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        autoencoder.decoder.conv_out.weight.mul_(0.5)
        assert decode_scores(autoencoder, latents, 1.0).abs().max() < 0.99
        logits = decode_logits(autoencoder, latents, 1.0)
        assert torch.allclose(logits.sigmoid(), decode_latents(autoencoder, latents, 1.0), atol=1e-6)


@pytest.mark.parametrize("autoencoder", [tiny_kl(), tiny_mask()], ids=["kl", "mask"])
def test_log_odds_keep_a_gradient_where_the_mask_is_certain(autoencoder):
    last = autoencoder.decoder.conv_out if isinstance(autoencoder, AutoencoderKL) else autoencoder.decoder[-2]
    with torch.no_grad():
        last.bias.fill_(20.0)  # inside the mask, whatever the latent says
    latents = torch.randn(2, 4, 4, 4, requires_grad=True)
    logits = decode_logits(autoencoder, latents, 1.0)
    assert logits.min() > 15
    logits.sum().backward()
    assert torch.isfinite(latents.grad).all()
    assert (latents.grad != 0).any()


def test_several_masks_lie_behind_one_another_in_a_latent_and_are_decoded_apart():
    autoencoder = MaskAutoencoder(encoder_channels=(8, 8), decoder_channels=(8, 8)).eval()
    masks = (torch.rand(2, 3, 32, 32) > 0.5).float()
    noise = torch.randn(2, 12, 4, 4)
    assert masks_per_latent(autoencoder, 12) == 3
    with torch.no_grad():
        together = sample_latents(posterior(autoencoder, masks), noise, 0.5)
        assert together.shape == (2, 12, 4, 4)
        for index in range(3):
            part = slice(4 * index, 4 * index + 4)
            alone = sample_latents(posterior(autoencoder, masks[:, index : index + 1]), noise[:, part], 0.5)
            assert torch.allclose(together[:, part], alone, atol=1e-6)
            for decode in (decode_scores, decode_logits, decode_latents):
                assert torch.allclose(
                    decode(autoencoder, together, 0.5)[:, index : index + 1],
                    decode(autoencoder, alone, 0.5),
                    atol=1e-6,
                )
