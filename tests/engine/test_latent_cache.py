"""Posteriors that are kept are those that the autoencoder gives."""

import torch

from sdseg_cli.core.engine.latent_cache import LatentCache, as_distribution, bytes_of_all
from sdseg_cli.core.model.latents import posterior, sample_latents
from sdseg_cli.core.model.mask_autoencoder import MaskAutoencoder

CPU = torch.device("cpu")


def masks(count: int) -> torch.Tensor:
    return (torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.5).float()


def make() -> MaskAutoencoder:
    torch.manual_seed(0)
    return MaskAutoencoder(encoder_channels=(8, 8), decoder_channels=(8, 8)).eval().requires_grad_(False)


def test_samples_are_those_of_the_autoencoder_in_the_order_asked_for():
    autoencoder, some = make(), masks(3)
    cache = LatentCache(autoencoder)
    cache(some[[1, 0]], CPU)
    asked = some[[0, 2, 1, 0]]
    noise = torch.randn(4, 4, 2, 2)
    found = sample_latents(as_distribution(cache(asked, CPU)), noise, 0.5)
    torch.testing.assert_close(found, sample_latents(posterior(autoencoder, asked), noise, 0.5))
    assert len(cache) == 3


def test_a_mask_is_encoded_once(monkeypatch):
    autoencoder, some = make(), masks(2)
    counted = []
    encode = autoencoder.encode
    monkeypatch.setattr(autoencoder, "encode", lambda x: (counted.append(len(x)), encode(x))[1])
    cache = LatentCache(autoencoder)
    for _ in range(3):
        cache(some, CPU)
    cache(some.flip(-1), CPU)
    assert counted == [1, 1, 1, 1]


def test_a_latent_does_not_depend_on_its_neighbours_to_the_last_bit():
    autoencoder, some = make(), masks(5)
    together = LatentCache(autoencoder)(some, CPU)
    alone = torch.cat([LatentCache(autoencoder)(some[i : i + 1], CPU) for i in range(5)])
    assert torch.equal(together, alone)


def test_the_size_of_all_latents_is_known_before():
    assert bytes_of_all(800, (4, 32, 32)) == 800 * 4 * 8 * 1024 * 4
