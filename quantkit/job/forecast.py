"""How many calibration tokens a model needs, and how many its experts will get, from its shapes alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.model.spec import ModelSpec

__all__ = ["Forecast", "forecast", "windows_for"]

_WANTED = 2  # tokens for each input of the linear with the fewest
_LEAST_WINDOWS, _LEAST, _MOST = 128, 65_536, 1_048_576


@dataclass(frozen=True)
class Forecast:
    """tokens: of the calibration. per_expert: those that reach a routed expert if all are reached alike; features: the most
    inputs that a linear of one has; of the layer where their quotient is least."""

    tokens: int
    per_expert: int
    features: int

    @property
    def per_feature(self) -> float:
        return self.per_expert / self.features

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_feature": round(self.per_feature, 3)}

    def note(self) -> str | None:
        """Below one token for each input the Hessian of an expert is singular, and tokens are lent to it."""
        if self.per_feature >= 1:
            return None
        return (
            f"{self.tokens:,} calibration tokens give each routed expert about {self.per_expert:,} for {self.features:,} "
            f"inputs ({self.per_feature:.2f} an input): give more --samples or --seq-len"
        )


def _dilution(spec: ModelSpec) -> list[tuple[float, int]]:
    """For each MoE layer of how many tokens one reaches an expert, and the most inputs of a linear of its experts."""
    return [
        (
            len(moe.experts) / moe.router.top_k,
            max(ref.in_features for expert in moe.experts for ref in expert.linears()),
        )
        for moe in spec.moes()
    ]


def windows_for(spec: ModelSpec, seq_len: int) -> int:
    """How many windows a calibration has if nobody says: two tokens for each input of any linear, experts being reached
    alike; at least 128 windows and 65,536 tokens, at most 1,048,576 tokens."""
    inputs = [share * features for share, features in _dilution(spec)]
    inputs += [float(max(ref.in_features for ref in layer.attention.linears())) for layer in spec.layers]
    inputs += [float(mlp.down.in_features) for layer in spec.layers for mlp in layer.mlps()[:1]]
    tokens = min(max(_LEAST, math.ceil(_WANTED * max(inputs))), _MOST)
    return max(_LEAST_WINDOWS, math.ceil(tokens / seq_len))


def forecast(spec: ModelSpec, tokens: int) -> Forecast | None:
    """None for a model without experts."""
    forecasts = [Forecast(tokens, round(tokens / share), features) for share, features in _dilution(spec)]
    return min(forecasts, key=lambda one: one.per_feature, default=None)
