"""What is loaded is compared with its manifest, whichever kind of model it is and whoever loads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sdseg_cli import cli
from sdseg_cli.core.errors import ModelError
from sdseg_cli.core.integrity import refuse_altered
from sdseg_cli.core.manifest import model_sum, write_manifest
from sdseg_cli.core.model.exported import load_exported
from sdseg_cli.core.model.image_encoder import KLImageEncoder
from sdseg_cli.core.model.mask_autoencoder import MaskAutoencoder
from sdseg_cli.core.model.pipeline import SDSegPipeline
from sdseg_cli.core.model.schedule import make_scheduler
from sdseg_cli.core.model.unet import SDSegUNet
from sdseg_cli.core.model.weights import (
    build_unet,
    load_any_autoencoder,
    load_autoencoder,
    load_pipeline,
    load_published_autoencoder,
    refer_to_autoencoder,
    replace_decoder,
)
from tests.small_models import small_kl

WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET = {"sample_size": 4, "channels": (32,), "blocks": 1, "heads": 4, "attention_strides": ()}


def make_model(autoencoder: MaskAutoencoder, reference: dict[str, str] | None = None) -> SDSegPipeline:
    torch.manual_seed(0)
    return SDSegPipeline(
        unet=SDSegUNet(**UNET),
        image_encoder=KLImageEncoder(channels=(32, 32, 32, 32), blocks=1),
        autoencoder=autoencoder,
        scheduler=make_scheduler("sample"),
        classes=("background", "polyp"),
        image_size=32,
        autoencoder_reference=reference,
    )


def make_autoencoder() -> MaskAutoencoder:
    torch.manual_seed(0)
    return MaskAutoencoder(encoder_channels=(8, 8), decoder_channels=(8, 8))


@pytest.fixture
def model(tmp_path) -> Path:
    """A model with its manifest."""
    make_model(make_autoencoder()).save_pretrained(tmp_path / "model")
    write_manifest(tmp_path / "model", "model")
    return tmp_path / "model"


def flip_a_bit(path: Path) -> None:
    """Of the last weight: the file loads as before."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def start_unet(location: Path) -> None:
    options = {name: value for name, value in UNET.items() if name != "sample_size"}
    build_unet(
        weights=str(location),
        sample_size=4,
        latent_channels=4,
        conditioning_channels=4,
        fusion="concat",
        dropout=0.0,
        num_class_embeds=None,
        **options,
    )


LOADERS = {
    "a whole model": (load_pipeline, "."),
    "its autoencoder": (load_autoencoder, "autoencoder"),
    "its autoencoder, of any kind": (load_any_autoencoder, "autoencoder"),
    "its U-Net as a start": (start_unet, "unet"),
    "the file of its U-Net": (start_unet, f"unet/{WEIGHTS}"),
}


@pytest.mark.faults(16)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_part_of_a_model_is_compared_with_the_manifest_of_the_model(loader, model):
    load, place = LOADERS[loader]
    load(str(model / place))
    part = place.split("/")[0] if place != "." else "unet"
    flip_a_bit(model / part / WEIGHTS)
    with pytest.raises(ModelError, match=f"{part}/{WEIGHTS} is altered: SHA-256 .* by {model}/manifest.json"):
        load(str(model / place))


@pytest.mark.faults(16)
@pytest.mark.parametrize("inside", [".", "vae"])
def test_a_published_autoencoder_is_compared(inside, tmp_path):
    small_kl().save_pretrained(tmp_path / "kl" / inside)
    write_manifest(tmp_path / "kl", "autoencoder")
    load_published_autoencoder(str(tmp_path / "kl"))
    flip_a_bit(tmp_path / "kl" / inside / WEIGHTS)
    with pytest.raises(ModelError, match=r"is altered: SHA-256 .*Restore the file"):
        load_published_autoencoder(str(tmp_path / "kl"))


