"""Calibration: one layer over all tokens, stage by stage, one expert at a time, through what is already quantised.

Every stage does the same: gather statistics of the input that the quantised model so far really produces, have the
linears that read it quantised, run them in quantised form (activations rounded too) to get the next stage's input. The
hidden states live on a tape on disk, so memory is bounded by one expert and one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.calib.tape import Tape
from quantkit.model.attention import Tensors, attention_core, keep, latent, query, query_input, raw_kv
from quantkit.model.blocks import rms_norm, rope_tables, route
from quantkit.model.cache import Kept
from quantkit.model.spec import MLA, MLP, Layer, Linear, ModelSpec, MoE
from quantkit.stats import LinearStats

__all__ = ["Apply", "Walk", "embed", "walk_layer"]

Apply = Callable[[Tensor], Tensor]
_BATCH_TOKENS = 4096
# An expert with fewer tokens than input features has a singular Hessian. It is lent the tokens that came nearest to being
# routed to it, until it has as many as gate and up have inputs; down, which may have more, gets the same. A lent token
# counts a quarter, so that real ones decide where there are any.
LENT_WEIGHT = 0.25


@dataclass(frozen=True)
class Walk:
    """What a walk needs. quantise: (linears that read one input, its statistics) -> how to apply each.

    wants: whether these linears need no statistics, amax only, or a Hessian: None, False, True.
    """

    spec: ModelSpec
    weights: Tensors
    windows: tuple[int, int]
    device: torch.device
    scratch: Path
    quantise: Callable[[Sequence[Linear], LinearStats | None], list[Apply]]
    wants: Callable[[Sequence[Linear]], bool | None]

    def tape(self, name: str, width: int) -> Tape:
        return Tape.create(self.scratch / f"{name}.f32", self.windows[0] * self.windows[1], width)

    def stats(self, refs: Sequence[Linear]) -> LinearStats | None:
        wanted = self.wants(refs)
        return None if wanted is None else LinearStats.empty(refs[0].in_features, self.device, wanted)

    def spans(self, rows: int) -> Iterator[tuple[int, int]]:
        """Batches of whole windows over the rows of a tape."""
        step = max(1, _BATCH_TOKENS // self.windows[1]) * self.windows[1]
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def norm(self, key: str, h: Tensor) -> Tensor:
        return rms_norm(h.to(self.device), self.weights.tensor(key).to(self.device), self.spec.eps)


def embed(walk: Walk, ids: Tensor, tape: Tape) -> None:
    """Fill the first tape with the embeddings of int64 ids [windows, seq_len]."""
    table = walk.weights.tensor(walk.spec.embedding)
    flat = ids.flatten()
    for start, stop in walk.spans(len(flat)):
        tape.write(start, table[flat[start:stop]].float())


def walk_layer(walk: Walk, layer: Layer, source: Tape, target: Tape, kv: Tape) -> None:
    """Quantise one layer and carry the hidden states from `source` to `target` (they may be the same tape).

    kv: raw K and V, [tokens, kv_width]: written by the layer that owns them, read by those that borrow.
    """
    _attention(walk, layer, source, target, kv)
    if isinstance(layer.mlp, MoE):
        _moe(walk, layer, layer.mlp, target)
    else:
        inputs = walk.tape("mlp_in", walk.spec.hidden)
        for start, stop in walk.spans(target.shape[0]):
            inputs.write(start, walk.norm(layer.post_attention_norm, target.read(start, stop)))
        _mlp(walk, layer.mlp, _Rows.all(inputs), target)
        inputs.remove()


class _Stages:
    """The linears of one layer's attention, quantised in groups that read one input; `linear` applies them after that."""

    def __init__(self, walk: Walk, rows: int) -> None:
        self.walk, self.rows = walk, rows
        self.run: dict[Linear, Apply] = {}

    def quantise(self, refs: Sequence[Linear], inputs: Callable[[int, int], Tensor]) -> None:
        """inputs: (start, stop) -> the rows of their input, [stop - start, in_features]."""
        stats = self.walk.stats(refs)
        if stats is not None:
            for span in self.walk.spans(self.rows):
                stats.add(inputs(*span).to(self.walk.device))
        self.run.update(zip(refs, self.walk.quantise(refs, stats), strict=True))

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        return self.run[ref](x)


