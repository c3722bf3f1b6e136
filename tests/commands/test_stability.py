"""``sdseg stability`` as a user meets it, with a real (untrained) model."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdseg_cli import cli
from sdseg_cli.core.data.prepared import PreparedDataset
from sdseg_cli.core.metrics.similarity import ssim


def sdseg(*args) -> int:
    with pytest.raises(SystemExit) as leaving:
        cli.main([str(arg) for arg in args])
    return leaving.value.code


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a phantom dataset, two finished runs (one without noise) and a made LPIPS backbone."""
    from torchvision.models import alexnet

    from sdseg_cli.core.engine.networks import build_networks
    from sdseg_cli.core.recipe import load_recipe
    from sdseg_cli.core.run_directory import RunDirectory

    root = tmp_path_factory.mktemp("place")
    data = root / "phantom"
    assert sdseg("prepare", "phantom", "--cases", 6, "--size", 64, "--workers", 1, "--out", data) == 0
    dataset = PreparedDataset.open(data)
    settings = [
        f"data.dataset={data}",
        "data.image_size=64",
        "model.unet_channels=[32,32]",
        "model.unet_blocks=1",
        "model.unet_heads=4",
        "model.unet_attention_strides=[]",
    ]
    for name, noise in (("still", "zeros"), ("tiny", "gaussian")):
        objective = [f"objective.noise={noise}", "objective.prediction=sample", "objective.timesteps=last"]
        recipe = load_recipe("demo", [*settings, *objective])
        run = RunDirectory.create(root / "runs" / name, recipe)
        build_networks(recipe, 2).pipeline(dataset.manifest, recipe, 1.0).save_pretrained(run.model)
        run.finish("finished")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        weights = {k: v for k, v in alexnet(weights=None).state_dict().items() if k.startswith("features.")}
    torch.save(weights, root / "alexnet.pth")
    return root


