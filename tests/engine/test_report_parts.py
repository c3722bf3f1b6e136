"""What the pages share: provenance as one would read it."""

import shlex

import pytest

from sdseg_cli.core.engine.report_parts import facts


@pytest.mark.parametrize("program", ["/opt/venv/bin/sdseg", "/opt/lib/sdseg_cli/__main__.py"])
def test_the_command_is_shown_as_it_would_be_typed(program):
    command = [program, "predict", "my scans/", "--set", "a=[1, 2]"]
    told = dict(facts({"command": command, "seed": 0}, {"command": "Command", "seed": "Seed"}))
    assert told == {"Command": "sdseg predict 'my scans/' --set 'a=[1, 2]'", "Seed": "0"}
    assert shlex.split(told["Command"]) == ["sdseg", *command[1:]]


def test_what_is_absent_or_empty_is_left_out():
    content = {"versions": {"torch": "2", "timm": ""}, "warnings": []}
    names = {"command": "Command", "versions": "Versions", "warnings": "Warnings", "other": "Other"}
    assert facts(content, names) == (("Versions", "torch 2"),)
