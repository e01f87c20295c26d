"""Where a report's models come from: what run.json says, digests, sizes, machine, and overlap of calibration and text."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import quantkit
from quantkit.calib import tokens
from quantkit.calib.covering import POOL
from quantkit.calib.mixture import read_mixture
from quantkit.calib.tokenizer import load_text_tokenizer
from quantkit.calib.tokens import EvalSet
from quantkit.checkpoint.contents import Contents
from quantkit.checkpoint.inspect import inspect
from quantkit.checkpoint.origin import RECORD
from quantkit.checkpoint.reader import load_json
from quantkit.errors import CalibrationError, ConfigError
from quantkit.recipe import Recipe
from quantkit.report.schema import LinearRow, Overlap, Provenance, Size, SizeRow
from quantkit.report.text_schema import TextTokens
from quantkit.run.model import Model

__all__ = ["Said", "linear_rows", "overlap", "provenance", "run_record", "size"]

_NGRAM = 16


def run_record(folder: Path) -> dict[str, Any]:
    """What `quantize` wrote into run.json; empty for a checkpoint that quantkit did not make."""
    path = folder / RECORD
    record = load_json(path) if path.is_file() else {}
    return record if isinstance(record.get("linears"), dict) and isinstance(record.get("job"), dict) else {}


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _hardware(device: torch.device) -> dict[str, str]:
    hardware = {"processor": _processor(), "threads": str(torch.get_num_threads()), "system": platform.platform(terse=True)}
    return hardware | ({"device": torch.cuda.get_device_name(device)} if device.type == "cuda" else {"device": "cpu"})


@dataclass(frozen=True)
class Said:
    """What the caller asked for, as it was given."""

    baseline: str
    quantized: str
    text: str
    seq_len: int
    kv_cache: str | None
    command: str
    text_tokens: TextTokens


def provenance(
    models: list[Model],
    on_disk: Sequence[Contents],
    record: dict[str, Any],
    data: EvalSet,
    shared: Overlap,
    request: Said,
    scored: int,
) -> Provenance:
    """models, on_disk: of baseline and quantized model. record: `run_record`. scored: tokens."""
    base = models[0]
    versions = {"quantkit": quantkit.__version__, "torch": torch.__version__, "python": platform.python_version()}
    if record:
        versions["quantized by quantkit"] = f"{record['quantkit']} (code {record['job'].get('quantkit', '')[:12]})"
    return Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=request.command,
        baseline=request.baseline,
        baseline_digest=on_disk[0].digest,
        quantized=request.quantized,
        quantized_digest=on_disk[1].digest,
        architecture=base.spec.architecture,
        parameters=base.spec.parameters,
        recipe=record.get("recipe"),
        calibration_tokens=record.get("calibration_tokens"),
        calibration_digest=record["job"].get("tokens") or None if record else None,
        text=request.text,
        text_digest=data.digest(),
        text_tokens=request.text_tokens,
        seq_len=request.seq_len,
        windows=len(data.ids),
        tokens=scored,
        unit=data.unit_name,
        units=len(data.unit.unique()),
        kv_cache=request.kv_cache,
        overlap=shared,
        versions=versions,
        hardware=_hardware(base.device),
    )


def overlap(record: dict[str, Any], model: Path, data: EvalSet) -> Overlap:
    """How much of the evaluation text the calibration has seen: its windows are drawn again from the recipe and checked
    against the digest of those that were used."""

    def unknown(note: str) -> Overlap:
        return Overlap(ngram=_NGRAM, share=None, note=note)

    if not record:
        return unknown("the checkpoint has no run.json that says what it was calibrated on")
    if not record.get("calibration_tokens"):
        return Overlap(ngram=_NGRAM, share=0.0, note="no calibration text was used")
    recipe = Recipe.of(record["recipe"], RECORD)
    try:
        mixture, tokenizer = read_mixture(recipe.calibration), load_text_tokenizer(model, recipe.add_bos)
        chosen = (record.get("calibration_text") or {}).get("cover", {}).get("chosen")
        samples = (recipe.samples or 0) * (POOL if chosen else 1)
        windows = mixture.windows(tokenizer, samples, recipe.seq_len, recipe.seed)
        windows = windows[torch.tensor(chosen)] if chosen else windows
    except (CalibrationError, ConfigError) as error:
        return unknown(f"calibration text '{recipe.calibration}' is not at hand: {error.problem}")
    if tokens.digest(windows) != record["job"].get("tokens"):
        return unknown(f"calibration text '{recipe.calibration}' is not what it was when the model was quantized")
    ngrams = np.unique(np.concatenate([_ngrams(row) for row in windows]))
    grams = np.concatenate([_ngrams(row[:length]) for row, length in zip(data.ids, data.lengths.tolist(), strict=True)])
    if not len(grams):
        return unknown(f"no window has {_NGRAM} tokens")
    share = float(np.isin(grams, ngrams).mean())
    return Overlap(ngram=_NGRAM, share=share, note=f"of {len(grams):,} runs of {_NGRAM} tokens")


def _ngrams(ids: Tensor) -> NDArray[np.uint64]:
    """A 64-bit polynomial hash of every run of `_NGRAM` ids."""
    values = ids.numpy().astype(np.uint64) + np.uint64(1)
    if len(values) < _NGRAM:
        return np.empty(0, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(values, _NGRAM)
    factor = np.uint64(0x9E3779B97F4A7C15)
    powers = np.cumprod(np.full(_NGRAM, factor), dtype=np.uint64)
    return np.asarray((windows * powers).sum(axis=1, dtype=np.uint64))


def linear_rows(models: list[Model], record: dict[str, Any], errors: Mapping[str, float]) -> list[LinearRow]:
    """Every linear: its scheme, the distance of its weights from the baseline's (errors), and what run.json says of it."""
    base, quant = models
    rows = []
    for layer in base.spec.layers:
        for ref in layer.linears():
            scheme, outcome = quant.weights.schemes[ref.key], record.get("linears", {}).get(ref.key, {})
            rows.append(
                LinearRow(
                    key=ref.key,
                    layer=layer.index,
                    role=ref.role.value,
                    scheme=scheme.name if scheme else None,
                    weight_error=errors.get(ref.key),
                    method=outcome.get("method"),
                    fallback=outcome.get("fallback"),
                    output_error=outcome.get("error"),
                    coverage=outcome.get("coverage"),
                    lent=outcome.get("lent"),
                )
            )
    return rows


def size(base: Path, quant: Path, record: dict[str, Any], seconds: float) -> Size:
    before, after = inspect(base), inspect(quant)
    rows = [
        SizeRow(
            role=role,
            schemes=row["schemes"],
            weights=row["weights"],
            bytes=row["bytes"],
            baseline_bytes=before["roles"].get(role, {}).get("bytes", 0),
        )
        for role, row in after["roles"].items()
    ]
    return Size(
        roles=rows,
        bytes=after["total"]["bytes"],
        baseline_bytes=before["total"]["bytes"],
        bits_per_weight=after["total"]["bits_per_weight"],
        quantize_seconds=record.get("seconds"),
        quantize_peak_memory_bytes=record.get("peak_memory_bytes"),
        evaluate_seconds=seconds,
        speed=[],
    )
