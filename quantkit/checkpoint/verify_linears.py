"""Every quantized linear of a checkpoint, decoded, and held against its source: by what its method allows, and by the error
that quantkit.json states for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantkit import rowwise
from quantkit.checkpoint.bounds import METHODS, TIE, Range, may_be_negative, misplaced_codes, range_of, wrong_scales
from quantkit.checkpoint.by_name import NamedSpec
from quantkit.checkpoint.opened import format_of
from quantkit.checkpoint.origin import STATEMENT
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.errors import CheckpointError, QuantkitError, VerificationError, counted, shown
from quantkit.host import every
from quantkit.model.spec import Linear, ModelSpec
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import Scheme, Strategy
from quantkit.stats import WeightError

__all__ = ["Found", "check_linears"]

_ELEMENTS = 1 << 18  # of a weight that are looked at together: in float32 they stay in a core's cache
_AT_ONCE = 4  # linears: each is held whole, as its codes, however many processors there are
_LAST_DIGITS = 1e-9  # relative: what another machine's float64 may differ by


@dataclass
class Found:
    """problems: what is wrong. unread: what could not be read. errors: ||W - Q|| / ||W|| against the source, by role.

    unstated, unscaled: how many linears have no recorded error, or no recorded input scale where they have one.
    """

    problems: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    errors: dict[str, list[float]] = field(default_factory=dict)
    unstated: int = 0
    unscaled: int = 0

    def add(self, other: Found) -> None:
        self.problems += other.problems
        self.unread += other.unread
        for role, errors in other.errors.items():
            self.errors.setdefault(role, []).extend(errors)
        self.unstated, self.unscaled = self.unstated + other.unstated, self.unscaled + other.unscaled


def check_linears(
    reader: CheckpointReader,
    original: CheckpointReader | None,
    spec: ModelSpec | NamedSpec,
    schemes: Mapping[str, Scheme | None],
    stated: Mapping[str, Any],
) -> Found:
    """Decode each quantized linear once. stated: rows of quantkit.json by linear; few matter without an original."""
    layout = format_of(reader)

    def check(group: tuple[Linear, ...]) -> Found:
        findings = Found()
        shared = _shared_range(original, group, schemes[group[0].key]) if original else None
        for ref in group:
            if (scheme := schemes[ref.key]) is None:
                continue
            row = stated.get(ref.key)
            findings.unstated += row is None
            findings.unscaled += scheme.static and (row is None or "input_scale" not in row)
            try:
                q = layout.decode(ref, scheme, reader.tensors())
                _check_values(reader, ref, q, row or {})
                if original is not None:
                    findings.errors.setdefault(ref.role.value, []).append(
                        _check_against(original, ref, scheme, q, row, shared)
                    )
            except CheckpointError as broken:
                findings.unread.append(broken.problem)
            except QuantkitError as broken:
                findings.problems.append(broken.problem)
        return findings

    total = Found()
    for findings in every(check, [group for layer in spec.layers for group in layer.same_input()], _AT_ONCE):
        total.add(findings)
    return total


def _shared_range(original: CheckpointReader, group: tuple[Linear, ...], scheme: Scheme | None) -> Range | None:
    """The range of linears that read one input and so share one scale; None where each row has its own."""
    if scheme is None or scheme.weight.strategy is not Strategy.TENSOR:
        return None
    try:
        parts = (part for ref in group for part in original.rows(ref.weight, _at_once(ref, scheme)))
        lows, highs = zip(*(range_of(part.float(), scheme.weight) for part in parts), strict=True)
    except CheckpointError:
        return None  # which is said where that linear is looked at
    return torch.stack(lows).amin(0), torch.stack(highs).amax(0)


def _at_once(ref: Linear, scheme: Scheme) -> int:
    """Rows to look at together, whole blocks of them."""
    whole = scheme.weight.block[0] if scheme.weight.block else 1
    return max(1, _ELEMENTS // max(1, ref.in_features) // whole) * whole


def _check_values(reader: CheckpointReader, ref: Linear, q: QuantizedTensor, row: Mapping[str, Any]) -> None:
    """What can be said of a decoded linear without its source. Raises VerificationError, CheckpointError."""
    scale = q.scale.float()
    if not ((scale > 0) | (may_be_negative(q) & (scale < 0))).all():
        raise VerificationError(f"'{ref.key}' has scales that are {'0' if q.grid.signed else 'not positive'} or not numbers")
    if q.input_scale is not None and not (q.input_scale.float() > 0).all():
        raise VerificationError(f"'{ref.key}' has an input scale that is not positive")
    if q.input_scale is not None and row.get("input_scale", float(q.input_scale)) != float(q.input_scale):
        problem = f"'{ref.key}' has the input scale {float(q.input_scale):.6g}"
        raise VerificationError(f"{problem}, and {STATEMENT} states {shown(row['input_scale'])}")
    stored = reader.entries.get(f"{ref.key}.weight_shape")
    if stored and reader.tensor(f"{ref.key}.weight_shape").tolist() != [ref.out_features, ref.in_features]:
        raise VerificationError(f"'{ref.key}.weight_shape' is not {[ref.out_features, ref.in_features]}")


@torch.inference_mode()
def _check_against(
    original: CheckpointReader,
    ref: Linear,
    scheme: Scheme,
    q: QuantizedTensor,
    row: Mapping[str, Any] | None,
    shared: Range | None,
) -> float:
    """The relative error against the source's weight. Raises VerificationError when it is not what the method gives."""
    method, stated = (row or {}).get("method"), (row or {}).get("weight_error")
    bounded = method in METHODS
    scales, codes, lost, start = _Wrong("scale"), _Wrong("code"), WeightError(), 0
    for part in original.rows(ref.weight, _at_once(ref, scheme)):
        weight, here = part.float(), q.rows(start, start + len(part))
        comparison = _compared(weight, here, method == "rtn", lost)
        if bounded and (shared is None or not start):  # one for all is looked at once
            scales.add(*_where(wrong_scales(here, shared or comparison.span, str(method))))
        codes.add(*comparison.misplaced, here.shape)
        start += len(part)
    error = lost.value
    if error > scheme.weight.codes.worst:
        raise VerificationError(f"'{ref.key}' differs from its source by {error:.1%}: more than {scheme.name} can lose")
    if row is None:
        return error
    if not bounded:
        raise VerificationError(f"'{ref.key}' was made by {shown(method)!r}, as {STATEMENT} states: nothing bounds that")
    if scales.number:
        raise VerificationError(f"'{ref.key}': {scales} not what {_by(str(method))} gives for its source")
    if codes.number:
        raise VerificationError(f"'{ref.key}': {codes} more than half a step from its source")
    if not isinstance(stated, float) or not math.isclose(error, stated, rel_tol=_LAST_DIGITS):
        problem = f"'{ref.key}' differs from its source by {error!r}"
        raise VerificationError(f"{problem}, and {STATEMENT} states {shown(stated)}")
    return error


