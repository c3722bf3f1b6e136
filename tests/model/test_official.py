"""Published checkpoints: the mapping, what is refused, and the official implementation's own numbers."""

import io
import os
import pickle
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from sdseg_cli.core.errors import ModelError, UsageError
from sdseg_cli.core.model import official
from sdseg_cli.core.model.checkpoint_file import read_state_dict
from sdseg_cli.core.model.image_encoder import KLImageEncoder
from sdseg_cli.core.model.latents import posterior
from sdseg_cli.core.model.losses import diffusion_loss
from sdseg_cli.core.model.official import (
    EncoderShape,
    UNetShape,
    encoder_shape,
    load_published,
    sdseg_from,
    unet_from,
    unet_shape,
)
from sdseg_cli.core.model.schedule import make_scheduler, predicted_original
from sdseg_cli.core.model.unet import SDSegUNet

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("SDSEG_SHARED", ROOT.parent / "shared"))
WIDTHS = (32, 64)


# A checkpoint in the official layout, made from our own networks --------------------------------------


def exported(network, layers, heads: int = 1) -> dict[str, torch.Tensor]:
    """Name a network's tensors as the official code does; the inverse of the conversion."""
    own, state, fused = network.state_dict(), {}, {}
    for ours, theirs in official._sources(layers, own):
        if ".qkv." in theirs:
            fused.setdefault(theirs, []).append(own[ours])  # to_q, to_k, to_v, in the order of the table
        elif ".proj_out." in theirs and ours.endswith("weight"):
            state[theirs] = own[ours][..., None]
        else:
            state[theirs] = own[ours]
    for theirs, parts in fused.items():
        by_head = torch.stack([part.reshape(heads, -1, *part.shape[1:]) for part in parts], dim=1)
        joined = by_head.reshape(-1, *parts[0].shape[1:])
        state[theirs] = joined[..., None] if theirs.endswith("weight") else joined
    return state


def a_unet(heads: int = 4, *, conditioning: int = 4, classes: int | None = None):
    torch.manual_seed(0)
    unet = SDSegUNet(
        sample_size=4,
        conditioning_channels=conditioning,
        channels=WIDTHS,
        blocks=1,
        heads=heads,
        attention_strides=(2,),
        dropout=0.0,
        num_class_embeds=classes,
    ).eval()
    shape = UNetShape(4, conditioning, WIDTHS, 1, (False, True), classes)
    return unet, exported(unet, official._unet_layers(shape), heads)


def an_autoencoder():
    torch.manual_seed(1)
    autoencoder = AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
    ).eval()
    return autoencoder, exported(autoencoder, official._autoencoder_layers(EncoderShape((32,) * 4, 1, 8)))


def an_image_encoder():
    torch.manual_seed(2)
    encoder = KLImageEncoder(channels=(32,) * 4, blocks=1).eval()
    return encoder, exported(encoder, official._image_encoder_layers(EncoderShape((32,) * 4, 1, 8)))


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


def a_checkpoint(classes: int | None = None, heads: int = 4) -> dict[str, torch.Tensor]:
    raw = a_unet(heads, classes=classes)[1]
    averaged = {("diffusion_model." + name).replace(".", ""): value * 2 for name, value in raw.items()}
    scheduler = make_scheduler()
    return {
        **under("model.diffusion_model.", raw),
        **under("model_ema.", averaged),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7),
        **under("first_stage_model.", an_autoencoder()[1]),
        **under("cond_stage_model.", an_image_encoder()[1]),
        "scale_factor": torch.tensor(0.125),
        "betas": scheduler.betas,
        "alphas_cumprod": scheduler.alphas_cumprod,
    }


def saved(state: dict, path: Path) -> Path:
    torch.save({"state_dict": state, "epoch": 3, "optimizer_states": [{"state": {}}]}, path)
    return path


OPTIONS = {"heads": 4, "image_size": 32}


# The mapping


