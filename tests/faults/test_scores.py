"""Row 27: empty masks, through ``sdseg evaluate`` on two folders of masks."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from sdseg_cli.core.data.images import write_label_map

FULL, EMPTY = np.zeros((12, 10), np.uint8), np.zeros((12, 10), np.uint8)
FULL[3:7, 2:6] = 1
CASES = {"found": (FULL, FULL), "missed": (EMPTY, FULL), "invented": (FULL, EMPTY), "neither": (EMPTY, EMPTY)}

# Dice, HD95 and outcome by the convention, as docs/metrics.md states them.
STANDARD = {
    "found": ("1", "0", "scored"),
    "missed": ("0", "inf", "missed"),
    "invented": ("0", "inf", "false alarm"),
    "neither": ("", "", "absent"),
}
PUBLISHED = {**STANDARD, "invented": ("1", "inf", "false alarm"), "neither": ("0", "", "absent")}


@pytest.mark.faults(27)
@pytest.mark.parametrize(
    ("convention", "expected", "mean"),
    [("standard", STANDARD, 1 / 3), ("sdseg", PUBLISHED, 2 / 4)],
)
def test_empty_masks_are_scored_by_the_named_convention_and_counted(
    convention, expected, mean, sdseg, tmp_path
):
    for name, (prediction, truth) in CASES.items():
        for folder, labels in (("masks", prediction), ("truth", truth)):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_label_map(tmp_path / folder / f"{name}.png", labels, 2)
    ended = sdseg(
        *("evaluate", "--predictions", tmp_path / "masks", "--ground-truth", tmp_path / "truth"),
        *("--convention", convention, "--out", tmp_path / "scores", "--classes", "polyp"),
    )
    assert ended.code == 0, ended.err
    with (tmp_path / "scores" / "cases.csv").open(encoding="utf-8", newline="") as stream:
        rows = {row["case"]: row for row in csv.DictReader(stream)}
    for name, (dice, hd95, outcome) in expected.items():
        row = rows[name]
        assert row["outcome"] == outcome
        for found, wanted in ((row["dice"], dice), (row["hd95"], hd95)):
            assert (found == wanted == "") or (found and wanted and float(found) == float(wanted)), row
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert summary["convention"] == convention
    polyp = summary["classes"]["polyp"]
    assert (polyp["missed"], polyp["false_alarms"], polyp["absent"]) == (1, 1, 1)
    assert polyp["metrics"]["dice"]["mean"] == pytest.approx(mean)
    for words in ("missed", "false alarms", "absent"):
        assert words in ended.out
