"""``sdseg convert`` as a command, and its results in predict, evaluate, stability and train."""

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from sdseg_cli.cli import main
from sdseg_cli.core.model.weights import load_autoencoder, load_pipeline

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("SDSEG_SHARED", ROOT.parent / "shared"))
SIZE = 32  # that of the phantoms; the fixtures' networks take any multiple of 32


def sdseg(*args: object) -> int:
    """Run the program in this process; its exit code."""
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args])
    return int(end.value.code or 0)


@pytest.fixture
def diffusers_folder(tmp_path) -> Path:
    """A whole diffusers model as far as sdseg looks: its autoencoder lies in ``vae``."""
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(tmp_path / "stable-diffusion" / "vae")
    return tmp_path / "stable-diffusion"


# Folders of other libraries


@pytest.mark.parametrize("part", ["", "vae"])
def test_the_autoencoder_of_a_diffusers_folder_is_taken(diffusers_folder, part, tmp_path, capsys):
    out = tmp_path / "kl"
    assert sdseg("convert", diffusers_folder / part, "--out", out) == 0
    assert "--set model.image_encoder_weights=autoencoder" in capsys.readouterr().err.replace("\n", " ")
    saved = load_file(diffusers_folder / "vae" / "diffusion_pytorch_model.safetensors")
    for name, value in load_autoencoder(str(out)).state_dict().items():
        assert torch.equal(saved[name], value), name


def test_half_stores_half_the_bytes(diffusers_folder, tmp_path):
    for name, flags in {"full": [], "half": ["--half"]}.items():
        assert sdseg("convert", diffusers_folder, "--out", tmp_path / name, *flags) == 0
    full, half = (
        (tmp_path / name / "diffusion_pytorch_model.safetensors").stat().st_size for name in ("full", "half")
    )
    assert half < 0.52 * full


def test_the_result_records_where_it_came_from_and_can_be_read_by_others(diffusers_folder, tmp_path, capsys):
    out = tmp_path / "kl"
    assert sdseg("convert", diffusers_folder, "--out", out, "--json") == 0
    printed, recorded = json.loads(capsys.readouterr().out), json.loads((out / "conversion.json").read_text())
    assert printed == {"folder": str(out), **recorded}
    assert recorded["source"] == str(diffusers_folder)
    assert recorded["networks"]["autoencoder"]["parameters"] > 0
    umask = os.umask(0)
    os.umask(umask)
    for file in out.rglob("*.safetensors"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask


@pytest.mark.faults
def test_an_existing_result_is_replaced_on_request_only(diffusers_folder, tmp_path, capsys):
    out = tmp_path / "kl"
    assert sdseg("convert", diffusers_folder, "--out", out) == 0
    assert sdseg("convert", diffusers_folder, "--out", out) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert sdseg("convert", diffusers_folder, "--out", out, "--overwrite") == 0


@pytest.mark.faults
def test_somebody_elses_folder_is_left_alone(diffusers_folder, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.tex").write_text("years")
    assert sdseg("convert", diffusers_folder, "--out", out, "--overwrite") == 2
    assert [file.name for file in out.iterdir()] == ["thesis.tex"]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        ("nowhere.ckpt", 1, "nowhere.ckpt does not exist"),
        ("empty.ckpt", 1, "empty.ckpt is empty"),
        ("./nowhere", 1, "./nowhere holds no KL autoencoder"),
        ("clinic/no-such-model", 1, "clinic/no-such-model holds no KL autoencoder"),
    ],
)
def test_what_cannot_be_read_is_named_and_leaves_nothing(
    tmp_path, monkeypatch, capsys, source, code, message
):
    monkeypatch.chdir(tmp_path)
    Path("empty.ckpt").touch()
    assert sdseg("convert", source, "--out", "out") == code
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert [file.name for file in tmp_path.iterdir()] == ["empty.ckpt"]


@pytest.mark.faults
def test_an_option_of_checkpoints_is_refused_for_a_folder(diffusers_folder, tmp_path, capsys):
    assert sdseg("convert", diffusers_folder, "--out", tmp_path / "kl", "--weights", "raw") == 2
    assert "--weights applies to these only" in capsys.readouterr().err.replace("\n", " ")


# Official checkpoints


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Convert a fixture once: ``converted("binary")`` is the model's folder."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        source = SHARED / "fixtures" / f"sdseg_{name}_tiny.ckpt"
        if not source.is_file():
            pytest.skip(f"no fixtures at {source.parent}: set SDSEG_SHARED to the folder that holds them")
        if name not in folders:
            out = tmp_path_factory.mktemp("converted") / name
            flags = ["--classes", "liver,kidney,spleen"] if name == "multiclass" else ["--classes", "polyp"]
            assert sdseg("convert", source, "--out", out, "--image-size", SIZE, *flags) == 0
            folders[name] = out
        return folders[name]

    return make


