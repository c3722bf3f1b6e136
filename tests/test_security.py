"""What SECURITY.md promises: no code from files, no way out, no patient told, nothing sent."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import generate_uid

from sdseg_cli.core.data.dicom import find_series
from sdseg_cli.core.engine.prediction_plan import plan_predictions
from sdseg_cli.core.errors import ModelError
from sdseg_cli.core.recipe import recipe_to_yaml
from tests.dicom_slices import ct_slice

PATIENT = {
    "PatientName": "Kowalczyk^Zofia",
    "PatientID": "PID-4711-081599",
    "PatientBirthDate": "19610203",
    "StudyDescription": "Follow-up of Zofia K.",
    "AccessionNumber": "ACC998877",
    "ReferringPhysicianName": "Brzeczyszczykiewicz^Grzegorz",
    "InstitutionName": "Szpital Wojewodzki",
    "PatientAddress": "ul. Lipowa 7",
    "OtherPatientIDs": "OTHER-3133731337",
}
WORDS = (
    "kowalczyk",
    "zofia",
    "081599",  # longer ones: a checksum may hold four digits by chance
    "19610203",
    "follow-up",
    "998877",
    "brzecz",
    "szpital",
    "lipowa",
    "3133731337",
)


@pytest.fixture(scope="module")
def model(tiny_recipe, tmp_path_factory, sdseg_process) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "tiny.yaml").write_text(recipe_to_yaml(tiny_recipe()))
    training = sdseg_process(
        *("train", "--recipe", folder / "tiny.yaml", "--out", folder / "run", "--device", "cpu")
    )
    training.join(180)
    assert training.exitcode == 0, training.log()
    return folder / "run" / "model"


# No code from files


def hostile_model(source: Path, folder: Path, marker: Path) -> Path:
    """A model folder with Python files beside its weights, and an index that asks for them."""
    shutil.copytree(source, folder)
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Evil: pass\n"
    for place in (folder, folder / "unet", folder / "image_encoder"):
        for name in ("evil.py", "pipeline.py", "modeling.py", "__init__.py"):
            (place / name).write_text(code)
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["evil", "Evil"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("asked", ["evil", "pipeline", "os", "subprocess", "pathlib"])
def test_code_in_a_model_folder_is_not_executed(asked, model, tmp_path, monkeypatch):
    from sdseg_cli.core.model.weights import load_pipeline

    folder = hostile_model(model, tmp_path / "evil", tmp_path / "executed")
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = [asked, "Evil" if asked in ("evil", "pipeline") else "Popen"]
    (folder / "model_index.json").write_text(json.dumps(index))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(tmp_path))  # as under python -m, where the working folder is searched
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_pipeline(str(folder))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("where", ["model_index.json", "unet/config.json", "autoencoder/config.json"])
def test_a_model_whose_configuration_names_code_of_its_own_does_not_run_it(where, model, tmp_path):
    from sdseg_cli.core.model.weights import load_pipeline

    folder = hostile_model(model, tmp_path / "evil", tmp_path / "executed")
    shutil.copy(model / "model_index.json", folder / "model_index.json")
    config = json.loads((folder / where).read_text())
    config |= {"_class_name": ["evil", "Evil"], "auto_map": {"AutoModel": "evil.Evil"}}
    (folder / where).write_text(json.dumps(config))
    with contextlib.suppress(ModelError):
        load_pipeline(str(folder))
    assert not (tmp_path / "executed").exists()


# No path from a file leaves the output folder


@pytest.mark.parametrize(
    "text", ["../../escaped", "/etc/escaped", "..", ".", "a/../../b", "C:\\x", "\\\\host\\x", "-rf"]
)
def test_a_description_of_a_series_names_a_file_in_the_output_folder(text, tmp_path):
    write_series(tmp_path / "scans", SeriesDescription=text)
    (task,) = plan_predictions([tmp_path / "scans"], tmp_path / "masks", overlays=True, probabilities=True)
    for path in task.outputs:
        assert path.resolve().is_relative_to((tmp_path / "masks").resolve())
        assert path.parent in (
            tmp_path / "masks",
            tmp_path / "masks" / "overlays",
            tmp_path / "masks" / "probabilities",
        )


@pytest.mark.parametrize("uid", ["../../../escaped", "/etc/escaped", "1.2/../../x"])
def test_an_identifier_of_a_series_names_a_file_in_the_output_folder(uid, tmp_path):
    write_series(tmp_path / "scans", SeriesInstanceUID=uid, SeriesDescription="")
    found = find_series(sorted((tmp_path / "scans").iterdir())).series
    assert len(found) == 1
    for series in found:
        assert Path(series.name).name == series.name, series.name
        assert series.name not in ("", ".", "..")


# No patient is told


def write_series(folder: Path, **extra: str) -> None:
    folder.mkdir(parents=True)
    series = {
        "StudyInstanceUID": generate_uid(),
        "SeriesInstanceUID": generate_uid(),
        "FrameOfReferenceUID": generate_uid(),
        "SeriesDescription": "thin",
    }
    for k in range(4):
        values = np.random.default_rng(k).integers(0, 900, (40, 36))
        data = ct_slice(values, [0, 0, 2.0 * k], InstanceNumber=k + 1, **{**series, **PATIENT, **extra})
        data.save_as(folder / f"{k}.dcm", enforce_file_format=True)


def told(folder: Path) -> list[str]:
    """The words about the patient in names and contents of all files, packed ones unpacked."""
    import gzip

    found = []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        text = (str(path.relative_to(folder)) + content.decode("latin-1")).casefold()
        found += [f"{word} in {path.name}" for word in WORDS if word in text]
    return found


@pytest.mark.faults
def test_no_patient_of_a_dicom_series_is_told_in_masks_reports_logs_or_names(model, sdseg_process, tmp_path):
    scans, made = tmp_path / "scans", tmp_path / "made"
    write_series(scans / "good")
    write_series(scans / "gap")  # a series that fails, and what is said of it
    (scans / "gap" / "1.dcm").unlink()
    write_series(scans / "damaged")
    for path in (scans / "damaged").iterdir():
        content = path.read_bytes()
        assert content.count(b"0.8\\0.6 ") == 1
        path.write_bytes(content.replace(b"0.8\\0.6 ", b"Zofia\\1 "))
    (scans / "good" / "stray.dcm").write_bytes((scans / "good" / "0.dcm").read_bytes()[:600])
    assert told(scans), "the words are in the scans"
    device = ("--device", "cpu")
    predicting = sdseg_process(
        *("predict", scans, "--out", made / "masks", "--model", model, "--recursive", *device),
        *("--overlay", "--probabilities", "--samples", "2", "--report", "--json"),
    )
    predicting.join(240)
    assert predicting.exitcode == 3, predicting.log()
    (made / "truth").mkdir()
    shutil.copy(made / "masks" / "good" / "thin.nii.gz", made / "truth" / "thin.nii.gz")
    evaluating = sdseg_process(
        *("evaluate", "--predictions", made / "masks" / "good", "--ground-truth", made / "truth"),
        *("--out", made / "evaluation"),
    )
    evaluating.join(240)
    assert evaluating.exitcode == 0, evaluating.log()
    assert (made / "masks" / "report.html").is_file()
    assert (made / "evaluation" / "report.html").is_file()
    for number, process in enumerate((predicting, evaluating)):
        (made / f"log-{number}.txt").write_text(process.log())
    assert told(made) == []


def test_a_dicom_segmentation_names_the_patient_as_the_standard_asks_and_nothing_beside(
    model, sdseg_process, tmp_path
):
    write_series(tmp_path / "scans")
    predicting = sdseg_process(
        *("predict", tmp_path / "scans", "--out", tmp_path / "masks", "--model", model),
        *("--device", "cpu", "--format", "dicom-seg"),
    )
    predicting.join(240)
    assert predicting.exitcode == 0, predicting.log()
    (file,) = (tmp_path / "masks").glob("*.dcm")
    document = pydicom.dcmread(file)
    assert str(document.PatientName) == PATIENT["PatientName"]
    assert document.PatientID == PATIENT["PatientID"]
    for name in ("PatientAddress", "InstitutionName", "OtherPatientIDs"):
        assert name not in document, name
    file.unlink()
    (tmp_path / "masks" / "log.txt").write_text(predicting.log())
    assert told(tmp_path / "masks") == []


# HTML


class Tags(HTMLParser):
    """Collects what a browser would run."""

    def __init__(self) -> None:
        super().__init__()
        self.handlers: list[str] = []
        self.scripts: list[str] = []
        self._in_script = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._in_script = tag == "script"
        self.handlers += [f"{tag} {name}" for name, value in attributes if name.startswith("on")]
        links = [value or "" for name, value in attributes if name in ("href", "src", "action", "data")]
        self.handlers += [f"{tag} {link}" for link in links if link.startswith("javascript:")]

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts.append(data)
            self._in_script = False


@pytest.mark.faults
def test_names_of_files_are_only_text_in_reports(model, sdseg_process, tmp_path):
    hostile = [
        "<script>alert(1)<",
        "<img src=x onerror=alert(1)>",
        '"\' onload=alert(1) x="',
        "</script><svg onload=alert(1)>",
    ]
    hostile = [name.replace("/", "∕") for name in hostile] + ["javascript:alert(1)", "&lt;b&gt;alert(1)"]
    (tmp_path / "scans").mkdir()
    for name in hostile:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(
            tmp_path / "scans" / f"{name}.png"
        )
    predicting = sdseg_process(
        *("predict", tmp_path / "scans", "--out", tmp_path / "masks", "--model", model, "--report"),
        *("--device", "cpu"),
    )
    predicting.join(240)
    assert predicting.exitcode == 0, predicting.log()
    shutil.copytree(tmp_path / "masks", tmp_path / "truth", ignore=shutil.ignore_patterns("*.html", "*.csv"))
    evaluating = sdseg_process(
        *("evaluate", "--predictions", tmp_path / "masks", "--ground-truth", tmp_path / "truth"),
        *("--out", tmp_path / "evaluation"),
    )
    evaluating.join(240)
    assert evaluating.exitcode == 0, evaluating.log()
    for page in (tmp_path / "masks" / "report.html", tmp_path / "evaluation" / "report.html"):
        html = page.read_text(encoding="utf-8")
        assert "alert(1)" in html, "the names are on the page"
        tags = Tags()
        tags.feed(html)
        assert tags.handlers == []
        assert not any("alert(1)" in script for script in tags.scripts)


# Nothing is sent

WATCH = """
import json, sys
seen = []
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        seen.append([event, repr(arguments[1:])])
sys.addaudithook(hook)
from sdseg_cli.cli import main
code = 0
try:
    main(sys.argv[2:])
