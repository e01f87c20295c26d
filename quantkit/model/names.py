"""What a tensor of an unknown architecture is, told from its name, shape and config: what a wildcard must not take."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

__all__ = ["Special", "experts_of", "fused_with", "is_outside", "specials", "target", "template"]

Shape = tuple[int, ...]


class Special(str, Enum):
    """What is not an ordinary linear of a layer, though it is a matrix."""

    EMBEDDING = "embedding"
    HEAD = "head"
    ROUTER = "router"
    GATE = "gate with one output"
    MTP = "multi-token prediction"


_HEADS = {"lm_head", "embed_out", "unembed", "unembedding"}
_OUTSIDE_HEADS = {"output_layer", "score", "classifier", "head"}  # names that a linear of a layer may have too
_EMBEDDINGS = {"wte", "wpe", "tok_embeddings", "word_embeddings", "position_embeddings"}
_ROUTERS = {"gate", "router", "wg"}
_LAYER = re.compile(r"(?:(?:model|language_model|text_model|transformer|decoder)\.)*(?:layers|h|blocks)\.(\d+)\.")
_IN_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.\d+\.")
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# What engines join into one product; a joined weight has one scheme. The last two rows are gated delta-nets'.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
_JOINED = {name: names for names in _FUSED for name in names}


def _stated(config: Mapping[str, Any], *names: str) -> Iterator[int]:
    """The whole numbers that a config, or a part of it (`text_config`), gives under these names."""
    for key, value in config.items():
        if key in names and isinstance(value, int):
            yield value
        elif isinstance(value, Mapping):
            yield from _stated(value, *names)


def _layers(config: Mapping[str, Any]) -> int | None:
    """How many layers the language model has: of its own part of the config, not of a tower of images or sound."""
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    for part in (config, *(config.get(name) for name in ("text_config", "language_config", "llm_config"))):
        if isinstance(part, Mapping) and (counts := [int(part[name]) for name in names if isinstance(part.get(name), int)]):
            return max(counts)
    return max(_stated(config, *names), default=None)


def specials(key: str, shape: Shape, config: Mapping[str, Any]) -> dict[str, Special]:
    """The parts of a matrix's name that say it is special, and what they say; empty for an ordinary linear."""
    parts, special_parts = key.split("."), dict[str, Special]()
    last = parts[-1]
    wide = shape[0] in set(_stated(config, "vocab_size", "padded_vocab_size"))
    outside = _IN_LAYER.search(key) is None  # within a layer a width may be the same number by chance
    if last in _HEADS or key == "output" or (last in _OUTSIDE_HEADS and (outside or wide)):
        special_parts[last] = Special.HEAD
    elif last in _EMBEDDINGS or "embed" in last or (wide and outside):
        special_parts[last] = Special.EMBEDDING
    if router := next((part for part in reversed(parts) if part in _ROUTERS or "router" in part), None):
        special_parts[router] = Special.ROUTER
    if 1 in shape:
        special_parts[last] = Special.GATE
    if own := next((part for part in parts if part.startswith(("mtp", "nextn")) or part == "eh_proj"), None):
        special_parts[own] = Special.MTP
    if (count := _layers(config)) and (match := _LAYER.match(key)) and int(match[1]) >= count:
        special_parts[match[1]] = Special.MTP
    return special_parts


def is_outside(special_parts: Mapping[str, Special]) -> bool:
    """Whether a matrix lies outside the layers: an embedding or a head."""
    return any(special in (Special.EMBEDDING, Special.HEAD) for special in special_parts.values())


def fused_with(key: str) -> tuple[str, ...]:
    """Itself and what engines join with it, by name; they need not all be there."""
    parent, dot, last = key.rpartition(".")
    return tuple(f"{parent}{dot}{name}" for name in _JOINED.get(last, (last,)))


def experts_of(key: str) -> str | None:
    """What the experts of its layer have in common, for a routed expert's linear."""
    match = _EXPERT.match(key)
    return match[1] if match else None


def template(key: str) -> str:
    """A glob for the tensors that differ from this one in layer or expert only."""
    return _NUMBER.sub("*", key)


def target(name: str) -> str:
    """What patterns and rules call a tensor."""
    return name.removesuffix(".weight")