def test_a_fused_tensor_is_ordered_by_head_first_and_by_query_key_value_second():
    # Two heads of width 2: the rows are q0 q0 k0 k0 v0 v0 q1 q1 k1 k1 v1 v1.
    fused = torch.arange(12.0)[:, None].expand(12, 4)[..., None]
    rows = {
        name: official._part(fused, f"x.{name}.weight", "x.qkv.weight", heads=2)[:, 0, 0].tolist()
        for name in ("to_q", "to_k", "to_v")
    }
    assert rows == {"to_q": [0, 1, 6, 7], "to_k": [2, 3, 8, 9], "to_v": [4, 5, 10, 11]}


@pytest.mark.parametrize("heads", [1, 4, 8])
@pytest.mark.parametrize("classes", [None, 5])
def test_a_unet_comes_back_from_the_official_names(heads, classes):
    unet, state = a_unet(heads, classes=classes)
    back = unet_from(state, heads=heads, sample_size=4)
    assert back.config["channels"] == WIDTHS
    assert back.config["attention_strides"] == (2,)
    assert back.config["num_class_embeds"] == classes
    for name, value in unet.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("network", "layers", "shape", "read"),
    [
        (
            SDSegUNet,
            official._unet_layers,
            UNetShape(4, 4, (192, 384, 384, 768, 768), 2, (True,) * 4 + (False,), None),
            unet_shape,
        ),
        (
            KLImageEncoder,
            official._image_encoder_layers,
            EncoderShape((128, 256, 512, 512), 2, 8),
            encoder_shape,
        ),
    ],
    ids=["unet", "image encoder"],
)
def test_every_tensor_of_the_papers_networks_has_an_official_name_and_tells_their_shape(
    network, layers, shape, read
):
    with torch.device("meta"):
        own = network()
        state = exported(own, layers(shape), heads=8)
        assert read(state) == shape
    assert set(dict(official._sources(layers(shape), own.state_dict()))) == set(own.state_dict())
    assert sum(value.numel() for value in state.values()) == own.num_parameters()


def test_a_pipeline_takes_everything_from_the_checkpoint():
    pipeline = sdseg_from(a_checkpoint(), **OPTIONS)
    assert pipeline.config.latent_scale == 0.125
    assert pipeline.classes == ("background", "foreground")
    assert pipeline.scheduler.config["beta_start"] == 0.0015
    assert pipeline.scheduler.config["beta_end"] == 0.0155
    assert pipeline.scheduler.config["prediction_type"] == "epsilon"
    for part, (network, _) in {"autoencoder": an_autoencoder(), "image_encoder": an_image_encoder()}.items():
        for name, value in network.state_dict().items():
            assert torch.equal(getattr(pipeline, part).state_dict()[name], value), name


def test_averaged_weights_are_the_default_and_raw_ones_are_on_request():
    raw = a_unet()[0].state_dict()["conv_in.weight"]
    state = a_checkpoint()
    assert torch.equal(sdseg_from(state, **OPTIONS).unet.conv_in.weight, raw * 2)
    assert torch.equal(sdseg_from(state, weights="raw", **OPTIONS).unet.conv_in.weight, raw)


def test_a_converted_pipeline_is_saved_loaded_and_predicts(tmp_path):
    from sdseg_cli.core.model.weights import load_pipeline

    pipeline = sdseg_from(a_checkpoint(classes=4), **OPTIONS)
    pipeline.save_pretrained(tmp_path)
    images = [np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)]
    before, after = (pipe(images).probabilities[0] for pipe in (pipeline, load_pipeline(str(tmp_path))))
    assert before.shape == (4, 20, 30)
    np.testing.assert_allclose(before, after, rtol=0, atol=1e-5)  # a file's tensors lie elsewhere in memory


