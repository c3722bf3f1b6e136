"""``sdseg export``: a model as one graph for ONNX Runtime or OpenVINO."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from sdseg_cli import console
from sdseg_cli.commands._options import JsonOption, OverwriteOption, complete_run


class Format(StrEnum):
    """Whose graph is written."""

    onnx = "onnx"
    openvino = "openvino"


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|FOLDER|HUB_ID",
            help="Run directory, model folder or hub id.",
            autocompletion=complete_run,
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the graph.", show_default=False)
    ],
    kind: Annotated[Format, typer.Option("--format", help="Whose graph to write.")] = Format.onnx,
    decoder: Annotated[
        Path | None,
        typer.Option(
            "--decoder",
            metavar="FOLDER",
            help="Small decoder in place of the autoencoder's (sdseg autoencoder --distill).",
            show_default=False,
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model as one graph, from image and noise to probabilities in one reverse step.

    The graph is run and compared with the model: it is kept only if they agree to 0.001. sdseg predict,
    evaluate and stability take the folder as --model, on a CPU. Needs: pip install 'sdseg[export]'

    Examples::

        sdseg export runs/kseg-fast --out exported --format openvino
        sdseg predict scans/ --model exported --out masks/
    """
    from sdseg_cli.core.files import EXPORT_FILE, refuse_existing, whole_folder
    from sdseg_cli.core.manifest import model_sum, write_manifest
    from sdseg_cli.core.run_directory import library_versions, now, resolve_model

    refuse_existing(out, overwrite=overwrite, ours=EXPORT_FILE)
    reference = resolve_model(model, option="")
    console.say(f"model: {reference.description}")
    with console.working("loading the model"):
        from sdseg_cli.core.engine.exporting import export_model

    with (
        whole_folder(out, overwrite=overwrite, ours=EXPORT_FILE) as folder,
        console.working(f"writing the {kind.value} graph and comparing it with the model"),
    ):
        config = export_model(
            reference.location, folder, kind.value, str(decoder.resolve()) if decoder is not None else None
        )
        made_from: dict[str, Any] = {"model_sha256": model_sum(reference.location)}
        made_from |= {"decoder_sha256": model_sum(decoder)} if decoder is not None else {}
        write_manifest(folder, "exported model", **made_from, written=now(), versions=library_versions())
    if as_json:
        console.show_json({"folder": str(out), **config})
        return
    console.say(f"largest difference of a probability: {config['max_abs_deviation']:.1e}")
    console.done(f"{out}. Use it with: sdseg predict scans/ --model {out} --out masks/")
