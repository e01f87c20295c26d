"""What an error of the residual stream costs: the Fisher information of the BF16 model's own answers, layer by layer.

With labels drawn from the model's own softmax, the mean of g g^T over tokens, g the gradient of the negative log likelihood
at the residual stream, is the Fisher matrix there (Martens, arXiv 1412.1193): to second order an error e costs
KL(BF16 || quantized) = e^T (g g^T) e / 2. One backward pass through the whole model, streamed: forward leaves the hidden
states before each group of layers on tapes; backward takes the groups in reverse and computes each again. Memory is the
weights of a group as they are stored, and one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.calib.fit import ReadOnce
from quantkit.calib.streams import Place, Stream
from quantkit.calib.tape import Tape
from quantkit.model.attention import Positions
from quantkit.model.blocks import rope_tables
from quantkit.model.cache import OneGroup
from quantkit.model.forward import head
from quantkit.model.layer import attention_half, mlp_half
from quantkit.model.spec import Layer, Linear

__all__ = ["FisherPass", "Metrics", "factor"]

_BATCH_TOKENS = 2048
_HEAD_TOKENS = 512  # of which all logits are held at once
_SHARE = 0.9  # of the Fisher matrix in the metric; the rest is the identity


class _Product(torch.autograd.Function):
    """x W^T of which only W, as it is stored, is kept for the way back."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor) -> Tensor:
        context.weight = weight
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ context.weight.to(gradient.dtype), None


class _Differentiable(ReadOnce):
    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.tensor(ref.weight))
        return y


@dataclass(frozen=True)
class Metrics:
    """Of one layer: sums of g g^T over tokens, float32 [hidden, hidden], after its attention and after its MLP; and how many
    tokens had a gradient that is not finite, which are left out."""

    attention: Tensor
    mlp: Tensor
    overflowed: int


def factor(metric: Tensor) -> Tensor | None:
    """L with L L^T = 0.9 M + 0.1 I, M the metric over its mean diagonal: the square of e L is what e costs. None where the
    metric says nothing."""
    mean = metric.diagonal().double().mean()
    if not torch.isfinite(mean) or mean <= 0:
        return None
    mixed = _SHARE * metric.double() / mean + (1 - _SHARE) * torch.eye(
        len(metric), dtype=torch.float64, device=metric.device
    )
    lower, failed = torch.linalg.cholesky_ex(mixed)
    return None if failed else lower.float()


class FisherPass:
    """ids: int64 [windows, length]. weights: the BF16 model's. seed: of the labels."""

    def __init__(self, place: Place, ids: Tensor, weights: ReadOnce, seed: int) -> None:
        self.place, self.ids, self.weights, self.seed = place, ids, weights, seed
        self.rows, self.length = ids.numel(), ids.shape[1]

    def _spans(self, tokens: int) -> list[slice]:
        """Rows of whole windows, some at a time."""
        step = max(1, tokens // self.length) * self.length
        return [slice(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]

    @torch.no_grad()
    def forward(self, layers: Sequence[Layer], source: Tape | None, target: Tape) -> None:
        """A group of layers; None: the embedding before all layers."""
        windows = (self.ids.shape[0], self.length)
        stream = Stream(self.place, windows, self.weights, source or target, target)
        if source is None:
            stream.embed(self.ids)
        for layer in layers:
            stream.attention(layer).finish()
            self.weights.forget()
            for part in stream.mlps(layer):
                part.finish()
                self.weights.forget()
            stream.close()
        stream.remove()
        self.weights.forget()

    @torch.enable_grad()
    def top(self, last: Tape, gradient: Tape) -> None:
        """The gradient at what the head reads, of labels drawn from the model's own answer."""
        spec, device = self.place.spec, self.place.device
        weights = _Differentiable(self.weights.tensor)
        for number, span in enumerate(self._spans(_HEAD_TOKENS)):
            h = last.read(span.start, span.stop).to(device).requires_grad_()
            logits = head(spec, weights, h)
            generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + number)
            labels = torch.multinomial(logits.detach().softmax(-1).nan_to_num(1.0), 1, generator=generator)
            F.cross_entropy(logits, labels[:, 0], reduction="sum").backward()
            assert h.grad is not None
            gradient.write(span.start, h.grad)
        self.weights.forget()

    @torch.enable_grad()
    def backward(self, layers: Sequence[Layer], source: Tape, above: Tape, below: Tape) -> dict[int, Metrics]:
        """Of a group of layers, by index. source: the hidden states before it. above: the gradient after it. below: for the
        gradient before it."""
        spec, device = self.place.spec, self.place.device
        weights, tables = (
            _Differentiable(self.weights.tensor),
            rope_tables(spec.rope, torch.arange(self.length, device=device)),
        )
        sums = {layer.index: _Sums(spec.hidden, device) for layer in layers}
        for span in self._spans(_BATCH_TOKENS):
            start = source.read(span.start, span.stop).to(device).unflatten(0, (-1, self.length)).requires_grad_()
            h, store, states = start, OneGroup(), list[tuple[_Sums, Tensor, Tensor]]()
            for layer in layers:
                middle = attention_half(layer, h, weights, Positions(tables), store)
                h, _ = mlp_half(layer, middle, weights)
                middle.retain_grad()
                h.retain_grad()
                states.append((sums[layer.index], middle, h))
            h.backward(above.read(span.start, span.stop).to(device).view_as(h))
            for total, middle, out in states:
                total.add(middle, out)
            assert start.grad is not None
            below.write(span.start, start.grad.flatten(0, 1))
        self.weights.forget()
        return {index: total.metrics() for index, total in sums.items()}


class _Sums:
    def __init__(self, hidden: int, device: torch.device) -> None:
        self.attention, self.mlp = (torch.zeros(hidden, hidden, device=device) for _ in range(2))
        self.overflowed = 0

    def add(self, middle: Tensor, out: Tensor) -> None:
        for total, state in ((self.attention, middle), (self.mlp, out)):
            assert state.grad is not None
            gradient = state.grad.flatten(0, 1)
            finite = gradient.isfinite().all(-1)
            gradient = gradient[finite]
            total.addmm_(gradient.T, gradient)
        self.overflowed += int((~finite).sum())

    def metrics(self) -> Metrics:
        return Metrics(self.attention.cpu(), self.mlp.cpu(), self.overflowed)
