"""What makes networks faster without changing what they compute: memory layout and compilation."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from sdseg_cli.core.engine.cuda_graphs import GraphedCalls

# Images on a GPU from which on compiling pays: on an H100 the paper's networks then take 6 ms an image less,
# after a minute at best.
WORTH_COMPILING = 10_000
_CAST_BY_AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
_LARGEST_BATCH = 64  # beyond it no network here runs faster, and the last batch is padded to it
_SHARE_OF_FREE_MEMORY = 0.6  # the rest is left to the allocator's gaps and to other programs


def use_channels_last(networks: list[nn.Module], device: torch.device, *, training: bool = False) -> None:
    """Lay the convolutions' weights out with the channels last, where that is known to be faster.

    It is on a GPU, whose tensor cores read them so, and in a prediction on a CPU, but not in training there.
    """
    if device.type == "cuda" or (device.type == "cpu" and not training):
        for network in networks:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def hold_in_half(networks: list[nn.Module], dtype: torch.dtype) -> None:
    """Keep weights of convolutions and matrix products in half precision, once and for all.

    Under autocast, which is needed as before, the results are the same bit for bit: it would cast these
    weights, and only these, at every call. Layers derived from them are left alone: what they do with their
    weights first, standardise them for one, needs float32.
    """
    for network in networks:
        for module in network.modules():
            if type(module) in _CAST_BY_AUTOCAST:
                module.to(dtype)


def record_graphs(networks: list[nn.Module]) -> None:
    """Record the calls of networks as CUDA graphs, in place; what is to be compiled is compiled before."""
    for network in networks:
        network._compiled_call_impl = GraphedCalls(network._compiled_call_impl or network._call_impl)


def compile_cache() -> Path:
    """Folder of compiled networks: TORCHINDUCTOR_CACHE_DIR, else in the user's cache folder."""
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sdseg" / "compiled"


def compile_networks(networks: list[nn.Module]) -> None:
    """Compile networks in place, for fixed shapes; the work is done at their next call.

    Types, names of weights and configurations stay what they were, so that nothing else need know.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compile_cache()))
    for network in networks:
        network.compile(dynamic=False)


def undo_compile(networks: list[nn.Module]) -> None:
    """Let networks run as written again: neither compiled nor recorded."""
    for network in networks:
        network._compiled_call_impl = None


def missing_compiler(device: torch.device) -> str | None:
    """Say what compiling lacks here, or None; a GPU's kernels need a host compiler too."""
    wanted = os.environ.get("CXX")
    usual = ["g++", "clang++", "c++"] if device.type == "cpu" else ["gcc", "clang", "cc"]
    names = [wanted] if wanted else usual
    if not any(shutil.which(name) for name in names):
        return f"no C++ compiler was found (looked for {', '.join(names)})"
    return None


def try_compiled(
    networks: list[nn.Module], warm_up: Callable[[], object], device: torch.device
) -> str | None:
    """Compile networks and run them once; where that fails they run as written.

    Args:
        networks: compiled in place.
        warm_up: runs them on the shapes that are to come.
        device: where they are.

    Returns:
        None, or why they run as written.

    Raises:
        torch.OutOfMemoryError: also as written they would not fit.
    """
    lacking = missing_compiler(device)
    if lacking is not None:
        return lacking
    compile_networks(networks)
    try:
        warm_up()
    except torch.OutOfMemoryError:
        undo_compile(networks)
        raise
    except Exception as error:  # a compiler fails in many ways, and none of them is the user's fault
        undo_compile(networks)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {' '.join(lines[:2])[:300] or 'no reason given'}"
    return None


def fitting_batch(free_bytes: int, bytes_per_image: float) -> int:
    """Largest power of two of images, at most 64, that fits well into the free memory; at least 1."""
    most = int(_SHARE_OF_FREE_MEMORY * free_bytes / max(bytes_per_image, 1.0))
    return 2 ** (max(1, min(most, _LARGEST_BATCH)).bit_length() - 1)


class MemoryMeter:
    """Free memory of a device, and the peak that a computation adds to what was in use."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free_bytes(self) -> int:
        """Bytes that this process can still get: the device's free ones and its own idle ones."""
        free, _ = torch.cuda.mem_get_info(self.device)
        idle = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + idle

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        """Measure: the list holds the added peak in bytes once the block has ended."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        found: list[int] = []
        yield found
        found.append(torch.cuda.max_memory_allocated(self.device) - before)
