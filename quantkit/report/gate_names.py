"""The metrics that an evaluation can give, before it is made: a gate that names another is refused at once."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from quantkit.errors import ConfigError
from quantkit.report.gates import Gate
from quantkit.report.intervals import QUANTILES

__all__ = ["check", "expected"]

_NEEDS = {
    "context": "--context N",
    "kv_cache": "--kv-cache fp8",
    "tasks": "--tasks NAME or --suite NAME",
    "change": "quantkit report --against PREVIOUS",
}

# Some only of some models (with experts, made by quantkit): that shows later.
_ALWAYS = (
    *("kl.mean", "kl.max", *(f"kl.{name}" for name in QUANTILES)),
    *("kl.floor", "kl.excess", "kl.forced_routing", "kl.routing_term"),
    *("perplexity.baseline", "perplexity.quantized", "perplexity.ratio", "top1_agreement", "router_agreement"),
    *("flips.right_to_wrong", "flips.wrong_to_right", "mlp.output_error.max", "weights.error.max", "not_finite.tokens"),
    *("fallbacks.count", "fallbacks.share", "coverage.min", "coverage.thin_experts"),
    *("size.bytes", "size.bits_per_weight", "size.reduction"),
)


def expected(kv_cache: bool, context: bool, tasks: Sequence[str]) -> set[str]:
    """Of an evaluation with --kv-cache, with --context, and of these benchmarks."""
    return {
        *_ALWAYS,
        *(["kv_cache.added_kl"] if kv_cache else []),
        *(["context.perplexity_ratio", "context.needle_recall"] if context else []),
        *(f"tasks.{name}.recovery" for name in tasks),
    }


def check(gates: Sequence[Gate], known: set[str]) -> None:
    """Raise ConfigError for a gate that no evaluation with these metrics can decide."""
    for gate in gates:
        group = gate.metric.partition(".")[0]
        if gate.metric == "kl.max":
            seen = "kl.max is the extreme of a sample and has no interval to decide on"
            raise ConfigError(f"gate '{gate.text}': {seen}", "gate kl.p999 instead")
        if group in _NEEDS and not any(name.startswith(f"{group}.") for name in known):
            raise ConfigError(f"gate '{gate.text}': this run does not measure {gate.metric}", f"it needs {_NEEDS[group]}")
        if gate.metric not in known:
            near = difflib.get_close_matches(gate.metric, known, n=1, cutoff=0.75)
            meant = f"did you mean {near[0]}? " if near else ""
            seen = f"gate '{gate.text}' names no metric that this run measures"
            raise ConfigError(seen, f"{meant}it measures {', '.join(sorted(known - {'kl.max'}))}")