def test_the_classes_of_a_class_conditional_checkpoint_may_be_named_and_be_fewer():
    state = a_checkpoint(classes=5)
    assert sdseg_from(state, **OPTIONS).classes == ("background", "class 1", "class 2", "class 3", "class 4")
    named = sdseg_from(state, classes=("background", "liver", "kidney"), **OPTIONS)
    assert named.classes == ("background", "liver", "kidney")


def test_an_unconditional_unet_becomes_a_start_that_ignores_the_conditioning_at_first():
    unet, state = a_unet(conditioning=0)
    checkpoint = {**under("model.diffusion_model.", state), "betas": make_scheduler().betas}
    start = official.ldm_unet_from(checkpoint, weights="raw", heads=4)
    assert start.conv_in.weight.shape[1] == 8
    assert torch.equal(start.conv_in.weight[:, :4], unet.conv_in.weight)
    assert not start.conv_in.weight[:, 4:].any()
    noisy, features, timestep = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4), torch.tensor([9, 9])
    with torch.no_grad():
        alone = unet(noisy, timestep, [torch.zeros(2, 0, 4, 4)])
        assert torch.allclose(start(noisy, timestep, [features]), alone, atol=1e-6)


def test_an_autoencoders_training_networks_are_left_out(tmp_path):
    autoencoder, state = an_autoencoder()
    path = saved({**state, "loss.discriminator.main.0.weight": torch.ones(1)}, tmp_path / "kl.ckpt")
    converted = load_published(path)
    assert isinstance(converted, AutoencoderKL)
    for name, value in autoencoder.state_dict().items():
        assert torch.equal(converted.state_dict()[name], value), name


def test_weights_in_half_precision_are_converted_to_float32():
    state = {
        name: value.half() if value.is_floating_point() and value.ndim else value
        for name, value in a_checkpoint().items()
    }
    state["betas"], state["alphas_cumprod"] = make_scheduler().betas, make_scheduler().alphas_cumprod
    pipeline = sdseg_from(state, **OPTIONS)
    assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {torch.float32}


# What is refused


@pytest.mark.faults
@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("model.diffusion_model.middle_block.1.qkv.weight", "U-Net"),
        ("model.diffusion_model.out.0.bias", "U-Net"),
        ("model_ema.diffusion_modelout0bias", "running averages"),
        ("first_stage_model.post_quant_conv.bias", "autoencoder"),
        ("first_stage_model.decoder.up.3.upsample.conv.weight", "autoencoder"),
        ("cond_stage_model.encoder.mid.attn_1.q.weight", "image encoder"),
        ("cond_stage_model.out.bias", "image encoder"),
        ("scale_factor", "lacks"),
        ("betas", "lacks"),
        ("alphas_cumprod", "lacks"),
    ],
)
def test_a_missing_tensor_is_named(key, what):
    state = a_checkpoint()
    del state[key]
    name = key.removeprefix("model.diffusion_model.").removeprefix("first_stage_model.")
    for weights in ("ema", "raw"):
        if weights == "raw" and key.startswith("model_ema"):
            continue
        with pytest.raises(ModelError, match=what) as error:
            sdseg_from(state, weights=weights, **OPTIONS)
        assert name.removeprefix("cond_stage_model.").replace(".", "") in str(error.value).replace(".", "")


@pytest.mark.faults
@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.norm1.weight",
        "model_ema.strange",
        "first_stage_model.encoder.down.3.attn.0.q.weight",
        "cond_stage_model.transformer.embeddings.weight",
        "control_model.input_hint_block.0.weight",
        "strange",
    ],
)
def test_an_unexpected_tensor_is_named(key):
    state = {**a_checkpoint(), key: torch.ones(1)}
    with pytest.raises(ModelError, match=key.split(".")[-1]):
        sdseg_from(state, **OPTIONS)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("out.2.bias", (9,), r"out\.2\.bias has shape \(9,\), expected \(4,\)"),
        (
            "middle_block.1.qkv.weight",
            (64, 192, 1),
            r"qkv\.weight has shape \(64, 192, 1\), expected \(192, 64\)",
        ),
        ("time_embed.0.weight", (32, 128), r"has shape \(32, 128\), expected \(128, 32\)"),
    ],
)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(key, shape, message):
    state = {**a_checkpoint(), f"model.diffusion_model.{key}": torch.ones(shape)}
    with pytest.raises(ModelError, match=message):
        sdseg_from(state, weights="raw", **OPTIONS)