@pytest.mark.faults(16)
def test_an_autoencoder_and_a_decoder_that_sdseg_made_are_compared_and_say_what_they_are_of(polyps, tmp_path):
    small_kl().save_pretrained(tmp_path / "kl")
    common = ["autoencoder", "--steps", "1", "--masks", "16", "--size", "64", "--batch-size"]
    common += ["2", "--data", str(polyps), "--device", "cpu", "--json", "--out"]
    made = {"autoencoder": ["--crop", "32"], "decoder": ["--distill", str(tmp_path / "kl")]}
    for kind, options in made.items():
        with pytest.raises(SystemExit) as leaving:
            cli.main([*common, str(tmp_path / kind), *options])
        assert leaving.value.code == 0
        manifest = json.loads((tmp_path / kind / "manifest.json").read_text())
        assert manifest["kind"] == kind
        assert manifest["dataset"]["path"] == str(polyps)
        assert len(manifest["dataset"]["fingerprint"]) == 64
        assert manifest["masks"] == {"generated": 16, "size": 64, "seed": 0}
        assert torch.__version__.startswith(manifest["versions"]["torch"])
        assert manifest["written"]
    assert manifest["teacher"]["location"] == str(tmp_path / "kl")
    assert len(manifest["teacher"]["sha256"]) == 64
    pipeline = make_model(small_kl())
    replace_decoder(pipeline, str(tmp_path / "decoder"))
    load_autoencoder(str(tmp_path / "autoencoder"))
    for kind in made:
        flip_a_bit(tmp_path / kind / WEIGHTS)
    with pytest.raises(ModelError, match=f"decoder/{WEIGHTS} is altered"):
        replace_decoder(make_model(small_kl()), str(tmp_path / "decoder"))
    with pytest.raises(ModelError, match=f"autoencoder/{WEIGHTS} is altered"):
        load_autoencoder(str(tmp_path / "autoencoder"))


@pytest.mark.faults(16)
def test_an_exported_graph_is_compared_before_its_runtime_reads_it(tmp_path):
    (tmp_path / "export.json").write_text("{}")
    (tmp_path / "model.onnx").write_bytes(bytes(100))
    write_manifest(tmp_path, "exported model")
    flip_a_bit(tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=r"model\.onnx is altered: SHA-256"):
        load_exported(tmp_path)


@pytest.mark.faults(16)
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "holds no JSON object"),
        ("{}", "no 'files'"),
        ('{"files": 3}', "no attribute 'items'"),
        ('{"files": {"a": 3}}', "'int'"),
        ('{"files": {"../secret": "00"}}', r"it lists \.\./secret, which is not in the folder"),
        ('{"files": {"/etc/passwd": "00"}}', "it lists /etc/passwd, which is not in the folder"),
        ('{"files": {"unet/../../secret": "00"}}', "which is not in the folder"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_damaged_manifest_is_told_with_its_remedy_and_leads_nowhere(content, reason, model, monkeypatch):
    (model.parent / "secret").write_text("not to be read")
    monkeypatch.setattr("sdseg_cli.core.integrity.sha256_of", lambda path: pytest.fail(f"{path} was read"))
    (model / "manifest.json").write_text(content)
    with pytest.raises(
        ModelError, match=rf"manifest\.json is damaged \(.*{reason}.*Copy the whole folder again"
    ):
        refuse_altered(model)


def test_a_manifest_of_others_beside_a_folder_is_none_of_its_own(tmp_path):
    make_autoencoder().save_pretrained(tmp_path / "mine")
    (tmp_path / "manifest.json").write_text("of another program")
    load_autoencoder(str(tmp_path / "mine"))


def test_a_card_that_was_rewritten_and_a_file_that_is_gone_are_no_alteration(model):
    (model / "README.md").write_text("card")
    write_manifest(model, "model")
    (model / "README.md").write_text("better card")
    (model / "scheduler" / "scheduler_config.json").unlink()
    refuse_altered(model)  # who needs the file names it


def test_the_sum_of_a_model_holds_the_autoencoder_that_it_refers_to(tmp_path):
    autoencoder = make_autoencoder()
    autoencoder.save_pretrained(tmp_path / "kept")
    reference = refer_to_autoencoder(str(tmp_path / "kept"), autoencoder)
    make_model(autoencoder, reference).save_pretrained(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "whole")
    shutil.copytree(tmp_path / "kept", tmp_path / "whole" / "autoencoder")
    before = model_sum(tmp_path / "model")
    assert before == model_sum(tmp_path / "whole")  # as if it lay there
    config = tmp_path / "kept" / "config.json"  # which the checksum of its tensors says nothing of
    config.write_text(config.read_text() + "\n")
    assert model_sum(tmp_path / "model") != before
