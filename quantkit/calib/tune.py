"""End to end: the scales of a quantized model by KL to the BF16 model's answers, codes as they are.

Streamed: a step passes its batch through the layers, group by group, keeping the hidden states between groups, and comes
back through them in reverse, computing each group again; of a group only its codes are held. A step reads all codes twice,
and memory is one group, one batch, and of each scale its change, its gradient and Adam's two means (Kingma and Ba, arXiv
1412.6980), four bytes each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.calib.replay import Applied
from quantkit.calib.tape import Tape
from quantkit.model.attention import Positions
from quantkit.model.blocks import rope_tables
from quantkit.model.cache import OneGroup
from quantkit.model.forward import head
from quantkit.model.layer import attention_half, mlp_half
from quantkit.model.spec import Layer, Linear, ModelSpec, Role
from quantkit.model.weights import Weights
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import Kind, Scheme, Strategy

__all__ = ["Tuned", "TunedWeights", "Tuner", "rescaled", "tunable"]

_BOUND = 0.1  # of the relative change of a scale
_DECAY, _DECAY_SQUARES = 0.9, 0.95  # of Adam's means
_TINY = 1e-12
_HEAD_TOKENS = 512  # of which all logits are held at once
_CHECKS = 8

Stored = Callable[[Linear], "Tensor | QuantizedTensor"]


def tunable(scheme: Scheme | None) -> bool:
    """Whether scales of it are tuned: of integers, of groups or rows."""
    return (
        scheme is not None
        and scheme.weight.kind is Kind.INT
        and scheme.weight.strategy in (Strategy.GROUP, Strategy.CHANNEL)
    )


class _Scaled(torch.autograd.Function):
    """x W^T, W = codes * scale * (1 + change); on the way back W is made again."""

    @staticmethod
    def forward(context: Any, x: Tensor, change: Tensor, q: QuantizedTensor) -> Tensor:
        context.q = q
        context.save_for_backward(x, change)
        return F.linear(x, _value(q, change))

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,), (x, change), q = gradients, context.saved_tensors, context.q
        of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        by_scale = (of_weight * q.dequantize()).unflatten(1, (change.shape[1], -1)).sum(-1)  # as if scales were not rounded
        return gradient @ _value(q, change), by_scale, None


def rescaled(q: QuantizedTensor, change: Tensor) -> QuantizedTensor:
    """With each scale changed by so much of it, rounded as it is stored."""
    return dataclasses.replace(q, scale=(q.scale.float() * (1 + change)).to(q.scale.dtype))


def _value(q: QuantizedTensor, change: Tensor) -> Tensor:
    return rescaled(q, change).dequantize()


class TunedWeights(Weights):
    """stored: a linear as it was committed. schemes: by key. changes: of the scales that are tuned, by key, float32 of the
    scale's shape. keep: the codes of all layers, where they are few, and not those of a group."""

    def __init__(
        self,
        tensors: Callable[[str], Tensor],
        stored: Stored,
        schemes: Mapping[str, Scheme | None],
        changes: Mapping[str, Tensor],
        keep: bool,
    ) -> None:
        self._tensors, self._stored, self._schemes, self.changes, self._keep = tensors, stored, schemes, changes, keep
        self._held: dict[str, Tensor | QuantizedTensor] = {}

    def tensor(self, key: str) -> Tensor:
        return self._tensors(key)

    def forget(self) -> None:
        if not self._keep:
            self._held.clear()

    def _of(self, ref: Linear) -> Tensor | QuantizedTensor:
        if ref.key not in self._held:
            self._held[ref.key] = self._stored(ref)
        return self._held[ref.key]

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        if ref.role is Role.HEAD:
            return F.linear(x, self.tensor(ref.weight).to(x.dtype))
        one, x = self._of(ref), self.read(ref, x)
        if ref.key in self.changes and isinstance(one, QuantizedTensor):
            y: Tensor = _Scaled.apply(x, self.changes[ref.key], one)
            return y
        return F.linear(x, self.matrix(ref))

    def matrix(self, ref: Linear) -> Tensor:
        one = self._of(ref)
        if isinstance(one, Tensor):
            return one.float()
        return _value(one, self.changes[ref.key]) if ref.key in self.changes else one.dequantize()

    def absorbs(self, ref: Linear) -> bool:
        return False

    def is_plain(self, ref: Linear) -> bool:
        return isinstance(self._of(ref), Tensor)

    def read(self, ref: Linear, x: Tensor) -> Tensor:
        one = self._of(ref)
        if isinstance(one, Tensor):
            return x
        how = Applied(one.scale, self._schemes[ref.key], one.input_scale)
        return x + (how.read(x) - x).detach()


@dataclass(frozen=True)
class Tuned:
    """changes: of scales, by key, after the best step (`kept`; 0: none, and nothing is changed). before, after: mean KL on
    the windows apart. stopped: why before the last step."""

    changes: dict[str, Tensor]
    kept: int
    steps: int
    before: float
    after: float
    stopped: str


