"""Who makes the weights of each part before anything passes through it: by calibration, or as they were committed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from quantkit.calib.lockstep import Observer
from quantkit.calib.replay import gather
from quantkit.calib.streams import Part
from quantkit.model.spec import Linear
from quantkit.quant.solve import Solution

if TYPE_CHECKING:
    from quantkit.job.unit import UnitRun

__all__ = ["Committed", "Group", "Maker", "Made", "Quantizing"]

Group = tuple[Linear, ...]
Made = list[Tensor | Solution]  # of each of a group: kept as it is stored, or quantized


class Maker(Observer):
    """Makes the weights of each part before anything passes through it."""

    def __init__(self, run: UnitRun) -> None:
        self.run = run

    def close(self) -> None:
        """The unit has been passed."""


class Quantizing(Maker):
    """Quantizes a part's linears on the calibration tokens that reach it, if there are any, and writes them."""

    def before(self, parts: Sequence[Part]) -> None:
        part = self.own(parts)
        for wave in parts[0].waves:
            self.solve(part, wave)

    def own(self, parts: Sequence[Part]) -> Part | None:
        """The part of the calibration text's stream."""
        return next((part for part in parts if any(part.stream is track.stream for track in self.tracks)), None)

    def solve(self, part: Part | None, wave: Sequence[Group]) -> None:
        run = self.run
        statistics = {group: run.statistics(group) if part else None for group in wave}
        if part is not None:
            gather(part, run.weights, statistics)
        for group in wave:
            self.made(group, run.solve(group, statistics.pop(group)))  # a Hessian is not kept longer than that

    def made(self, group: Group, solutions: Made) -> None:
        self.apply(group, solutions)
        self.run.write(group, solutions)

    def apply(self, group: Group, solutions: Made) -> None:
        self.run.apply(group, [one.quantized if isinstance(one, Solution) else one for one in solutions])


class Committed(Maker):
    """Takes what was written then."""

    def before(self, parts: Sequence[Part]) -> None:
        for group in (group for wave in parts[0].waves for group in wave):
            self.run.apply(group, [self.run.written(ref) for ref in group])
