"""Whether networks are compiled before a prediction, and what the user is told of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sdseg_cli.commands._compiling import compile_if_wanted


class Predictor:
    """Counts how often it is compiled, and gives ``reason``."""

    def __init__(self, device: str = "cpu", reason: str | None = None) -> None:
        self.device = SimpleNamespace(type=device)
        self.reason = reason
        self.compiled = 0

    def compile(self) -> str | None:
        self.compiled += 1
        return self.reason


@pytest.mark.parametrize(
    ("device", "wanted", "images", "compiled"),
    [
        ("cuda", None, 10_000, 1),
        ("cuda", None, 9_999, 0),
        ("cuda", False, 5000, 0),
        ("cuda", True, 1, 1),
        ("cpu", None, 10**6, 0),  # its compiler takes minutes
        ("cpu", True, 1, 1),
    ],
)
def test_networks_are_compiled_if_asked_for_or_on_a_gpu_with_many_images(device, wanted, images, compiled):
    predictor = Predictor(device)
    compile_if_wanted(predictor, wanted, images)
    assert predictor.compiled == compiled


def test_the_work_is_announced_and_a_failure_is_told(capsys):
    compile_if_wanted(Predictor(reason="no C++ compiler was found"), True, 1)
    told = capsys.readouterr().err
    assert "compiling the networks" in told
    assert "the networks run as written, they could not be compiled: no C++ compiler was found" in told


def test_nothing_is_said_where_nothing_is_compiled(capsys):
    compile_if_wanted(Predictor(), None, 3)
    assert capsys.readouterr().err == ""