class Tuner:
    """ids: int64 [windows, length]. target: the BF16 model's hidden states before the head, for all of them. apart: bool
    [windows], by which steps are judged; the others are learned from once."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: TunedWeights,
        ids: Tensor,
        target: Tape,
        apart: Tensor,
        device: torch.device,
        rate: float,
    ) -> None:
        self.spec, self.weights, self.ids, self.target, self.apart = spec, weights, ids, target, apart
        self.device, self.rate = device, rate
        self.tables = rope_tables(spec.rope, torch.arange(ids.shape[1], device=device))
        self._means = {key: (torch.zeros_like(one), torch.zeros_like(one)) for key, one in weights.changes.items()}

    def run(self, batches: Sequence[Tensor]) -> Tuned:
        """batches: of windows, int64, one a step."""
        changes, steps = self.weights.changes, len(batches)
        before = least = self.divergence(self.apart.nonzero().flatten())
        best, best_step, stopped, step = {key: one.clone() for key, one in changes.items()}, 0, "", 0
        for step, windows in enumerate(batches, 1):
            gradients = self.step(windows)
            if gradients is None:
                stopped = f"the gradient is not finite at step {step}"
                break
            self._adam(gradients, step, self.rate * (1 - (step - 1) / steps))
            if step % max(1, steps // _CHECKS) == 0 or step == steps:
                now = self.divergence(self.apart.nonzero().flatten())
                if math.isfinite(now) and now < least:
                    best, least, best_step = {key: one.clone() for key, one in changes.items()}, now, step
        return Tuned(best, best_step, step, before, least, stopped)

    def step(self, windows: Tensor) -> dict[str, Tensor] | None:
        """Gradients of the KL of these windows by key; None where one is not finite."""
        states = list(self._forward(windows))
        gradient, gradients = self._top(states[-1], windows), dict[str, Tensor]()
        for layers, start in zip(reversed(self.spec.groups()), reversed(states[:-1]), strict=True):
            with torch.enable_grad():
                h = start.detach().requires_grad_()
                keys = [ref.key for layer in layers for ref in layer.linears() if ref.key in self.weights.changes]
                for key in keys:
                    self.weights.changes[key].requires_grad_()
                self._group(layers, h).backward(gradient)
            assert h.grad is not None
            gradient = h.grad
            for key in keys:
                change = self.weights.changes[key].requires_grad_(False)
                if change.grad is not None:  # an expert that no token reached has none
                    gradients[key], change.grad = change.grad, None
            self.weights.forget()
        finite = torch.stack([gradient.sum(), *(one.sum() for one in gradients.values())]).isfinite().all()
        return gradients if finite else None

    @torch.no_grad()
    def divergence(self, windows: Tensor) -> float:
        """Mean KL(BF16 || quantized) of the windows in nats."""
        total = 0.0
        for part in windows.split(max(1, 2048 // self.ids.shape[1])):
            *_, last = self._forward(part)
            for rows, target in self._heads(last, part):
                p = head(self.spec, self.weights, target).log_softmax(-1)
                total += float((p.exp() * (p - head(self.spec, self.weights, rows).log_softmax(-1))).sum())
        return total / (len(windows) * self.ids.shape[1])

    @torch.no_grad()
    def _forward(self, windows: Tensor) -> Iterator[Tensor]:
        """The hidden states before each group of layers, and after the last."""
        table = self.weights.tensor(self.spec.embedding)
        h = table[self.ids[windows].to(table.device)].float().to(self.device)
        yield h
        for layers in self.spec.groups():
            h = self._group(layers, h)
            self.weights.forget()
            yield h

    def _group(self, layers: Sequence[Layer], h: Tensor) -> Tensor:
        store = OneGroup()
        for layer in layers:
            h, _ = mlp_half(layer, attention_half(layer, h, self.weights, Positions(self.tables), store), self.weights)
        return h

    def _heads(self, last: Tensor, windows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        length = self.ids.shape[1]
        rows = (windows[:, None] * length + torch.arange(length)).flatten()
        for mine, theirs in zip(last.flatten(0, 1).split(_HEAD_TOKENS), rows.split(_HEAD_TOKENS), strict=True):
            yield mine, self.target.gather(theirs).to(self.device)

    def _top(self, last: Tensor, windows: Tensor) -> Tensor:
        """The gradient of the mean KL at what the head reads."""
        parts = []
        for mine, target in self._heads(last, windows):
            with torch.no_grad():
                p = head(self.spec, self.weights, target).softmax(-1)
            with torch.enable_grad():
                rows = mine.detach().requires_grad_()
                loss = -(p * head(self.spec, self.weights, rows).log_softmax(-1)).sum() / last.flatten(0, 1).shape[0]
            loss.backward()
            assert rows.grad is not None
            parts.append(rows.grad)
        return torch.cat(parts).view_as(last)

    @torch.no_grad()
    def _adam(self, gradients: Mapping[str, Tensor], step: int, rate: float) -> None:
        for key, gradient in gradients.items():
            mean, squares = self._means[key]
            mean.lerp_(gradient, 1 - _DECAY)
            squares.lerp_(gradient.square(), 1 - _DECAY_SQUARES)
            size = (squares / (1 - _DECAY_SQUARES**step)).sqrt_().add_(_TINY)
            self.weights.changes[key].sub_(rate / (1 - _DECAY**step) * mean / size).clamp_(-_BOUND, _BOUND)
