"""The integer programme: one scheme for each group, the least loss within bytes, or the fewest bytes within a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.errors import QuantkitError
from quantkit.extras import need

__all__ = ["Option", "fewest_bytes", "least_loss"]

_SECONDS = 30.0  # for one programme; HiGHS proves hundreds of groups optimal in a fraction of one
_GAP = 1e-4
_INFEASIBLE = 2  # status of scipy's milp


@dataclass(frozen=True)
class Option:
    """What a group may get: its bytes on disk, and its loss, of which those of the groups are summed."""

    nbytes: int
    loss: float


def least_loss(groups: Sequence[Sequence[Option]], nbytes: int) -> list[int] | None:
    """For each group the index of its option, so that bytes are at most `nbytes`; None where that is not possible."""
    return _solve(_losses(groups), _sizes(groups), nbytes)


def fewest_bytes(groups: Sequence[Sequence[Option]], loss: float) -> list[int] | None:
    """The same, so that the sum of losses is at most `loss`."""
    return _solve(_sizes(groups), _losses(groups), loss)


def _losses(groups: Sequence[Sequence[Option]]) -> list[list[float]]:
    return [[option.loss for option in group] for group in groups]


def _sizes(groups: Sequence[Sequence[Option]]) -> list[list[float]]:
    return [[float(option.nbytes) for option in group] for group in groups]


def _solve(costs: Sequence[Sequence[float]], uses: Sequence[Sequence[float]], limit: float) -> list[int] | None:
    need("allocate", "an allocation of bits")
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    cost, use = (np.array([x for row in rows for x in row], dtype=np.float64) for rows in (costs, uses))
    sizes = [len(row) for row in costs]
    member = np.repeat(np.arange(len(sizes)), sizes)
    one = csr_array((np.ones(len(member)), (member, np.arange(len(member)))))
    least = sum(min(row) for row in uses)
    if least > limit:
        return None
    scale = float(use.max()) or 1.0  # so that the solver's tolerances are shares of a group, not of a byte or a nat
    solved = milp(
        cost / (float(cost.max()) or 1.0),
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(use[None] / scale, ub=limit / scale)],
        options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
    )
    if solved.status == _INFEASIBLE:
        return None
    if solved.x is None:
        raise QuantkitError(f"the allocation was not solved: {solved.message}", "measure fewer groups: --bands")
    chosen, start = [], 0
    for size in sizes:
        chosen.append(int(solved.x[start : start + size].argmax()))
        start += size
    return _within(chosen, costs, uses, limit)


def _within(chosen: list[int], costs: Sequence[Sequence[float]], uses: Sequence[Sequence[float]], limit: float) -> list[int]:
    """What the solver lets pass by its tolerance is taken back: the limit holds exactly."""
    while sum(row[i] for row, i in zip(uses, chosen, strict=True)) > limit:
        moves = [
            ((costs[g][j] - costs[g][i]) / (uses[g][i] - uses[g][j]), g, j)
            for g, i in enumerate(chosen)
            for j in range(len(uses[g]))
            if uses[g][j] < uses[g][i]
        ]
        _, group, option = min(moves)
        chosen[group] = option
    return chosen
