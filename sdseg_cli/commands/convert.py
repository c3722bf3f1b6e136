"""``sdseg convert``: turns published checkpoints into folders that sdseg reads."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdseg_cli import console
from sdseg_cli.commands._options import JsonOption, OverwriteOption

if TYPE_CHECKING:
    from sdseg_cli.core.model.official import Published

_RECORD = "conversion.json"


class Weights(StrEnum):
    """Which of a checkpoint's U-Nets: the running average of its weights, or the last ones."""

    ema = "ema"
    raw = "raw"


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="Official SDSeg, latent-diffusion or kl-f8 checkpoint; or the folder or hub id of a "
            "Stable Diffusion model, whose autoencoder is taken.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the result.")],
    weights: Annotated[
        Weights | None,
        typer.Option(
            "--weights", help="Weights of the U-Net: averaged or raw. Default: ema.", show_default=False
        ),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option("--heads", min=1, help="Attention heads of the U-Net. Default: 8.", show_default=False),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size",
            min=8,
            help="Side that it was trained at, pixels. Default: 256.",
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes",
            metavar="NAME,NAME,...",
            help="Names of the foreground classes, in the order of their indices.",
            show_default=False,
        ),
    ] = None,
    conditioning_channels: Annotated[
        int | None,
        typer.Option(
            "--conditioning-channels",
            min=1,
            help="Of a latent-diffusion U-Net: channels to add for the conditioning. Default: 4.",
            show_default=False,
        ),
    ] = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(
            "--autoencoder",
            metavar="FOLDER|ID",
            help="Of an SDSeg checkpoint: refer to this folder or hub id, which holds the same autoencoder, "
            "instead of copying it (335 MB).",
            show_default=False,
        ),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store 16-bit floats: half the size.")] = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Turn a published checkpoint into a model folder, or into a start for training.

    What the file is, and the widths and depths of its networks, are read from its tensors. Each of them must
    find its place: one that is missing or unexpected is named. Pickled code in a file is never executed.

    Examples::

        sdseg convert sdseg-cvc.ckpt --out models/sdseg-cvc          # an official SDSeg checkpoint
        sdseg predict scans/ --model models/sdseg-cvc --out masks/
        sdseg convert btcv.ckpt --out models/btcv --classes spleen,kidney,liver
        sdseg convert kl-f8/model.ckpt --out weights/kl-f8           # the autoencoder that kseg starts from
        sdseg convert lsun_churches/model.ckpt --out weights/lsun_churches   # and its U-Net
    """
    from sdseg_cli.core.files import refuse_existing, whole_folder
    from sdseg_cli.core.manifest import write_manifest
    from sdseg_cli.core.run_directory import library_versions, now

    ours = "model_index.json" if (out / "model_index.json").is_file() else "config.json"
    refuse_existing(out, overwrite=overwrite, ours=ours)
    console.say(f"reading {source} ...")

    given = {
        "weights": weights and weights.value,
        "heads": heads,
        "image_size": image_size,
        "classes": ("background", *_split(classes)) if classes is not None else None,
        "conditioning_channels": conditioning_channels,
    }
    options = {name: value for name, value in given.items() if value is not None}
    result = _read(source, options)
    if autoencoder is not None:
        _refer(result, autoencoder)
        options["autoencoder"] = autoencoder
    summary = _summary(result, source, options, half)
    with whole_folder(out, overwrite=overwrite, ours=ours) as folder:
        _save(result, folder, half)
        (folder / _RECORD).write_text(console.to_json(summary, indent=2) + "\n", encoding="utf-8")
        write_manifest(folder, summary["kind"], written=now(), versions=library_versions())
    if as_json:
        console.show_json({"folder": str(out), **summary})
        return
    console.show_table(
        ["network", "weights", "built as"],
        [[name, f"{part['parameters']:,}", part["built_as"]] for name, part in summary["networks"].items()],
        title=summary["kind"],
    )
    console.done(f"{out}. Use it with: {_use(result, out)}")


def _split(classes: str) -> list[str]:
    return [name.strip() for name in classes.split(",") if name.strip()]


def _read(source: str, options: dict[str, Any]) -> Published:
    from sdseg_cli.core.errors import UsageError
    from sdseg_cli.core.model.official import load_published
    from sdseg_cli.core.model.weights import load_published_autoencoder, quiet_diffusers

    quiet_diffusers()
    path = Path(source).expanduser()
    if path.is_file() or path.suffix.lower() in (".ckpt", ".pt", ".pth", ".safetensors", ".bin"):
        return load_published(path, options)
    if options:
        flags = ", ".join("--" + name.replace("_", "-") for name in options)
        raise UsageError(f"{source} is no checkpoint file, and {flags} applies to these only. Leave it out.")
    return load_published_autoencoder(source)


def _refer(result: Published, location: str) -> None:
    """Let a pipeline refer to its autoencoder, once it is seen to be the same tensor by tensor."""
    import torch

    from sdseg_cli.core.errors import ModelError, UsageError
    from sdseg_cli.core.model.pipeline import SDSegPipeline
    from sdseg_cli.core.model.weights import load_any_autoencoder, refer_to_autoencoder

    if not isinstance(result, SDSegPipeline):
        raise UsageError("--autoencoder applies to an official SDSeg checkpoint only. Leave it out.")
    own, found = result.autoencoder.state_dict(), load_any_autoencoder(location).state_dict()
    differing = [
        name
        for name in sorted({*own, *found})
        if name not in own or name not in found or not torch.equal(own[name], found[name])
    ]
    if differing:
        raise ModelError(
            f"--autoencoder {location} is not the checkpoint's autoencoder: {len(differing)} of {len(own)} "
            f"tensors differ, such as {differing[0]}. Leave the option out to copy the checkpoint's own."
        )
    result.register_to_config(autoencoder_reference=refer_to_autoencoder(location, result.autoencoder))


def _networks(result: Published) -> dict[str, Any]:
    import torch

    from sdseg_cli.core.model.pipeline import SDSegPipeline
    from sdseg_cli.core.model.unet import SDSegUNet

    if isinstance(result, SDSegPipeline):
        return {name: part for name, part in result.components.items() if isinstance(part, torch.nn.Module)}
    return {"unet" if isinstance(result, SDSegUNet) else "autoencoder": result}


def _summary(result: Published, source: str, options: dict[str, Any], half: bool) -> dict[str, Any]:
    from sdseg_cli import __version__
    from sdseg_cli.core.files import sha256_of
    from sdseg_cli.core.model.pipeline import SDSegPipeline
    from sdseg_cli.core.model.unet import SDSegUNet

    networks = _networks(result)
    summary: dict[str, Any] = {
        "kind": "start of a U-Net" if isinstance(result, SDSegUNet) else "autoencoder",
        "networks": {
            name: {"parameters": network.num_parameters(), "built_as": _built_as(network)}
            for name, network in networks.items()
        },
        "source": source,
        "sha256": sha256_of(Path(source)) if Path(source).is_file() else None,
        "options": options,
        "half": half,
        "sdseg": __version__,
    }
    if isinstance(result, SDSegPipeline):
        summary |= {
            "kind": "SDSeg model",
            "classes": list(result.classes),
            "image_size": result.config.image_size,
            "latent_scale": result.config.latent_scale,
        }
    return summary


def _built_as(network: Any) -> str:
    config = network.config
    channels = config.get("channels") or config.get("block_out_channels")
    depth = config.get("blocks") or config.get("layers_per_block")
    text = f"widths {'-'.join(map(str, channels))}, {depth} blocks a level"
    if "heads" in config:
        strides = ", ".join(map(str, config["attention_strides"])) or "none"
        text += f", {config['heads']} heads, attention at strides {strides}"
    if config.get("num_class_embeds"):
        text += f", {config['num_class_embeds']} classes"
    return text


def _save(result: Published, folder: Path, half: bool) -> None:
    import torch

    from sdseg_cli.core.errors import ModelError

    if half:
        for name, network in _networks(result).items():
            network.to(torch.float16)
            broken = [key for key, value in network.state_dict().items() if not torch.isfinite(value).all()]
            if broken:
                raise ModelError(f"{name}: {broken[0]} does not fit into 16-bit floats. Leave out --half.")
    result.save_pretrained(folder)


def _use(result: Published, out: Path) -> str:
    from sdseg_cli.core.model.pipeline import SDSegPipeline
    from sdseg_cli.core.model.unet import SDSegUNet

    if isinstance(result, SDSegPipeline):
        return f"sdseg predict scans/ --model {out} --out masks/"
    here = out if out.is_absolute() else f"./{out}"
    if isinstance(result, SDSegUNet):
        return f"sdseg train --recipe kseg --set model.unet_weights={here}"
    return (
        f"sdseg train --recipe kseg --set model.autoencoder={here} "
        "--set model.image_encoder_weights=autoencoder"
    )
