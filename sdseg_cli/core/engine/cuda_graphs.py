"""Calls of a network as CUDA graphs: one launch in place of hundreds, which small batches wait for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

_MOST_RECORDINGS = 2  # of one network; each holds its inputs and outputs, and what lies between them

_logger = logging.getLogger(__name__)


class GraphedCalls:
    """Stands in for a network's call: the second of the same shapes is recorded, later ones are replayed.

    The first runs as it is: it does what is done once (compiling, choosing algorithms). What is returned lies
    where the next call of the same shapes will write, so it has to be used or copied before that. With
    gradients, on another device, or where recording fails, calls run as they are.

    Args:
        call: what the network runs, compiled or as written; in evaluation mode.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self._met: dict[Hashable, _Recording | None] = {}
        self._fails = False

    def __call__(self, *inputs: Any) -> Any:
        """Give what the call gives, in memory that the next replay writes to."""
        leaves, structure = pytree.tree_flatten(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if self._fails or torch.is_grad_enabled() or not _on_gpu(tensors):
            return self._call(*inputs)
        key = (*map(_signature, leaves), torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        if key not in self._met:
            if len(self._met) < _MOST_RECORDINGS:
                self._met[key] = None
            return self._call(*inputs)
        if self._met[key] is None:
            self._record(key, leaves, structure)
        recording = self._met.get(key)
        # After a failure what it held is free again here: no error is being handled any more.
        return self._call(*inputs) if recording is None else recording.replay(leaves)

    def _record(self, key: Hashable, leaves: list, structure: Any) -> None:
        try:
            self._met[key] = _Recording(self._call, leaves, structure)
        except RuntimeError as error:  # no memory to hold it twice, or a part cannot be recorded
            _logger.debug("not recorded as a CUDA graph: %s", error)
            self._fails = True
            self._met.clear()


class _Recording:
    def __init__(self, call: Callable[..., Any], leaves: list, structure: Any) -> None:
        self._inputs = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._graph = torch.cuda.CUDAGraph()
        device = next(leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor))
        # Memory of its own: in a pool shared by graphs, one that is replayed twice writes over what a graph
        # recorded later gave. And other threads may wait for their results meanwhile.
        with (
            _kept_stream(device),
            torch.cuda.graph(
                self._graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"
            ),
        ):
            self._outputs = call(*pytree.tree_unflatten(self._inputs, structure))

    def replay(self, leaves: list) -> Any:
        for kept, given in zip(self._inputs, leaves, strict=True):
            if isinstance(given, torch.Tensor):
                kept.copy_(given)
        self._graph.replay()
        return self._outputs


@contextmanager
def _kept_stream(device: torch.device) -> Iterator[None]:
    """Record on ``device``, and go on on the stream of before: a recording that fails does not restore it."""
    with torch.cuda.device(device):
        before = torch.cuda.current_stream(device)
        try:
            yield
        finally:
            torch.cuda.set_stream(before)


def _on_gpu(tensors: list[torch.Tensor]) -> bool:
    return bool(tensors) and all(tensor.device.type == "cuda" for tensor in tensors)


def _signature(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.stride()
    return leaf