except SystemExit as end:
    code = end.code
open(sys.argv[1], "w").write(json.dumps({"code": code, "seen": seen}))
"""


def connections(*arguments: object, folder: Path) -> dict:
    note = folder / "seen.json"
    environment = {
        key: value
        for key, value in os.environ.items()
        if not re.match(r"HF_|HUGGINGFACE|DO_NOT_TRACK|TRANSFORMERS|DIFFUSERS|WANDB|RANK|WORLD_SIZE", key)
    }
    finished = subprocess.run(
        [sys.executable, "-c", WATCH, note, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HOME": str(folder)},
    )
    assert note.exists(), finished.stderr[-3000:]
    return json.loads(note.read_text())


def test_prediction_and_training_open_no_connection(model, tiny_recipe, tmp_path):
    (tmp_path / "scans").mkdir()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "scans" / "a.png")
    found = connections(
        *("predict", "scans", "--out", "masks", "--model", model, "--device", "cpu", "--report"),
        folder=tmp_path,
    )
    assert found == {"code": 0, "seen": []}
    recipe = tiny_recipe({"train.trackers": ["tensorboard"], "train.validate_every": 2})
    (tmp_path / "tiny.yaml").write_text(recipe_to_yaml(recipe))
    found = connections("train", "--recipe", "tiny.yaml", "--out", "run", "--device", "cpu", folder=tmp_path)
    assert found == {"code": 0, "seen": []}


def test_openvino_is_loaded_without_its_telemetry(tmp_path):
    pytest.importorskip("openvino")
    pytest.importorskip("openvino_telemetry")
    code = (
        "import sys; from sdseg_cli.core.model.exported import _import; _import('openvino').convert_model; "
        "sys.exit(sum(name.startswith('openvino_telemetry') and bool(module) "
        "for name, module in sys.modules.items()))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=200).returncode == 0


def test_the_watch_sees_a_connection(tmp_path):
    found = connections(
        *("prepare", "kseg", "--source", "http://127.0.0.1:9/x.zip", "--out", "data"), folder=tmp_path
    )
    assert found["code"] == 1
    assert any(event == "socket.connect" for event, _ in found["seen"])
