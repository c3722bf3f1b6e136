"""Weights from files: what is found, what is refused, and what the message says then."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from sdseg_cli.core.errors import ModelError, UsageError
from sdseg_cli.core.model import weights
from sdseg_cli.core.model.image_encoder import KLImageEncoder, TimmImageEncoder
from sdseg_cli.core.model.mask_autoencoder import MaskAutoencoder
from sdseg_cli.core.model.pipeline import SDSegPipeline
from sdseg_cli.core.model.schedule import make_scheduler
from sdseg_cli.core.model.unet import SDSegUNet
from sdseg_cli.core.model.weights import (
    build_image_encoder,
    build_unet,
    load_autoencoder,
    load_pipeline,
)

FILE = "diffusion_pytorch_model.safetensors"
CHANNELS = (32, 32, 32, 32)


def tiny_kl(levels: int = 4) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=CHANNELS[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
    )


def image_encoder(kind="kl", autoencoder=None, **changes):
    settings = {
        "weights": "random",
        "conditioning_channels": 4,
        "levels": 1,
        "channels": CHANNELS,
        "blocks": 1,
        "dropout": 0.1,
    }
    return build_image_encoder(kind, **{**settings, **changes}, autoencoder=autoencoder or MaskAutoencoder())


def unet(**changes) -> SDSegUNet:
    settings = {
        "weights": "random",
        "sample_size": 8,
        "latent_channels": 4,
        "conditioning_channels": 4,
        "fusion": "input",
        "channels": (32, 32),
        "blocks": 1,
        "heads": 4,
        "attention_strides": (2,),
        "dropout": 0.0,
        "num_class_embeds": None,
    }
    return build_unet(**{**settings, **changes})


def edit(path, change) -> None:
    """Rewrite a safetensors file after ``change`` has altered its tensors."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# Autoencoders


def test_a_folder_with_a_kl_autoencoder_is_loaded_and_frozen(tmp_path):
    saved = tiny_kl()
    saved.save_pretrained(tmp_path)
    loaded = load_autoencoder(str(tmp_path))
    assert isinstance(loaded, AutoencoderKL)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for a, b in zip(saved.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.faults
@pytest.mark.parametrize("location", ["weights/kl-f8", "./weights/kl-f8", "/nowhere/kl-f8"])
def test_a_missing_published_autoencoder_is_named_with_its_place_and_the_recipe_that_needs_none(location):
    with pytest.raises(UsageError) as error:
        load_autoencoder(location)
    message = str(error.value)
    for part in (
        "model.autoencoder",
        location.removeprefix("./"),
        FILE,
        "kl-f8.zip",
        "sdseg convert",
        "--recipe kseg-fast",
    ):
        assert part in message
    assert error.value.exit_code == 2


@pytest.mark.faults
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("decoder.conv_out.weight"), r"Missing: decoder\.conv_out\.weight"),
        (lambda tensors: tensors.update(strange=torch.ones(1)), "Unexpected: strange"),
        (
            lambda tensors: tensors.update({"decoder.conv_out.bias": torch.ones(5)}),
            r"decoder\.conv_out\.bias expected shape torch\.Size\(\[3\]\), but got torch\.Size\(\[5\]\)",
        ),
    ],
)
def test_autoencoder_weights_that_do_not_fit_their_configuration_are_refused(tmp_path, change, message):
    tiny_kl().save_pretrained(tmp_path)
    edit(tmp_path / FILE, change)
    with pytest.raises(UsageError, match=message):
        load_autoencoder(str(tmp_path))


@pytest.mark.faults
@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_a_damaged_autoencoder_is_refused_by_name(tmp_path, damage):
    tiny_kl().save_pretrained(tmp_path)
    damage(tmp_path / FILE)
    with pytest.raises(UsageError, match=f"{tmp_path} exists but holds no autoencoder that can be read"):
        load_autoencoder(str(tmp_path))


@pytest.mark.faults
def test_a_damaged_configuration_is_refused_by_name(tmp_path):
    tiny_kl().save_pretrained(tmp_path)
    cut(tmp_path / "config.json")
    with pytest.raises(UsageError, match=r"config\.json' is not a valid JSON file"):
        load_autoencoder(str(tmp_path))