class _Wrong:
    """Where things are wrong, in pieces of rows that follow each other: `3 of 128 scales, the first at [0, 2], are`."""

    def __init__(self, thing: str) -> None:
        self.thing, self.number, self._total, self._rows, self._first = thing, 0, 0, 0, list[int]()

    def add(self, number: int, first: int, shape: tuple[int, ...]) -> None:
        """Of a piece of that shape: how many are, and the flat index of the first."""
        if number and not self.number:
            row = math.prod(shape[1:])
            self._first = [self._rows + first // row, *([first % row] if len(shape) > 1 else [])]
        self.number += number
        self._total, self._rows = self._total + math.prod(shape), self._rows + shape[0]

    def __str__(self) -> str:
        are = "is" if self.number == 1 else "are"
        return f"{self.number:,} of {counted(self._total, self.thing)}, the first at {self._first}, {are}"


def _where(wrong: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """How many of a bool tensor are true, the flat index of the first, and its shape."""
    places = wrong.flatten().nonzero()
    return len(places), int(places[0]) if len(places) else 0, tuple(wrong.shape)


@dataclass(frozen=True)
class _Comparison:
    span: Range
    misplaced: tuple[int, int]


def _compared(weight: Tensor, q: QuantizedTensor, codes: bool, lost: WeightError) -> _Comparison:
    """Some rows beside what they became: their range under each scale, how many codes are misplaced, if that is asked, and
    the first, and what was lost, which is added to `lost`. In one pass where there is a compiler."""
    if (done := rowwise.compare_rows(weight, q, TIE, codes)) is not None:
        lost.add_sums(done.lost.tolist(), done.whole.tolist())
        return _Comparison((done.smallest, done.largest), done.misplaced)
    value = q.dequantize()
    lost.add(weight, value)
    number, first, _ = _where(misplaced_codes(weight, q, value)) if codes else (0, 0, ())
    return _Comparison(range_of(weight, q.grid), (number, first))


def _by(method: str) -> str:
    return {"rtn": "rounding", "learned": "learning", "tuned": "tuning"}.get(method, "a search of scales")
