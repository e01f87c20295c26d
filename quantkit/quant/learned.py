"""Learned rounding: which way each weight is rounded, and each scale, by the gradient of what the layer's output loses.

SignRound (Cheng et al., arXiv 2309.05516) learns an offset V of every weight with the sign of its gradient; here from GPTQ's
codes instead of the nearest ones:

    W = s (1 + d) clamp(round(u + V), low, high),    |V| <= 0.5, |d| <= 0.3, V = d = 0 at the start

u is what GPTQ rounded: the weight in steps of its scale, repaired for the columns before it. The gradient passes `round` as
if it were not there. Steps are the sign of the gradient times a rate that falls from 1 / steps to 0. The best iterate on
tokens of its own is kept, which may be the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.qtensor import QuantizedTensor

__all__ = ["Learned", "SoftWeight", "learn"]

_OFFSET, _CHANGE = 0.5, 0.3  # the largest |V| and |d|
_INSIDE = 0.499  # of a step: as far from a code as what is rounded to it is put
_CHECKS = 8  # how often iterates are held against the tokens that are not learned from


class SoftWeight:
    """A weight, float32 [out, in], that is being learned. start: its codes and scales so far, which V = d = 0 gives back.
    latent: [out, in], what was rounded to them, in steps of the scale plus the zero point; None: the weight itself."""

    def __init__(self, weight: Tensor, start: QuantizedTensor, latent: Tensor | None) -> None:
        self.start, grid = start, start.grid
        size = grid.group_size or start.shape[1]
        zero = torch.zeros_like(start.scale, dtype=torch.float32) if start.zero is None else start.zero.float()
        self.zero, self.scale = zero[..., None], start.scale.float()[..., None]
        codes = start.codes.float().unflatten(1, (-1, size)) - self.zero
        groups = weight.unflatten(1, (-1, size))
        rounded = groups / self.scale if latent is None else latent.float().unflatten(1, (-1, size)) - self.zero
        self.low, self.high = grid.qmin - self.zero, grid.qmax - self.zero
        self.u = codes + (rounded - codes).clamp(-_INSIDE, _INSIDE)
        # The scale of a group of zeros says nothing of it: a code of 1 would be a weight of 1.
        self.live = groups.abs().amax(-1, keepdim=True) > 0
        self.offset = torch.zeros_like(self.u, requires_grad=True)
        self.change = torch.zeros_like(self.scale, requires_grad=True)

    @property
    def learned(self) -> tuple[Tensor, Tensor]:
        return self.offset, self.change

    def _codes(self) -> Tensor:
        codes = self.u + self.offset
        inside: Tensor = codes.maximum(self.low - _INSIDE).minimum(self.high + _INSIDE)
        return inside

    def value(self) -> Tensor:
        """The weight, float32 [out, in], with a gradient."""
        codes = self._codes()
        rounded = codes + (codes.round() - codes).detach()
        soft: Tensor = (rounded * (self.scale * (1 + self.change))).flatten(1)
        return soft

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Against the sign of the gradients, within the bounds; they are used up."""
        for value, bound in ((self.offset, _OFFSET), (self.change, _CHANGE)):
            assert value.grad is not None
            value.sub_(value.grad.sign().mul_(rate).mul_(self.live)).clamp_(-bound, bound)
            value.grad = None

    @torch.no_grad()
    def hard(self) -> QuantizedTensor:
        """The codes and scales that it stands for."""
        codes = (self._codes().round() + self.zero).flatten(1).to(self.start.codes.dtype)
        scale = (self.scale * (1 + self.change)).squeeze(-1).to(self.start.scale.dtype)
        return QuantizedTensor(codes, scale, self.start.zero, self.start.grid, self.start.input_scale)

    @torch.no_grad()
    def flipped(self, now: QuantizedTensor) -> int:
        """How many codes differ from those at the start."""
        return int((now.codes != self.start.codes).sum())


@dataclass(frozen=True)
class Learned:
    """weights: the best iterate. kept: the step after which it was, 0 for the start. steps: how many were made. before,
    after: the start's loss and the best one's, on tokens that were not learned from. stopped: why before the last step."""

    weights: list[QuantizedTensor]
    kept: int
    steps: int
    before: float
    after: float
    stopped: str


def learn(
    soft: Sequence[SoftWeight],
    steps: int,
    loss: Callable[[int, list[Tensor]], Tensor],
    held_out: Callable[[list[Tensor]], float],
) -> Learned:
    """Learn weights together. loss: of the step's tokens under such weights, a scalar with a gradient. held_out: the loss
    on other tokens. A loss or gradient that is not finite ends it, and costs nothing that was kept before."""
    best = [one.start for one in soft]
    before = least = held_out([q.dequantize() for q in best])
    best_step, stopped, step = 0, "", 0
    if not math.isfinite(before):
        return Learned(best, 0, 0, before, before, "the loss is not finite at the start")
    for step in range(1, steps + 1):
        with torch.enable_grad():
            value = loss(step - 1, [one.value() for one in soft])
        value.backward()
        if not _finite(value.detach(), soft):
            stopped = f"the gradient is not finite at step {step}"
            break
        for one in soft:
            one.step((1 - (step - 1) / steps) / steps)
        if step % max(1, steps // _CHECKS) == 0 or step == steps:
            now = [one.hard() for one in soft]
            loss_apart = held_out([q.dequantize() for q in now])
            if loss_apart < least:
                best, least, best_step = now, loss_apart, step
    return Learned(best, best_step, step, before, least, stopped)


def _finite(loss: Tensor, soft: Sequence[SoftWeight]) -> bool:
    """A sum is finite only if all that it sums is: one look for all of them."""
    gradients = [value.grad for one in soft for value in one.learned if value.grad is not None]
    return bool(torch.stack([loss, *(gradient.sum() for gradient in gradients)]).isfinite().all())
