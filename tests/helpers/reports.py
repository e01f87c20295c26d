"""Reports made by hand, of a model that is sound unless told."""

from __future__ import annotations

from typing import Any

from quantkit.report.schema import Divergence, Figure, Moe, MoeLayer, Probe, Report, Task

SURE = Figure(value=0.01, low=0.009, high=0.011)
SHARE = Figure(value=0.9, low=0.89, high=0.91)


def fig(value: float, low: float | None = None, high: float | None = None) -> Figure:
    return Figure(value=value, low=low, high=high)


def experts(*errors: Figure | None, **more: Any) -> Moe:
    """One layer with these experts."""
    row = MoeLayer(
        layer=2,
        evaluated_tokens=[9] * len(errors),
        output_error=list(errors),
        shared_output_error=None,
        coverage=[4.0] * len(errors),
    )
    return Moe(layers=[row], dense={}, **more)


def divergence(**kl: Figure) -> Divergence:
    names = ("mean", "median", "p90", "p99", "p999", "max")
    return Divergence(
        kl={name: SURE for name in names} | kl,
        histogram={"edges": [-7, 1], "counts": [9], "below": 0},  # type: ignore[arg-type]
        perplexity={name: fig(1.001, 1.0, 1.002) for name in ("baseline", "quantized", "ratio")},
        log_ratio_standard_error=None,
        top1_agreement=SHARE,
        router_agreement=SHARE,
        right_to_wrong=SURE,
        wrong_to_right=SURE,
        worst_percent_share=0.5,
        positions=[],
        by_unit=[{"unit": i, **dict.fromkeys(("tokens", "kl", "nll_baseline", "nll_quantized"), 10),
                  **dict.fromkeys(("same_top1", "same_router"), 9)} for i in range(16)],  # type: ignore[list-item]
    )  # fmt: skip


def made(**parts: Any) -> Report:
    """A sound model's report: 64 windows of 16 documents. The keys of `origin` and `size` replace those parts' fields."""
    origin = {
        **dict.fromkeys(("created", "command", "baseline", "baseline_digest", "quantized", "quantized_digest"), "x"),
        **dict.fromkeys(("recipe", "calibration_tokens", "calibration_digest", "kv_cache"), None),
        "architecture": "x",
        "parameters": 9,
        "text": "x",
        "text_digest": "d",
        "seq_len": 512,
        "windows": 64,
        "tokens": 9000,
        "unit": "document",
        "units": 16,
        "versions": {},
        "hardware": {},
        "overlap": {"ngram": 16, "share": None, "note": "x"},
    }
    size = {"roles": [], "bytes": 500, "baseline_bytes": 1000, "bits_per_weight": 8, "evaluate_seconds": 1, "speed": []}
    size |= {"quantize_seconds": None, "quantize_peak_memory_bytes": None}
    probe = Probe(
        windows=16, tokens=2000, kl=SURE, floor=SURE, floor_top1_agreement=SHARE, floor_router_agreement=SHARE, excess=SURE,
        forced_routing=SURE, routing_term=SURE,
    )  # fmt: skip
    row = {"key": "model.x", "layer": 0, "role": "q", "scheme": "W8A16", "weight_error": 0.01}
    default = {
        "verdict": {"status": "undecided", "reasons": []},
        "gates": [],
        "finite": {"tokens": 0, "of": 9000},
        "divergence": divergence(),
        "probe": probe,
        "kv": None,
        "context": None,
        "tasks": [],
        "layers": [],
        "linears": [row],
        "moe": experts(SURE, SURE),
        "worst_tokens": [],
        "samples": [],
        "notes": [],
        "provenance": origin | parts.pop("origin", {}),
        "size": size | parts.pop("size", {}),
    }
    return Report.model_validate(default | parts)


def task(recovery: Figure, **more: Any) -> Task:
    return Task(
        name="gsm8k", metric="exact_match", baseline=0.5, quantized=0.49,
        recovery=recovery.value, ci95=None if recovery.low is None else (recovery.low, recovery.high),
        **{"right_to_wrong": 3, "wrong_to_right": 2, "mcnemar_p": 1.0, "n": 100} | more,
    )  # fmt: skip
