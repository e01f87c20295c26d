"""`report.json`: what an evaluation found, as one versioned schema. docs/report.md explains it, docs/report.schema.json
is generated from it (scripts/report_schema.py).

A figure that was not measured is null; a section that was not is null or empty. Errors are shares of squared length
(energy) unless they say otherwise, KL is in nats a token, sizes are bytes, times seconds.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from quantkit.report.allocation_schema import Allocation
from quantkit.report.task_schema import TaskRun
from quantkit.report.text_schema import TextTokens

__all__ = [
    *("METRICS_VERSION", "SCHEMA_VERSION", "Change", "Comparison", "Context", "ContextBucket", "Decision", "Divergence"),
    *("Figure", "Finite", "GateResult", "Histogram", "KVCache", "LayerRow", "LinearRow", "Moe", "MoeLayer", "Needle"),
    *("Operator", "Overlap", "Probe", "Provenance", "Report", "Run", "Sample", "Size", "SizeRow", "SpeedRow"),
    *("Status", "Task", "UnitSums", "Verdict", "WorstToken"),
]

SchemaVersion = Literal[2]
SCHEMA_VERSION: SchemaVersion = 2
METRICS_VERSION = 2  # raised when a metric is computed in another way, so that old figures are not compared with new ones
Status = Literal["pass", "fail", "undecided"]
Operator = Literal["<", "<=", ">", ">="]
Decision = Literal["pass", "fail", "undecided", "not measured"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Figure(_Part):
    """A value and its 95 % interval. Without low and high it is exact (a count, a size, an error of stored weights) or too
    little was read for an interval; a gate's `exact` says which."""

    value: float
    low: float | None = None
    high: float | None = None


class Verdict(_Part):
    """pass: every gate passed. fail: at least one failed. undecided: none failed, but one needs more data."""

    status: Status
    reasons: list[str]


class GateResult(_Part):
    """One gate. exact: the metric is no sample's, so it needs no interval. where: what in the model it speaks of. needed:
    about how many `unit`s would decide it, where that can be said, or, without an interval, how many give one; advice: the
    same in words, and how to get them. not measured: a default gate whose metric this report lacks; the verdict does not
    count it."""

    gate: str
    metric: str
    measured: Figure | None
    operator: Operator
    threshold: float
    status: Decision
    reason: str
    exact: bool = False
    where: str = ""
    needed: int | None = None
    unit: str = ""
    advice: str = ""


class Overlap(_Part):
    """Share of the evaluation text's runs of `ngram` tokens that occur in the calibration windows; null with a reason."""

    ngram: int
    share: float | None
    note: str


class Provenance(_Part):
    """What was compared with what, on what, and how to do it again."""

    created: str
    command: str
    baseline: str
    baseline_digest: str
    quantized: str
    quantized_digest: str
    architecture: str
    parameters: int
    recipe: dict[str, object] | None
    calibration_tokens: int | None
    calibration_digest: str | None
    text: str
    text_digest: str
    text_tokens: TextTokens | None = None
    seq_len: int
    windows: int
    tokens: int
    unit: str
    units: int
    kv_cache: str | None
    overlap: Overlap
    versions: dict[str, str]
    hardware: dict[str, str]


class Finite(_Part):
    """Scored tokens whose logits are not finite, and the first layer after which the quantized hidden state was not.
    layer is null when only the head's output is not. probe: by variant (floor, forced, float_kv), tokens whose logits are
    finite in the quantized model but not in that variant; the probe's figures leave them out. elsewhere: by place (needles,
    samples, benchmark tasks), tokens that the quantized model could not answer with. tokens and of count the long windows,
    these variants and places too."""

    tokens: int
    of: int
    layer: int | None = None
    head: bool = False
    probe: dict[str, int] = {}
    elsewhere: dict[str, int] = {}


class Histogram(_Part):
    """Tokens per bin of log10(KL in nats); below counts those under edges[0]."""

    edges: list[float]
    counts: list[int]
    below: int


class UnitSums(_Part):
    """Sums over one document's tokens: what a paired comparison with another report needs."""

    unit: int
    tokens: int
    kl: float
    nll_baseline: float
    nll_quantized: float
    same_top1: float
    same_router: float


class Probe(_Part):
    """What was measured on a share of the windows only: the floor (baseline with BF16 products against itself in float32)
    and the quantized model with the baseline's routing. kl is the free-running model on the same tokens; excess = kl -
    floor, routing_term = kl - forced_routing, both paired. units: documents that the windows are from."""

    windows: int
    units: int | None = None
    tokens: int
    kl: Figure
    floor: Figure
    floor_top1_agreement: Figure
    floor_router_agreement: Figure | None
    excess: Figure
    forced_routing: Figure | None
    routing_term: Figure | None


class Divergence(_Part):
    kl: dict[str, Figure]
    histogram: Histogram
    perplexity: dict[str, Figure]
    log_ratio_standard_error: float | None
    top1_agreement: Figure
    router_agreement: Figure | None
    right_to_wrong: Figure
    wrong_to_right: Figure
    worst_percent_share: float = Field(description="Share of the summed KL that the worst 1 % of tokens carry.")
    positions: list[ContextBucket]
    by_unit: list[UnitSums]


class Task(_Part):
    """One benchmark task. baseline and quantized: the metric, 0..1. recovery: their ratio; ci95: of the recovery, paired
    over items; null where it has none. mcnemar_p: exact, of the flips."""

    name: str
    metric: str
    baseline: float
    quantized: float
    recovery: float | None
    ci95: tuple[float, float] | None
    right_to_wrong: int
    wrong_to_right: int
    mcnemar_p: float | None
    n: int


