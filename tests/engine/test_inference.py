"""The predictor: batches, padding, compiled networks and memory change nothing in what is predicted."""

from __future__ import annotations

import os
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from timm.layers import StdConv2d

from sdseg_cli.core.engine import acceleration
from sdseg_cli.core.engine.acceleration import compile_cache, fitting_batch
from sdseg_cli.core.engine.inference import Predictor, SliceInput, choose_device, load_predictor
from sdseg_cli.core.errors import OutOfMemoryError
from sdseg_cli.core.grid import Grid
from sdseg_cli.core.model.image_encoder import KLImageEncoder
from sdseg_cli.core.model.mask_autoencoder import MaskAutoencoder
from sdseg_cli.core.model.pipeline import SDSegPipeline
from sdseg_cli.core.model.plain_unet import PlainUNet
from sdseg_cli.core.model.schedule import make_scheduler
from sdseg_cli.core.model.unet import SDSegUNet
from sdseg_cli.core.run_directory import resolve_model

SIZE = 32
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None and "CXX" not in os.environ,
    reason="no C++ compiler here (g++ or clang++)",
)


def make(classes=("background", "polyp"), prediction="sample") -> SDSegPipeline:
    torch.manual_seed(0)
    unet = SDSegUNet(
        sample_size=SIZE // 8,
        channels=(32, 32),
        blocks=1,
        heads=4,
        attention_strides=(),
        num_class_embeds=len(classes) if len(classes) > 2 else None,
    )
    pipeline = SDSegPipeline(
        unet=unet,
        image_encoder=KLImageEncoder(channels=(32, 32, 32, 32), blocks=1),
        autoencoder=MaskAutoencoder(encoder_channels=(8, 8), decoder_channels=(8, 8)),
        scheduler=make_scheduler(prediction),
        classes=classes,
        image_size=SIZE,
    )
    for network in (pipeline.unet, pipeline.image_encoder, pipeline.autoencoder):
        network.eval().requires_grad_(False)
    return pipeline


def inputs(count: int) -> list[SliceInput]:
    draw, shape = np.random.default_rng(0), (SIZE, SIZE, 3)
    return [
        SliceInput(f"case {i}", i, draw.integers(0, 256, shape, dtype=np.uint8), Grid(40, 24, SIZE, "pad"))
        for i in range(count)
    ]


def assert_same(found, expected, tolerance=1e-5):
    found, expected = list(found), list(expected)
    assert [(p.case_id, p.slice_index) for p in found] == [(p.case_id, p.slice_index) for p in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=tolerance)
        undecided = np.abs(other.probabilities[1:] - 0.5).min(axis=0) < tolerance
        np.testing.assert_array_equal(one.label_map[~undecided], other.label_map[~undecided])


@pytest.mark.parametrize("classes", [("background", "polyp"), ("background", "liver", "kidney")])
def test_a_padded_batch_predicts_what_the_images_alone_do(classes):
    pipeline = make(classes)
    three = inputs(3)
    names = {"case_ids": [i.case_id for i in three], "slice_indices": [i.slice_index for i in three]}
    pixels = [item.image for item in three]
    alone = pipeline.sample(pixels, num_samples=2, seed=5, **names)
    padded = pipeline.sample(pixels, num_samples=2, seed=5, pad_to=8, **names)
    assert padded.shape == alone.shape == (3, 2, len(classes), SIZE, SIZE)
    np.testing.assert_allclose(padded, alone, atol=1e-5)


def test_the_predictor_says_what_the_pipeline_says():
    pipeline = make()
    given = inputs(5)
    output = pipeline(
        [item.image for item in given],
        case_ids=[item.case_id for item in given],
        slice_indices=[item.slice_index for item in given],
        grids=[item.grid for item in given],
        num_samples=2,
        return_samples=True,
    )
    found = list(Predictor(pipeline, batch_size=2, num_samples=2, return_samples=True)(given))
    for index, one in enumerate(found):
        np.testing.assert_allclose(one.samples, output.samples[index], atol=1e-5)
        np.testing.assert_allclose(one.uncertainty, output.uncertainty[index], atol=1e-5)


