"""The pipeline: saving, noise, samples, classes, steps, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image

from sdseg_cli.core.errors import ModelError
from sdseg_cli.core.grid import Grid
from sdseg_cli.core.model.image_encoder import KLImageEncoder, TimmImageEncoder
from sdseg_cli.core.model.mask_autoencoder import MaskAutoencoder
from sdseg_cli.core.model.pipeline import (
    SDSegPipeline,
    draw_overlaps,
    mirrored_axes,
    probabilities_to_labels,
    scores_to_probabilities,
)
from sdseg_cli.core.model.plain_unet import PlainUNet
from sdseg_cli.core.model.schedule import make_scheduler
from sdseg_cli.core.model.unet import SDSegUNet
from sdseg_cli.core.model.weights import load_pipeline, refer_to_autoencoder

SIZE = 32
# Of probabilities: tensors read from a file lie elsewhere in memory, and arithmetic depends on where.
SAME = 1e-5
ORGANS = ("background", "liver", "kidney", "spleen")


def make(
    classes=("background", "polyp"),
    *,
    encoder: str = "kl",
    fusion: str = "input",
    prediction="epsilon",
    joint: bool = False,
    **config,
) -> SDSegPipeline:
    torch.manual_seed(0)
    levels = 2 if fusion == "multiscale" else 1
    image_encoder = (
        KLImageEncoder(channels=(32, 32, 32, 32), blocks=1, levels=levels)
        if encoder == "kl"
        else TimmImageEncoder(encoder, levels=levels, pyramid_channels=16)
    )
    unet = SDSegUNet(
        sample_size=SIZE // 8,
        channels=(32, 64),
        blocks=1,
        heads=4,
        attention_strides=(2,),
        fusion=fusion,
        latent_channels=4 * (len(classes) - 1) if joint else 4,
        num_class_embeds=len(classes) if len(classes) > 2 and not joint else None,
    )
    with torch.no_grad():  # outputs that depend visibly on everything
        unet.conv_out.weight.mul_(3)
    pipeline = SDSegPipeline(
        unet=unet,
        image_encoder=image_encoder,
        autoencoder=MaskAutoencoder(encoder_channels=(8, 8), decoder_channels=(8, 8)),
        scheduler=make_scheduler(prediction),
        classes=classes,
        image_size=SIZE,
        latent_scale=config.pop("latent_scale", 5.0),  # keeps the scores off the ends of their range
        **config,
    )
    for component in (unet, image_encoder, pipeline.autoencoder):
        component.eval()
    return pipeline


def pictures(count: int, height: int = SIZE, width: int = SIZE, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(count)]


@pytest.fixture(scope="module")
def binary() -> SDSegPipeline:
    return make()


@pytest.fixture(scope="module")
def organs() -> SDSegPipeline:
    return make(ORGANS)


@pytest.fixture(scope="module")
def joint() -> SDSegPipeline:
    return make(ORGANS, joint=True)


# Saving and loading


@pytest.mark.parametrize(
    ("encoder", "fusion", "prediction"),
    [
        ("kl", "input", "epsilon"),
        ("kl", "multiscale", "sample"),
        ("kl", "attention", "epsilon"),
        ("test_resnet", "multiscale", "velocity"),
    ],
)
def test_a_saved_pipeline_predicts_the_same_when_loaded(encoder, fusion, prediction, tmp_path):
    pipeline = make(encoder=encoder, fusion=fusion, prediction=prediction)
    pipeline.save_pretrained(tmp_path)
    loaded = SDSegPipeline.from_pretrained(tmp_path)
    before, after = (pipe(pictures(2), seed=3).probabilities for pipe in (pipeline, loaded))
    np.testing.assert_allclose(before, after, rtol=0, atol=SAME)
    for name in ("unet", "image_encoder", "autoencoder"):
        own, other = (getattr(pipe, name).state_dict() for pipe in (pipeline, loaded))
        assert all(torch.equal(own[key], other[key]) for key in own)
    assert loaded.scheduler.config["prediction_type"] == pipeline.scheduler.config["prediction_type"]


def test_what_a_pipeline_knows_is_saved_with_it(tmp_path):
    training_data = {"name": "clinic", "fingerprint": "abc"}
    make(
        ORGANS, latent_scale=0.125, resize="pad", noise="zeros", training_data=training_data
    ).save_pretrained(tmp_path)
    loaded = load_pipeline(str(tmp_path))
    assert loaded.classes == ORGANS
    assert loaded.num_classes == 4
    assert dict(loaded.config.training_data) == training_data
    assert (loaded.config.image_size, loaded.config.resize) == (SIZE, "pad")
    assert (loaded.config.latent_scale, loaded.config.noise) == (0.125, "zeros")


@pytest.fixture
def referring(tmp_path) -> tuple[SDSegPipeline, Path, Path]:
    """A pipeline, the folder of a model that refers to its autoencoder, and the folder of the latter."""
    pipeline = make()
    pipeline.autoencoder.save_pretrained(tmp_path / "weights")
    reference = refer_to_autoencoder(str(tmp_path / "weights"), pipeline.autoencoder)
    pipeline.register_to_config(autoencoder_reference=reference)
    pipeline.save_pretrained(tmp_path / "model")
    return pipeline, tmp_path / "model", tmp_path / "weights"


def test_an_autoencoder_that_is_referred_to_is_not_saved_and_found_again(referring):
    pipeline, model, _ = referring
    assert pipeline.autoencoder is not None
    assert not (model / "autoencoder").exists()
    for loaded in (SDSegPipeline.from_pretrained(model), load_pipeline(str(model))):
        before, after = (pipe(pictures(2), seed=3).probabilities for pipe in (pipeline, loaded))
        assert np.allclose(before, after, atol=1e-6)


@pytest.mark.faults
def test_an_autoencoder_that_is_gone_or_another_one_is_named_with_the_remedy(referring):
    _, model, weights = referring
    weights.rename(weights.with_name("moved"))
    with pytest.raises(ModelError, match=rf"refers to {weights}, which cannot be read\. Put it back"):
        load_pipeline(str(model))
    torch.manual_seed(7)
    MaskAutoencoder(encoder_channels=(8, 8), decoder_channels=(8, 8)).save_pretrained(weights)
    with pytest.raises(ModelError, match=r"its tensors differ\..*embed_autoencoder=true"):
        load_pipeline(str(model))


@pytest.mark.parametrize(("copied", "full", "half"), [(True, 1.7e9, 0.85e9), (False, 1.4e9, 0.7e9)])
def test_the_papers_model_is_as_small_as_promised(copied, full, half):
    with torch.device("meta"):
        parts = [SDSegUNet(), KLImageEncoder()]
        if copied:
            parts.append(
                AutoencoderKL(
                    block_out_channels=(128, 256, 512, 512),
                    down_block_types=("DownEncoderBlock2D",) * 4,
                    up_block_types=("UpDecoderBlock2D",) * 4,
                    layers_per_block=2,
                )
            )
    weights = sum(tensor.numel() for part in parts for tensor in part.state_dict().values())
    assert 4 * weights < full
    assert 2 * weights < half


def test_components_carry_their_documented_names(binary):
    assert set(binary.components) >= {"autoencoder", "image_encoder", "unet", "scheduler"}


def test_a_loaded_pipeline_is_frozen_and_in_evaluation_mode(binary, tmp_path):
    binary.save_pretrained(tmp_path)
    for component in load_pipeline(str(tmp_path)).components.values():
        if isinstance(component, torch.nn.Module):
            assert not component.training
            assert not any(parameter.requires_grad for parameter in component.parameters())


def test_a_hub_id_is_read_from_the_filled_cache_without_a_network(binary, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--clinic--polyps" / "snapshots" / ("0" * 40)
    binary.save_pretrained(snapshot)
    refs = tmp_path / "models--clinic--polyps" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    loaded = SDSegPipeline.from_pretrained("clinic/polyps", cache_dir=tmp_path, local_files_only=True)
    again, before = (pipe(pictures(1)).probabilities for pipe in (loaded, binary))
    np.testing.assert_allclose(again, before, rtol=0, atol=SAME)


def test_diffusers_own_loader_finds_the_pipelines_parts(binary, tmp_path):
    binary.save_pretrained(tmp_path)
    with pytest.raises(Exception, match="SDSegPipeline"):  # it is told the name, not where the class is
        DiffusionPipeline.from_pretrained(tmp_path)
    assert type(SDSegPipeline.from_pretrained(tmp_path).unet) is SDSegUNet


def test_a_plain_unet_needs_no_other_component(tmp_path):
    torch.manual_seed(0)
    pipeline = SDSegPipeline(unet=PlainUNet("test_resnet", 4).eval(), classes=ORGANS, image_size=SIZE)
    assert not pipeline.is_diffusion
    pipeline.save_pretrained(tmp_path)
    loaded = load_pipeline(str(tmp_path))
    before, after = (pipe(pictures(2), num_samples=2) for pipe in (pipeline, loaded))
    np.testing.assert_allclose(before.probabilities, after.probabilities, rtol=0, atol=SAME)
    assert before.probabilities[0].shape == (4, SIZE, SIZE)
    assert np.all(before.uncertainty[0] == 0)


def test_weights_in_half_precision_are_read_as_float32(binary, tmp_path):
    make().to(torch.float16).save_pretrained(tmp_path / "half")
    binary.save_pretrained(tmp_path / "full")
    loaded = load_pipeline(str(tmp_path / "half"))
    assert loaded.unet.dtype == torch.float32
    half, full = (
        sum(file.stat().st_size for file in (tmp_path / name).rglob("*.safetensors"))
        for name in ("half", "full")
    )
    assert half < 0.55 * full
    difference = np.abs(loaded(pictures(1)).probabilities[0] - binary(pictures(1)).probabilities[0])
    assert difference.max() < 0.02


# Noise


def test_noise_is_bit_identical_whatever_the_batch_and_its_order(binary):
    keys = [(7, case, index, sample) for case in ("a", "b") for index in (0, 1) for sample in (0, 1)]
    together = binary.draw_noise(keys)
    for i, key in enumerate(keys):
        assert torch.equal(binary.draw_noise([key])[0], together[i])
    assert torch.equal(binary.draw_noise(keys[::-1]), together.flip(0))
    assert len({noise.numpy().tobytes() for noise in together}) == len(keys)


def test_noise_does_not_touch_the_global_generator(binary):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    binary(pictures(1), seed=1)
    assert torch.equal(torch.rand(1), expected)


def test_noise_is_standard_normal(binary):
    drawn = binary.draw_noise([(0, "case", index, 0) for index in range(400)])
    assert abs(float(drawn.mean())) < 0.02
    assert abs(float(drawn.std()) - 1) < 0.02


@pytest.mark.parametrize("classes", [("background", "polyp"), ORGANS])
def test_probabilities_agree_whatever_the_batch_and_its_order(classes):
    pipeline, images = make(classes), pictures(5)
    names = [f"case {i}" for i in range(5)]
    together = pipeline(images, seed=2, case_ids=names).probabilities
    backwards = pipeline(images[::-1], seed=2, case_ids=names[::-1]).probabilities[::-1]
    for i in range(5):
        alone = pipeline(images[i], seed=2, case_ids=names[i : i + 1]).probabilities[0]
        assert np.abs(alone - together[i]).max() < 1e-5
        assert np.abs(backwards[i] - together[i]).max() < 1e-5


def test_seed_case_slice_and_sample_each_change_the_result(binary):
    image = pictures(1)

    def scores(**changes):
        return binary(image, **{"case_ids": ["a"], "slice_indices": [0], **changes}).probabilities[0]

    reference = scores()
    assert np.array_equal(scores(), reference)
    for changes in ({"seed": 1}, {"case_ids": ["b"]}, {"slice_indices": [1]}, {"first_sample": 1}):
        assert not np.array_equal(scores(**changes), reference), changes


def test_zeros_instead_of_noise_make_every_seed_and_sample_the_same():
    pipeline = make(noise="zeros", prediction="sample")
    assert not pipeline.draw_noise([(0, "a", 0, 0)]).any()
    results = [pipeline(pictures(1), seed=seed).probabilities[0] for seed in (0, 1)]
    assert np.array_equal(*results)


# Samples and uncertainty


def test_samples_are_those_of_single_draws_and_their_mean_is_returned(binary):
    image = pictures(1, 40, 50)
    several = binary(image, num_samples=3, return_samples=True)
    singles = [binary(image, first_sample=i).probabilities[0] for i in range(3)]
    assert several.samples[0].shape == (3, 2, 40, 50)
    assert np.abs(several.samples[0] - np.stack(singles)).max() < 1e-5
    assert np.allclose(several.probabilities[0], several.samples[0].mean(axis=0), atol=1e-6)


def test_uncertainty_is_the_standard_deviation_of_the_foreground_over_the_samples(binary):
    output = binary(pictures(1), num_samples=4, return_samples=True)
    assert np.allclose(output.uncertainty[0], output.samples[0][:, 1].std(axis=0), atol=1e-6)
    assert output.uncertainty[0].max() > 0


def test_uncertainty_of_several_classes_is_the_largest_of_the_foreground(organs):
    output = organs(pictures(1), num_samples=3, return_samples=True)
    assert np.allclose(output.uncertainty[0], output.samples[0][:, 1:].std(axis=0).max(axis=0), atol=1e-6)


def test_one_sample_has_no_uncertainty_and_samples_are_kept_on_request_only(binary):
    output = binary(pictures(1))
    assert np.isnan(output.uncertainty[0]).all()
    assert output.samples is None


# Classes


def test_binary_probabilities_are_half_of_one_plus_the_score():
    scores = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0]).view(1, 1, 1, 5)
    foreground = scores_to_probabilities(scores)[0, 1, 0]
    assert foreground.tolist() == [0.0, 0.0, 0.5, 0.75, 1.0]
    assert torch.equal(scores_to_probabilities(scores).sum(dim=1), torch.ones(1, 1, 5))


def test_several_classes_compete_by_softmax():
    scores = torch.randn(2, 3, 4, 4)
    assert torch.equal(scores_to_probabilities(scores), scores.softmax(dim=1))


def test_labels_are_above_the_threshold_or_the_most_probable():
    binary = np.array([[[0.7, 0.5, 0.2]], [[0.3, 0.5, 0.8]]], np.float32)
    assert probabilities_to_labels(binary).tolist() == [[0, 0, 1]]
    assert probabilities_to_labels(binary, 0.25).tolist() == [[1, 1, 1]]
    three = np.array([[[0.5, 0.2]], [[0.3, 0.1]], [[0.2, 0.7]]], np.float32)
    assert probabilities_to_labels(three).tolist() == [[0, 2]]
    assert probabilities_to_labels(three).dtype == np.uint8


def test_every_class_has_its_own_reverse_process_and_the_backgrounds_is_negated(organs):
    noise = organs.draw_noise([(0, "a", 0, 0), (0, "b", 0, 0)])
    with torch.no_grad():
        conditioning = organs.image_encoder(organs.normalise(np.stack(pictures(2))))
        scores = organs.denoise(conditioning, noise, 1)
        last = torch.full((2,), 999)
        for index in range(4):
            output = organs.unet(noise, last, conditioning, torch.full((2,), index))
            latent = organs.scheduler.step(output, 999, noise).pred_original_sample
            expected = organs.autoencoder.decode(latent / organs.config.latent_scale).sample[:, 0]
            assert torch.allclose(scores[:, index], -expected if index == 0 else expected, atol=1e-4)


def test_all_masks_are_denoised_jointly_in_one_call_and_decoded_in_one_batch(joint, monkeypatch):
    noise = joint.draw_noise([(0, "a", 0, 0), (0, "b", 0, 0)])
    assert noise.shape == (2, 12, 4, 4)
    calls = []
    forward, decode = SDSegUNet.forward, MaskAutoencoder.decode
    monkeypatch.setattr(SDSegUNet, "forward", lambda *a: (calls.append("unet"), forward(*a))[1])
    monkeypatch.setattr(MaskAutoencoder, "decode", lambda *a: (calls.append("decode"), decode(*a))[1])
    with torch.no_grad():
        conditioning = joint.image_encoder(joint.normalise(np.stack(pictures(2))))
        scores = joint.denoise(conditioning, noise, 1)
        assert calls == ["unet", "decode"]
        output = joint.unet(noise, torch.full((2,), 999), conditioning)
        latent = joint.scheduler.step(output, 999, noise).pred_original_sample
        for index in range(3):
            part = latent[:, 4 * index : 4 * index + 4] / joint.config.latent_scale
            expected = joint.autoencoder.decode(part).sample[:, 0]
            assert torch.allclose(scores[:, index + 1], expected, atol=1e-5)
    assert torch.equal(scores[:, 0], -scores[:, 1:].amax(dim=1))


def test_a_joint_pipeline_is_saved_and_loaded_and_its_noise_depends_on_the_case_alone(joint, tmp_path):
    joint.save_pretrained(tmp_path)
    loaded = load_pipeline(str(tmp_path))
    before, after = (pipe(pictures(2), seed=3).probabilities for pipe in (joint, loaded))
    assert np.allclose(before, after, atol=1e-6)
    assert before[0].shape == (4, SIZE, SIZE)
    alone = loaded(pictures(2)[1], seed=3, case_ids=["1"]).probabilities[0]
    assert np.allclose(alone, after[1], atol=1e-5)
    assert not np.allclose(loaded(pictures(2), seed=4).probabilities[0], after[0], atol=1e-4)


def test_fewer_classes_than_embeddings_use_the_first_embeddings(organs):
    torch.manual_seed(0)
    fewer = SDSegPipeline(
        **{**organs.components, "scheduler": organs.scheduler},
        classes=ORGANS[:3],
        image_size=SIZE,
        latent_scale=organs.config.latent_scale,
    )
    assert fewer(pictures(1)).probabilities[0].shape == (3, SIZE, SIZE)


@pytest.mark.parametrize("pipeline_name", ["binary", "organs", "joint"])
def test_probabilities_sum_to_one_on_the_images_own_grid(pipeline_name, request):
    pipeline = request.getfixturevalue(pipeline_name)
    output = pipeline(pictures(1, 37, 61) + pictures(1, 90, 20))
    for probabilities, labels, shape in zip(
        output.probabilities, output.label_maps, [(37, 61), (90, 20)], strict=True
    ):
        assert probabilities.shape == (pipeline.num_classes, *shape)
        assert probabilities.dtype == np.float32
        assert np.allclose(probabilities.sum(axis=0), 1, atol=1e-5)
        assert labels.shape == shape
        assert labels.dtype == np.uint8
        assert labels.max() < pipeline.num_classes


# Steps


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "velocity"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_network_is_asked_once_a_step_beginning_with_pure_noise(prediction, steps):
    pipeline = make(prediction=prediction)
    asked = []
    pipeline.unet.register_forward_pre_hook(lambda _, arguments: asked.append(int(arguments[1][0])))
    output = pipeline(pictures(1), num_inference_steps=steps)
    assert len(asked) == steps
    assert asked[0] == 999
    assert asked == sorted(asked, reverse=True)
    assert np.isfinite(output.probabilities[0]).all()


def test_more_steps_give_another_result(binary):
    one, ten = (binary(pictures(1), num_inference_steps=steps).probabilities[0] for steps in (1, 10))
    assert not np.allclose(one, ten, atol=1e-4)


# Input


def test_one_image_may_come_alone_as_an_array_or_as_a_picture(binary):
    array = pictures(1)[0]
    results = [binary(form).probabilities[0] for form in (array, [array], Image.fromarray(array))]
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_a_grey_image_is_one_with_three_equal_channels(binary):
    grey = pictures(1)[0][..., 0]
    expected = binary(np.stack([grey] * 3, axis=-1)).probabilities[0]
    assert np.array_equal(binary(grey).probabilities[0], expected)
    assert np.array_equal(binary(Image.fromarray(grey)).probabilities[0], expected)


def test_images_already_on_the_models_grid_come_back_on_their_own(binary):
    grid = Grid(50, 70, SIZE)
    image = pictures(1, 50, 70)[0]
    direct = binary(image)
    ready = binary(grid.image_to_model(image), grids=[grid])
    assert np.array_equal(direct.probabilities[0], ready.probabilities[0])


def test_pixels_go_in_between_minus_one_and_one(binary):
    images = np.stack([np.zeros((SIZE, SIZE, 3), np.uint8), np.full((SIZE, SIZE, 3), 255, np.uint8)])
    tensor = binary.normalise(images)
    assert tensor.shape == (2, 3, SIZE, SIZE)
    assert tensor[0].unique().tolist() == [-1.0]
    assert tensor[1].unique().tolist() == [1.0]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("images", "arguments", "message"),
    [
        ([], {}, "no images were given"),
        (pictures(1), {"num_inference_steps": 0}, "num_inference_steps is 0"),
        (pictures(1), {"num_samples": 0}, "num_samples is 0"),
        (pictures(2), {"case_ids": ["a"]}, "case_ids has 1 entries for 2 images"),
        (pictures(1), {"slice_indices": [0, 1]}, "slice_indices has 2 entries for 1 images"),
        (pictures(1), {"grids": []}, "grids has 0 entries for 1 images"),
        (pictures(1, 16, 16), {"grids": [Grid(16, 16, SIZE)]}, r"on the model's grid is \(16, 16, 3\)"),
        (np.zeros((8, 8, 3)), {}, "an image array is float64, expected uint8"),
        (np.zeros((8, 8, 4), np.uint8), {}, r"an image array is \(8, 8, 4\), expected"),
        (np.zeros((2, 8, 8, 3), np.uint8), {}, r"an image array is \(2, 8, 8, 3\), expected"),
        (Image.fromarray(np.zeros((8, 8), np.uint16)), {}, "holds more than 8 bits a channel"),
        (Image.fromarray(np.zeros((8, 8), np.float32)), {}, "holds more than 8 bits a channel"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(binary, images, arguments, message):
    with pytest.raises(ValueError, match=message):
        binary(images, **arguments)


# ---- test-time flips and the overlap of draws ----


@pytest.mark.parametrize(
    ("flips", "axes"),
    [(["horizontal"], [1]), (["vertical"], [0]), (["horizontal", "vertical"], [1, 0, (0, 1)])],
)
def test_a_flip_is_the_prediction_of_the_mirrored_image_mirrored_back(binary, flips, axes):
    (image,) = pictures(1)
    found = binary(image, case_ids=["a"], flips=flips, num_samples=2, return_samples=True).samples[0]
    views = [image, *(np.flip(image, axis) for axis in axes)]
    assert len(found) == 2 * len(views)
    for number, (view, axis) in enumerate(zip(views, [(), *axes], strict=True)):
        alone = binary(
            np.ascontiguousarray(view), case_ids=["a"], num_samples=2, return_samples=True
        ).samples[0]
        shifted = tuple(one + 2 for one in ((axis,) if isinstance(axis, int) else axis))
        expected = np.flip(alone, shifted) if shifted else alone
        np.testing.assert_allclose(found[2 * number : 2 * number + 2], expected, atol=1e-5)


def test_flips_count_as_draws_and_an_image_set_off_centre_comes_back_to_its_place(binary):
    (image,) = pictures(1, 20, 32)
    grid = Grid(20, 32, SIZE, "pad")
    output = binary([grid.image_to_model(image)], grids=[grid], flips=["vertical"], return_samples=True)
    plain = binary([grid.image_to_model(image)], grids=[grid], return_samples=True)
    assert output.samples[0].shape == (2, 2, 20, 32)
    np.testing.assert_allclose(output.samples[0][0], plain.samples[0][0], atol=1e-5)
    assert np.isfinite(output.uncertainty[0]).all()
    np.testing.assert_allclose(output.probabilities[0], output.samples[0].mean(axis=0), atol=1e-6)


def test_an_unknown_flip_is_refused():
    assert mirrored_axes([]) == [()]
    with pytest.raises(ValueError, match="'diagonal', expected horizontal or vertical"):
        mirrored_axes(["diagonal"])


def test_the_pixels_that_draws_share_are_counted_class_by_class():
    foreground = np.array([[[0.9, 0.9, 0.1]], [[0.1, 0.9, 0.9]], [[0.1, 0.1, 0.1]]], np.float32)
    samples = np.stack([1 - foreground, foreground], axis=1)
    assert draw_overlaps(samples).tolist() == [[[2, 1, 0], [1, 2, 0], [0, 0, 0]]]
    assert draw_overlaps(samples, threshold=0.05)[0].min() == 3
    three = np.zeros((2, 3, 1, 4), np.float32)
    for draw, labels in enumerate(([0, 1, 2, 2], [1, 1, 2, 0])):
        three[draw, labels, 0, range(4)] = 1
    assert draw_overlaps(three).tolist() == [[[1, 1], [1, 2]], [[2, 1], [1, 1]]]
