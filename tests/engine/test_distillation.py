"""The distilled decoder: it learns to agree with the full one, and stands in its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdseg_cli.commands.autoencoder import autoencoder as command
from sdseg_cli.core.engine.distillation import agreement, ask_teacher, make_mask_decoder, train_mask_decoder
from sdseg_cli.core.engine.inference import load_predictor
from sdseg_cli.core.errors import ModelError, UsageError
from sdseg_cli.core.model.image_encoder import KLImageEncoder
from sdseg_cli.core.model.latents import decode_latents, decode_logits, posterior, spatial_factor
from sdseg_cli.core.model.mask_autoencoder import MaskAutoencoder
from sdseg_cli.core.model.mask_decoder import MaskDecoder, fingerprint
from sdseg_cli.core.model.pipeline import SDSegPipeline
from sdseg_cli.core.model.schedule import make_scheduler
from sdseg_cli.core.model.unet import SDSegUNet
from sdseg_cli.core.run_directory import resolve_model
from tests.small_models import small_kl

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kl")
    small_kl().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pipeline on that KL autoencoder."""
    torch.manual_seed(1)
    pipeline = SDSegPipeline(
        unet=SDSegUNet(sample_size=4, channels=(32,), blocks=1, heads=4, attention_strides=()),
        image_encoder=KLImageEncoder(channels=(32, 32, 32, 32), blocks=1),
        autoencoder=small_kl(),
        scheduler=make_scheduler("sample"),
        image_size=32,
    )
    folder = tmp_path_factory.mktemp("model")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(kl, tmp_path_factory):
    """What the command makes in a few steps."""
    out = tmp_path_factory.mktemp("small") / "decoder"
    command(out=out, distill=str(kl), steps=3, batch_size=2, masks=16, size=64, crop=64, device="cpu")
    return out


def squares(count: int, size: int = 32) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    found = []
    for _ in range(count):
        mask = np.zeros((size, size), np.uint8)
        top, left = draw.integers(0, size // 2, 2)
        mask[top : top + size // 2, left : left + size // 2] = 1
        found.append(mask)
    return found


def test_it_learns_what_the_full_decoder_makes_of_the_latents_of_masks():
    masks = squares(24)
    teacher = small_kl()
    with torch.no_grad():  # one whose answers are no mask that it was given, as an untrained one's are not
        teacher.decoder.conv_out.weight.mul_(20)
    answers = ask_teacher(teacher, masks, seed=0, device=CPU)
    latents, wanted = (torch.stack(column) for column in zip(*answers, strict=True))
    assert latents.shape == (24, 4, 4, 4)
    assert (wanted.shape, wanted.dtype) == ((24, 32, 32), torch.float16)
    decoder = make_mask_decoder(teacher, latents, (16, 32))
    before = agreement(decoder, teacher, masks, device=CPU)[0].mean()
    options = {"steps": 60, "batch_size": 8, "learning_rate": 5e-3, "seed": 0, "device": CPU}
    reports = list(train_mask_decoder(decoder, latents, wanted, report_every=20, **options))
    assert [report.step for report in reports] == [20, 40, 60]
    with_full, with_truth = (scores.mean() for scores in agreement(decoder, teacher, masks, device=CPU))
    assert with_full > before + 0.1
    assert with_full > with_truth + 0.1


def test_every_second_latent_it_learns_from_is_exact_and_the_others_lie_between_masks_with_noise():
    masks, teacher = squares(10), small_kl()
    latents, wanted = zip(*ask_teacher(teacher, masks, seed=3, device=CPU), strict=True)
    exact = posterior(teacher, torch.from_numpy(np.stack(masks)).float().unsqueeze(1)).mode()
    for index, (latent, said) in enumerate(zip(latents, wanted, strict=True)):
        assert torch.allclose(latent, exact[index], atol=1e-5) is (index % 2 == 0)
        decoded = decode_latents(teacher, latent.unsqueeze(0), scale=1.0)[0, 0]
        assert torch.allclose(said.float(), decoded, atol=2e-3)  # what the full decoder says of this very one
    quiet, _ = zip(*ask_teacher(teacher, masks, seed=3, device=CPU, max_latent_noise=0), strict=True)
    low, high = exact[:4].amin(dim=0) - 1e-5, exact[:4].amax(dim=0) + 1e-5
    assert all(bool(((latent >= low) & (latent <= high)).all()) for latent in quiet[1:4:2])
    assert not torch.equal(quiet[1], latents[1])
    again, _ = zip(*ask_teacher(teacher, masks, seed=3, device=CPU), strict=True)
    other, _ = zip(*ask_teacher(teacher, masks, seed=4, device=CPU), strict=True)
    assert torch.equal(torch.stack(again), torch.stack(latents))
    assert not torch.equal(other[1], latents[1])


def test_the_command_makes_a_decoder_that_a_prediction_can_use(small, model):
    plain = load_predictor(resolve_model(str(model)), device="cpu")
    swapped = load_predictor(resolve_model(str(model)), device="cpu", decoder=str(small))
    assert isinstance(swapped.pipeline.autoencoder, MaskDecoder)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    found = swapped.pipeline(image).probabilities[0]
    assert found.shape == (2, 32, 32)
    assert not np.array_equal(found, plain.pipeline(image).probabilities[0])
    assert len(swapped.pipeline.computing_networks()) == 3


def test_it_is_written_as_it_was_trained_and_reads_unscaled_latents(small):
    decoder = MaskDecoder.from_pretrained(small).eval()
    assert decoder.config["made_for"] == fingerprint(small_kl())
    assert decoder.config["latent_std"] > 0
    assert spatial_factor(decoder) == 8
    latents = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        score = decoder.decode(latents / 0.5).sample
        torch.testing.assert_close(decode_latents(decoder, latents, 0.5), (score + 1) / 2)
        torch.testing.assert_close(torch.tanh(decode_logits(decoder, latents, 0.5) / 2), score)


def test_a_copy_at_half_size_has_the_same_fingerprint_and_other_weights_another():
    assert fingerprint(small_kl().half()) == fingerprint(small_kl())
    assert fingerprint(small_kl(1)) != fingerprint(small_kl())


@pytest.mark.faults
def test_a_decoder_of_another_autoencoder_is_refused(small, model, tmp_path):
    decoder = MaskDecoder.from_pretrained(small)
    decoder.register_to_config(made_for=fingerprint(small_kl(1)))
    decoder.save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="was made for another KL autoencoder"):
        load_predictor(resolve_model(str(model)), device="cpu", decoder=str(tmp_path / "other"))


@pytest.mark.faults
def test_what_is_no_decoder_is_refused_with_the_command_that_makes_one(kl, model, tmp_path):
    MaskAutoencoder().save_pretrained(tmp_path / "mask")
    for folder in (kl, tmp_path / "mask", tmp_path / "nothing"):
        with pytest.raises(UsageError, match="sdseg autoencoder --distill KL"):
            load_predictor(resolve_model(str(model)), device="cpu", decoder=str(folder))


@pytest.mark.faults
def test_what_is_no_kl_autoencoder_is_refused_before_any_work(tmp_path):
    MaskAutoencoder().save_pretrained(tmp_path / "mask")
    with pytest.raises(ModelError, match="holds no KL autoencoder"):
        command(
            out=tmp_path / "out", distill=str(tmp_path / "mask"), masks=16, size=64, crop=64, device="cpu"
        )
    assert not (tmp_path / "out").exists()