@pytest.mark.faults
def test_another_schedule_is_refused():
    state = a_checkpoint()
    betas = torch.linspace(0.0015, 0.0155, 1000)
    state |= {"betas": betas, "alphas_cumprod": (1 - betas).cumprod(0)}
    with pytest.raises(ModelError, match="not linear in the square root of beta"):
        sdseg_from(state, **OPTIONS)


@pytest.mark.faults
def test_a_checkpoint_without_averages_says_how_to_convert_it():
    state = {name: value for name, value in a_checkpoint().items() if not name.startswith("model_ema")}
    with pytest.raises(ModelError, match="--weights raw"):
        sdseg_from(state, **OPTIONS)
    assert sdseg_from(state, weights="raw", **OPTIONS).num_classes == 2


@pytest.mark.faults
@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        (None, {"heads": 7}, "7 attention heads do not divide the U-Net's widths"),
        (None, {"heads": 4, "image_size": 40}, "--image-size 40: this U-Net needs a multiple of 16"),
        (
            None,
            {**OPTIONS, "classes": ("background", "a", "b")},
            "names 3 classes; this checkpoint is binary",
        ),
        (4, {**OPTIONS, "classes": ("background", "a")}, "expected 3 to 4"),
        (4, {**OPTIONS, "classes": tuple("abcde")}, "expected 3 to 4"),
    ],
)
def test_an_option_that_contradicts_the_weights_is_refused(classes, options, message):
    with pytest.raises(UsageError, match=message):
        sdseg_from(a_checkpoint(classes), **options)


@pytest.mark.faults
def test_an_option_of_another_kind_of_checkpoint_is_refused(tmp_path):
    path = saved(an_autoencoder()[1], tmp_path / "kl.ckpt")
    with pytest.raises(UsageError, match=r"kl\.ckpt is a KL autoencoder, to which --heads does not apply"):
        load_published(path, {"heads": 4})


@pytest.mark.faults
def test_a_checkpoint_of_another_kind_is_refused_with_what_it_holds(tmp_path):
    path = saved({"backbone.conv.weight": torch.ones(1), "head.bias": torch.ones(1)}, tmp_path / "other.ckpt")
    with pytest.raises(ModelError, match=r"other\.ckpt: .*belong to backbone, head\. Expected an official"):
        load_published(path)


# Reading files


def test_lightnings_callbacks_keyed_by_a_class_are_read_without_lightning(tmp_path, monkeypatch):
    module = ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    path = tmp_path / "lightning.ckpt"
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            patch.setitem(sys.modules, name, module)
        callbacks = {module.ModelCheckpoint: {"best_model_score": torch.tensor(0.5)}}
        torch.save({"state_dict": {"a": torch.ones(2)}, "callbacks": callbacks}, path)
    assert "pytorch_lightning" not in sys.modules
    assert torch.equal(read_state_dict(path)["a"], torch.ones(2))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_old_and_new_files_with_and_without_a_state_dict_are_read(tmp_path, zipped, nested):
    weights = {"a": torch.arange(3.0)}
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": weights} if nested else weights, path, _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_state_dict(path)["a"], weights["a"])


def test_safetensors_are_read(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.arange(3.0)}, tmp_path / "weights.safetensors")
    assert torch.equal(read_state_dict(tmp_path / "weights.safetensors")["a"], torch.arange(3.0))


