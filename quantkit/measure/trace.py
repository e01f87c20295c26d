"""What an evaluation takes from inside the models: errors of single MLPs, and the noise of BF16 products."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from quantkit.model.spec import Linear
from quantkit.model.weights import Weights
from quantkit.report.intervals import Resampler, bca_interval
from quantkit.report.schema import Figure

__all__ = ["BLOCKS", "Bf16Products", "Heard", "OutputErrors"]

BLOCKS = 64  # documents are put together into at most so many blocks, so that memory does not grow with them


class Bf16Products(Weights):
    """The same weights multiplied as engines do: inputs and outputs of every linear rounded to BF16."""

    def __init__(self, own: Weights) -> None:
        self.own = own

    def tensor(self, key: str) -> Tensor:
        return self.own.tensor(key)

    def matrix(self, ref: Linear) -> Tensor:
        return self.own.matrix(ref)

    def read(self, ref: Linear, x: Tensor) -> Tensor:
        return self.own.read(ref, x)

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        if not self.own.is_plain(ref):
            return self.own.linear(ref, x.bfloat16().to(x.dtype)).bfloat16().to(x.dtype)
        return F.linear(x.bfloat16(), self.own.tensor(ref.weight).bfloat16()).to(x.dtype)


@dataclass(frozen=True)
class Heard:
    """Input and output of one MLP, [n, hidden], before router weights, and the block of each token, int64 [n]."""

    x: Tensor
    y: Tensor
    block: Tensor


class OutputErrors:
    """By MLP and block: squared output error, squared output, and tokens."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._sums: dict[str, NDArray[np.float64]] = {}

    def add(self, key: str, block: Tensor, lost: Tensor, total: Tensor) -> None:
        sums = self._sums.setdefault(key, np.zeros((3, self.blocks)))
        index = block.cpu().numpy()
        for row, values in zip(sums, (lost.cpu().numpy(), total.cpu().numpy(), np.ones(len(index))), strict=True):
            row += np.bincount(index, weights=values, minlength=self.blocks)

    def tokens(self, key: str) -> int:
        return int(self._sums[key][2].sum()) if key in self._sums else 0

    def figures(self, resamples: int = 500, seed: int = 0) -> dict[str, Figure]:
        """Relative error of each MLP's output where it is finite, with an interval over the blocks of documents in which the
        MLP had tokens, if they are at least `Resampler.LEAST_UNITS`."""
        draw = np.random.default_rng(seed).multinomial
        drawn = draw(self.blocks, np.full(self.blocks, 1 / self.blocks), size=resamples).astype(np.float64)
        errors, broken = {}, self.not_finite()
        for key, (lost, total, tokens) in self._sums.items():
            if key in broken or total.sum() == 0:
                continue
            value, units = float(lost.sum() / total.sum()), int((tokens > 0).sum())
            errors[key] = Figure(value=value)
            if units >= Resampler.LEAST_UNITS:
                rest = np.concatenate((drawn, (1 - np.eye(self.blocks))[tokens > 0]))  # without each of its blocks too
                below = rest @ total
                ratios = np.divide(rest @ lost, below, out=np.full(len(rest), np.nan), where=below > 0)
                resampled, left_out = (part[np.isfinite(part)] for part in (ratios[:resamples], ratios[resamples:]))
                low, high = bca_interval(value, resampled, left_out, units)
                errors[key] = Figure(value=value, low=max(0.0, low), high=high)
        return errors

    def not_finite(self) -> set[str]:
        """MLPs whose output is not finite on some token, or has an error where the baseline gives nothing but zeros."""
        sums = {key: (lost.sum(), total.sum()) for key, (lost, total, _) in self._sums.items()}
        return {key for key, (lost, total) in sums.items() if not np.isfinite(lost) or (lost > 0 and total == 0)}