@pytest.mark.faults
def test_an_autoencoder_with_another_stride_is_refused(tmp_path):
    tiny_kl(levels=3).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has 4 pixels per latent pixel, expected 8"):
        load_autoencoder(str(tmp_path))


# Image encoders


def test_the_image_encoder_can_start_as_a_copy_of_the_autoencoders(tmp_path):
    autoencoder = tiny_kl()
    encoder = image_encoder(weights="autoencoder", autoencoder=autoencoder)
    for name, value in autoencoder.encoder.state_dict().items():
        assert torch.equal(encoder.encoder.state_dict()[name], value), name
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = encoder.out(autoencoder.encoder(images))
        torch.testing.assert_close(encoder.eval()(images)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["kl", "timm:test_resnet"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_image_encoder_weights_come_from_a_file_or_a_folder(kind, as_folder, tmp_path):
    torch.manual_seed(0)
    saved = image_encoder(kind)
    saved.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = image_encoder(kind, weights=str(tmp_path if as_folder else tmp_path / FILE))
    assert type(loaded) is (KLImageEncoder if kind == "kl" else TimmImageEncoder)
    for (name, a), b in zip(saved.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.faults
def test_copying_from_the_built_in_autoencoder_is_refused():
    with pytest.raises(UsageError, match="copies the encoder of a KL autoencoder"):
        image_encoder(weights="autoencoder")


@pytest.mark.faults
def test_copying_from_an_autoencoder_of_other_widths_is_refused():
    with pytest.raises(UsageError, match=r"does not fit model\.image_encoder_channels"):
        image_encoder(weights="autoencoder", autoencoder=tiny_kl(), blocks=2)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet43", r"timm has no network named 'resnet43'; near: .*resnet"),
        ("no-such-thing", "timm has no network named 'no-such-thing'"),
        ("test_vit", "timm:test_vit cannot serve: .*strides"),
    ],
)
def test_a_backbone_that_cannot_serve_is_refused(name, message):
    with pytest.raises(UsageError, match=message):
        image_encoder(f"timm:{name}")


@pytest.mark.faults
def test_published_weights_of_a_backbone_that_cannot_be_had_are_never_replaced_by_random_ones():
    with pytest.raises(
        UsageError, match=r"published weights of timm:resnet18 cannot be had .*weights=random"
    ):
        image_encoder("timm:resnet18", weights="pretrained")


# U-Net


@pytest.mark.parametrize(
    "changes", [{"num_class_embeds": 3}, {"fusion": "multiscale"}, {"fusion": "attention"}]
)
def test_a_start_without_the_layers_of_classes_and_fusion_is_completed(changes, tmp_path):
    start = unet(attention_strides=(1,))
    with torch.no_grad():
        start.conv_in.weight[:, 4:] = 0  # as a converted start
    start.save_pretrained(tmp_path)
    loaded = unet(weights=str(tmp_path), attention_strides=(1,), **changes)
    own = loaded.state_dict()
    for name, value in start.state_dict().items():
        assert torch.equal(own[name], value[:, :4] if own[name].shape != value.shape else value), name


@pytest.mark.faults
def test_conditioning_that_a_start_reads_is_not_cut_off_for_attention(tmp_path):
    unet(attention_strides=(1,)).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"do not fit.*conv_in\.weight"):
        unet(weights=str(tmp_path), attention_strides=(1,), fusion="attention")


@pytest.mark.faults
def test_a_start_of_one_mask_does_not_fit_a_joint_unet_and_says_what_does(tmp_path):
    unet().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"gives 4 channels of latent, the recipe's 12\. .*start at random"):
        unet(weights=str(tmp_path), latent_channels=12)


