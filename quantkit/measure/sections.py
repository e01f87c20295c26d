"""From what an `Evaluation` gathered to the sections of a report: figures with intervals, and rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quantkit.measure.context import buckets
from quantkit.measure.divergence import TokenScores, bootstrap, log_ratio_error, summary
from quantkit.measure.run import Evaluation
from quantkit.model.spec import MLP, Layer, MoE
from quantkit.report.intervals import Floats, Resampler, at_least_wilson, figure
from quantkit.report.metrics import mlp_name
from quantkit.report.schema import (
    Divergence,
    Figure,
    Histogram,
    KVCache,
    LayerRow,
    LinearRow,
    Moe,
    MoeLayer,
    Probe,
    UnitSums,
)

__all__ = ["divergence", "kv_cache", "layer_rows", "moe", "probe"]

_EDGES = np.linspace(-7, 1.5, 35)  # of log10(KL)


def divergence(run: Evaluation) -> Divergence:
    scores = run.scores
    values, intervals = summary(scores), bootstrap(scores)
    flat = {f"{group}.{key}": value for group in ("kl", "perplexity") for key, value in values[group].items()}

    def named(name: str, value: float) -> Figure:
        return figure(value, intervals.get(name))

    right, wrong = scores.right_baseline * (1 - scores.right_quantized), scores.right_quantized * (1 - scores.right_baseline)
    top = np.sort(scores.kl)[-max(1, len(scores) // 100) :].sum()
    router = named("router_agreement", values["router_agreement"]) if run.spec.moes() else None
    return Divergence(
        kl={key: named(f"kl.{key}", flat[f"kl.{key}"]) for key in values["kl"]},
        histogram=_histogram(scores.kl),
        perplexity={key: named(f"perplexity.{key}", flat[f"perplexity.{key}"]) for key in values["perplexity"]},
        log_ratio_standard_error=log_ratio_error(scores),
        top1_agreement=named("top1_agreement", values["top1_agreement"]),
        router_agreement=router,
        right_to_wrong=named("flips.right_to_wrong", float(right.mean())),
        wrong_to_right=named("flips.wrong_to_right", float(wrong.mean())),
        worst_percent_share=float(top / scores.kl.sum()) if scores.kl.sum() > 0 else 0.0,
        positions=buckets(scores),
        by_unit=_by_unit(scores),
    )


def _histogram(kl: Floats) -> Histogram:
    logs = np.log10(np.maximum(kl, 1e-300))
    counts, edges = np.histogram(np.minimum(logs, _EDGES[-1]), bins=_EDGES)
    return Histogram(edges=edges.tolist(), counts=counts.tolist(), below=int((logs < _EDGES[0]).sum()))


def _by_unit(scores: TokenScores) -> list[UnitSums]:
    rows = []
    for unit in np.unique(scores.unit):
        part = scores.where(scores.unit == unit)
        rows.append(
            UnitSums(
                unit=int(unit),
                tokens=len(part),
                kl=float(part.kl.sum()),
                nll_baseline=float(part.nll_baseline.sum()),
                nll_quantized=float(part.nll_quantized.sum()),
                same_top1=float(part.same_top1.sum()),
                same_router=float(part.same_router.sum()),
            )
        )
    return rows


def probe(run: Evaluation) -> Probe | None:
    """None where no probed token has finite logits."""
    free, floor = run.probes["free"], run.probes["floor"]
    if not len(free):
        return None
    sample = Resampler(free.unit)

    def mean(values: Floats) -> Figure:
        return figure(float(values.mean()), sample.interval(sample.means(values)))

    def share(values: Floats) -> Figure:
        return figure(float(values.mean()), at_least_wilson(sample.interval(sample.means(values)), values))

    forced = run.probes.get("forced")
    return Probe(
        windows=int(run.probe.sum()),
        units=sample.units,
        tokens=len(free),
        kl=mean(free.kl),
        floor=mean(floor.kl),
        floor_top1_agreement=share(floor.same_top1),
        floor_router_agreement=share(floor.same_router) if run.spec.moes() else None,
        excess=mean(free.kl - floor.kl),
        forced_routing=mean(forced.kl) if forced else None,
        routing_term=mean(free.kl - forced.kl) if forced else None,
    )


def kv_cache(run: Evaluation) -> KVCache | None:
    plain = run.probes.get("float_kv")
    if plain is None or not len(plain) or run.kv is None:
        return None
    free, sample = run.probes["free"], Resampler(plain.unit)
    values = {"kl_with": free.kl, "kl_without": plain.kl, "added": free.kl - plain.kl}
    figures = {name: figure(float(x.mean()), sample.interval(sample.means(x))) for name, x in values.items()}
    return KVCache(format=run.kv.value, **figures)


def layer_rows(run: Evaluation, linears: Sequence[LinearRow]) -> list[LayerRow]:
    rows = []
    for layer in run.spec.layers:
        roles: dict[str, list[float]] = {}
        for row in linears:
            if row.layer == layer.index and row.output_error is not None:
                roles.setdefault(row.role, []).append(row.output_error)
        rows.append(
            LayerRow(
                layer=layer.index,
                hidden_error=run.layers.error(layer.index),
                router_agreement=run.layers.agreement(layer.index),
                roles={role: (float(np.mean(errors)), max(errors)) for role, errors in roles.items()},
            )
        )
    return rows


def moe(run: Evaluation, linears: Sequence[LinearRow]) -> Moe:
    errors, broken = run.errors.figures(), run.errors.not_finite()
    coverage = {row.key: row.coverage for row in linears if row.coverage is not None}
    layers, dense, not_finite = [], {}, []
    for layer in run.spec.layers:
        not_finite += [name for name, mlp in _mlps(layer) if mlp.gate.key in broken]
        if not isinstance(layer.mlp, MoE):
            if layer.mlp.gate.key in errors:
                dense[layer.index] = errors[layer.mlp.gate.key]
            continue
        keys = [expert.gate.key for expert in layer.mlp.experts]
        layers.append(
            MoeLayer(
                layer=layer.index,
                evaluated_tokens=run.layers.sent[layer.index][: len(keys)].tolist(),
                output_error=[errors.get(key) for key in keys],
                shared_output_error=errors.get(layer.mlp.shared.gate.key) if layer.mlp.shared else None,
                coverage=[_least(coverage, expert) for expert in layer.mlp.experts],
            )
        )
    return Moe(layers=layers, dense=dense, not_finite=not_finite)


def _mlps(layer: Layer) -> list[tuple[str, MLP]]:
    """The MLPs of a layer, by the names that a report gives them."""
    if not isinstance(layer.mlp, MoE):
        return [(mlp_name(layer.index), layer.mlp)]
    shared = [(mlp_name(layer.index, "shared"), layer.mlp.shared)] if layer.mlp.shared else []
    return [*((mlp_name(layer.index, i), expert) for i, expert in enumerate(layer.mlp.experts)), *shared]


def _least(coverage: dict[str, float], expert: MLP) -> float | None:
    """Of the expert's linears, that with the fewest tokens for its inputs decides."""
    return min((coverage[linear.key] for linear in expert.linears() if linear.key in coverage), default=None)