@pytest.mark.fixtures
@pytest.mark.parametrize(("name", "classes"), [("binary", 2), ("multiclass", 4)])
def test_a_converted_checkpoint_segments_pictures(converted, name, classes, tmp_path):
    scans, masks = tmp_path / "scans", tmp_path / "masks"
    scans.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(scans / "a.png")
    Image.fromarray(pixels[:, ::-1]).save(scans / "b.jpg")
    assert sdseg("predict", scans, "--model", converted(name), "--out", masks, "--device", "cpu") == 0
    assert {"a.png", "b.png"} <= {file.name for file in masks.iterdir()}
    with Image.open(masks / "a.png") as mask:
        assert mask.size == (40, 30)
    assert load_pipeline(str(converted(name))).num_classes == classes


@pytest.mark.fixtures
@pytest.mark.parametrize(("name", "dataset"), [("binary", "polyps"), ("multiclass", "organs")])
def test_a_converted_checkpoint_is_evaluated(converted, name, dataset, tmp_path, request):
    data = request.getfixturevalue(dataset)
    out = tmp_path / "scores"
    arguments = ("--model", converted(name), "--data", data, "--out", out, "--device", "cpu")
    assert sdseg("evaluate", *arguments) == 0
    assert (out / "cases.csv").is_file()
    assert (out / "summary.json").is_file()


@pytest.mark.fixtures
def test_the_stability_of_a_converted_checkpoint_is_measured(converted, polyps, tmp_path):
    out = tmp_path / "stability"
    arguments = ("--model", converted("binary"), "--data", polyps, "--runs", 2, "--limit", 1, "--out", out)
    assert sdseg("stability", *arguments, "--device", "cpu") == 0
    assert any(out.rglob("summary.json"))


@pytest.mark.fixtures
def test_a_converted_checkpoint_is_a_start_for_training(converted, tiny_recipe, trained, tmp_path):
    folder = converted("binary")
    recipe = tiny_recipe(
        {
            "model.autoencoder": str(folder / "autoencoder"),
            "model.image_encoder_weights": str(folder / "image_encoder"),
            "model.unet_weights": str(folder / "unet"),
            "model.unet_channels": [32, 64, 64],
            "model.unet_heads": 8,
            "model.unet_attention_strides": [1, 2],
            "train.steps": 1,
            "train.learning_rate": 1e-5,
            "train.ema_decay": 0.0,
        }
    )
    result = trained(recipe, tmp_path / "run")
    before, after = load_pipeline(str(folder)), load_pipeline(str(result.run.model))
    for part in ("unet", "image_encoder"):
        for name, value in getattr(before, part).state_dict().items():
            moved = (getattr(after, part).state_dict()[name] - value).abs().max()
            assert moved <= 2e-5, name  # one optimizer step away from the start, not from somewhere else


@pytest.mark.fixtures
def test_a_raw_checkpoint_as_model_is_refused_with_the_command_that_converts_it(tmp_path, capsys):
    source = SHARED / "fixtures" / "sdseg_binary_tiny.ckpt"
    if not source.is_file():
        pytest.skip(f"no fixtures at {source.parent}: set SDSEG_SHARED to the folder that holds them")
    assert sdseg("predict", tmp_path, "--model", source, "--out", tmp_path / "masks") == 2
    assert f"sdseg convert {source}" in capsys.readouterr().err.replace("\n", "")


@pytest.mark.fixtures
def test_a_model_may_refer_to_the_autoencoder_that_it_holds_too(
    converted, diffusers_folder, tmp_path, capsys
):
    whole, source = converted("binary"), SHARED / "fixtures" / "sdseg_binary_tiny.ckpt"
    options = ("--image-size", SIZE, "--out", tmp_path / "small", "--autoencoder")
    assert sdseg("convert", source, *options, diffusers_folder) == 1
    assert "is not the checkpoint's autoencoder" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "small").exists()
    assert sdseg("convert", source, *options, whole / "autoencoder") == 0
    assert not (tmp_path / "small" / "autoencoder").exists()
    image = np.full((SIZE, SIZE, 3), 90, np.uint8)
    one, other = (
        load_pipeline(str(folder))(image).probabilities[0] for folder in (whole, tmp_path / "small")
    )
    assert np.allclose(one, other, atol=1e-6)
