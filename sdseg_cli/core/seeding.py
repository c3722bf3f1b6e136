"""Randomness as an argument: every draw comes from a named key, never from global state.

The noise of a slice depends on (seed, case, slice, sample) alone, so it is bit-identical whatever the
batch size, the order, the number of workers or the number of processes.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(*key: str | int) -> int:
    """Hash a key to a seed.

    Args:
        key: the parts of the key, in order. ``("a", 1)`` and ``("a1",)`` give different seeds.

    Returns:
        An integer in [0, 2**63).
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in key:
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return int.from_bytes(digest.digest(), "little") >> 1


def generator_for(*key: str | int) -> torch.Generator:
    """Make a CPU generator for a key; see :func:`derive_seed`."""
    import torch

    return torch.Generator("cpu").manual_seed(derive_seed(*key))