class _Code:
    """What a malicious file holds: unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.faults(15)
def test_code_in_a_checkpoint_is_never_executed_and_named(tmp_path):
    proof, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    torch.save({"state_dict": {"a": torch.ones(1)}, "extra": _Code(proof)}, path)
    with pytest.raises(ModelError, match=r"it asks for .*Nothing was executed\. .*save the weights alone"):
        read_state_dict(path)
    path.write_bytes(pickle.dumps(_Code(proof), protocol=2))
    with pytest.raises(ModelError):
        read_state_dict(path)
    assert not proof.exists()


@pytest.mark.faults(16)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "cannot be read .* cut short or damaged"),
        (lambda data: b"", "is empty"),
        (lambda data: b"<!DOCTYPE html><html>", "is no PyTorch checkpoint: it begins with b'<'"),
        (lambda data: data.replace(bytes(range(200, 240)), bytes(40)), "the checksum of .* is wrong"),
    ],
    ids=["half", "empty", "page", "altered"],
)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, damage, message):
    buffer = io.BytesIO()
    torch.save({"a": torch.tensor(list(range(200, 240)), dtype=torch.uint8)}, buffer)
    path = tmp_path / "damaged.ckpt"
    path.write_bytes(damage(buffer.getvalue()))
    with pytest.raises(ModelError, match=message) as error:
        read_state_dict(path)
    assert str(path) in str(error.value)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list, expected named weights"),
        ({"epoch": 3, "name": "x"}, "holds no plain weights: found epoch, name"),
        ({}, "holds no plain weights: found nothing"),
    ],
)
def test_a_file_without_named_weights_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ModelError, match=message):
        read_state_dict(tmp_path / "x.pt")


@pytest.mark.faults
def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"nowhere\.ckpt does not exist"):
        read_state_dict(tmp_path / "nowhere.ckpt")


# Against the official implementation


FIXTURES = ("binary", "multiclass")


class Official:
    """A converted fixture with the official implementation's inputs and outputs."""

    def __init__(self, name: str) -> None:
        folder = SHARED / "fixtures"
        self.path = folder / f"sdseg_{name}_tiny.ckpt"
        if not self.path.is_file():
            pytest.skip(f"no fixtures at {folder}: set SDSEG_SHARED to the folder that holds them")
        self.pipeline = load_published(self.path, {"image_size": 64})
        with np.load(self.path.with_suffix(".npz")) as arrays:
            self.expected = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        self.conditional = name == "multiclass"
        self.classes = sorted(int(key[4:]) for key in self.expected if key.startswith("eps_"))

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.expected[key]

    def labels(self, index: int) -> torch.Tensor | None:
        return torch.full((2,), index) if self.conditional else None

    def predict_noise(self, latent: torch.Tensor, timestep: torch.Tensor, index: int) -> torch.Tensor:
        return self.pipeline.unet(latent, timestep, [self["cond"]], self.labels(index))


@pytest.fixture(scope="module", params=FIXTURES)
def fixture(request) -> Official:
    return Official(request.param)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    deviation = (ours - theirs).abs().max().item()
    assert ours.shape == theirs.shape
    assert deviation <= tolerance, f"largest deviation {deviation:.2e}, allowed {tolerance:.0e}"


@pytest.mark.fixtures
def test_the_architecture_is_read_from_the_shapes(fixture):
    config = fixture.pipeline.unet.config
    assert (config["channels"], config["blocks"], config["heads"]) == ((32, 64, 64), 1, 8)
    assert config["attention_strides"] == (1, 2)
    assert config["num_class_embeds"] == (14 if fixture.conditional else None)
    assert fixture.pipeline.num_classes == (14 if fixture.conditional else 2)
    assert fixture.pipeline.image_encoder.config["channels"] == (32, 32, 32, 32)


@pytest.mark.fixtures
def test_the_schedule_equals_the_official_one(fixture):
    close(fixture.pipeline.scheduler.alphas_cumprod, fixture["alphas_cumprod"], 1e-6)


