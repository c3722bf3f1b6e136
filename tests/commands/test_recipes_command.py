"""``sdseg recipes``: list, show, copy, check."""

import json

import pytest

from sdseg_cli import cli
from sdseg_cli.core.recipe import find_recipe, load_recipe, read_recipe, shipped_recipes


def sdseg(capsys, *args) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(["recipes", *map(str, args)])
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def test_the_list_says_what_each_recipe_is_and_needs(capsys):
    code, out, _ = sdseg(capsys, "list", "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)}
    assert sorted(rows) == shipped_recipes()
    assert all(row["what"] for row in rows.values())
    assert "autoencoder ./weights/kl-f8" in rows["kseg"]["needs"]
    assert rows["kseg-fast"]["needs"] == ["the prepared dataset data/kseg"]


def test_show_prints_the_file_and_resolved_prints_every_key(capsys):
    assert sdseg(capsys, "show", "demo")[1] == find_recipe("demo").read_text()
    assert read_recipe(sdseg(capsys, "show", "demo", "--resolved")[1]) == load_recipe("demo")


def test_copy_overwrites_only_when_told_to(tmp_path, capsys):
    target = tmp_path / "mine.yaml"
    assert sdseg(capsys, "copy", "demo", target)[0] == 0
    assert target.read_bytes() == find_recipe("demo").read_bytes()
    target.write_text("mine")
    code, _, err = sdseg(capsys, "copy", "demo", target)
    assert code == 2
    assert "--overwrite" in err
    assert target.read_text() == "mine"
    assert sdseg(capsys, "copy", "demo", target, "--overwrite")[0] == 0
    assert sdseg(capsys, "copy", "kseg", tmp_path)[0] == 0
    assert (tmp_path / "kseg.yaml").is_file()


@pytest.mark.faults
def test_check_tells_every_mistake_with_its_line_and_what_passes(tmp_path, capsys):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(
        find_recipe("demo").read_text().replace("steps: 900", "stesp: 900").replace("size: 128", "size: big")
    )
    code, out, err = sdseg(capsys, "check", "demo", wrong)
    assert code == 2
    assert "demo: fine" in out
    lines = [
        n for n, line in enumerate(wrong.read_text().splitlines(), 1) if "stesp" in line or "big" in line
    ]
    assert len(lines) >= 2
    for line in lines:
        assert f"{wrong}:{line}: " in err
