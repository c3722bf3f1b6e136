"""The small autoencoder of masks: its interface, and what the shipped one reconstructs."""

import numpy as np
import pytest
import torch

from sdseg_cli.core.model.latents import decode_latents, posterior, sample_latents
from sdseg_cli.core.model.mask_autoencoder import MaskAutoencoder
from sdseg_cli.core.model.weights import builtin_autoencoder_folder, load_autoencoder


def tiny(**changes) -> MaskAutoencoder:
    torch.manual_seed(0)
    return MaskAutoencoder(encoder_channels=(8, 8), decoder_channels=(8, 8), **changes).eval()


def discs(size: int = 256) -> torch.Tensor:
    """Discs of several sizes, a ring, a pair and a bar, (B, 1, S, S)."""
    y, x = np.mgrid[:size, :size] / size

    def disc(centre_x: float, centre_y: float, radius: float) -> np.ndarray:
        return np.hypot(x - centre_x, y - centre_y) < radius

    drawings = [
        disc(0.5, 0.5, 0.3),
        disc(0.2, 0.7, 0.08),
        disc(0.5, 0.5, 0.35) & ~disc(0.55, 0.5, 0.15),
        disc(0.3, 0.3, 0.12) | disc(0.7, 0.6, 0.2),
        (np.abs(x - y) < 0.06) & (x > 0.2),
        disc(0.0, 1.0, 0.4),
    ]
    return torch.from_numpy(np.stack(drawings)).float()[:, None]


def dice(prediction: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    prediction = (prediction > 0.5).float()
    overlap = (prediction * truth).sum(dim=(1, 2, 3))
    return 2 * overlap / (prediction.sum(dim=(1, 2, 3)) + truth.sum(dim=(1, 2, 3)))


@pytest.fixture(scope="module")
def builtin() -> MaskAutoencoder:
    return load_autoencoder("builtin")


# Interface


def test_it_answers_as_a_kl_autoencoder_does():
    autoencoder, masks = tiny(), torch.rand(2, 1, 40, 24) * 2 - 1
    with torch.no_grad():
        latents = autoencoder.encode(masks).latent_dist.mode()
        decoded = autoencoder.decode(latents).sample
    assert latents.shape == (2, 4, 5, 3)
    assert decoded.shape == (2, 1, 40, 24)
    assert decoded.abs().max() <= 1


def test_a_decoded_value_is_the_hyperbolic_tangent_of_half_the_logit():
    autoencoder, latents = tiny(), torch.randn(1, 4, 3, 3)
    with torch.no_grad():
        decoded = autoencoder.decode(latents).sample
        probability = torch.sigmoid(autoencoder.decode_logits(latents))
    assert torch.allclose((decoded + 1) / 2, probability, atol=1e-6)


def test_the_posterior_has_the_configured_standard_deviation_everywhere():
    with torch.no_grad():
        distribution = tiny(posterior_std=0.2).encode(torch.rand(1, 1, 16, 16)).latent_dist
    assert torch.allclose(distribution.std, torch.full((1, 4, 2, 2), 0.2))


def test_what_is_decoded_depends_on_the_neighbourhood_alone():
    autoencoder, latents = tiny(), torch.randn(1, 4, 16, 16)
    changed = latents.clone()
    changed[..., -1, -1] += 10
    with torch.no_grad():
        difference = (autoencoder.decode(latents).sample - autoencoder.decode(changed).sample).abs()
    assert difference[..., :32, :32].max() == 0
    assert difference[..., -8:, -8:].max() > 0


def test_it_survives_saving_and_loading(tmp_path):
    autoencoder, masks = tiny(posterior_std=0.1), torch.rand(1, 1, 16, 16)
    autoencoder.save_pretrained(tmp_path)
    loaded = load_autoencoder(str(tmp_path))
    assert isinstance(loaded, MaskAutoencoder)
    with torch.no_grad():
        before, after = (network.encode(masks).latent_dist.mean for network in (autoencoder, loaded))
    torch.testing.assert_close(before, after, rtol=0, atol=1e-5)
    assert loaded.config["posterior_std"] == 0.1


# The shipped one


def test_the_shipped_one_takes_at_most_5_mb():
    files = list(builtin_autoencoder_folder().rglob("*"))
    assert {file.name for file in files} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert sum(file.stat().st_size for file in files) <= 5e6


def test_the_shipped_one_is_frozen(builtin):
    assert not builtin.training
    assert not any(parameter.requires_grad for parameter in builtin.parameters())


def test_the_shipped_one_reconstructs_plain_shapes(builtin):
    truth = discs()
    with torch.no_grad():
        decoded = decode_latents(builtin, posterior(builtin, truth).mean, 1.0)
    assert dice(decoded, truth).min() > 0.985
    assert dice(decoded, truth).mean() > 0.993


def test_the_shipped_one_forgives_latent_noise_of_half_a_standard_deviation(builtin):
    truth = discs()
    with torch.no_grad():
        distribution = posterior(builtin, truth)
        spread = float(distribution.mean.std())
        noise = torch.randn(distribution.mean.shape, generator=torch.Generator().manual_seed(0))
        decoded = decode_latents(builtin, distribution.mean + 0.5 * spread * noise, 1.0)
    assert dice(decoded, truth).mean() > 0.98


def test_the_shipped_one_keeps_empty_and_full_masks(builtin):
    truth = torch.stack([torch.zeros(1, 64, 64), torch.ones(1, 64, 64)])
    with torch.no_grad():
        distribution = posterior(builtin, truth)
        decoded = decode_latents(builtin, sample_latents(distribution, torch.zeros(2, 4, 8, 8), 1.0), 1.0)
    assert decoded[0].max() < 0.5
    assert decoded[1].min() > 0.5


def test_the_shipped_scaling_factor_brings_latents_to_about_unit_spread(builtin):
    with torch.no_grad():
        spread = float(posterior(builtin, discs()).mean.std() * builtin.config["scaling_factor"])
    assert 0.5 < spread < 2
