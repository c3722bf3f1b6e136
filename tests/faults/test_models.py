"""Rows 15, 16, 20, 22, 24 and 26: models, checkpoints, memory, and what is refused before they are loaded."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdseg_cli.core.files import sha256_of
from sdseg_cli.core.recipe import recipe_to_yaml
from sdseg_cli.core.run_directory import RunDirectory


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.fixture
def proof(tmp_path) -> Path:
    """What must never come to be."""
    return tmp_path / "executed"


@pytest.fixture
def recipe(tiny_recipe, tmp_path, monkeypatch) -> Path:
    """A recipe of three steps in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    changes = {"train.steps": 3, "train.checkpoint_every": 1, "train.keep_checkpoints": 3}
    path.write_text(recipe_to_yaml(tiny_recipe(changes)))
    return path


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(5):
        noise = np.random.default_rng(index).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def broken_model(tiny_model, tmp_path) -> Path:
    """A copy of a model, to be damaged."""
    return Path(shutil.copytree(tiny_model / "model", tmp_path / "broken"))


# ---- files that hold code


@pytest.mark.faults(15)
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_checkpoint_that_holds_code_is_refused_and_never_executed(form, sdseg, proof, tmp_path, pictures):
    evil = tmp_path / "evil.ckpt"
    if form == "torch":
        torch.save({"state_dict": {"a": torch.ones(1)}, "callbacks": Evil(proof)}, evil)
    else:
        evil.write_bytes(pickle.dumps(Evil(proof)))
    ended = sdseg("convert", evil, "--out", tmp_path / "out")
    assert ended.code == 1
    assert ended.says(str(evil))
    if form == "torch":
        assert ended.says("Nothing was executed.", "save the weights alone")
    ended = sdseg("predict", pictures, "--model", evil, "--out", tmp_path / "out", "--device", "cpu")
    assert ended.code == 2
    assert ended.says(f"sdseg convert {evil} --out")
    assert not (tmp_path / "out").exists()
    assert not proof.exists()


@pytest.mark.faults(15)
def test_code_in_the_place_of_a_models_weights_is_never_executed(
    sdseg, proof, tmp_path, pictures, broken_model
):
    weights = broken_model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save(Evil(proof), weights.with_suffix(".bin"))
    (weights.with_name("pytorch_model.bin")).write_bytes(pickle.dumps(Evil(proof)))
    ended = sdseg("predict", pictures, "--model", broken_model, "--out", tmp_path / "out", "--device", "cpu")
    assert ended.code == 1
    assert ended.says(str(broken_model / "unet"))
    assert not proof.exists()
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.faults(15)
def test_a_lightning_checkpoint_of_another_model_is_refused_with_what_it_holds(sdseg, tmp_path):
    holds = {"state_dict": {"encoder.layer.weight": torch.ones(2, 2)}, "pytorch-lightning_version": "1.4.2"}
    torch.save({**holds, "epoch": 3, "optimizer_states": []}, tmp_path / "other.ckpt")
    ended = sdseg("convert", tmp_path / "other.ckpt", "--out", tmp_path / "out")
    assert ended.code == 1
    assert ended.says("other.ckpt", "encoder")
    assert not (tmp_path / "out").exists()


# ---- files that are torn or altered


@pytest.mark.faults(16)
@pytest.mark.parametrize("component", ["unet", "image_encoder"])
@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "text"])
def test_a_model_whose_weights_are_damaged_is_refused_by_the_name_of_the_file(
    component, damage, sdseg, tmp_path, pictures, broken_model
):
    weights = broken_model / component / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes({"cut": content[:-1000], "empty": b"", "text": b"404: not found"}[damage])
    ended = sdseg("predict", pictures, "--model", broken_model, "--out", tmp_path / "out", "--device", "cpu")
    assert ended.code == 1
    assert ended.says(f"{broken_model / component}")
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.faults(16)
@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "model_index.json"])
def test_a_model_with_one_bit_altered_is_refused_by_the_checksum_of_its_file(
    name, sdseg, tmp_path, pictures, broken_model
):
    """It would load: safetensors has no checksum of its own, and the manifest beside it has."""
    files = [path for path in broken_model.rglob("*") if path.is_file()]
    sums = {path.relative_to(broken_model).as_posix(): sha256_of(path) for path in files}
    (broken_model / "manifest.json").write_text(json.dumps({"files": sums}))
    options = ("predict", pictures, "--model", broken_model, "--out", tmp_path / "out", "--device", "cpu")
    assert sdseg(*options).code == 0
    shutil.rmtree(tmp_path / "out")
    altered = bytearray((broken_model / name).read_bytes())
    altered[-2] ^= 1
    (broken_model / name).write_bytes(altered)
    ended = sdseg(*options)
    assert ended.code == 1
    assert ended.says(
        f"{broken_model / name} is altered: SHA-256", "Restore the file, or copy the whole folder"
    )
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.fixture(scope="module")
def three_steps(tiny_recipe, tmp_path_factory) -> Path:
    """A run with a checkpoint after each of three steps."""
    from sdseg_cli.core.engine.training import Training

    changes = {"train.steps": 3, "train.checkpoint_every": 1, "train.keep_checkpoints": 3}
    recipe = tiny_recipe(changes)
    run = RunDirectory.create(tmp_path_factory.mktemp("three") / "run", recipe)
    list(Training(recipe, device="cpu").run(run))
    return run.root


