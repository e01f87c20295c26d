"""Statistics of what linears read: a part of a layer is replayed with weights that listen. No architecture is known here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from quantkit.calib.streams import Part
from quantkit.kernels.reference import round_activation
from quantkit.model.spec import Linear, Role
from quantkit.model.weights import Weights
from quantkit.scheme import Scheme
from quantkit.stats import LinearStats

__all__ = ["LENT_WEIGHT", "Applied", "Listening", "gather"]

Ear = Callable[[Tensor], None]
Group = tuple[Linear, ...]
LENT_WEIGHT = 0.25  # of a real token, so that real ones decide where there are any


@dataclass(frozen=True)
class Applied:
    """How a linear is applied: x W^T for a float32 weight [out, in], x rounded as an engine would under that scheme."""

    weight: Tensor
    scheme: Scheme | None = None
    input_scale: Tensor | None = None

    def read(self, x: Tensor) -> Tensor:
        activation = self.scheme.activation if self.scheme else None
        return x if activation is None else round_activation(x, activation, self.input_scale)


class _Reached(Exception):
    """All that was listened for has been heard."""


class Listening(Weights):
    """Applies what is quantized already, and hears what is read by what is not.

    tensors: gives a tensor that is no linear's, on the device.
    """

    def __init__(self, tensors: Callable[[str], Tensor]) -> None:
        self._tensors = tensors
        self._applied: dict[str, Applied] = {}
        self._ears: dict[str, Ear | None] = {}
        self._unheard: set[Ear] = set()

    def tensor(self, key: str) -> Tensor:
        return self._tensors(key)

    def apply(self, refs: Sequence[Linear], applies: Sequence[Applied]) -> None:
        self._applied.update({ref.key: apply for ref, apply in zip(refs, applies, strict=True)})

    def forget(self) -> None:
        """Let go of what was applied."""
        self._applied.clear()

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        if ref.role is Role.HEAD:  # is never quantized
            return F.linear(x, self.tensor(ref.weight).to(x.dtype))
        if ref.key not in self._ears:
            applied = self._applied[ref.key]
            return F.linear(applied.read(x), applied.weight)
        ear = self._ears[ref.key]
        if ear is not None and ear in self._unheard:
            ear(x.flatten(0, -2))
            self._unheard.discard(ear)
        if not self._unheard:
            raise _Reached
        return x.new_zeros(*x.shape[:-1], ref.out_features)  # nothing that is listened for depends on it

    def again(self, ref: Linear, x: Tensor) -> Tensor:
        if ref.key in self._ears:
            return x.new_zeros(*x.shape[:-1], ref.out_features)
        return self.linear(ref, x)

    def matrix(self, ref: Linear) -> Tensor:
        return self._applied[ref.key].weight

    def absorbs(self, ref: Linear) -> bool:
        return False  # what it reads is to be heard

    def is_plain(self, ref: Linear) -> bool:
        return self._applied[ref.key].scheme is None

    def read(self, ref: Linear, x: Tensor) -> Tensor:
        applied = self._applied.get(ref.key)  # none yet, while what it reads is listened for
        return x if applied is None else applied.read(x).to(x.dtype)

    def hear(self, wave: Mapping[Group, Ear | None], run: Callable[[], object]) -> None:
        """Run until each group of a wave has been reached; its ear gets what it reads, [n, in_features]. None: deaf."""
        self._ears = {ref.key: ear for group, ear in wave.items() for ref in group}
        self._unheard = {ear for ear in wave.values() if ear is not None}
        try:
            with suppress(_Reached):
                run()
        finally:
            self._ears, self._unheard = {}, set()


def gather(part: Part, weights: Listening, wave: Mapping[Group, LinearStats | None]) -> None:
    """Fill the statistics of one wave's groups. None: of this group none are needed."""
    if all(stats is None for stats in wave.values()):
        return
    last = wave.get((part.last,))
    real = {group: None if stats is None else stats.add for group, stats in wave.items()}
    lent = {group: None if stats is None else partial(stats.lend, weight=LENT_WEIGHT) for group, stats in wave.items()}
    for where, x in part.batches():
        if last is None:
            weights.hear(real, partial(part.inner, where, x, weights))
        else:
            inner = part.inner(where, x, weights)
            last.add(inner)
            part.keep(where, inner)
    for x in part.lent():
        if last is None:
            weights.hear(lent, partial(part.inner, None, x, weights))
        else:
            last.lend(part.inner(None, x, weights), LENT_WEIGHT)