def test_a_model_loaded_on_a_cpu_has_its_channels_last_and_predicts_the_same(tmp_path):
    make().save_pretrained(tmp_path / "model")
    loaded = load_predictor(resolve_model(str(tmp_path / "model")), device="cpu")
    for network in loaded.pipeline.computing_networks():
        weights = [own.weight for own in network.modules() if isinstance(own, torch.nn.Conv2d)]
        assert weights
        assert all(own.is_contiguous(memory_format=torch.channels_last) for own in weights)
    for one, other in zip(loaded(inputs(3)), Predictor(make())(inputs(3)), strict=True):
        np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-5)


@pytest.mark.parametrize("classes", [("background", "polyp"), ("background", "liver", "kidney")])
def test_weights_held_in_half_predict_bit_for_bit_what_autocast_does(tmp_path, classes):
    make(classes).save_pretrained(tmp_path / "model")
    held = load_predictor(resolve_model(str(tmp_path / "model")), device="cpu", precision="bf16")
    kinds = Counter(weights.dtype for weights in held.pipeline.unet.parameters())
    assert kinds[torch.bfloat16] > kinds[torch.float32] > 0  # norms keep theirs
    cast = Predictor(make(classes), precision="bf16")
    acceleration.use_channels_last(cast.pipeline.computing_networks(), torch.device("cpu"))
    assert_same(held(inputs(3)), cast(inputs(3)), tolerance=0)


