"""The bundled model is what its card says: architecture, size, perplexity on text it has not seen, no dead expert."""

from __future__ import annotations

import json
import math

import torch

import quantkit
from quantkit.calib.documents import read_documents
from quantkit.calib.tokenizer import load_text_tokenizer
from quantkit.calib.tokens import evaluation_set
from quantkit.checkpoint.inspect import inspect
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.model.spec import MoE
from tests.helpers.paths import ROOT

MODEL = ROOT / "examples" / "tiny-hunyuan"


def test_architecture_and_size() -> None:
    assert sum(p.stat().st_size for p in MODEL.iterdir()) <= 24_000_000
    spec, reader = quantkit.load(MODEL).spec, CheckpointReader(MODEL)
    assert all(entry.dtype == "BF16" for entry in reader.entries.values())
    for ref in spec.linears():
        assert ref.out_features % 128 == ref.in_features % 128 == 0, ref.key
    assert spec.head is None and [layer.attention.kv_from for layer in spec.layers] == [0, 0, 2, 2]
    for layer in spec.layers:
        assert isinstance(layer.mlp, MoE) and layer.attention.q_norm and layer.attention.k_norm
        assert len(layer.mlp.experts) == 16 and layer.mlp.router.top_k == 1 and layer.mlp.shared


def test_card_states_what_training_recorded() -> None:
    record = json.loads((MODEL / "training.json").read_text())
    card = (MODEL / "README.md").read_text()
    figures = [record["parameters"], record["tokens_seen"], record["steps"], *record["held_out_perplexity"].values()]
    assert all(f"{figure:,}" in card for figure in figures)
    assert record["parameters"] == inspect(MODEL)["total"]["weights"]
    assert min(record["router_share_min"]) > 0.01


def test_perplexity_and_router_balance_on_held_out_text() -> None:
    model, record = quantkit.load(MODEL), json.loads((MODEL / "training.json").read_text())
    data = evaluation_set(load_text_tokenizer(MODEL), read_documents("stdlib-held-out"), seq_len=512, max_windows=32)
    counts = torch.zeros(4, 16)
    hidden = torch.empty(0)
    with torch.inference_mode():
        for trace in model.layers(data.ids):
            hidden = trace.hidden
            assert trace.routing is not None
            counts[trace.index] += torch.bincount(trace.routing.experts.flatten(), minlength=16)
        logits = torch.cat([model.head(part) for part in hidden[:, :-1].split(8)])
    targets = data.ids[:, 1:].clone()
    targets[torch.arange(511)[None, :] >= data.lengths[:, None] - 1] = -100
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    # The first windows of 32 modules are mostly docstrings and imports: other text than the whole held-out set.
    assert 0.5 < math.exp(loss) / record["held_out_perplexity"]["python"] < 2
    assert (counts / counts.sum(1, keepdim=True)).min() > 0.002
