"""`evaluate`: a quantised model beside its baseline on held-out text, layer by layer and token by token."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.calib import tokens
from quantkit.errors import ConfigError
from quantkit.evals.divergence import (
    TokenScores,
    bootstrap,
    chunks,
    relative_error,
    same_choices,
    score,
    summary,
)
from quantkit.formats.folder import find_model
from quantkit.runtime import Model

__all__ = ["evaluate"]

_BATCH_TOKENS = 8192


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

    text: a file or named corpus (see `calib.tokens.documents`); its documents are cut into windows of `seq_len` tokens,
    at most `windows` of them. Both models run in float32, activations rounded as their schemes say. progress is called
    with (windows done, windows in all). Raises QuantkitError.
    """
    begun = time.monotonic()
    place = torch.device(device)
    models = [Model(find_model(path), place, hold=False) for path in (baseline, quantized)]
    _check_pair(models)
    tokenizer = tokens.load_tokenizer(models[0].folder)
    data = tokens.evaluation_set(tokenizer, tokens.documents(text, models[0].folder), seq_len, windows, text)
    step = max(1, _BATCH_TOKENS // data.ids.shape[1])
    parts, layers = [], _LayerErrors(len(models[0].spec.layers))
    for start in range(0, len(data.ids), step):
        rows = slice(start, start + step)
        parts.append(_batch(models, data.ids[rows], data.lengths[rows], data.unit[rows], layers))
        if progress:
            progress(min(start + step, len(data.ids)), len(data.ids))
    scores = TokenScores(*(np.concatenate([part[i] for part in parts]) for i in range(6)))
    return {
        **summary(scores),
        "ci95": bootstrap(scores),
        "layers": layers.rows(),
        "tokens": len(scores.kl),
        "windows": len(data.ids),
        "seq_len": seq_len,
        "bootstrap_unit": data.unit_name,
        "units": len(np.unique(scores.unit)),
        "text": text,
        "text_digest": tokens.digest(data.ids),
        "baseline": str(baseline),
        "quantized": str(quantized),
        "seconds": round(time.monotonic() - begun, 2),
    }


def _check_pair(models: list[Model]) -> None:
    base, quant = (model.spec for model in models)
    if base != quant:
        raise ConfigError(
            f"{models[0].folder} and {models[1].folder} are not the same model: their architecture or sizes differ",
            "give the BF16 model that the checkpoint was made from as --baseline",
        )


class _LayerErrors:
    """Sums over batches, by layer: error of the hidden state after it, and unchanged router choices."""

    def __init__(self, layers: int) -> None:
        self.lost, self.total = np.zeros(layers), np.zeros(layers)
        self.same, self.routed = np.zeros(layers), np.zeros(layers)

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "layer": i,
                "hidden_error": self.lost[i] / self.total[i] if self.total[i] else 0.0,
                "router_agreement": self.same[i] / self.routed[i] if self.routed[i] else None,
            }
            for i in range(len(self.lost))
        ]


@torch.inference_mode()
def _batch(
    models: list[Model], ids: Tensor, lengths: Tensor, unit: Tensor, layers: _LayerErrors
) -> list[np.ndarray[Any, Any]]:
    """The six arrays of TokenScores for some windows. Position t is scored if token t + 1 exists."""
    scored = (torch.arange(ids.shape[1])[None, :] < lengths[:, None] - 1).flatten()
    agreements, hidden = [], []
    for base, quant in zip(*(model.layers(ids) for model in models), strict=True):
        hidden = [trace.hidden.flatten(0, 1)[scored] for trace in (base, quant)]
        lost, total = relative_error(*hidden)
        layers.lost[base.index] += lost
        layers.total[base.index] += total
        if base.routing is not None and quant.routing is not None:
            same = same_choices(base.routing.experts[scored], quant.routing.experts[scored])
            agreements.append(same)
            layers.same[base.index] += float(same.sum())
            layers.routed[base.index] += len(same)
    targets = ids.roll(-1, dims=1).flatten()[scored]
    columns: list[list[Tensor]] = [[], [], [], []]
    for part in chunks(len(targets), models[0].spec.vocab):
        base_logits, quant_logits = (model.head(h[part]) for model, h in zip(models, hidden, strict=True))
        scored_part = score(base_logits, quant_logits, targets[part].to(base_logits.device))
        for column, values in zip(columns, scored_part, strict=True):
            column.append(values.cpu())
    router = torch.stack(agreements).mean(0).cpu() if agreements else torch.ones(len(targets), dtype=torch.float64)
    units = unit[:, None].expand(ids.shape).flatten()[scored]
    return [*(torch.cat(column).numpy() for column in columns), router.numpy(), units.numpy()]
