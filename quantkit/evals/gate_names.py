"""The metrics that an evaluation can give, before it is made: a gate that names another is refused at once."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.evals.divergence import QUANTILES

__all__ = ["expected"]

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
        *(f"tasks.{name}.{figure}" for name in tasks for figure in ("recovery", "mcnemar_p")),
    }