def _attention(walk: Walk, layer: Layer, source: Tape, target: Tape, kv: Tape) -> None:
    a, rows, weights = layer.attention, source.shape[0], walk.weights
    stages = _Stages(walk, rows)

    def inputs(start: int, stop: int) -> Tensor:
        return walk.norm(layer.input_norm, source.read(start, stop))

    def windows(x: Tensor) -> Tensor:
        cut: Tensor = x.to(walk.device).unflatten(0, (-1, walk.windows[1]))
        return cut

    first, *_ = a.same_input()
    stages.quantise(first, inputs)
    for span in walk.spans(rows):
        raw = raw_kv(a, inputs(*span), stages.linear)
        if raw is not None:
            kv.write(span[0], raw)
    if isinstance(a, MLA):
        if a.q not in first:
            stages.quantise([a.q], lambda *span: query_input(a, inputs(*span), stages.linear, weights))
        stages.quantise([a.kv_b], lambda *span: latent(a, kv.read(*span).to(walk.device), weights))
    core = walk.tape("attention", a.o.in_features)
    tables = rope_tables(walk.spec.rope, torch.arange(walk.windows[1], device=walk.device))
    for start, stop in walk.spans(rows):
        key, value = keep(a, windows(kv.read(start, stop)), tables, weights, walk.spec.eps)
        q = query(a, windows(inputs(start, stop)), stages.linear, tables, weights, walk.spec.eps)
        core.write(start, attention_core(a, q, (Kept(key), Kept(value)), stages.linear).flatten(0, 1))
    stages.quantise([a.o], core.read)
    for start, stop in walk.spans(rows):
        target.write(start, source.read(start, stop) + stages.linear(a.o, core.read(start, stop).to(walk.device)).cpu())
    core.remove()


@dataclass(frozen=True)
class _Rows:
    """The tokens of one MLP: rows of the tape of inputs, their router weights, and the rows that are lent to it."""

    inputs: Tape
    rows: Tensor
    weights: Tensor | None
    lent: Tensor

    @classmethod
    def all(cls, inputs: Tape) -> _Rows:
        return cls(inputs, torch.arange(inputs.shape[0]), None, torch.empty(0, dtype=torch.int64))

    def batches(self, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.rows), _BATCH_TOKENS):
            part = slice(start, start + _BATCH_TOKENS)
            yield part, self.inputs.gather(self.rows[part]).to(device)

    def lent_batches(self, device: torch.device) -> Iterator[Tensor]:
        for part in self.lent.split(_BATCH_TOKENS):
            yield self.inputs.gather(part).to(device)


def _mlp(walk: Walk, mlp: MLP, tokens: _Rows, target: Tape) -> None:
    """Quantise one MLP on its tokens and add its (weighted) output to the tape."""

    def statistics(refs: Sequence[Linear], transform: Apply) -> LinearStats | None:
        stats = walk.stats(refs)
        if stats is not None:
            for _, x in tokens.batches(walk.device):
                stats.add(transform(x))
            for x in tokens.lent_batches(walk.device):
                stats.lend(transform(x), LENT_WEIGHT)
        return stats

    gate, up = walk.quantise([mlp.gate, mlp.up], statistics([mlp.gate, mlp.up], lambda x: x))

    def inner(x: Tensor) -> Tensor:
        return F.silu(gate(x)) * up(x)

    (down,) = walk.quantise([mlp.down], statistics([mlp.down], inner))
    for part, x in tokens.batches(walk.device):
        y = down(inner(x))
        if tokens.weights is not None:
            y = y * tokens.weights[part, None].to(walk.device)
        target.add(tokens.rows[part], y)


def _moe(walk: Walk, layer: Layer, moe: MoE, target: Tape) -> None:
    """Route all tokens once, nothing dropped; then the shared expert on all of them and each expert on its own."""
    inputs = walk.tape("moe_in", walk.spec.hidden)
    table = walk.weights.tensor(moe.router.weight).to(walk.device)
    experts, weights, logits = [], [], []
    for start, stop in walk.spans(target.shape[0]):
        x = walk.norm(layer.post_attention_norm, target.read(start, stop))
        inputs.write(start, x)
        routing = route(x, moe.router, table)
        experts.append(routing.experts.cpu())
        weights.append(routing.weights.cpu())
        logits.append(routing.logits.log_softmax(-1).cpu())
    chosen, weight, closeness = torch.cat(experts), torch.cat(weights), torch.cat(logits)
    if moe.shared:
        _mlp(walk, moe.shared, _Rows.all(inputs), target)
    for index, expert in enumerate(moe.experts):
        rows, slot = (chosen == index).nonzero(as_tuple=True)
        lent = _lent(closeness[:, index], rows, expert.gate.in_features)
        _mlp(walk, expert, _Rows(inputs, rows, weight[rows, slot], lent), target)
    inputs.remove()


def _lent(closeness: Tensor, routed: Tensor, wanted: int) -> Tensor:
    """Rows not routed to an expert whose router probability for it is highest, as many as it lacks of `wanted`."""
    lacking = min(max(0, wanted - len(routed)), len(closeness) - len(routed))
    others = closeness.clone()
    others[routed] = -torch.inf
    return others.topk(lacking).indices.sort().values
