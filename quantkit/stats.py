"""`LinearStats`: what calibration has seen at the input of a linear; `weight_error`: what rounding has cost its weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["LinearStats", "WeightError", "weight_error"]

_ELEMENTS = 1 << 17  # of a weight in float64 at once: what stays in a core's cache; no result depends on it
_COLUMNS = 512  # of a block of the Hessian


@dataclass
class LinearStats:
    """Sums over calibration tokens at one linear's input x [in].

    hessian: float32 [in, in], sum of weight * x x^T, of which only blocks of the lower triangle are made (`whole_hessian`
    makes the rest); None when no algorithm asks for it. On a CPU that multiplies bfloat16, it is that of x rounded to it:
    products are of bfloat16 numbers, sums are float32. amax: largest |x|, infinite if one is not finite, of
    the tokens that the layer really sends here; lent_amax: of those lent to it, because the real ones were too few (see
    calib/streams.py). tokens and lent count them; mass is the sum of their weights.
    """

    in_features: int
    hessian: Tensor | None
    amax: float = 0.0
    lent_amax: float = 0.0
    tokens: int = 0
    lent: int = 0
    mass: float = 0.0

    @classmethod
    def empty(cls, in_features: int, device: torch.device, with_hessian: bool) -> LinearStats:
        return cls(in_features, torch.zeros(in_features, in_features, device=device) if with_hessian else None)

    def add(self, x: Tensor) -> None:
        """Take in x [n, in], tokens that the layer really sends here."""
        if len(x):
            self._accumulate(x, 1.0)
            self.amax = max(self.amax, _largest(x))
            self.tokens += len(x)

    def lend(self, x: Tensor, weight: float) -> None:
        """Take in x [n, in], tokens from elsewhere, each counting `weight` of a real one."""
        if len(x):
            self._accumulate(x, weight)
            self.lent_amax = max(self.lent_amax, _largest(x))
            self.lent += len(x)

    def merge(self, other: LinearStats) -> None:
        """Take in what was seen of other tokens at the same input, here or on another machine. Raises ValueError where the
        two are not statistics of one kind."""
        if self.in_features != other.in_features or (self.hessian is None) != (other.hessian is None):
            raise ValueError(f"statistics of {self.in_features} and {other.in_features} features, or of two kinds")
        if self.hessian is not None and other.hessian is not None:
            self.hessian += other.hessian.to(self.hessian.device)
        self.amax, self.lent_amax = max(self.amax, other.amax), max(self.lent_amax, other.lent_amax)
        self.tokens, self.lent, self.mass = self.tokens + other.tokens, self.lent + other.lent, self.mass + other.mass

    def _accumulate(self, x: Tensor, weight: float) -> None:
        if self.hessian is not None:
            x = x.float()
            with _bfloat16_products():
                for start in range(0, self.in_features, _COLUMNS):
                    stop = start + _COLUMNS
                    self.hessian[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop], alpha=weight)
        self.mass += weight * len(x)

    @property
    def coverage(self) -> float:
        """Real tokens per input feature; below 1 the Hessian of the real tokens alone is singular."""
        return self.tokens / self.in_features

    def whole_hessian(self) -> Tensor | None:
        """`mass` times the weighted mean of x x^T, [in, in], symmetric; None without a Hessian or without a token. It is the
        sum itself, whose upper triangle is filled in: no copy is made, and tokens may be added afterwards."""
        if self.hessian is None or not self.mass > 0:
            return None
        for start in range(_COLUMNS, self.in_features, _COLUMNS):
            stop = start + _COLUMNS
            self.hessian[:start, start:stop] = self.hessian[start:stop, :start].T
        return self.hessian


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """On the CPU float32 matrices are multiplied as bfloat16 with float32 sums, where the processor does so."""
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


def _largest(x: Tensor) -> float:
    """The largest |x|, infinite where one is not finite: max() would lose a NaN."""
    largest = x.abs().max().item()
    return largest if math.isfinite(largest) else math.inf


class WeightError:
    """||weight - dequantized|| / ||weight|| (Frobenius), taken in a piece of rows at a time, on any device.

    The same to the last digit for any number of threads, any instruction set and any cut into pieces, so that a record of it
    can be checked: rows are summed in float64 by numpy's pairwise order, and then exactly.
    """

    def __init__(self) -> None:
        self._lost, self._whole = list[float](), list[float]()

    def add(self, weight: Tensor, dequantized: Tensor) -> None:
        """Take in two floats [rows, in]. Their difference is taken in float32, its squares and their sums in float64."""
        at_once = max(1, _ELEMENTS // max(1, weight.shape[1]))
        for rows, other in zip(weight.split(at_once), dequantized.split(at_once), strict=True):
            exact = rows.float()
            lost, whole = ((part.cpu().double().numpy()) for part in (other.float() - exact, exact))
            self.add_sums(*(np.square(part, out=part).sum(axis=1) for part in (lost, whole)))

    def add_sums(self, lost: Iterable[float], whole: Iterable[float]) -> None:
        """Take in the sums of squares of some rows: of what was lost, and of the weight."""
        self._lost += [float(value) for value in lost]
        self._whole += [float(value) for value in whole]

    @property
    def value(self) -> float:
        """0 for a weight of zeros that stayed so, infinite for one that did not."""
        difference, norm = math.sqrt(math.fsum(self._lost)), math.sqrt(math.fsum(self._whole))
        return difference / norm if norm else math.inf if difference else 0.0


def weight_error(weight: Tensor, dequantized: Tensor) -> float:
    """`WeightError` of two floats [out, in]."""
    error = WeightError()
    error.add(weight, dequantized)
    return error.value
