"""``sdseg doctor``: what is installed, what is at hand, and what will work on this machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import typer

from sdseg_cli import console
from sdseg_cli.commands._options import JsonOption
from sdseg_cli.core.errors import SdsegError
from sdseg_cli.core.run_directory import library_versions

OPTIONAL = {
    "highdicom": "DICOM segmentations",
    "onnx": "sdseg export",
    "onnxscript": "sdseg export",
    "onnxruntime": "running exported ONNX models",
    "openvino": "running exported models on Intel processors",
    "wandb": "train.trackers: [wandb]",
    "mlflow": "train.trackers: [mlflow]",
    "tensorboard": "train.trackers: [tensorboard]",
}
LOW_DISK_GB = 5.0  # below it, checkpoints and prepared data soon fill the disk


def doctor(as_json: JsonOption = False) -> None:
    """Look at this machine: versions, devices, weights, disk, datasets; and what to do where one is amiss.

    Leaves with 0, or with 1 where something that every command needs is broken. Fetches nothing.

    Examples:

    sdseg doctor

    sdseg doctor --json > machine.json
    """
    report: dict[str, Any] = {
        "versions": library_versions(),
        "devices": {},
        "optional": {name: _version(name) for name in OPTIONAL},
        "weights": {},
        "disk": _disk(),
        "datasets": _datasets(Path("data")),
        "broken": [],
        "remedies": [],
    }
    with console.working("looking at this machine"):
        try:
            report["devices"] = _devices()
            report["weights"] = _weights()
        except Exception as error:  # a broken installation raises anything: that is what is looked for
            report["broken"].append(
                f"PyTorch cannot be used ({type(error).__name__}: {error}). Install torch again."
            )
    for name, version in report["versions"].items():
        if version is None:
            report["broken"].append(f"{name} is not installed. Install it with: pip install {name}")
    report["remedies"] = _remedies(report)
    if as_json:
        console.show_json(report)
    else:
        _show(report)
    if report["broken"]:
        raise typer.Exit(1)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(
            {
                "name": properties.name,
                "memory_gib": round(total / 2**30, 1),
                "free_gib": round(free / 2**30, 1),
                "fp16": True,
                "bf16": properties.major >= 8,
            }
        )
    return {
        "cpu_threads": torch.get_num_threads(),
        "gpus": gpus,
        "mps": torch.backends.mps.is_available(),
        "compiler": next((tool for tool in (os.environ.get("CXX"), "g++", "clang++") if _has(tool)), None),
        "triton": importlib.util.find_spec("triton") is not None,
    }


def _has(tool: str | None) -> bool:
    return tool is not None and shutil.which(tool) is not None


def _weights() -> dict[str, Any]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from sdseg_cli.core.errors import ModelError
    from sdseg_cli.core.metrics.similarity import find_perceptual_trunk

    cache = Path(HF_HUB_CACHE)
    files = cache.glob("models--*/blobs/*") if cache.is_dir() else iter(())
    size = sum(file.stat().st_size for file in files if file.is_file())
    try:
        trunk: str | None = str(find_perceptual_trunk())
    except ModelError:
        trunk = None
    return {"hub_cache": str(cache), "hub_cache_gb": round(size / 1e9, 2), "lpips_backbone": trunk}


def _disk() -> dict[str, float]:
    """Free space in GB where runs, data and everything else of this folder would be written."""
    places = [Path(), *(place for place in (Path("runs"), Path("data")) if place.is_dir())]
    return {str(place): round(shutil.disk_usage(place).free / 1e9, 1) for place in places}


def _datasets(root: Path) -> dict[str, str]:
    """Each prepared dataset below ``root``: its splits, or why it does not open."""
    from sdseg_cli.core.data.prepared import MANIFEST_FILE, PreparedDataset

    found = {}
    for file in sorted(root.glob(f"*/{MANIFEST_FILE}")):
        try:
            splits = PreparedDataset.open(file.parent).manifest.splits
            found[str(file.parent)] = ", ".join(f"{name} {count}" for name, count in splits.items())
        except SdsegError as error:
            found[str(file.parent)] = f"broken: {error}"
    return found


def _remedies(report: dict[str, Any]) -> list[str]:
    """What will not work or will be slow, each with what to do about it."""
    remedies = [
        f"{OPTIONAL[name]} will not work: pip install {name}"
        for name, version in report["optional"].items()
        if version is None
    ]
    devices, weights = report["devices"], report["weights"]
    if devices and not devices["gpus"] and not devices["mps"]:
        remedies.append("no GPU: the recipes kseg and cvc are made for one; sdseg demo is made for a CPU")
    if weights and weights["lpips_backbone"] is None:
        remedies.append("stability leaves LPIPS out: sdseg stability --lpips-backbone download (233 MB)")
    remedies += [
        f"only {free} GB are free in {place}: free some space, or write elsewhere with --out"
        for place, free in report["disk"].items()
        if free < LOW_DISK_GB
    ]
    if not report["datasets"]:
        remedies.append("no prepared dataset in data/: sdseg prepare kseg, or sdseg prepare phantom")
    remedies += [text for text in report["datasets"].values() if text.startswith("broken")]
    return remedies


def _show(report: dict[str, Any]) -> None:
    devices, weights = report["devices"], report["weights"]
    console.show_facts(report["versions"], title="Versions")
    if devices:
        gpus = {
            f"GPU {index}": f"{gpu['name']}, {gpu['memory_gib']} GiB ({gpu['free_gib']} free), "
            f"fp16, {'bf16' if gpu['bf16'] else 'no bf16'}"
            for index, gpu in enumerate(devices["gpus"])
        }
        facts = {"CPU threads": devices["cpu_threads"], **(gpus or {"GPU": "none"})}
        tools = (devices["compiler"] or "no C++ compiler", "triton" if devices["triton"] else "no triton")
        console.show_facts({**facts, "compilers": ", ".join(tools)}, title="\nDevices")
    console.show_facts(report["optional"], title="\nOptional packages")
    if weights:
        cache = f"{weights['hub_cache']}, {weights['hub_cache_gb']} GB"
        backbone = weights["lpips_backbone"] or "none"
        console.show_facts({"hub cache": cache, "LPIPS backbone": backbone}, title="\nWeights")
    console.show_facts({place: f"{gb} GB free" for place, gb in report["disk"].items()}, title="\nDisk")
    console.show_facts(report["datasets"] or {"data/": "none"}, title="\nPrepared datasets")
    for text in report["broken"]:
        console.fail(text)
    for text in report["remedies"]:
        console.warn(text)
    if not report["broken"]:
        console.done("everything that sdseg needs is at hand")