@pytest.fixture
def run(three_steps, tmp_path) -> RunDirectory:
    """A copy of it that says it was interrupted."""
    copied = RunDirectory(Path(shutil.copytree(three_steps, tmp_path / "run")))
    copied.write_run_json(status="interrupted")
    return copied


@pytest.mark.faults(16, 26)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl"])
@pytest.mark.parametrize("damage", ["missing", "cut", "one bit"])
def test_a_torn_checkpoint_is_refused_with_its_file_and_the_last_good_one(name, damage, sdseg, run):
    before = {path: path.stat().st_mtime_ns for path in run.checkpoints.rglob("*")}
    file = run.checkpoint(3) / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[-1] ^= 1
        file.write_bytes(content)
    ended = sdseg("train", "--resume", run.root, "--device", "cpu", "--set", "train.steps=4")
    assert ended.code == 1
    assert ended.says(f"checkpoint {run.checkpoint(3)} cannot be used", name)
    assert ended.says(
        f"The last good checkpoint is {run.checkpoint(2)}; delete {run.checkpoint(3)} to continue"
    )
    if damage != "missing":
        assert ended.says(f"{name} is altered: SHA-256")
    untouched = {path: path.stat().st_mtime_ns for path in run.checkpoints.rglob("*") if path.name != name}
    assert {path: time for path, time in before.items() if path.name != name and path != file.parent} == {
        path: time for path, time in untouched.items() if path != file.parent
    }


@pytest.mark.faults(26)
def test_after_deleting_the_torn_checkpoint_as_told_the_run_goes_on_from_the_last_good_one(sdseg, run):
    shutil.rmtree(run.checkpoint(3))
    ended = sdseg("train", "--resume", run.root, "--device", "cpu")
    assert ended.code == 0, ended.err
    assert ended.says("steps 3 to 3")
    assert run.status == "finished"


# ---- memory (the shortage is injected)


@pytest.mark.faults(20)
def test_prediction_retries_smaller_and_predicts_the_same(sdseg, tmp_path, pictures, tiny_model, monkeypatch):
    from sdseg_cli.core.model.pipeline import SDSegPipeline

    def predict(out: str):
        return sdseg(
            *("predict", pictures, "--model", tiny_model, "--out", tmp_path / out, "--device", "cpu"),
            *("--batch-size", 4, "--probabilities"),
        )

    assert predict("roomy").code == 0
    sample, sizes = SDSegPipeline.sample, []

    def small_device(pipeline, images, **options):
        sizes.append(len(images))
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return sample(pipeline, images, **options)

    monkeypatch.setattr(SDSegPipeline, "sample", small_device)
    ended = predict("narrow")
    assert ended.code == 0, ended.err
    assert sizes[:4] == [4, 2, 1, 1]
    assert sizes.count(1) == 5
    for one in sorted((tmp_path / "roomy" / "probabilities").iterdir()):
        levels = [np.asarray(Image.open(f)) for f in (one, tmp_path / "narrow" / "probabilities" / one.name)]
        assert np.abs(levels[0].astype(int) - levels[1]).max() <= 8  # of 65,535: sums in another order


@pytest.mark.faults(20)
def test_memory_that_does_not_hold_one_image_ends_with_what_was_done(
    sdseg, tmp_path, pictures, tiny_model, monkeypatch
):
    from sdseg_cli.core.model.pipeline import SDSegPipeline

    sample = SDSegPipeline.sample

    def too_small(pipeline, images, **options):
        if options["case_ids"][0] == "3":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sample(pipeline, images, **options)

    monkeypatch.setattr(SDSegPipeline, "sample", too_small)
    out = tmp_path / "out"
    ended = sdseg(
        "predict", pictures, "--model", tiny_model, "--out", out, "--device", "cpu", "--batch-size", 1
    )
    assert ended.code == 1
    assert ended.says("does not fit into the memory", "3 of 5 images done", "2 not reached")
    assert {path.name for path in out.glob("*.png")} == {"0.png", "1.png", "2.png"}
    assert json.loads((out / "prediction.json").read_text())["status"] == "stopped"


@pytest.mark.faults(20)
def test_training_says_which_setting_to_change(sdseg, recipe, tmp_path, monkeypatch):
    from sdseg_cli.core.engine import learner

    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(learner, "diffusion_loss", too_much)
    ended = sdseg("train", "-r", recipe, "--out", "run", "--device", "cpu")
    assert ended.code == 1
    assert ended.says("does not hold a part of 4 images", "--set train.gradient_accumulation=2")
    assert RunDirectory.open(tmp_path / "run").status == "failed"


