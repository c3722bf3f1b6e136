"""The speed benchmark runs and counts what it says; how fast anything is, no test judges."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "benchmarks" / "speed.py"
TINY = ("--quick", "--tiny", "--device", "cpu", "--size", "32", "--rounds", "1")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("speed")
    main = runpy.run_path(str(SCRIPT), run_name="speed")["main"]
    main([*TINY, "--runtimes", "--out", str(out)])
    assert "| kseg-fast bf16 channels-last |" in (out / "speed.md").read_text()
    return json.loads((out / "speed.json").read_text())


def test_every_variant_is_measured(report):
    assert not [row for row in report["variants"] if row["reason"]]
    assert len(report["variants"]) == 5 * 4 + 1  # one recomputes its activations
    for row in report["variants"]:
        assert set(row["images_per_second"]) == {"1", "16"}
        assert row["samples_per_second"] > 0
        assert row["gflop_per_image"] > 0
        assert row["peak_memory_gib"] > 0


def test_the_shares_of_the_networks_add_up(report):
    for row in report["variants"]:
        assert sum(row["shares"].values()) == pytest.approx(1.0, abs=0.02), row["name"]


def test_the_mask_decoder_takes_a_smaller_share_than_the_decoder_for_photographs(report):
    shares = {row["name"]: row["shares"].get("decoder") for row in report["variants"]}
    assert shares["paper, built-in mask decoder fp32"] < shares["paper fp32"]


def test_an_exported_graph_is_measured_beside_the_network(capsys):
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason="needs the extra: pip install 'sdseg[export]'")
    main = runpy.run_path(str(SCRIPT), run_name="speed")["main"]
    found = main([*TINY, "--runtimes", "onnx", "--only", "U-Net ResNet-34 fp32 onnx"])
    (row,) = found["variants"]
    assert (row["name"], row["reason"]) == ("U-Net ResNet-34 fp32 onnx", "")
    assert row["images_per_second"]["16"] > 0
    assert row["samples_per_second"] is None
