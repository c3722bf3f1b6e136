"""Exports a model by its place."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdseg_cli.core.model.exported import export
from sdseg_cli.core.model.weights import load_pipeline, replace_decoder


def export_model(location: str, folder: Path, kind: str, decoder: str | None = None) -> dict[str, Any]:
    """Write a model as a graph.

    Args:
        location: folder or hub id of the model.
        folder: exists; the graph and its JSON are written there.
        kind: ``onnx`` or ``openvino``.
        decoder: folder of a small decoder to put in the autoencoder's place.

    Returns:
        What the JSON holds.

    Raises:
        ModelError: the model cannot be read, or its graph does not compute the same.
        UsageError: a library is missing, or the decoder does not fit.
    """
    pipeline = load_pipeline(location)
    pipeline.to("cpu")
    if decoder is not None:
        replace_decoder(pipeline, decoder)
    with _quiet():
        return asdict(export(pipeline, folder, kind))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own progress off stdout and its warnings off the log."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
