"""What happens inside the two models while they run: wrappers of their weights that listen, and change nothing.

`Heard`, what each MLP of the baseline read and gave on some tokens, is played to the same MLP of the quantised model, whose
answer then differs by its own error alone, not by what earlier layers lost. So a damaged expert stands out by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from quantkit.measure.divergence import relative_error
from quantkit.model.blocks import Routing
from quantkit.model.spec import MLP, Linear, MoE
from quantkit.model.weights import Weights
from quantkit.report.intervals import Resampler, percentile_interval
from quantkit.report.schema import Figure
from quantkit.run.weights import CheckpointWeights

__all__ = ["BLOCKS", "BaselineTrace", "Bf16Products", "OutputErrors", "QuantizedTrace"]

BLOCKS = 64  # documents are put together into at most so many blocks, so that memory does not grow with them


class _Wrapped(Weights):
    def __init__(self, own: CheckpointWeights) -> None:
        self.own = own

    def tensor(self, key: str) -> Tensor:
        return self.own.tensor(key)

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        return self.own.linear(ref, x)

    def matrix(self, ref: Linear) -> Tensor:
        return self.own.matrix(ref)

    def read(self, ref: Linear, x: Tensor) -> Tensor:
        return self.own.read(ref, x)


class Bf16Products(_Wrapped):
    """The same weights multiplied as engines do: inputs and outputs of every linear rounded to BF16."""

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        if self.own.schemes.get(ref.key) is not None:
            return self.own.linear(ref, x.bfloat16().to(x.dtype)).bfloat16().to(x.dtype)
        return F.linear(x.bfloat16(), self.own.tensor(ref.weight).bfloat16()).to(x.dtype)


@dataclass(frozen=True)
class Heard:
    """Input and output of one MLP, [n, hidden], before router weights, and the block of each token, int64 [n]."""

    x: Tensor
    y: Tensor
    block: Tensor


class BaselineTrace(_Wrapped):
    """Keeps what every MLP of one layer reads and gives on the tokens that `pick` (bool [tokens]) chooses.

    block: int64 [tokens]. heard: by the key of the MLP's gate; whoever uses an entry takes it out.
    """

    def __init__(self, own: CheckpointWeights, pick: Tensor, block: Tensor) -> None:
        super().__init__(own)
        self.pick, self.block = pick, block
        self.heard: dict[str, Heard] = {}
        self._tokens: dict[str, Tensor] = {}

    def experts(self, spec: MoE, x: Tensor, routing: Routing) -> Tensor:
        order = routing.experts.flatten().argsort(stable=True)  # as Weights.experts hands tokens out
        counts = torch.bincount(routing.experts.flatten(), minlength=len(spec.experts)).tolist()
        parts = (order // routing.experts.shape[1]).split(counts)
        self._tokens = {expert.gate.key: part for expert, part in zip(spec.experts, parts, strict=True)}
        return super().experts(spec, x, routing)

    def mlp(self, spec: MLP, x: Tensor) -> Tensor:
        y = super().mlp(spec, x)
        tokens = self._tokens.pop(spec.gate.key, None)
        pick, block = (self.pick, self.block) if tokens is None else (self.pick[tokens], self.block[tokens])
        if pick.any():
            self.heard[spec.gate.key] = Heard(x[pick], y[pick], block[pick])
        return y


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
        found, broken = {}, self.not_finite()
        for key, (lost, total, tokens) in self._sums.items():
            if key in broken or total.sum() == 0:
                continue
            value, held = float(lost.sum() / total.sum()), int((tokens > 0).sum())
            found[key] = Figure(value=value)
            if held >= Resampler.LEAST_UNITS:
                below = drawn @ total
                low, high = percentile_interval(value, (drawn @ lost)[below > 0] / below[below > 0], held)
                found[key] = Figure(value=value, low=max(0.0, low), high=high)
        return found

    def not_finite(self) -> set[str]:
        """MLPs whose output is not finite on some token, or has an error where the baseline gives nothing but zeros."""
        sums = {key: (lost.sum(), total.sum()) for key, (lost, total, _) in self._sums.items()}
        return {key for key, (lost, total) in sums.items() if not np.isfinite(lost) or (lost > 0 and total == 0)}


class QuantizedTrace(_Wrapped):
    """Plays `heard` to its own MLPs and records their error; the last rows of a batch take `forced`, the routing of the
    baseline, where it is given."""

    def __init__(self, own: CheckpointWeights, heard: dict[str, Heard], errors: OutputErrors) -> None:
        super().__init__(own)
        self.heard, self.errors = heard, errors
        self.forced: Routing | None = None

    def experts(self, spec: MoE, x: Tensor, routing: Routing) -> Tensor:
        if self.forced is not None:
            free = len(x) - len(self.forced.experts)
            parts = (routing.experts, self.forced.experts), (routing.weights, self.forced.weights)
            chosen, weights = (torch.cat((own[:free], given)) for own, given in parts)
            routing = Routing(chosen, weights, routing.logits)
        out = super().experts(spec, x, routing)
        for expert in spec.experts:  # those to which only the baseline sends tokens
            if expert.gate.key in self.heard:
                self.mlp(expert, x[:0])
        return out

    def mlp(self, spec: MLP, x: Tensor) -> Tensor:
        heard = self.heard.pop(spec.gate.key, None)
        if heard is None:
            return super().mlp(spec, x)
        y = super().mlp(spec, torch.cat((x, heard.x)))
        self.errors.add(spec.gate.key, heard.block, *relative_error(heard.y, y[len(x) :]))
        return y[: len(x)]
