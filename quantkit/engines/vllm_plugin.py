"""vLLM's way to Hunyuan-Large: the entry point that vLLM calls in each of its processes, and what its loader needs to
know of names. The model itself is `vllm_hunyuan`, which vLLM imports when a checkpoint asks for it.

vLLM 0.32 pins older versions of transformers and compressed-tensors than quantkit uses elsewhere, so nothing is imported
from quantkit here but the model as data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.model.spec import GQA, MLP, ModelSpec

__all__ = ["ARCHITECTURE", "PACKED", "RENAMED", "kv_target", "register", "stacked", "with_idle_expert"]

ARCHITECTURE = "HunYuanForCausalLM"
# Which linears of the checkpoint vLLM holds as one. A scheme or an ignored name must hold for all of them.
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
RENAMED = {".mlp.gate.wg.": ".mlp.gate."}


def stacked(spec: ModelSpec) -> dict[str, tuple[str, str | int]]:
    """Start of a tensor's name in the checkpoint -> start of its name in vLLM, and which part of that it is.

    A cross layer has no key and no value to stack its query on; experts are stacked by vLLM's own loader.
    """
    names: dict[str, tuple[str, str | int]] = {}

    def stack(keys: list[tuple[str, str | int]], together: str) -> None:
        for key, part in keys:
            names[f"{key}."] = f"{key.rpartition('.')[0]}.{together}.", part

    for layer in spec.layers:
        a = layer.attention
        if isinstance(a, GQA) and a.k and a.v:
            stack([(a.q.key, "q"), (a.k.key, "k"), (a.v.key, "v")], "qkv_proj")
        mlp = layer.mlp if isinstance(layer.mlp, MLP) else layer.mlp.shared
        if mlp:
            stack([(mlp.gate.key, 0), (mlp.up.key, 1)], "gate_up_proj")
    return names


def kv_target(spec: ModelSpec, index: int, prefix: str) -> str | None:
    """vLLM's name of the attention whose cache layer `index` reads; None if it fills one of its own.

    prefix: of all layers, such as "model.layers".
    """
    owner = spec.layers[index].attention.kv_from
    return None if owner == index else f"{prefix}.{owner}.self_attn.attn"


def with_idle_expert(logits: Tensor) -> Tensor:
    """float32 [tokens, experts] for top-1 -> [tokens, experts + 1] for top-2 with the same result, if the expert that is
    added gives zero: it takes what the best one leaves of the probability, and the others keep none.

    For AMD's zentorch, whose kernels need two experts at work and get one when one token is routed to one.
    """
    best, chosen = logits.softmax(-1).max(-1, keepdim=True)
    alone = torch.full_like(logits, -torch.inf).scatter(-1, chosen, best.log())
    return torch.cat([alone, (1 - best).clamp(min=1e-30).log()], dim=-1)


def register() -> None:
    """Called by vLLM through the entry point group `vllm.general_plugins`, more than once in a process if it likes."""
    from vllm import ModelRegistry

    from quantkit.engines.hunyuan_config import register_config

    register_config()
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"quantkit.engines.vllm_hunyuan:{ARCHITECTURE}")