@pytest.mark.parametrize("as_folder", [True, False])
def test_unet_weights_come_from_a_file_or_a_folder(as_folder, tmp_path):
    torch.manual_seed(0)
    saved = unet()
    saved.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = unet(weights=str(tmp_path if as_folder else tmp_path / FILE))
    for a, b in zip(saved.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.faults
def test_missing_unet_weights_are_named_with_the_recipe_that_needs_none():
    with pytest.raises(UsageError) as error:
        unet(weights="weights/lsun_churches")
    for part in ("model.unet_weights", "weights/lsun_churches", "lsun_churches.zip", "--recipe kseg-fast"):
        assert part in str(error.value)


@pytest.mark.faults
@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("conv_out.weight"),
        lambda tensors: tensors.update(strange=torch.ones(1)),
        lambda tensors: tensors.update({"conv_out.bias": torch.ones(9)}),
    ],
)
def test_unet_weights_that_do_not_fit_are_refused(tmp_path, change):
    unet().save_pretrained(tmp_path)
    edit(tmp_path / FILE, change)
    with pytest.raises(UsageError, match=r"do not fit the recipe's network: .*(conv_out|strange)"):
        unet(weights=str(tmp_path))


@pytest.mark.faults
@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b"")])
def test_truncated_weights_are_refused_by_name(tmp_path, damage):
    unet().save_pretrained(tmp_path)
    damage(tmp_path / FILE)
    with pytest.raises(UsageError, match=f"{tmp_path / FILE} cannot be read as safetensors"):
        unet(weights=str(tmp_path))


# Pipelines


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    SDSegPipeline(
        unet=unet(),
        image_encoder=image_encoder(),
        autoencoder=MaskAutoencoder(encoder_channels=(8, 8), decoder_channels=(8, 8)),
        scheduler=make_scheduler(),
        image_size=64,
    ).save_pretrained(tmp_path)
    return tmp_path


def test_a_whole_model_folder_is_loaded(saved):
    assert isinstance(load_pipeline(str(saved)), SDSegPipeline)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("conv_out.weight"), r"unet: .*Missing: conv_out\.weight"),
        (lambda tensors: tensors.update(strange=torch.ones(1)), "unet: .*Unexpected: strange"),
        (lambda tensors: tensors.update({"conv_out.bias": torch.ones(9)}), r"conv_out\.bias expected shape"),
    ],
)
def test_a_model_whose_weights_do_not_fit_is_refused(saved, change, message):
    edit(saved / "unet" / FILE, change)
    with pytest.raises(ModelError, match=message):
        load_pipeline(str(saved))


@pytest.mark.faults(16)
@pytest.mark.parametrize("component", ["unet", "image_encoder", "autoencoder"])
@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_a_damaged_model_is_refused_by_the_name_of_its_file(saved, component, damage):
    damage(saved / component / FILE)
    with pytest.raises(ModelError, match=f"{saved / component}"):
        load_pipeline(str(saved))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a valid JSON file"), ('{"_class_name": "StableDiffusionPipeline"}', "cannot be loaded")],
)
def test_a_damaged_or_foreign_model_index_is_refused(saved, text, message):
    (saved / "model_index.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        load_pipeline(str(saved))


@pytest.mark.faults
def test_a_model_index_that_names_a_module_that_is_not_there_is_refused(saved):
    index = json.loads((saved / "model_index.json").read_text())
    index["unet"] = ["no_such_module", "SDSegUNet"]
    (saved / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_pipeline(str(saved))


@pytest.mark.faults
@pytest.mark.parametrize("location", ["/nowhere/model", "clinic/no-such-model"])
def test_a_model_that_is_not_there_is_named(location):
    with pytest.raises(ModelError, match=f"model '{location}' cannot be loaded"):
        load_pipeline(location)


@pytest.mark.faults
@pytest.mark.parametrize(("status", "remedy"), [(404, "The hub answered 404"), (None, "HF_HUB_OFFLINE")])
def test_a_model_that_the_hub_does_not_give_names_the_remedy(monkeypatch, status, remedy):
    def download(_, **options):
        cause = ConnectionError("no route")
        if status:
            cause.response = SimpleNamespace(status_code=status)
        raise OSError("Cannot load model") from cause

    monkeypatch.setattr(weights, "snapshot_download", download)
    with pytest.raises(ModelError, match=f"No folder nobody/nothing is here, so .* hub id.*{remedy}"):
        weights.load_pipeline("nobody/nothing")
