"""Every quantized linear of a checkpoint, decoded, and held against its source: by what its method allows, and by the error
that quantkit.json states for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.bounds import METHODS, Range, may_be_negative, misplaced_codes, range_of, wrong_scales
from quantkit.checkpoint.by_name import NamedSpec
from quantkit.checkpoint.opened import format_of
from quantkit.checkpoint.origin import STATEMENT
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.errors import CheckpointError, QuantkitError, VerificationError, counted, shown
from quantkit.model.spec import Linear, ModelSpec
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import Scheme, Strategy
from quantkit.stats import weight_error

__all__ = ["Found", "check_linears"]

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


def check_linears(
    reader: CheckpointReader,
    original: CheckpointReader | None,
    spec: ModelSpec | NamedSpec,
    schemes: Mapping[str, Scheme | None],
    stated: Mapping[str, Any],
) -> Found:
    """Decode each quantized linear once. stated: rows of quantkit.json by linear; few matter without an original."""
    findings, layout = Found(), format_of(reader)
    for layer in spec.layers:
        for group in layer.same_input():
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
                        error = _check_against(original.tensor(ref.weight).float(), ref, scheme, q, row, shared)
                        findings.errors.setdefault(ref.role.value, []).append(error)
                except CheckpointError as broken:
                    findings.unread.append(broken.problem)
                except QuantkitError as broken:
                    findings.problems.append(broken.problem)
    return findings


def _shared_range(original: CheckpointReader, group: tuple[Linear, ...], scheme: Scheme | None) -> Range | None:
    """The range of linears that read one input and so share one scale; None where each has its own."""
    if scheme is None or scheme.weight.strategy is not Strategy.TENSOR or len(group) == 1:
        return None
    ranges = []
    for ref in group:
        try:
            ranges.append(range_of(original.tensor(ref.weight).float(), scheme.weight))
        except CheckpointError:
            return None  # which is said where that linear is looked at
    lows, highs = zip(*ranges, strict=True)
    return torch.stack(lows).amin(0), torch.stack(highs).amax(0)


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


def _check_against(
    weight: Tensor, ref: Linear, scheme: Scheme, q: QuantizedTensor, row: Mapping[str, Any] | None, shared: Range | None
) -> float:
    """The relative error against float32 weight [out, in]. Raises VerificationError when it is not what the method gives."""
    value = q.dequantize()
    error = weight_error(weight, value)
    if error > scheme.weight.codes.worst:
        raise VerificationError(f"'{ref.key}' differs from its source by {error:.1%}: more than {scheme.name} can lose")
    if row is None:
        return error
    method, stated = row.get("method"), row.get("weight_error")
    if method not in METHODS:
        raise VerificationError(f"'{ref.key}' was made by {shown(method)!r}, as {STATEMENT} states: nothing bounds that")
    wrong = wrong_scales(q, shared or range_of(weight, scheme.weight), method)
    if wrong.any():
        raise VerificationError(f"'{ref.key}': {_first(wrong, 'scale')} not what {_by(method)} gives for its source")
    if method == "rtn" and (wrong := misplaced_codes(weight, q, value)).any():
        raise VerificationError(f"'{ref.key}': {_first(wrong, 'code')} more than half a step from its source")
    if not isinstance(stated, float) or not math.isclose(error, stated, rel_tol=_LAST_DIGITS):
        problem = f"'{ref.key}' differs from its source by {error!r}"
        raise VerificationError(f"{problem}, and {STATEMENT} states {shown(stated)}")
    return error


def _by(method: str) -> str:
    return {"rtn": "rounding", "learned": "learning", "tuned": "tuning"}.get(method, "a search of scales")


def _first(wrong: Tensor, thing: str) -> str:
    """`3 of 128 scales, the first at [0, 2], are`."""
    number, where = int(wrong.sum()), wrong.nonzero()[0].tolist()
    return f"{number:,} of {counted(wrong.numel(), thing)}, the first at {where}, {'is' if number == 1 else 'are'}"
