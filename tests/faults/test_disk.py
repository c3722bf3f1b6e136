"""Rows 17 and 18: a disk that is really full, a small file system in a namespace of the program's own."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from sdseg_cli.core.data.images import read_label_map
from sdseg_cli.core.recipe import recipe_to_yaml
from sdseg_cli.core.run_directory import RunDirectory

NO_SMALL_DISK = 77


@pytest.fixture
def on_small_disk(hardship, tmp_path) -> Callable[..., Any]:
    """Run ``sdseg`` with a disk of so many KiB at ``disk``; what was on it lies in ``kept``."""

    def run(kib: int, *arguments: object) -> Any:
        (tmp_path / "disk").mkdir(exist_ok=True)
        shutil.rmtree(tmp_path / "kept", ignore_errors=True)
        disk = (str(tmp_path / "disk"), kib, str(tmp_path / "kept"))
        process = hardship(*arguments, small_disk=disk)
        process.join(120)
        if process.exitcode == NO_SMALL_DISK:
            pytest.skip("this machine lets nobody mount a file system in a namespace (unshare)")
        assert "Traceback" not in process.log()
        return process

    return run


def no_partial_files(folder: Path) -> bool:
    return not [path for path in folder.rglob("*") if ".sdseg-" in path.name or path.suffix == ".partial"]


@pytest.fixture(scope="module")
def sizes(tiny_recipe, tmp_path_factory) -> tuple[int, int]:
    """Bytes of a checkpoint and of a model of the tiny recipe."""
    from sdseg_cli.core.engine.training import Training

    run = RunDirectory.create(tmp_path_factory.mktemp("measured") / "run", tiny_recipe())
    list(Training(tiny_recipe(), device="cpu").run(run))
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    return tuple(
        sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for folder in (checkpoint, run.model)
    )  # type: ignore[return-value]


@pytest.mark.faults(17)
@pytest.mark.parametrize("what", ["checkpoint", "model"])
def test_a_disk_that_fills_up_in_training_leaves_the_checkpoint_before(
    what, on_small_disk, sdseg, sizes, tiny_recipe, tmp_path
):
    checkpoint, model = sizes
    # The model is exported at the validation of the last step, before its checkpoint.
    steps = {"checkpoint": 6, "model": 4}[what]
    changes = {"train.steps": steps, "train.checkpoint_every": 2, "train.keep_checkpoints": 1}
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(tiny_recipe(changes)))
    root = tmp_path / "disk" / "run"
    options = ("--recipe", tmp_path / "recipe.yaml", "--out", root, "--device", "cpu")
    more = {"checkpoint": checkpoint // 2, "model": model // 2}[what]
    process = on_small_disk((checkpoint + more) // 1024 + 64, "train", *options)
    assert process.exitcode == 1, process.log()
    if what == "checkpoint":
        assert f"checkpoint {root / 'checkpoints' / 'step-000004'} could not be written" in process.log()
    for words in (
        "No space left on device",
        f"The last whole checkpoint is {root / 'checkpoints' / 'step-000002'}.",
        f"Free space on the disk of {root}, then continue with: sdseg train --resume {root}",
    ):
        assert words in process.log()
    kept = RunDirectory.open(tmp_path / "kept" / "run")
    assert kept.status == "failed"
    assert [path.name for path in kept.checkpoints.iterdir()] == ["step-000002"]
    assert not kept.model.exists()
    assert no_partial_files(tmp_path / "kept")
    ended = sdseg("train", "--resume", kept.root, "--device", "cpu")
    assert ended.code == 0, ended.err
    assert ended.says(f"steps 3 to {steps}")
    assert [record["step"] for record in kept.read_metrics() if "loss" in record] == list(range(1, steps + 1))


def listed(folder: Path, log: str, names: set[str]) -> bool:
    """Whether what was done is listed: in the summary, or on the screen where the disk is too full for it."""
    if (folder / "summary.csv").exists():
        with (folder / "summary.csv").open(encoding="utf-8", newline="") as stream:
            return {row["file"] for row in csv.DictReader(stream) if row["status"] == "done"} == names
    assert "summary.csv cannot be written (No space left on device); done were:" in log
    return all(name in log.partition("done were:")[2] for name in names)


@pytest.mark.faults(18)
def test_a_disk_that_fills_up_with_masks_of_pictures_holds_whole_ones_only(
    on_small_disk, tiny_model, tmp_path, sdseg
):
    scans = tmp_path / "scans"
    scans.mkdir()
    for index in range(12):
        noise = np.random.default_rng(index).integers(0, 256, (160, 160, 3), np.uint8)
        Image.fromarray(noise).save(scans / f"{index}.png")
    out = tmp_path / "disk" / "masks"
    options = ("--model", tiny_model, "--device", "cpu", "--probabilities")
    process = on_small_disk(160, "predict", scans, "--out", out, *options)
    assert process.exitcode == 1, process.log()
    for words in (
        "No space left on device",
        "No partial file was left.",
        "with --skip-existing to go on",
        "of 12 images",
    ):
        assert words in process.log()
    kept = tmp_path / "kept" / "masks"
    done = {path.name for path in kept.glob("*.png")}
    assert 1 <= len(done) < 12
    assert no_partial_files(kept)
    assert done == {path.name for path in (kept / "probabilities").iterdir()}
    for name in done:
        assert read_label_map(kept / name, num_classes=2).shape == (160, 160)
        Image.open(kept / "probabilities" / name).load()
    assert listed(kept, process.log(), done)
    ended = sdseg("predict", scans, "--out", kept, *options, "--skip-existing")  # as it was told, with room
    assert ended.code == 0, ended.err
    assert ended.says(f"{len(done)} of them are done already and are skipped")
    assert len(list(kept.glob("*.png"))) == 12


def kib_of(folder: Path) -> int:
    """What the files of a folder take on a disk, in pages of 4 KiB."""
    return sum(-(-file.stat().st_size // 4096) * 4 for file in folder.rglob("*") if file.is_file())


@pytest.mark.faults(18)
@pytest.mark.parametrize("suffix", ["nii.gz", "nrrd", "mha"])
def test_a_disk_that_fills_up_with_masks_of_volumes_holds_whole_ones_only(
    suffix, on_small_disk, sdseg, tiny_model, tmp_path
):
    scans = tmp_path / "scans"
    scans.mkdir()
    for index in range(6):
        noise = np.random.default_rng(index).integers(0, 1000, (96, 96, 6)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(noise, np.eye(4)), scans / f"{index}.nii.gz")
    options = ("--window", "0,1000", "--model", tiny_model, "--device", "cpu")
    options += ("--format", {"nii.gz": "nifti"}.get(suffix, suffix), "--threshold", 0.4)
    assert sdseg("predict", scans, "--out", tmp_path / "roomy", *options).code == 0
    out = tmp_path / "disk" / "masks"
    process = on_small_disk(kib_of(tmp_path / "roomy") // 2, "predict", scans, "--out", out, *options)
    assert process.exitcode == 1, process.log()
    assert "No space left on device" in process.log()
    kept = tmp_path / "kept" / "masks"
    done = {path.name for path in kept.glob(f"*.{suffix}")}
    assert 1 <= len(done) < 6, process.log()
    assert no_partial_files(kept)
    for name in done:
        assert (kept / name).read_bytes() == (tmp_path / "roomy" / name).read_bytes()
    assert listed(kept, process.log(), {name.replace(suffix, "nii.gz") for name in done})


@pytest.mark.faults(18)
def test_a_disk_that_fills_up_while_a_dataset_is_prepared_holds_nothing_of_it(on_small_disk, tmp_path):
    options = ("--cases", 40, "--size", 64, "--workers", 1, "--out", tmp_path / "disk" / "data")
    process = on_small_disk(200, "prepare", "phantom", *options)
    assert process.exitcode == 1, process.log()
    assert "the disk is full" in process.log()
    assert "Free some space or choose another --out, then run the command again." in process.log()
    assert list((tmp_path / "kept").iterdir()) == []
