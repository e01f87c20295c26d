"""What a computation costs, counted whatever the machine is busy with: memory its operations ask for, lines of Python."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Memory", "MostAlive", "ran", "steps"]


class Memory(TorchDispatchMode):
    """largest, total: bytes of tensors that operations made anew, views left out. calls: how many operations ran."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        self.calls += 1
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                size = x.untyped_storage().nbytes()
                self.largest, self.total = max(self.largest, size), self.total + size
        return out


class MostAlive(TorchDispatchMode):
    """most: of tensors that operations made, how many of at least so many elements lay in memory at once, views left out."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.bytes, self.most, self.made = 4 * elements, 0, list[weakref.ref[Tensor]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        given -= {tensor.untyped_storage().data_ptr() for tensor in self._alive()}
        out = func(*args, **(kwargs or {}))
        large = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.untyped_storage().nbytes() >= self.bytes]
        self.made = [weakref.ref(x) for x in (*self._alive(), *large) if x.untyped_storage().data_ptr() not in given]
        self.most = max(self.most, len({tensor.untyped_storage().data_ptr() for tensor in self._alive()}))
        return out

    def _alive(self) -> list[Tensor]:
        return [tensor for tensor in (made() for made in self.made) if tensor is not None]


def ran(function: Any) -> Memory:
    with Memory() as memory, torch.inference_mode():
        function()
    return memory


def steps(function: Callable[[], object]) -> int:
    """Lines of Python that it runs in this thread, each turn of a loop or a comprehension counted."""
    counted = 0

    def trace(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        nonlocal counted
        counted += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return counted
