"""Which windows of a text leave no expert short: the BF16 model routes more windows than are wanted, and a greedy choice
takes those that give the most to experts that lack tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from quantkit.calib.lockstep import Lockstep, Observer, Pair, Track
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.model.spec import Layer, ModelSpec, MoE
from quantkit.model.weights import PlainWeights

__all__ = ["POOL", "chosen_windows", "lacking", "needed", "routed_tokens"]

POOL = 4  # times as many windows as are wanted pass the model
_WANTED = 2  # tokens for each input of an expert's widest linear


class _Routed(Observer):
    """counts: int32 [windows, all experts of all layers], tokens by window."""

    def __init__(self, spec: ModelSpec, weights: PlainWeights, ids: Tensor) -> None:
        self.spec, self.weights, self.ids = spec, weights, ids
        self._counts: list[Tensor] = []

    def prepare(self, lockstep: Lockstep) -> None:
        self._track = Track(lockstep.stream(self.weights, self.ids), self.ids)
        self.tracks = [self._track]

    def routed(self, layer: Layer) -> None:
        routing = self._track.stream.routing
        if routing is None or not isinstance(layer.mlp, MoE):
            return
        windows, experts = len(self.ids), len(layer.mlp.experts)
        counts = torch.zeros(windows, experts, dtype=torch.int32)
        by_window = routing.experts.view(windows, -1)
        self._counts.append(counts.scatter_add_(1, by_window, torch.ones_like(by_window, dtype=torch.int32)))

    @property
    def counts(self) -> Tensor:
        return torch.cat(self._counts, dim=1)


@torch.inference_mode()
def routed_tokens(
    reader: CheckpointReader,
    spec: ModelSpec,
    ids: Tensor,
    device: torch.device,
    scratch: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """How many tokens of each window of int64 ids [windows, length] the BF16 model sends to each expert, int32 [windows,
    experts of all layers in order]: one reading of the weights. progress: (layers done, in all)."""
    read: dict[str, Tensor] = {}

    def tensor(key: str) -> Tensor:
        if key not in read:
            read[key] = reader.tensor(key)
        return read[key].to(device)

    weights = PlainWeights(tensor)
    schemes: Mapping[str, None] = dict.fromkeys((ref.key for ref in spec.linears()), None)
    observer = _Routed(spec, weights, ids)
    loop = Lockstep(Pair(spec, weights, weights, schemes, device, read.clear), scratch, [observer])
    loop.embed()
    for layers in spec.groups():
        loop.run(layers)
        progress(layers[-1].index + 1, len(spec.layers))
    return observer.counts


def needed(spec: ModelSpec) -> Tensor:
    """int64 [experts of all layers]: two tokens for each input of an expert's widest linear."""
    wide = [_WANTED * max(ref.in_features for ref in e.linears()) for moe in spec.moes() for e in moe.experts]
    return torch.tensor(wide)


def lacking(counts: Tensor, need: Tensor) -> int:
    """Of how many experts these windows, [windows, experts], hold fewer tokens than they need."""
    return int((counts.sum(0) < need).sum())


def chosen_windows(counts: Tensor, samples: int, need: Tensor) -> Tensor:
    """int64 [samples], sorted: windows of counts int32 [windows, experts], one by one that which gives the most, as a share
    of what each needs, to experts that lack tokens still; when that is none, the first that are left."""
    missing, left = need.double().clone(), counts.double()
    picked = torch.zeros(len(counts), dtype=torch.bool)
    for _ in range(samples):
        gain = (torch.minimum(left, missing.clamp(min=0)) / need).sum(1)
        best = int(gain.masked_fill(picked, -1.0).argmax())
        picked[best] = True
        missing -= left[best]
    return picked.nonzero().flatten()