# ---- what is refused before the model is loaded


@pytest.fixture
def no_model_is_loaded(monkeypatch) -> None:
    from sdseg_cli.core.engine import inference, learner

    for place, name in ((inference, "load_pipeline"), (learner, "build_networks")):
        monkeypatch.setattr(place, name, lambda *_, **__: pytest.fail("the model was loaded"))


def commands(data: Path, pictures: Path, model: Path, recipe: Path) -> dict[str, tuple[object, ...]]:
    measured = ("--model", model, "--data", data)
    return {
        "predict": ("predict", pictures, "--model", model),
        "evaluate": ("evaluate", *measured),
        "stability": ("stability", *measured, "--runs", 2),
        "train": ("train", "--recipe", recipe),
    }


@pytest.mark.faults(22)
@pytest.mark.parametrize("command", ["predict", "evaluate", "stability", "train"])
def test_an_output_that_cannot_be_written_fails_before_the_model_is_loaded(
    command, sdseg, polyps, pictures, tiny_model, recipe, tmp_path, no_model_is_loaded
):
    (tmp_path / "file").write_text("in the way")
    arguments = commands(polyps, pictures, tiny_model, recipe)[command]
    ended = sdseg(*arguments, "--out", tmp_path / "file" / "out", "--device", "cpu")
    assert ended.code == 2
    assert ended.says(
        f"{tmp_path / 'file' / 'out'} cannot be written", "Not a directory", "Choose another --out"
    )
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.faults(22)
def test_a_place_for_runs_that_cannot_be_written_is_told_before_the_networks_are_built(
    sdseg, recipe, tmp_path, no_model_is_loaded
):
    (tmp_path / "runs").write_text("in the way")
    ended = sdseg("train", "--recipe", recipe, "--device", "cpu")
    assert ended.code == 2
    assert ended.says("runs/tiny cannot be written", "Choose another --out")


@pytest.mark.faults(22)
@pytest.mark.parametrize("command", ["prepare", "convert", "export", "autoencoder"])
def test_an_output_that_cannot_be_written_is_told_before_the_work_begins(
    command, sdseg, polyps, tiny_model, tmp_path
):
    (tmp_path / "file").write_text("in the way")
    arguments = {
        "prepare": ("prepare", "phantom", "--cases", 4, "--size", 32),
        "convert": ("convert", tiny_model / "model"),
        "export": ("export", tiny_model),
        "autoencoder": ("autoencoder", "--data", polyps),
    }[command]
    ended = sdseg(*arguments, "--out", tmp_path / "file" / "out")
    assert ended.code == 2
    assert ended.says("cannot be written", "Not a directory", "Choose another --out")


@pytest.mark.faults(22)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("command", ["predict", "evaluate", "stability", "train"])
def test_a_gpu_that_is_not_there_is_told_before_the_model_is_loaded(
    command, sdseg, polyps, pictures, tiny_model, recipe, tmp_path, no_model_is_loaded
):
    arguments = commands(polyps, pictures, tiny_model, recipe)[command]
    ended = sdseg(*arguments, "--out", tmp_path / "out", "--device", "cuda")
    assert ended.code == 2
    assert ended.says("PyTorch finds no GPU here", "--device cpu")
    assert not (tmp_path / "out" / "run.json").exists()
    assert not list(tmp_path.glob("out/*.png"))


@pytest.mark.faults(22)
def test_a_tracker_that_is_not_installed_is_told_before_the_model_is_loaded(
    sdseg, recipe, tmp_path, no_model_is_loaded, monkeypatch
):
    ended = sdseg(
        "train", "-r", recipe, "--out", "run", "--device", "cpu", "--set", "train.trackers=[mlflow]"
    )
    assert ended.code == 2
    assert ended.says("mlflow is not installed", "pip install mlflow")
    assert not (tmp_path / "run").exists()


# ---- the first line on the screen

WATCH = """
import os, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.stderr.flush()
            os._exit(77)

sys.meta_path.insert(0, NoTorch())
from sdseg_cli.cli import main
main(sys.argv[1:])
"""


@pytest.mark.faults(24)
@pytest.mark.parametrize("command", ["predict", "evaluate", "stability", "train"])
def test_something_is_on_the_screen_before_torch_is_imported(
    command, polyps, pictures, tiny_model, recipe, tmp_path
):
    """The program ends where it would import torch, with what the user has read by then."""
    for index in range(500):
        os.link(pictures / "0.png", pictures / f"more-{index}.png")
    arguments = commands(polyps, pictures, tiny_model, recipe)[command]
    finished = subprocess.run(
        [sys.executable, "-c", WATCH, *map(str, arguments), "--out", tmp_path / "out", "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 77, finished.stderr
    assert finished.stderr.strip(), "nothing was said before torch was imported"
    if command == "predict":
        assert "505 images to predict into" in finished.stderr
        assert not list(tmp_path.glob("out/*.png"))
