"""``sdseg verify``, and the manifests it reads: a real run, its scores, masks and dataset."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from sdseg_cli import cli
from sdseg_cli.core.data.images import write_png
from sdseg_cli.core.data.prepared import PreparedDataset
from sdseg_cli.core.errors import DataError
from sdseg_cli.core.files import joint_sum, sha256_of
from sdseg_cli.core.manifest import JOURNAL_FOLDER, model_sum, read_journal
from sdseg_cli.core.recipe import recipe_to_yaml
from sdseg_cli.core.run_directory import RunDirectory
from tests.small_models import small_kl

CAN_EXPORT = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


def sdseg(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        cli.main([str(argument) for argument in arguments])
    return leaving.value.code


def verified(capsys, path: Path) -> tuple[int, dict]:
    capsys.readouterr()
    code = sdseg("verify", path, "--json")
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def made(polyps, tiny_recipe, sdseg_process, tmp_path_factory) -> Path:
    """A folder with data, a run that was scored, its masks of two scans, and what else sdseg makes."""
    place = tmp_path_factory.mktemp("made")
    shutil.copytree(polyps, place / "data")
    changes = {"data.dataset": str(place / "data"), "train.checkpoint_every": 1}
    (place / "tiny.yaml").write_text(recipe_to_yaml(tiny_recipe(changes)))
    process = sdseg_process(
        "train", "--recipe", place / "tiny.yaml", "--out", place / "run", "--device", "cpu"
    )
    process.join(120)
    assert process.exitcode == 0, process.log()
    cpu = ("--model", place / "run", "--device", "cpu")
    assert sdseg("evaluate", *cpu, "--split", "test", "--overlays", 1) == 0
    (place / "scans").mkdir()
    for number in range(2):
        row = PreparedDataset.open(place / "data").split("test")[number]
        write_png(place / "scans" / f"{number}.png", row.image)
    assert sdseg("predict", place / "scans", "--out", place / "masks", *cpu, "--overlay", "--report") == 0
    for shard in ("1/2", "2/2"):
        assert sdseg("predict", place / "scans", "--out", place / "sharded", *cpu, "--shard", shard) == 0
    few = ("--steps", 1, "--masks", 16, "--size", 64, "--batch-size", 2, "--device", "cpu")
    assert sdseg("autoencoder", "--out", place / "network", "--crop", 32, *few) == 0
    small_kl().save_pretrained(place / "published")
    assert sdseg("convert", place / "published", "--out", place / "converted") == 0
    assert sdseg("autoencoder", "--distill", place / "published", "--out", place / "decoder", *few) == 0
    two = (place / "run", f"again={place / 'run'}", "--split", "test", "--draws", 0, "--device", "cpu")
    assert sdseg("compare", *two, "--out", place / "ablation" / "validation") == 0  # as sdseg ablate does
    shutil.copytree(place / "run", place / "ablation" / "runs" / "one-seed0")
    if CAN_EXPORT:
        assert sdseg("export", place / "run", "--out", place / "exported", "--format", "onnx") == 0
    return place


@pytest.fixture
def copy(made, tmp_path):
    """Copies one of the folders, to be damaged."""

    def make(name: str) -> Path:
        shutil.copytree(made / name, tmp_path / name)
        return tmp_path / name

    return make


KINDS = {
    "run": ["run", "checkpoint", "checkpoint", "evaluation", "model"],
    "run/model": ["model"],
    "run/checkpoints/step-000002": ["checkpoint"],
    "run/evaluation/test": ["evaluation"],
    "data": ["prepared dataset"],
    "masks": ["predictions"],
    "sharded": ["predictions"],
    "network": ["autoencoder"],
    "decoder": ["decoder"],
    "converted": ["autoencoder"],
    "ablation/validation": ["comparison"],
    "ablation": ["comparison", "run", "checkpoint", "checkpoint", "evaluation", "model"],
    **({"exported": ["exported model"]} if CAN_EXPORT else {}),
}


# What holds


@pytest.mark.parametrize("name", KINDS)
def test_what_is_as_it_was_written_is_told_with_its_counts(name, made, capsys):
    code, report = verified(capsys, made / name)
    assert (code, report["differences"], report["whole"]) == (0, [], True)
    assert sorted(part["kind"] for part in report["parts"]) == sorted(KINDS[name])
    assert all(part["files"] > 0 and part["bytes"] > 0 for part in report["parts"])
    assert sdseg("verify", made / name) == 0
    shown = capsys.readouterr()
    files = sum(part["files"] for part in report["parts"])
    assert f"done: {made / name}: {files} files in" in shown.err
    assert all(part["kind"] in shown.out for part in report["parts"])


def test_verify_changes_nothing(made):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert sdseg("verify", made / "run") == 0
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


# What does not


def damaged(folder: Path, name: str, damage: str) -> Path:
    file = folder / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "altered":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file = file.with_name("notes.txt")
        file.write_text("mine")
    return file


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["missing", "truncated", "altered", "unlisted"])
@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("run", "recipe.yaml"),
        ("run", "run.json"),
        ("run", "checkpoints/step-000001/optimizer.bin"),
        ("run", "model/unet/diffusion_pytorch_model.safetensors"),
        ("run", "evaluation/test/cases.csv"),
        ("data", "train/data-00000-of-00001.arrow"),
        ("masks", "1.png"),
        ("masks", "overlays/0.png"),
        ("network", "config.json"),
        ("decoder", "diffusion_pytorch_model.safetensors"),
        ("converted", "config.json"),
        ("ablation", "validation/summary.json"),
        ("ablation", "runs/one-seed0/model/model_index.json"),
        *([("exported", "export.json"), ("exported", "model.onnx")] if CAN_EXPORT else []),
    ],
)
def test_every_difference_is_named(folder, name, damage, copy, capsys):
    place = copy(folder)
    file = damaged(place, name, damage)
    code, report = verified(capsys, place)
    assert code == 1
    assert [(found["path"], found["fault"]) for found in report["differences"]] == [(str(file), damage)]
    assert not report["whole"]
    assert sdseg("verify", place) == 1
    shown = capsys.readouterr()
    assert f"warning: {file}: {damage}" in shown.err
    assert "1 difference; " in shown.err


@pytest.mark.faults
def test_all_differences_are_named_at_once_and_what_a_kill_left_is_one(copy, capsys):
    run = copy("run")
    files = [damaged(run, "metrics.jsonl", "altered")]
    files.append(damaged(run, "checkpoints/step-000002/optimizer.bin", "unlisted"))
    left = run / "checkpoints" / ".step-000004.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    code, report = verified(capsys, run)
    assert code == 1
    assert {found["path"] for found in report["differences"]} == {str(path) for path in [*files, left]}


@pytest.mark.faults
@pytest.mark.parametrize(
    ("folder", "manifest", "said"),
    [
        ("run", "manifest.json", "a run writes it when it ends"),
        ("run/model", "manifest.json", "made by an older sdseg or by others"),
        ("masks", JOURNAL_FOLDER, "predict again with --overwrite"),
        ("run/evaluation/test", "manifest.json", "measure again with --overwrite"),
    ],
)
def test_a_folder_without_its_manifest_says_so(folder, manifest, said, made, tmp_path, capsys):
    shutil.copytree(made / folder, tmp_path / "old")
    place = tmp_path / "old" / manifest
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    code, report = verified(capsys, tmp_path / "old")
    assert code == 1
    (found,) = report["differences"]
    assert found["fault"] == "no manifest"
    assert said in found["detail"]


@pytest.mark.faults
def test_a_dataset_of_an_older_version_is_read_and_has_nothing_to_verify(copy, capsys):
    data = copy("data")
    record = json.loads((data / "dataset.json").read_text())
    del record["checksums"]
    (data / "dataset.json").write_text(json.dumps(record))
    assert len(PreparedDataset.open(data).split("train")) == 14
    code, report = verified(capsys, data)
    assert code == 1
    assert "prepare it again" in report["differences"][0]["detail"]


@pytest.mark.faults
@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "[]",
        "{}",
        '{"files": 3}',
        '{"files": {"config.json": 3}}',
        '{"files": {"../../etc/passwd": "00"}}',
        '{"files": {"/etc/passwd": "00"}}',
        '{"files": {}, "bytes": {"config.json": "many"}}',
        '{"files": {}, "bytes": {"config.json": Infinity}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_manifest_is_told_and_leads_nowhere_else(manifest, copy, capsys):
    network = copy("network")
    (network / "manifest.json").write_text(manifest)
    code, report = verified(capsys, network)
    assert code == 1
    assert [found["fault"] for found in report["differences"]] == ["damaged manifest"]


@pytest.mark.faults
def test_what_is_none_of_these_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    for path, said in (
        (tmp_path, "is none of these"),
        (tmp_path / "thesis.tex", "is a file"),
        (tmp_path / "nowhere", "does not exist"),
    ):
        assert sdseg("verify", path) == 2
        err = capsys.readouterr().err
        assert f"{path} {said}: expected a run directory (run.json)" in err


@pytest.mark.faults
def test_a_run_that_goes_on_is_refused(copy, capsys):
    run = RunDirectory.open(copy("run"))
    run.write_run_json(status="running")
    with run.lock():
        assert sdseg("verify", run.root) == 2
    assert "is going on. Verify it once it has ended" in capsys.readouterr().err


# From a mask, a table or a page back to what it was made from


def test_every_mask_leads_to_its_scan_its_model_and_its_command(made):
    journal = read_journal(made / "masks")
    calls = {line["call"]: line for line in journal if "command" in line}
    masks = {name: line for line in journal if "case" in line for name in line["files"]}
    assert {"0.png", "1.png", "overlays/0.png", "overlays/1.png"} == set(masks)
    for name, line in masks.items():
        assert line["files"][name] == sha256_of(made / "masks" / name)
        assert line["input_sha256"] == sha256_of(made / "scans" / line["input"])
        call = calls[line["call"]]
        assert call["model_sha256"] == model_sum(made / "run" / "model")
        assert (call["recipe"], call["seed"], call["precision"]) == ("tiny", 0, "fp32")
        assert call["command"]
        assert call["versions"]["torch"]
    settings = json.loads((made / "masks" / "prediction.json").read_text())
    assert settings["model_sha256"] == model_sum(made / "run" / "model")
    page = (made / "masks" / "report.html").read_text()
    assert settings["model_sha256"] in page


def test_scores_name_the_model_and_the_data_they_were_read_from(made):
    scores = made / "run" / "evaluation" / "test"
    summary = json.loads((scores / "summary.json").read_text())
    data = made / "data"
    assert summary["model"]["sha256"] == model_sum(made / "run" / "model")
    assert summary["dataset"]["manifest_sha256"] == sha256_of(data / "dataset.json")
    assert summary["dataset"]["files"]
    assert all(digest == sha256_of(data / name) for name, digest in summary["dataset"]["files"].items())
    assert summary["sampling"]["seed"] == 0
    assert summary["command"]
    page = (scores / "report.html").read_text()
    assert summary["model"]["sha256"] in page


def test_scores_of_two_folders_list_what_was_compared(made, tmp_path):
    out = tmp_path / "scores"
    masks = [made / "masks" / f"{number}.png" for number in range(2)]
    for side in ("first", "second"):
        (tmp_path / side).mkdir()
        for mask in masks:
            shutil.copy(mask, tmp_path / side)
    given = ("--predictions", tmp_path / "first", "--ground-truth", tmp_path / "second", "--out", out)
    assert sdseg("evaluate", *given) == 0
    inputs = json.loads((out / "manifest.json").read_text())["inputs"]
    assert inputs == {
        str(tmp_path / side / mask.name): sha256_of(mask) for side in ("first", "second") for mask in masks
    }
    assert sdseg("verify", out) == 0


def test_a_model_names_the_recipe_the_seed_and_the_data_it_was_trained_on(made):
    manifest = json.loads((made / "run" / "model" / "manifest.json").read_text())
    assert (manifest["recipe"], manifest["seed"], manifest["step"]) == ("tiny", 0, 2)
    assert manifest["dataset"] == PreparedDataset.open(made / "data").manifest.fingerprint
    (session,) = RunDirectory.open(made / "run").read_run_json()["sessions"]
    assert (session["first_step"], session["processes"], session["remark"]) == (0, 1, "")
    assert session["command"][1] == "train"


def test_the_sum_of_a_model_is_that_of_its_files_and_not_of_what_lies_beside_them(copy, made):
    model = copy("run") / "model"
    manifest = json.loads((model / "manifest.json").read_text())
    assert model_sum(model) == joint_sum(manifest["files"])
    (model / "README.md").write_text("a card")
    assert model_sum(model) == joint_sum(manifest["files"])
    assert sdseg("verify", model) == 0
    damaged(model, "model_index.json", "altered")
    assert model_sum(model) != joint_sum(manifest["files"])


def test_the_sum_of_a_model_is_what_the_guide_computes(copy):
    model = copy("run") / "model"
    for name in ("README.md", ".gitattributes", ".cache/x.json", "unet/README.md", "of two words.json"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("beside")
    guide = (Path(__file__).parents[2] / "docs" / "reproducibility.md").read_text(encoding="utf-8")
    (recipe,) = (block for block in guide.split("```") if block.strip().startswith("find "))
    computed = subprocess.run(["bash", "-c", recipe], cwd=model, capture_output=True, check=True, text=True)
    assert computed.stdout.split()[0] == model_sum(model)


@pytest.mark.faults
def test_an_altered_split_is_not_scored(copy, made, capsys):
    data = copy("data")
    (file,) = (data / "test").glob("*.arrow")
    damaged(data, f"test/{file.name}", "altered")
    given = ("--model", made / "run", "--data", data, "--device", "cpu", "--out", data.parent / "out")
    assert sdseg("evaluate", *given) == DataError.exit_code
    err = capsys.readouterr().err
    assert f"{file} is altered: SHA-256" in err
    assert f"sdseg verify {data}" in err
    assert not (data.parent / "out").exists()


# Masks that were added by several calls, one of which was killed


@pytest.mark.faults
def test_masks_added_later_are_listed_and_a_torn_line_is_passed_over(copy, made, capsys):
    masks = copy("masks")
    (masks / "1.png").unlink()
    (journal_file,) = (masks / JOURNAL_FOLDER).iterdir()
    with journal_file.open("a") as journal:
        journal.write('{"call": "0123", "files": {"0.png": "00')  # killed while it wrote
    cpu = ("--model", made / "run", "--device", "cpu")
    assert sdseg("predict", made / "scans", "--out", masks, *cpu, "--overlay", "--skip-existing") == 0
    assert verified(capsys, masks)[0] == 0
    calls = [line for line in read_journal(masks) if "command" in line]
    assert len(calls) == 2
    assert sdseg("predict", made / "scans", "--out", masks, *cpu, "--overlay", "--overwrite") == 0
    assert len([line for line in read_journal(masks) if "command" in line]) == 3
    assert not (masks / "report.html").exists()  # it showed the masks that were replaced
    assert verified(capsys, masks)[0] == 0


def test_replacing_some_masks_leaves_the_list_of_the_others(copy, made, tmp_path, capsys):
    masks = copy("masks")
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(made / "scans" / "1.png", other / "later.png")
    cpu = ("--out", masks, "--model", made / "run", "--device", "cpu")
    assert sdseg("predict", other, *cpu) == 0
    assert sdseg("predict", other, *cpu, "--overwrite") == 0
    assert verified(capsys, masks)[0] == 0
    (masks / "later.png").unlink()
    assert verified(capsys, masks)[1]["differences"][0]["fault"] == "missing"


def test_the_clocks_of_several_machines_need_not_agree(copy, capsys):
    masks = copy("masks")
    line = {"call": "slow clock", "time": 0.0}
    sums = dict.fromkeys(("summary.csv", "prediction.json"), "0" * 64)
    fast = {**line, "time": 9e9, "files": sums, "bytes": dict.fromkeys(sums, 1)}
    (masks / JOURNAL_FOLDER / "ahead.jsonl").write_text(json.dumps(fast) + "\n")
    assert verified(capsys, masks)[0] == 0
    (masks / "summary.csv").write_text("altered")
    assert verified(capsys, masks)[0] == 1


@pytest.mark.faults
def test_a_mask_that_a_killed_call_did_not_list_is_told_and_predicted_again(copy, made, capsys):
    """SIGKILL between the renaming of 1.png and its line; 2.png is the user's own, which nobody planned."""
    masks = copy("masks")
    (journal,) = (masks / JOURNAL_FOLDER).iterdir()
    lines = [line for line in journal.read_text().splitlines() if '"case": "1"' not in line]
    journal.write_text("\n".join(lines) + "\n")
    for place in (masks, masks / "overlays"):
        shutil.copy(place / "0.png", place / "2.png")
    scans = shutil.copytree(made / "scans", masks.parent / "scans")
    shutil.copy(scans / "0.png", scans / "2.png")
    found = {Path(one["path"]).name: one for one in verified(capsys, masks)[1]["differences"]}
    assert {name: one["fault"] for name, one in found.items()} == dict.fromkeys(
        ("1.png", "2.png"), "unlisted"
    )
    assert "the same command with --skip-existing makes it again" in found["1.png"]["detail"]
    assert found["2.png"]["detail"] == ""
    own = (masks / "2.png").stat().st_mtime_ns
    cpu = ("--model", made / "run", "--device", "cpu", "--overlay", "--skip-existing")
    assert sdseg("predict", scans, "--out", masks, *cpu) == 0
    assert "1 of them were not listed before a call was killed, and are predicted again" in (
        capsys.readouterr().err
    )
    assert (masks / "2.png").stat().st_mtime_ns == own
    left = verified(capsys, masks)[1]["differences"]
    assert {Path(one["path"]).name for one in left} == {"2.png"}


@pytest.mark.faults
def test_a_case_that_cannot_be_listed_is_not_done(made, tmp_path, monkeypatch, capsys):
    from sdseg_cli.core import manifest

    add = manifest.Journal.add

    def full(journal, files, **about):
        if about.get("case") == "1":
            raise OSError(28, "No space left on device")
        add(journal, files, **about)

    monkeypatch.setattr(manifest.Journal, "add", full)
    cpu = ("--model", made / "run", "--device", "cpu")
    assert sdseg("predict", made / "scans", "--out", tmp_path / "masks", *cpu) == 1
    assert not (tmp_path / "masks" / "1.png").exists()
    assert "No space left" in capsys.readouterr().err
    assert verified(capsys, tmp_path / "masks")[0] == 0
