"""When a call is recorded and when it is not, with the recording itself left out; test_cuda.py has that."""

from __future__ import annotations

import weakref

import pytest
import torch

from sdseg_cli.core.engine import cuda_graphs
from sdseg_cli.core.engine.cuda_graphs import GraphedCalls


class Recording:
    """Remembers what it was made of, and computes when it is replayed."""

    made: list[list[torch.Size]]

    def __init__(self, call, leaves, structure):
        if leaves[0].shape[0] == 13:
            raise torch.OutOfMemoryError("no room")
        self.made.append([leaf.shape for leaf in leaves if isinstance(leaf, torch.Tensor)])
        self.call, self.structure = call, structure

    def replay(self, leaves):
        return "replayed", self.call(*torch.utils._pytree.tree_unflatten(leaves, self.structure))


@pytest.fixture
def calls(monkeypatch) -> GraphedCalls:
    Recording.made = []
    monkeypatch.setattr(cuda_graphs, "_Recording", Recording)
    monkeypatch.setattr(cuda_graphs, "_on_gpu", lambda tensors: True)
    return GraphedCalls(lambda image, features, label: image.sum() + features[0].sum() + (label or 0))


def given(count: int, value: float = 1.0):
    return torch.full((count, 2), value), [torch.full((count, 3), value)], None


@torch.no_grad()
def test_the_second_call_of_a_shape_is_recorded_and_every_later_one_replayed(calls):
    assert calls(*given(2)) == 10
    assert calls(*given(2, 2.0)) == ("replayed", 20)
    assert calls(*given(2, 3.0)) == ("replayed", 30)
    assert calls(*given(1)) == 5  # the last batch, of another size
    assert Recording.made == [[(2, 2), (2, 3)]]


@torch.no_grad()
def test_what_is_no_tensor_is_part_of_the_shape(calls):
    image, features, _ = given(2)
    assert calls(image, features, None) == 10
    assert calls(image, features, 5) == 15
    assert calls(image, features, 5) == ("replayed", 15)


@torch.no_grad()
def test_a_call_that_cannot_be_recorded_runs_as_it_is_from_then_on(calls):
    for _ in range(3):
        assert calls(*given(13)) == 65
    assert [calls(*given(2)) for _ in range(3)] == [10, 10, 10]


@torch.no_grad()
def test_the_memory_of_a_recording_that_failed_is_free_when_the_call_runs_as_it_is(calls, monkeypatch):
    held: list[weakref.ref] = []

    class Failing:
        def __init__(self, call, leaves, structure):
            clone = leaves[0].clone()
            held.append(weakref.ref(clone))
            raise torch.OutOfMemoryError(f"no room beside {clone.shape}")

    monkeypatch.setattr(cuda_graphs, "_Recording", Failing)
    seen = []
    calls._call = lambda *_: seen.append([kept() for kept in held])
    for _ in range(2):
        calls(*given(2))
    assert seen == [[], [None]]


@torch.no_grad()
def test_two_shapes_are_recorded_and_no_more(calls):
    for count in range(1, 11):
        calls(*given(count))
    answers = [calls(*given(count)) for count in range(1, 11)]
    assert [isinstance(answer, tuple) for answer in answers] == [True] * 2 + [False] * 8


def test_nothing_is_recorded_with_gradients(calls):
    assert [calls(*given(2)) for _ in range(3)] == [10, 10, 10]


@torch.no_grad()
def test_nothing_is_recorded_on_a_cpu():
    calls = GraphedCalls(lambda image: image.sum())
    assert [calls(torch.ones(2, 2)) for _ in range(3)] == [4, 4, 4]
