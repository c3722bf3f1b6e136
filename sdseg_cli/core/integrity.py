"""What a folder's manifest says of its files, and whether they still are so, for whoever loads them.

safetensors, graphs and JSON have no checksum of their own: with a flipped bit they load, as another model.
``manifest.py`` writes manifests; ``verification.py`` compares whole folders, this module what is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sdseg_cli.core.errors import ModelError
from sdseg_cli.core.files import sha256_of

MANIFEST_FILE = "manifest.json"

# What others put beside a model: its card, and the hub's own file.
NOT_OURS = frozenset({"README.md", ".gitattributes"})

# What reading a manifest of another form can raise, besides OSError.
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        OSError: the file cannot be read.
        ValueError, RecursionError: it holds no JSON object.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no JSON object")  # noqa: TRY004  (a file of another form)
    return content


def checked_sums(sums: Any) -> dict[str, str]:
    """Refuse names that lead out of the folder: a manifest comes with the folder, from whoever made it.

    Args:
        sums: path inside the folder -> SHA-256, as a manifest has them.

    Raises:
        one of :data:`DAMAGE`: it is no such table, or a name leads elsewhere.
    """
    for name, digest in sums.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"it lists {name}, which is not in the folder")
        str.encode(digest)
    return dict(sums)


def first_altered(folder: Path, sums: Mapping[str, str]) -> str:
    """Name the first file that is not as it was written, with both checksums; "" where all are.

    Raises:
        OSError: a file is missing or cannot be read.
    """
    for name, expected in sums.items():
        found = sha256_of(folder / name)
        if found != expected:
            return f"{folder / name} is altered: SHA-256 {found[:12]}, expected {expected[:12]}"
    return ""


def refuse_altered(folder: Path) -> None:
    """Compare what is about to be loaded with its manifest: the folder's, or that of the model it is part of.

    A folder without a manifest is loaded as it is, and a file that is missing is named by whoever needs it.

    Raises:
        ModelError: a file is altered, or the manifest is damaged.
    """
    folder = folder.expanduser().resolve()
    manifest, prefix = folder / MANIFEST_FILE, ""
    if not manifest.is_file() and (folder.parent / "model_index.json").is_file():
        manifest, prefix = folder.parent / MANIFEST_FILE, f"{folder.name}/"
    if not manifest.is_file():
        return
    try:
        listed = checked_sums(read_object(manifest)["files"])
    except (OSError, *DAMAGE) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise ModelError(
            f"{manifest} is damaged ({reason}): expected a JSON object whose 'files' are names in its folder "
            f"with their SHA-256. Copy the whole folder again; or remove {MANIFEST_FILE} to load the rest "
            "unchecked."
        ) from error
    root = manifest.parent
    try:
        sums = {
            name: digest
            for name, digest in listed.items()
            if name.startswith(prefix) and name not in NOT_OURS and (root / name).is_file()
        }
        problem = first_altered(root, sums)
    except OSError as error:
        raise ModelError(f"{error.filename or folder} cannot be read: {error.strerror or error}.") from error
    if problem:
        raise ModelError(f"{problem} by {manifest}. Restore the file, or copy the whole folder again.")
