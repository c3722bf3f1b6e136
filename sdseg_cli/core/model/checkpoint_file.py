"""Reads checkpoint files of others without running what they may hold."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sdseg_cli.core.errors import ModelError
from sdseg_cli.core.files import is_zip

_AGAIN = "It may be cut short or damaged: download or copy it again and compare its size."
_PICKLE = b"\x80"
_GLOBAL = re.compile(r"(?:GLOBAL|[Uu]nsupported class) (\S+)")


class _LightningCallback:
    """Stands in for the class that Lightning 1.4 uses as a key of ``callbacks``; does nothing."""


# The reader of weights compares names, so the stand-in carries the name that the file holds.
_LightningCallback.__module__ = "pytorch_lightning.callbacks.model_checkpoint"
_LightningCallback.__qualname__ = _LightningCallback.__name__ = "ModelCheckpoint"


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a checkpoint; nothing in the file is executed.

    Args:
        path: a Lightning or plain PyTorch checkpoint, or a safetensors file.

    Returns:
        Name to tensor, on the CPU, mapped from the file where its format allows it: optimizer states, which
        are most of a training checkpoint, are then never read.

    Raises:
        ModelError: the file is missing, damaged, holds code, or holds no weights.
    """
    if not path.is_file():
        raise ModelError(
            f"checkpoint {path} does not exist. Expected a .ckpt, .pt, .pth or .safetensors file."
        )
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict):
        raise ModelError(
            f"checkpoint {path} holds a {type(state).__name__}, expected named weights, at its top or under "
            "'state_dict'. Is it a whole pickled model? Save its state_dict() with the program that made it."
        )
    weights = {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    strangers = sorted(str(name) for name in state if str(name) not in weights)
    if strangers or not weights:
        raise ModelError(
            f"checkpoint {path} holds no plain weights: found {', '.join(strangers[:8]) or 'nothing'}, "
            "expected pairs of name and tensor, at its top or under 'state_dict'."
        )
    return weights


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read as safetensors ({error}). {_AGAIN}") from error


def _read_pickle(path: Path) -> object:
    zipped = is_zip(path)
    with path.open("rb") as file:
        start = file.read(1)
    if not start:
        raise ModelError(f"checkpoint {path} is empty (0 bytes). {_AGAIN}")
    if not zipped and start not in (b"P", _PICKLE):
        raise ModelError(
            f"{path} is no PyTorch checkpoint: it begins with {start!r}, expected a zip archive or a pickle. "
            "A saved web page? Download it again and compare its size."
        )
    try:
        if zipped:
            _check_sums(path)
        with torch.serialization.safe_globals([_LightningCallback]):
            # Only PyTorch's zip format can be mapped; older files are read whole.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except ModelError:
        raise
    except Exception as error:  # damaged bytes raise nearly anything
        if asked_for := _GLOBAL.search(str(error)):
            raise ModelError(
                f"checkpoint {path} holds more than weights: it asks for {asked_for[1].rstrip('.')}, which "
                "could run code. Nothing was executed. If you trust its source, save the weights alone with "
                "the program that made it, torch.save({'state_dict': checkpoint['state_dict']}, "
                "'weights.ckpt'), and convert that file."
            ) from error
        raise ModelError(f"checkpoint {path} cannot be read ({_brief(error)}). {_AGAIN}") from error


def _check_sums(path: Path) -> None:
    """Compare the archive's checksums, which PyTorch does not: one altered bit would pass unseen."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ModelError(f"checkpoint {path} is damaged: the checksum of {damaged} in it is wrong. {_AGAIN}")


def _brief(error: BaseException) -> str:
    """Keep the cause and leave out PyTorch's advice, which also names ways that sdseg does not take."""
    text = str(error).rsplit("WeightsUnpickler error:", 1)[-1]
    return " ".join(text.split()).split(". ")[0].split(" Check the doc")[0][:200] or type(error).__name__
