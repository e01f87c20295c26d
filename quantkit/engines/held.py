"""How an engine holds a model: which linears it fuses into one weight, and how devices share that weight.

vLLM and SGLang agree on this (sources: their models' packed_modules_mapping, linear.py and the fused-MoE loaders); where
they differ the tables in `vllm.py` and `sglang.py` say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from quantkit.model.spec import Layer, Linear, ModelSpec, MoE, Role
from quantkit.scheme import Scheme

__all__ = ["CPUS", "EXPERT_PARTS", "FUSED", "Deployment", "Held", "Split", "hold"]


class Split(str, Enum):
    """How tensor parallelism cuts a weight [out, in]: by output rows, by input columns, or not at all."""

    COLUMN = "column"
    ROW = "row"
    WHOLE = "whole"


_SPLITS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj"), Split.COLUMN),
    **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), Split.COLUMN),
    **dict.fromkeys(("o_proj", "down_proj", "w2"), Split.ROW),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), Split.WHOLE),
}
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
CPUS = ("cpu", "amx", "zen")
EXPERT_PARTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "w1": "w1", "w3": "w3", "w2": "w2"}


@dataclass(frozen=True)
class Deployment:
    """How a model would be served. ep: each device holds whole experts.

    hardware: gpu (recent enough for anything), smNN (an NVIDIA GPU of compute capability N.N), cpu (x86 without AMX), amx
    (x86 with AMX tiles), or zen (AMD with zentorch). eager: without compilation. kv_cache: auto (what the checkpoint says)
    or fp8.
    """

    tp: int = 1
    ep: bool = False
    pp: int = 1
    hardware: str = "gpu"
    eager: bool = False
    kv_cache: str = "auto"

    @property
    def on_gpu(self) -> bool:
        return self.hardware not in CPUS

    @property
    def capability(self) -> int:
        """Compute capability times ten; very large for an unnamed GPU, 0 for none."""
        if not self.on_gpu:
            return 0
        return int(self.hardware[2:]) if self.hardware.startswith("sm") else 10_000


@dataclass(frozen=True)
class Held:
    """One weight of one layer as an engine allocates it. linears: its parts (of experts: the first one's).

    parts: output rows of each on a device; inputs: input columns on a device. None where the devices do not divide it.
    """

    layer: int
    role: Role
    name: str
    prefix: str
    linears: tuple[Linear, ...]
    scheme: Scheme | None
    split: Split
    ways: int
    parts: tuple[int | None, ...]
    inputs: int | None

    @property
    def out_features(self) -> int:
        return sum(ref.out_features for ref in self.linears)

    @property
    def in_features(self) -> int:
        return self.linears[0].in_features


def hold(
    spec: ModelSpec, config: Mapping[str, Any], schemes: Mapping[str, Scheme | None], deployment: Deployment
) -> tuple[Held, ...]:
    """Every weight that an engine makes of the model's linears. config: config.json, for the head counts."""
    return tuple(weight for layer in spec.layers for weight in _layer(layer, config, schemes, deployment))


def _layer(
    layer: Layer, config: Mapping[str, Any], schemes: Mapping[str, Scheme | None], deployment: Deployment
) -> Iterator[Held]:
    first = set(layer.mlp.experts[0].linears()) if isinstance(layer.mlp, MoE) else set()
    groups: dict[tuple[str, str], list[Linear]] = {}
    for ref in layer.linears():
        if ref.role is Role.EXPERTS and ref not in first:
            continue
        prefix, _, last = ref.key.rpartition(".")
        if ref.role is Role.EXPERTS:
            name = "w2" if EXPERT_PARTS[last] == "w2" else "w13"
        else:
            name = next((fused for fused, parts in FUSED.items() if last in parts), last)
        groups.setdefault((prefix, name), []).append(ref)
    for (prefix, name), refs in groups.items():
        if len(refs) == 1 and name in FUSED:  # a cross layer has q_proj alone
            name = refs[0].key.rpartition(".")[2]
        split = _SPLITS[refs[0].key.rpartition(".")[2]]
        ways = 1 if split is Split.WHOLE or (deployment.ep and refs[0].role is Role.EXPERTS) else deployment.tp
        yield Held(
            layer=layer.index,
            role=refs[0].role,
            name=name,
            prefix=prefix,
            linears=tuple(refs),
            scheme=schemes[refs[0].key],
            split=split,
            ways=ways,
            parts=tuple(_rows(ref, config, split, ways) for ref in refs),
            inputs=_divided(refs[0].in_features, ways) if split is Split.ROW else refs[0].in_features,
        )


def _rows(ref: Linear, config: Mapping[str, Any], split: Split, ways: int) -> int | None:
    """Output rows on one device; key and value heads are repeated where there are fewer of them than devices."""
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads")
    if split is not Split.COLUMN:
        return ref.out_features
    if ref.key.endswith((".k_proj", ".v_proj")) and isinstance(heads, int) and heads < ways:
        return ref.out_features // heads if ways % heads == 0 else None
    return _divided(ref.out_features, ways)


def _divided(size: int, ways: int) -> int | None:
    return None if size % ways else size // ways
