"""`Method`: how a weight is rounded, with the method's own parameters. No tensors, so that a recipe may speak of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from quantkit.choices import MethodName

__all__ = ["BEST_TOKENS", "DAMPING", "FISHER_TOKENS", "PARAMETERS", "STEPS", "Method", "MethodName"]

DAMPING = (0.05, 0.2, 1.0)  # fractions of mean(diag H) added to the diagonal: the first that Cholesky accepts
STEPS = 200  # of learning
BEST_TOKENS = 436_907  # of `--effort best`: fresh ones for all steps, and those that iterates are judged by
FISHER_TOKENS = 32_768  # from which the metric of learning is
PARAMETERS: dict[MethodName, tuple[str, ...]] = {  # of a method: fields of `Method`
    "rtn": (),
    "gptq": ("damping",),
    "learned": ("damping", "steps"),
}


@dataclass(frozen=True)
class Method:
    """A method with its parameters. Two that are equal make the same codes of the same weight and statistics.

    damping: of GPTQ, > 0: the fraction of mean(diag H) that is added to the diagonal of H. steps: of learning, which begins
    at GPTQ's codes, >= 1. Raises ValueError for a parameter that the method does not have.
    """

    name: MethodName
    damping: float = DAMPING[0]
    steps: int = STEPS

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[1:]:
            if field.name not in PARAMETERS[self.name] and getattr(self, field.name) != field.default:
                raise ValueError(f"{self.name} has no {field.name}")

    def __str__(self) -> str:
        return ", ".join([self.name, *(f"{name} {getattr(self, name):g}" for name in PARAMETERS[self.name])])

    @property
    def hessian(self) -> bool:
        """Whether it needs the Hessian at the weight's input, and so calibration."""
        return self.name in ("gptq", "learned")

    @property
    def dampings(self) -> tuple[float, ...]:
        """What is tried, in order: its own, then the usual ones above it."""
        return (self.damping, *(damping for damping in DAMPING if damping > self.damping))
