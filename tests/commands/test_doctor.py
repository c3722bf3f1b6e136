"""``sdseg doctor``: what it finds, what it advises, and how it leaves."""

import json
import shutil

import pytest

from sdseg_cli import cli
from sdseg_cli.commands import doctor


def report_of(capsys) -> tuple[int, dict]:
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", "--json"])
    return int(end.value.code or 0), json.loads(capsys.readouterr().out)


def test_a_dataset_is_found_and_a_torn_one_is_told(polyps, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(polyps, tmp_path / "data/polyps")
    shutil.copytree(polyps, tmp_path / "data/torn")
    next((tmp_path / "data/torn/train").glob("*.arrow")).unlink()
    code, report = report_of(capsys)
    assert code == 0
    assert report["datasets"]["data/polyps"].startswith("train 14")
    assert "torn" in report["datasets"]["data/torn"]
    assert any("data/torn" in text for text in report["remedies"])
    assert report["versions"]["torch"]
    assert report["devices"]["cpu_threads"] >= 1
    assert report["disk"]["data"] > 0


@pytest.mark.faults
def test_what_is_missing_and_optional_is_advised_and_what_is_essential_ends_with_1(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    code, report = report_of(capsys)
    assert code == 0
    assert any("pip install highdicom" in text for text in report["remedies"])

    def broken():
        raise OSError("libcudart.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "_devices", broken)
    code, report = report_of(capsys)
    assert code == 1
    assert "libcudart.so" in report["broken"][0]
