"""`measure`: a quantised model beside its baseline on held-out text, as a `Report`; `evaluate`: its main figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from quantkit.bench import bench, matrices_of
from quantkit.calib import tokens
from quantkit.calib.tokens import EvalSet
from quantkit.errors import CheckpointError, ConfigError
from quantkit.evals.cache import BaselineCache
from quantkit.evals.context import long_context
from quantkit.evals.provenance import linear_rows, provenance, run_record, size
from quantkit.evals.run import BATCH_TOKENS, Evaluation
from quantkit.evals.samples import generations, worst_tokens
from quantkit.evals.schema import Finite, Report, SpeedRow, Verdict
from quantkit.evals.sections import divergence, kv_cache, layer_rows, moe, probe
from quantkit.formats.folder import find_model
from quantkit.model.cache import KVFormat
from quantkit.runtime import Model

__all__ = ["Extent", "evaluate", "figures", "measure"]

_KEEP_BYTES = 4_000_000_000  # generation keeps the weights of both models; beyond this it is left out, and said so
_CONTEXT_WINDOWS = 8


@dataclass(frozen=True)
class Extent:
    """What to measure. cache: folder for the baseline's results. kv_cache: the quantised model keeps K and V so (None: not
    rounded). context: length of the long windows, 0 for none. samples: prompts to continue. speed: time the kernels."""

    seq_len: int = 512
    windows: int = 64
    cache: Path | None = None
    kv_cache: KVFormat | None = None
    context: int = 0
    samples: int = 3
    speed: bool = False


def measure(
    quantized: str | Path,
    baseline: str | Path,
    text: str = "stdlib-held-out",
    extent: Extent = Extent(),
    *,
    device: str = "cpu",
    command: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Everything that report.json holds but gates and tasks, in float32, activations rounded as the schemes say.

    text: a file or named corpus (see `calib.tokens.documents`); its documents are cut into windows of `seq_len` tokens, at
    most `windows` of them. progress is called with (windows done, windows in all). Raises QuantkitError.
    """
    begun = time.monotonic()
    place = torch.device(device)
    models = [Model(find_model(path), place, hold=False) for path in (baseline, quantized)]
    tokenizer = tokens.load_tokenizer(models[0].folder)
    _check_pair(models, tokenizer)
    texts = tokens.documents(text, models[0].folder)
    data = tokens.evaluation_set(tokenizer, texts, extent.seq_len, extent.windows, text)
    if int(data.ids.max()) >= models[0].spec.vocab:
        seen = f"the tokenizer in {models[0].folder} gives id {int(data.ids.max())}, the vocabulary ends before"
        raise ConfigError(seen, "use the tokenizer that belongs to this model")
    long_ids = None  # before the work, so that too short a text is said at once
    if extent.context:
        long_ids = tokens.calibration_windows(tokenizer, texts, _CONTEXT_WINDOWS, extent.context, 0, text)
    step = max(1, BATCH_TOKENS // data.ids.shape[1])
    run = Evaluation(models, data, _store(extent.cache, models[0], data, step), extent.kv_cache)
    run.run(step, progress)
    record = run_record(models[1].folder)
    linears = linear_rows(models, record)
    names = str(baseline), str(quantized)
    kv, scored = extent.kv_cache, len(run.scores) + run.broken
    samples, notes = _generate(models, data, tokenizer, extent, run.broken > 0)
    return Report(
        verdict=Verdict(status="undecided", reasons=["no gate has been applied"]),
        gates=[],
        provenance=provenance(models, names, data, text, extent.seq_len, kv.value if kv else None, command, scored),
        finite=Finite(tokens=run.broken, of=scored, layer=run.broken_at, head=run.broken > 0 and run.broken_at is None),
        divergence=divergence(run) if len(run.scores) else None,
        probe=probe(run),
        kv=kv_cache(run),
        context=long_context(models, long_ids, kv or KVFormat.FLOAT32) if long_ids is not None else None,
        tasks=[],
        layers=layer_rows(run, linears),
        linears=linears,
        moe=moe(run, linears),
        worst_tokens=worst_tokens(run.worst, data, tokenizer),
        samples=samples,
        notes=notes,
        size=size(models[0].folder, models[1].folder, record, round(time.monotonic() - begun, 2)).model_copy(
            update={"speed": _speed(models[1], device) if extent.speed else []}
        ),
    )


def evaluate(
    quantized: str | Path,
    baseline: str | Path,
    text: str = "stdlib-held-out",
    *,
    seq_len: int = 512,
    windows: int = 64,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """KL(baseline || quantized) in nats, perplexity of both, agreement of top-1 and of router choices, error by layer.

    As `measure`, whose report `figures` abridges. Raises QuantkitError.
    """
    extent = Extent(seq_len=seq_len, windows=windows, samples=0)
    return figures(measure(quantized, baseline, text, extent, device=device, progress=progress))


def figures(report: Report) -> dict[str, Any]:
    """The main figures under the keys that `quantkit eval --json` documents. Raises CheckpointError where no token of the
    quantised model has finite logits."""
    found, origin = report.divergence, report.provenance
    if found is None:
        seen = f"no logits of {origin.quantized} are finite, from layer {report.finite.layer} on"
        raise CheckpointError(seen, "see its report; quantise again")
    named = {
        **{f"perplexity.{key}": figure for key, figure in found.perplexity.items()},
        **{f"kl.{key}": figure for key, figure in found.kl.items()},
        "top1_agreement": found.top1_agreement,
        **({"router_agreement": found.router_agreement} if found.router_agreement else {}),
    }
    router = found.router_agreement.value if found.router_agreement else 1.0
    keys = ("layer", "hidden_error", "router_agreement")
    return {
        "perplexity": {key: figure.value for key, figure in found.perplexity.items()},
        "kl": {key: figure.value for key, figure in found.kl.items()},
        "top1_agreement": found.top1_agreement.value,
        "router_agreement": router,
        "noise_floor": report.probe.floor.value if report.probe else None,
        "ci95": {name: [f.low, f.high] for name, f in named.items() if f.low is not None},
        "layers": [{key: getattr(row, key) for key in keys} for row in report.layers],
        "tokens": origin.tokens,
        "windows": origin.windows,
        "seq_len": origin.seq_len,
        "bootstrap_unit": origin.unit,
        "units": origin.units,
        "text": origin.text,
        "text_digest": origin.text_digest,
        "baseline": origin.baseline,
        "quantized": origin.quantized,
        "seconds": report.size.evaluate_seconds,
    }


def _check_pair(models: list[Model], tokenizer: Tokenizer) -> None:
    base, quant = (model.spec for model in models)
    fix = "give the BF16 model that the checkpoint was made from as --baseline"
    folders = f"{models[0].folder} and {models[1].folder}"
    if base.vocab != quant.vocab:
        raise ConfigError(f"{folders} have different vocabularies: {base.vocab} and {quant.vocab} tokens", fix)
    if base != quant:
        raise ConfigError(f"{folders} are not the same model: their architecture or sizes differ", fix)
    try:
        other = tokens.load_tokenizer(models[1].folder)
    except CheckpointError:
        return  # it came without a tokenizer: the baseline's serves
    if other.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(f"{folders} have different vocabularies: their tokenizers differ", fix)


def _store(folder: Path | None, base: Model, data: EvalSet, step: int) -> BaselineCache | None:
    if folder is None:
        return None
    return BaselineCache(folder, base.weights.reader.fingerprint(), tokens.digest(data.ids), step, base.device)


def _generate(
    models: list[Model], data: EvalSet, tokenizer: Tokenizer, extent: Extent, broken: bool
) -> tuple[list[Any], list[str]]:
    """Samples, and a note where there are none although they were asked for."""
    if not extent.samples or broken:
        return [], ["no text was generated: logits are not finite"] if broken and extent.samples else []
    held = sum(entry.nbytes for model in models for entry in model.weights.reader.entries.values())
    if held > _KEEP_BYTES:
        return [], [f"no text was generated: it would keep {held:,} bytes of weights in memory"]
    kept = [Model(model.folder, model.device) for model in models]
    return generations(kept, data, tokenizer, extent.samples, extent.kv_cache), []


def _speed(model: Model, device: str) -> list[SpeedRow]:
    rows = bench(matrices_of(model), [1, 16, 256], 10, device, "auto")
    return [
        SpeedRow(
            matrix=row["matrix"],
            tokens=row["tokens"],
            kernel=row["kernel"],
            microseconds=row["microseconds"]["median"],
            of_roofline=row["of_roofline"],
            of_bf16=row["of_bf16"],
        )
        for row in rows
    ]