@pytest.mark.fixtures
@torch.no_grad()
def test_the_conditioning_equals_the_official_one(fixture):
    close(fixture.pipeline.image_encoder(fixture["image"])[0], fixture["cond"], 1e-4)


@pytest.mark.fixtures
@torch.no_grad()
def test_the_latent_of_the_mask_equals_the_official_one(fixture):
    masks = (fixture["mask"][:, :1] + 1) / 2
    mode = posterior(fixture.pipeline.autoencoder, masks).mode() * fixture.pipeline.config.latent_scale
    close(mode, fixture["mask_latent_mode"], 1e-4)


@pytest.mark.fixtures
def test_the_noisy_latent_equals_the_official_one(fixture):
    noisy = fixture.pipeline.scheduler.add_noise(fixture["mask_latent_mode"], fixture["noise"], fixture["t"])
    close(noisy, fixture["z_noisy"], 1e-4)


@pytest.mark.fixtures
@torch.no_grad()
def test_the_noise_predicted_for_every_class_equals_the_official_one(fixture):
    assert fixture.classes == ([0, 1, 2] if fixture.conditional else [0])
    for index in fixture.classes:
        close(fixture.predict_noise(fixture["noise"], fixture["t"], index), fixture[f"eps_{index}"], 1e-4)


@pytest.mark.fixtures
@torch.no_grad()
def test_the_one_step_latent_of_every_class_equals_the_official_one(fixture):
    last = torch.full((2,), 999)
    for index in fixture.classes:
        output = fixture.predict_noise(fixture["noise"], last, index)
        estimate = predicted_original(fixture.pipeline.scheduler, output, fixture["noise"], last)
        close(estimate, fixture[f"z0_{index}"], 1e-3)


@pytest.mark.fixtures
@torch.no_grad()
def test_the_decoded_mask_of_every_class_equals_the_official_one(fixture):
    for index in fixture.classes:
        latent = fixture[f"z0_{index}"] / fixture.pipeline.config.latent_scale
        close(fixture.pipeline.autoencoder.decode(latent).sample, fixture[f"decoded_{index}"], 1e-4)


@pytest.mark.fixtures
@torch.no_grad()
def test_image_to_scores_in_the_pipeline_equals_the_official_way(fixture):
    pipeline = fixture.pipeline
    scores = pipeline.denoise(pipeline.image_encoder(fixture["image"]), fixture["noise"], 1)
    assert scores.shape[1] == (14 if fixture.conditional else 1)
    for index in fixture.classes:
        expected = fixture[f"decoded_{index}"].mean(dim=1)
        sign = -1 if fixture.conditional and index == 0 else 1
        close(scores[:, index], sign * expected, 1e-4)


@pytest.mark.fixtures
@torch.no_grad()
def test_both_losses_equal_the_official_ones(fixture):
    output = fixture.predict_noise(fixture["z_noisy"], fixture["t"], 1)
    loss = diffusion_loss(
        fixture.pipeline.scheduler,
        output,
        fixture["mask_latent_mode"],
        fixture["z_noisy"],
        fixture["noise"],
        fixture["t"],
    )
    close(loss.noise, fixture["loss_noise"], 1e-4)
    close(loss.latent, fixture["loss_latent"], 1e-4)


@pytest.mark.fixtures
@torch.no_grad()
def test_averaged_and_raw_weights_of_a_fixture_differ(fixture):
    raw = load_published(fixture.path, {"image_size": 64, "weights": "raw"})
    pairs = zip(raw.unet.parameters(), fixture.pipeline.unet.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.fixtures
def test_every_shape_of_the_fixtures_unet_is_told_from_either_weights(fixture):
    state = read_state_dict(fixture.path)
    shape = unet_shape(official._under(state, "model.diffusion_model."))
    assert (shape.latent_channels, shape.conditioning_channels) == (4, 4)
    assert shape.attended == (True, True, False)