@pytest.mark.parametrize("layer", [torch.nn.Conv2d, StdConv2d], ids=["plain", "standardised"])
def test_only_weights_that_autocast_would_cast_are_held_in_half(layer):
    torch.manual_seed(0)
    network, images = layer(3, 8, 3).eval(), torch.rand(2, 3, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = network(images)
        acceleration.hold_in_half([network], torch.bfloat16)
        torch.testing.assert_close(network(images), expected, atol=0, rtol=0)
    assert network.weight.dtype == (torch.bfloat16 if layer is torch.nn.Conv2d else torch.float32)


def test_a_gpu_that_was_asked_for_becomes_the_current_one(monkeypatch):
    """Graphs are recorded on streams of the current one: on another they would be empty."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert choose_device("cuda:1") == torch.device("cuda:1") == current[0]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == torch.device("cuda:1") == current[1]
    assert choose_device("cpu") == torch.device("cpu")
    assert len(current) == 2


def test_work_behind_the_networks_keeps_the_order_and_the_results():
    pipeline = make()
    behind = Predictor(pipeline, batch_size=2)
    behind.overlap = True
    assert_same(behind(inputs(7)), Predictor(pipeline, batch_size=2)(inputs(7)), tolerance=0)


def test_compiled_networks_predict_the_same_and_are_compiled_once(monkeypatch):
    """Traced and run without code generation, which takes minutes on a CPU."""
    graphs = []

    def traced(networks):
        for network in networks:
            network.compile(backend=lambda graph, examples: (graphs.append(graph), graph)[1], dynamic=False)

    monkeypatch.setattr(acceleration, "missing_compiler", lambda device: None)
    monkeypatch.setattr(acceleration, "compile_networks", traced)
    pipeline = make()
    expected = list(Predictor(pipeline, batch_size=4)(inputs(6)))
    predictor = Predictor(pipeline, batch_size=4)
    assert predictor.compile() is None
    compiled = len(graphs)
    assert compiled >= 3  # image encoder, U-Net, decoder
    assert_same(predictor(inputs(6)), expected)  # the last batch holds 2 of 4
    assert len(graphs) == compiled
    assert not any("_orig_mod" in name for name in pipeline.unet.state_dict())


@needs_compiler
def test_generated_code_computes_what_the_networks_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.SiLU()).eval()
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        expected = network(images)
        reason = acceleration.try_compiled([network], lambda: network(images), torch.device("cpu"))
        assert reason is None
        torch.testing.assert_close(network(images), expected, atol=1e-5, rtol=1e-5)
    assert list((tmp_path / "compiled").iterdir())
    assert set(network.state_dict()) == {"0.weight", "0.bias"}


def test_without_a_compiler_the_networks_run_as_written_and_the_reason_is_told(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    predictor = Predictor(make(), batch_size=4)
    assert "no C++ compiler was found (looked for no-such-compiler)" in predictor.compile()
    assert_same(predictor(inputs(3)), Predictor(make(), batch_size=4)(inputs(3)))


def test_a_compiler_that_fails_leaves_the_networks_as_written(monkeypatch):
    monkeypatch.setattr(acceleration, "missing_compiler", lambda device: None)

    def broken(networks):
        for network in networks:
            network.compile(backend=refuses)

    def refuses(graph, examples):
        raise RuntimeError("this machine cannot compile")

    monkeypatch.setattr(acceleration, "compile_networks", broken)
    predictor = Predictor(make(), batch_size=4)
    assert "this machine cannot compile" in predictor.compile()
    assert_same(predictor(inputs(3)), Predictor(make(), batch_size=4)(inputs(3)))


def test_a_plain_unet_has_one_network_to_compile():
    plain = SDSegPipeline(unet=PlainUNet("test_efficientnet", 2), image_size=SIZE)
    assert plain.computing_networks() == [plain.unet]


class Meter:
    """A device with ``free`` bytes, on which an image takes ``image`` bytes."""

    def __init__(self, free: int, image: int) -> None:
        self.free, self.image = free, image

    def free_bytes(self) -> int:
        return self.free

    def peak(self):
        from contextlib import nullcontext

        return nullcontext([4 * self.image])


@pytest.mark.parametrize(
    ("free", "image", "batch"),
    [(1000, 10, 32), (100, 10, 4), (10, 10, 1), (0, 10, 1), (10**9, 1, 64), (10**9, 0, 64)],
)
def test_the_batch_is_what_fits_well_into_the_free_memory(free, image, batch):
    assert fitting_batch(free, image) == batch
    predictor = Predictor(make())
    predictor.meter = Meter(free, image)
    assert len(list(predictor(inputs(3)))) == 3
    assert predictor.batch_size == batch


def test_a_batch_that_was_asked_for_is_not_measured():
    predictor = Predictor(make(), batch_size=3)
    assert predictor.meter is None
    predictor.choose_batch_size()
    assert predictor.batch_size == 3


@pytest.mark.faults(20)
def test_batches_are_halved_until_they_fit(monkeypatch):
    pipeline = make()
    sample = pipeline.sample

    def limited(images, **options):
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sample(images, **options)

    expected = list(Predictor(pipeline, batch_size=2)(inputs(9)))
    monkeypatch.setattr(pipeline, "sample", limited)
    predictor = Predictor(pipeline, batch_size=8)
    assert_same(predictor(inputs(9)), expected)
    assert predictor.batch_size == 2


def test_what_was_predicted_before_the_memory_ran_out_is_given_first(monkeypatch):
    pipeline = make()
    sample = pipeline.sample

    def limited(images, **options):
        if options["case_ids"][0] == "case 2":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sample(images, **options)

    monkeypatch.setattr(pipeline, "sample", limited)
    predictor = Predictor(pipeline, batch_size=1)
    predictor.overlap = True
    stream = predictor(inputs(3))
    assert [next(stream).case_id, next(stream).case_id] == ["case 0", "case 1"]
    with pytest.raises(OutOfMemoryError, match="does not fit into the memory"):
        next(stream)


def test_the_clean_latent_is_computed_in_float32_under_autocast(monkeypatch):
    seen = []
    pipeline = make(prediction="epsilon")
    decode = pipeline.autoencoder.decode
    monkeypatch.setattr(pipeline.autoencoder, "decode", lambda z: (seen.append(z.dtype), decode(z))[1])
    exact = list(Predictor(pipeline, batch_size=2)(inputs(2)))
    found = list(Predictor(pipeline, batch_size=2, precision="bf16")(inputs(2)))
    assert set(seen) == {torch.float32}
    for one, other in zip(found, exact, strict=True):
        assert one.probabilities.dtype == np.float32
        assert np.abs(one.probabilities - other.probabilities).max() < 0.2


def test_compiled_networks_are_kept_in_the_users_cache_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cache() == tmp_path / "sdseg" / "compiled"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    assert compile_cache() == tmp_path / "mine"