class LayerRow(_Part):
    """One layer: accumulated error of the hidden state after it (null where it is not finite), unchanged router choices, and
    by role the mean and worst output error that calibration recorded for its linears."""

    layer: int
    hidden_error: float | None
    router_agreement: float | None
    roles: dict[str, tuple[float, float]]


class LinearRow(_Part):
    """One quantized linear. method, fallback, output_error, coverage and lent are calibration's; weight_error =
    ||W - Q|| / ||W|| (a length, not an energy) against the baseline's weight, null where it is not quantized."""

    key: str
    layer: int
    role: str
    scheme: str | None
    weight_error: float | None
    method: str | None = None
    fallback: str | None = None
    output_error: float | None = None
    coverage: float | None = None
    lent: int | None = None


class MoeLayer(_Part):
    """Routed experts of one layer, in order. output_error: of each expert's output when it reads what the baseline's reads,
    on evaluated tokens, null where none was routed there or it is not finite, without an interval where fewer than 5 blocks
    of documents sent some. coverage: calibration tokens over in_features, the least of the expert's linears."""

    layer: int
    evaluated_tokens: list[int]
    output_error: list[Figure | None]
    shared_output_error: Figure | None
    coverage: list[float | None]


class Moe(_Part):
    """layers without experts have none; dense: their MLPs' output error, by layer. not_finite: MLPs whose output is not
    finite where the baseline's is, such as "layer 2, expert 5"."""

    layers: list[MoeLayer]
    dense: dict[int, Figure]
    not_finite: list[str] = []


class SizeRow(_Part):
    role: str
    schemes: list[str]
    weights: int
    bytes: int
    baseline_bytes: int


class SpeedRow(_Part):
    """One matrix at one batch size on this machine's kernel."""

    matrix: str
    tokens: int
    kernel: str
    microseconds: float
    of_roofline: float
    of_bf16: float


class Size(_Part):
    roles: list[SizeRow]
    bytes: int
    baseline_bytes: int
    bits_per_weight: float
    quantize_seconds: float | None
    quantize_peak_memory_bytes: int | None
    evaluate_seconds: float
    speed: list[SpeedRow]


class WorstToken(_Part):
    """A scored token with a large KL. baseline and quantized: the five likeliest tokens of each, with probabilities."""

    window: int
    position: int
    kl: float
    before: str
    token: str
    baseline: list[tuple[str, float]]
    quantized: list[tuple[str, float]]


class Sample(_Part):
    """Greedy continuations of one prompt. same: how many tokens both begin with; they divide text at that point."""

    prompt: str
    common: str
    baseline: str
    quantized: str
    same: int
    of: int


class ContextBucket(_Part):
    """Positions start..stop-1 of windows: perplexity of both and mean KL."""

    start: int
    stop: int
    tokens: int
    perplexity_baseline: float
    perplexity_quantized: float
    kl: float


class Needle(_Part):
    """Recall of a planted run of rare tokens at one depth (0 is the start): mean probability of the right continuation, and
    how often it is the likeliest. baseline_without: the baseline's where the run is not planted; one that is not below
    `baseline` says that this model does not recall, and the check nothing. not_finite: of the quantized model's three reads
    in each of the n windows, those whose logits are not finite; they count as not recalled."""

    depth: float
    n: int
    baseline_without: float
    baseline: float
    quantized: float
    baseline_hits: float
    quantized_hits: float
    not_finite: int = 0


class Context(_Part):
    """Long windows, read in pieces through the cache. kv_cache: how the quantized model keeps K and V (the baseline keeps
    float32). tokens: scored; not_finite: of them, those whose logits are not, which all else leaves out; not_finite_layer:
    the first layer after which. last_ratio: of perplexities in the second half, null where nothing is finite there.
    needle_recall: of the needles that the baseline recalls whole, the share that the quantized model does; null where it
    recalls none."""

    length: int
    windows: int
    kv_cache: str
    tokens: int
    not_finite: int
    not_finite_layer: int | None
    positions: list[ContextBucket]
    last_ratio: Figure | None
    needles: list[Needle]
    needle_recall: Figure | None


class KVCache(_Part):
    """The quantized model with K and V kept in `format`, against the same with float32, on the probe's tokens; added is
    their paired difference."""

    format: str
    kl_with: Figure
    kl_without: Figure
    added: Figure


class Change(_Part):
    """A metric of the previous report and of this one. regression: the interval of the difference lies on the bad side."""

    metric: str
    previous: Figure
    current: Figure
    difference: Figure
    regression: bool


class Report(_Part):
    """The whole of report.json."""

    schema_version: SchemaVersion = SCHEMA_VERSION
    metrics_version: int = METRICS_VERSION
    verdict: Verdict
    gates: list[GateResult]
    provenance: Provenance
    finite: Finite
    divergence: Divergence | None
    probe: Probe | None
    kv: KVCache | None
    context: Context | None
    tasks: list[Task]
    task_run: TaskRun | None = None
    layers: list[LayerRow]
    linears: list[LinearRow]
    moe: Moe
    size: Size
    allocation: Allocation | None = None
    worst_tokens: list[WorstToken]
    samples: list[Sample]
    notes: list[str]
    previous: str | None = None
    changes: list[Change] = []


class Run(_Part):
    """A report and the name that it goes by beside others."""

    name: str
    report: Report


class Comparison(_Part):
    """Several reports: what `quantkit report A B -o x.html` writes as x.json."""

    schema_version: SchemaVersion = SCHEMA_VERSION
    runs: list[Run]


Divergence.model_rebuild()