@pytest.fixture(autouse=True)
def working_directory(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no-cache"))


def measure(out: Path, *args) -> int:
    return sdseg(
        "stability", "--split", "train", "--model", "runs/tiny", "--device", "cpu", "--out", out, *args
    )


def picture(folder: Path, run: int, case: str) -> np.ndarray:
    return np.asarray(Image.open(folder / "runs" / f"run-{run:02d}" / "scores" / "polyp" / f"{case}.png"))


def test_both_kinds_are_reported_and_the_saved_runs_bear_them_out(place, tmp_path, capsys):
    import lpips

    out = tmp_path / "out"
    assert measure(out, "--runs", 3, "--limit", 2, "--save-runs", "--lpips-backbone", "alexnet.pth") == 0
    shown = capsys.readouterr().out
    assert "Dice agreement" in shown
    assert "MS-SSIM: 2 of 2 pictures have a side below 176 pixels" in " ".join(shown.split())
    cases = rows(out / "cases.csv")
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "Dice agreement" in html
    assert 'data-name="run 2"' in html
    assert [row["kind"] for row in cases] == ["maps", "scores"] * 2

    direct = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for name, value in torch.load("alexnet.pth", weights_only=True).items():
        index, what = name.removeprefix("features.").split(".")
        layer = next(
            dict(part.named_children()).get(index)
            for part in direct.net.children()
            if index in dict(part.named_children())
        )
        getattr(layer, what).data = value
    for row in cases[1::2]:
        first, *others = (picture(out, run, row["case"]) for run in (1, 2, 3))
        assert float(row["ssim"]) == pytest.approx(np.mean([ssim(other, first) for other in others]))

        def tensor(pixels):
            return torch.from_numpy(pixels / 127.5 - 1).float().expand(1, 3, -1, -1)

        with torch.no_grad():
            expected = np.mean([float(direct(tensor(other), tensor(first))) for other in others])
        assert float(row["lpips"]) == pytest.approx(expected, abs=1e-6)
        assert row["ms_ssim"] == ""
    report = summary(out)
    scores = report["classes"]["polyp"]["scores"]["measures"]
    assert scores["lpips"]["mean"] == pytest.approx(np.mean([float(row["lpips"]) for row in cases[1::2]]))
    assert scores["ms_ssim"]["mean"] is None
    # Whether two draws of this untrained model round to one picture is up to the processor's arithmetic.
    identical = any(int(row["identical_pairs"]) for row in cases)
    assert set(report["undefined"]) == {"ms_ssim"} | ({"psnr"} if identical else set())


@pytest.mark.faults
def test_without_its_backbone_lpips_is_null_and_the_message_says_what_to_do(tmp_path, capsys):
    out = tmp_path / "out"
    assert measure(out, "--runs", 2, "--limit", 1) == 0
    assert "LPIPS is left out" in (messages := capsys.readouterr().err)
    assert "--lpips-backbone" in messages
    assert summary(out)["classes"]["polyp"]["maps"]["measures"]["lpips"]["mean"] is None
    assert "not at hand" in summary(out)["undefined"]["lpips"]


@pytest.mark.faults
def test_a_backbone_that_was_asked_for_and_is_not_there_is_an_error(tmp_path, capsys):
    assert measure(tmp_path / "out", "--lpips-backbone", "gone.pth") == 1
    assert "gone.pth: no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_official_protocol_compares_on_the_model_grid(tmp_path):
    out = tmp_path / "out"
    assert measure(out, "--runs", 2, "--limit", 2, "--protocol", "sdseg") == 0
    assert {(row["height"], row["width"]) for row in rows(out / "cases.csv")} == {("64", "64")}
    assert summary(out)["grid"] == "model"


def test_a_model_without_noise_is_reported_as_such(tmp_path, capsys):
    out = tmp_path / "out"
    assert measure(out, "--runs", 2, "--limit", 1, "--model", "runs/still") == 0
    assert "All runs are equal" in " ".join(capsys.readouterr().out.split())
    assert summary(out)["all_runs_equal"]


@pytest.mark.faults
def test_a_folder_of_images_is_measured_and_unreadable_ones_are_listed(tmp_path, capsys):
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("a", "b"):
        pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(scans / f"{name}.png")
    (scans / "c.png").write_bytes(b"")
    out = tmp_path / "out"
    assert sdseg("stability", scans, "--model", "runs/tiny", "--runs", 2, "--out", out, "--json") == 3
    shown = capsys.readouterr()
    assert "c.png" in shown.err
    report = json.loads(shown.out)
    assert report["images"] == {"measured": 2, "failed": 1}
    assert list(report["failed_images"]) == ["c.png"]
    assert [row["case"] for row in rows(out / "cases.csv")] == ["a", "a", "b", "b"]
    assert {(row["height"], row["width"]) for row in rows(out / "cases.csv")} == {("40", "50")}


@pytest.mark.faults
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--runs", "1"], "--runs"),
        (["scans", "--data", "phantom"], "exclude each other"),
        (["nowhere"], "nowhere: expected a folder of images"),
    ],
)
def test_what_cannot_be_measured_is_refused(args, message, capsys):
    assert sdseg("stability", "--model", "runs/tiny", *args) in (1, 2)
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_two_processes_measure_every_image_once_with_the_same_result(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "sdseg_cli"]
    command = ["stability", "--model", "runs/tiny", "--split", "train", "--runs", "2", "--device", "cpu"]
    two = tmp_path / "two"
    subprocess.run(
        [*launch, *command, "--save-runs", "--out", two], check=True, env=environment, capture_output=True
    )
    assert summary(two)["processes"] == 2
    assert sdseg(*command, "--out", tmp_path / "one") == 0
    one, both = rows(tmp_path / "one" / "cases.csv"), rows(two / "cases.csv")
    assert [row["case"] for row in both] == [row["case"] for row in one]
    for first, second in zip(one, both, strict=True):
        assert float(first["ssim"]) == pytest.approx(float(second["ssim"]), abs=1e-3)
    assert len(list((two / "runs" / "run-02" / "maps").iterdir())) == len(one) // 2
