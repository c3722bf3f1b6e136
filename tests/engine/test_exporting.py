"""An exported graph says what the model says, and predicts in its place."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from sdseg_cli.commands.export import Format
from sdseg_cli.commands.export import export as command
from sdseg_cli.core.engine.inference import SliceInput, load_predictor
from sdseg_cli.core.errors import ModelError, UsageError
from sdseg_cli.core.grid import Grid
from sdseg_cli.core.model import exported
from sdseg_cli.core.model.image_encoder import KLImageEncoder
from sdseg_cli.core.model.mask_autoencoder import MaskAutoencoder
from sdseg_cli.core.model.pipeline import SDSegPipeline
from sdseg_cli.core.model.plain_unet import PlainUNet
from sdseg_cli.core.model.schedule import make_scheduler
from sdseg_cli.core.model.unet import SDSegUNet
from sdseg_cli.core.run_directory import resolve_model

SIZE = 32
LIBRARIES = {"onnx": ["onnx", "onnxscript", "onnxruntime"], "openvino": ["onnx", "onnxscript", "openvino"]}


def libraries_of(kind: str) -> None:
    for library in LIBRARIES[kind]:
        pytest.importorskip(library, reason="needs the extra: pip install 'sdseg[export]'")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")

    def save(name: str, classes: tuple[str, ...], noise: str = "gaussian") -> None:
        torch.manual_seed(0)
        unet = SDSegUNet(
            sample_size=4,
            channels=(32, 32),
            blocks=1,
            heads=4,
            attention_strides=(2,),
            num_class_embeds=len(classes) if len(classes) > 2 else None,
        )
        SDSegPipeline(
            unet=unet,
            image_encoder=KLImageEncoder(channels=(32, 32, 32, 32), blocks=1),
            autoencoder=MaskAutoencoder(encoder_channels=(8, 8), decoder_channels=(8, 8)),
            scheduler=make_scheduler("sample"),
            classes=classes,
            image_size=SIZE,
            resize="pad",
            latent_scale=2.0,
            noise=noise,
        ).save_pretrained(root / name)

    save("binary", ("background", "polyp"))
    save("organs", ("background", "liver", "kidney"), "zeros")
    plain = SDSegPipeline(unet=PlainUNet("test_efficientnet", 2).eval(), image_size=SIZE)
    plain.save_pretrained(root / "plain")
    return root


def inputs(count: int) -> list[SliceInput]:
    draw, shape = np.random.default_rng(0), (SIZE, SIZE, 3)
    return [
        SliceInput(f"case {i}", i, draw.integers(0, 256, shape, dtype=np.uint8), Grid(40, 24, SIZE, "pad"))
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("organs", "onnx"),
        ("plain", "openvino"),
        pytest.param("binary", "onnx", marks=pytest.mark.slow),
        pytest.param("binary", "openvino", marks=pytest.mark.slow),
    ],
)
def test_an_exported_model_predicts_what_the_model_does(name, kind, models, tmp_path, capsys):
    libraries_of(kind)
    command(str(models / name), tmp_path / "out", Format(kind))
    assert capsys.readouterr().out == ""  # results alone go there
    fields = json.loads((tmp_path / "out" / "export.json").read_text())
    assert fields["max_abs_deviation"] < 1e-4
    assert fields["noise_shape"] == (None if name == "plain" else [4, 4, 4])
    options = {"seed": 3, "num_samples": 2, "batch_size": 2}
    expected = load_predictor(resolve_model(str(models / name)), device="cpu", **options)
    found = load_predictor(resolve_model(str(tmp_path / "out")), **options)
    assert (found.classes, found.image_size, found.resize) == (
        expected.classes, expected.image_size, expected.resize,
    )  # fmt: skip
    for one, other in zip(found(inputs(3)), expected(inputs(3)), strict=True):
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-4)
        np.testing.assert_allclose(one.uncertainty, other.uncertainty, atol=1e-4)


@pytest.mark.faults
def test_a_graph_that_differs_is_not_kept(models, tmp_path, monkeypatch):
    libraries_of("onnx")
    monkeypatch.setattr(exported, "LARGEST_DEVIATION", -1.0)
    with pytest.raises(ModelError, match="the onnx graph differs from the model by"):
        command(str(models / "plain"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.faults
def test_a_missing_library_is_named_with_the_extra(models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UsageError, match=r"onnx is not installed.*pip install 'sdseg\[export\]'"):
        command(str(models / "plain"), tmp_path / "out")


@pytest.mark.faults
def test_what_an_exported_model_cannot_do_is_refused(tmp_path):
    (tmp_path / "export.json").write_text("{}")
    reference = resolve_model(str(tmp_path))
    for refused in ({"device": "cuda"}, {"precision": "bf16"}, {"decoder": "small"}):
        with pytest.raises(UsageError, match="it runs on the CPU, in fp32"):
            load_predictor(reference, **refused)
    with pytest.raises(ModelError, match="holds no exported model that can be read"):
        load_predictor(reference)
    config = exported.ExportConfig("onnx", ("background", "polyp"), SIZE, "pad", 1.0, None, "gaussian")
    with pytest.raises(UsageError, match="takes one reverse step, and 5 were asked for"):
        exported.ExportedModel(config, lambda given: given["image"]).sample(
            [np.zeros((SIZE, SIZE, 3), np.uint8)], num_inference_steps=5, case_ids=["a"], slice_indices=[0]
        )
