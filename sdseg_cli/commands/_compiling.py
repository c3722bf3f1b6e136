"""Compiles a predictor's networks where that was asked for or is expected to pay, and says how it went."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdseg_cli import console

if TYPE_CHECKING:
    from sdseg_cli.core.engine.inference import Predictor


SLICES_OF_A_VOLUME = 100  # about: how many a volume has is known when it is read


def compile_if_wanted(predictor: Predictor, wanted: bool | None, images: int) -> None:
    """Compile as ``--compile`` says; without it by device and number of images.

    Args:
        predictor: its networks run as written where compiling fails.
        wanted: what the user asked for, or None.
        images: how many this process will predict, the slices of volumes counted.
    """
    from sdseg_cli.core.engine.acceleration import WORTH_COMPILING, compile_cache

    if wanted is None:
        wanted = images >= WORTH_COMPILING and predictor.device.type == "cuda"
    if not wanted:
        return
    with console.working(f"compiling the networks (a minute or more; kept in {compile_cache()})"):
        reason = predictor.compile()
    if reason is not None:
        console.warn(f"the networks run as written, they could not be compiled: {reason}")
