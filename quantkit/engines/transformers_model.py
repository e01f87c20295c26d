"""Hunyuan-Large for transformers: after `register()`, AutoModelForCausalLM loads its checkpoints, quantized ones too.

The modules bear the names of the checkpoint and every matrix is an nn.Linear, so transformers' compressed-tensors loader
finds each where it expects it. The mathematics is `quantkit.model`'s; the cache holds one key and one value for each group
of layers that share them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from quantkit.engines.hunyuan_config import HunyuanLargeConfig, register_config
from quantkit.model.blocks import apply_rope, rms_norm, rope_tables, route
from quantkit.model.spec import GQA, MLP, Layer, Linear, ModelSpec, MoE

__all__ = ["HunYuanForCausalLM", "HunyuanModel", "register"]

KV = tuple[Tensor, Tensor]
# transformers 5.24 calls `cache` what was `past_key_values`, in its outputs and in what it asks of a model.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def _one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """That which is given under either name. Raises TypeError for two."""
    if past_key_values is not None and cache is not None and cache is not past_key_values:
        raise TypeError("past_key_values and cache are two names of one thing, and two were given")
    return past_key_values if cache is None else cache


def _refuse(others: dict[str, Any]) -> None:
    """Raise TypeError for what the model does not compute: a state that came under a name it does not know would be lost."""
    unsupported = [
        name for name, value in others.items() if value is not None and value is not False and name != "return_dict"
    ]
    if unsupported:
        raise TypeError(f"Hunyuan-Large takes no {', '.join(sorted(unsupported))}")


def _linear(ref: Linear) -> nn.Linear:
    return nn.Linear(ref.in_features, ref.out_features, bias=False)


class HunyuanNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class HunyuanAttention(nn.Module):
    """See `quantkit.model.attention`: a kept key has no weight, each layer's query has that of its own key norm."""

    is_causal = True

    def __init__(self, a: GQA, eps: float, slot: int) -> None:
        super().__init__()
        self.q_proj, self.o_proj = _linear(a.q), _linear(a.o)
        self.shares = a.k is None or a.v is None
        if a.k and a.v:
            self.k_proj, self.v_proj = _linear(a.k), _linear(a.v)
        self.normed, self.eps = a.q_norm is not None, eps
        if self.normed:
            self.query_layernorm, self.key_layernorm = HunyuanNorm(a.head_dim, eps), HunyuanNorm(a.head_dim, eps)
        self.head_dim, self.slot, self.num_key_value_groups = a.head_dim, slot, a.heads // a.kv_heads

    def forward(
        self, x: Tensor, tables: KV, mask: Tensor | None, cache: Cache | None, shared: KV | None
    ) -> tuple[Tensor, KV]:
        """x [batch, time, hidden] -> the same, and the key and value that it attended to. shared: those of its group."""
        q = apply_rope(self._heads(self.q_proj(x)), *tables)
        if self.normed:
            q = self.query_layernorm(q) * self.key_layernorm.weight.to(q.dtype)
        if not self.shares:
            shared = self._kv(x, tables, cache)
        assert shared
        out, _ = sdpa_attention_forward(self, q, *shared, mask, scaling=self.head_dim**-0.5)
        return self.o_proj(out.flatten(2)), shared

    def _kv(self, x: Tensor, tables: KV, cache: Cache | None) -> KV:
        k, v = apply_rope(self._heads(self.k_proj(x)), *tables), self._heads(self.v_proj(x))
        k = rms_norm(k, None, self.eps) if self.normed else k
        return cache.update(k, v, self.slot) if cache is not None else (k, v)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class HunyuanMLP(nn.Module):
    def __init__(self, spec: MLP) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = map(_linear, spec.linears())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class HunyuanGate(nn.Module):
    def __init__(self, spec: MoE) -> None:
        super().__init__()
        self.wg = _linear(spec.router)


class HunyuanMoE(nn.Module):
    """Experts are given [1, tokens, hidden]: what compressed-tensors scales "per token" is each index of two dimensions."""

    def __init__(self, spec: MoE) -> None:
        super().__init__()
        self.spec, self.gate = spec, HunyuanGate(spec)
        self.experts = nn.ModuleList(HunyuanMLP(expert) for expert in spec.experts)
        self.shared_mlp = HunyuanMLP(spec.shared) if spec.shared else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)[None]
        routing = route(flat[0], self.spec.router, self.gate.wg.weight)
        out = self.shared_mlp(flat) if self.shared_mlp is not None else torch.zeros_like(flat)
        for index in routing.experts.unique().tolist():
            token, slot = (routing.experts == index).nonzero(as_tuple=True)
            part = self.experts[index](flat[:, token]) * routing.weights[token, slot, None].to(flat.dtype)
            out = out.index_add(1, token, part)
        return out.view_as(x)


class HunyuanLayer(nn.Module):
    def __init__(self, spec: ModelSpec, layer: Layer, slot: int) -> None:
        super().__init__()
        assert isinstance(layer.attention, GQA)
        self.self_attn = HunyuanAttention(layer.attention, spec.eps, slot)
        self.mlp = HunyuanMoE(layer.mlp) if isinstance(layer.mlp, MoE) else HunyuanMLP(layer.mlp)
        self.input_layernorm = HunyuanNorm(spec.hidden, spec.eps)
        self.post_attention_layernorm = HunyuanNorm(spec.hidden, spec.eps)

    def forward(
        self, x: Tensor, tables: KV, mask: Tensor | None, cache: Cache | None, shared: KV | None
    ) -> tuple[Tensor, KV]:
        attended, shared = self.self_attn(self.input_layernorm(x), tables, mask, cache, shared)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), shared


class HunyuanPreTrainedModel(PreTrainedModel):
    config_class = HunyuanLargeConfig
    base_model_prefix = "model"
    _no_split_modules = ["HunyuanLayer"]
    _supports_sdpa = True


class HunyuanModel(HunyuanPreTrainedModel):
    def __init__(self, config: HunyuanLargeConfig) -> None:
        super().__init__(config)
        self.spec = spec = config.spec()
        self.embed_tokens = nn.Embedding(spec.vocab, spec.hidden)
        slots = {layer.attention.kv_from: i for i, layer in enumerate(group[0] for group in spec.groups())}
        self.layers = nn.ModuleList(HunyuanLayer(spec, layer, slots[layer.attention.kv_from]) for layer in spec.layers)
        self.norm = HunyuanNorm(spec.hidden, spec.eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """Raises TypeError for what it does not compute. past_key_values and cache: names of one thing."""
        _refuse(others)
        kv_cache = _one_cache(past_key_values, cache)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if kv_cache is None and use_cache:
            kv_cache = DynamicCache(config=self.config)
        if position_ids is None:
            past = kv_cache.get_seq_length() if kv_cache is not None else 0
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        mask_inputs = {"attention_mask": attention_mask, "position_ids": position_ids, CACHE: kv_cache}
        mask = create_causal_mask(config=self.config, inputs_embeds=x, **mask_inputs)
        cos, sin = rope_tables(self.spec.rope, position_ids)
        shared: KV | None = None
        for layer in self.layers:
            x, shared = layer(x, (cos[:, None], sin[:, None]), mask, kv_cache, shared)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), **{CACHE: kv_cache})


class HunYuanForCausalLM(HunyuanPreTrainedModel, GenerationMixin):
    """Named as `architectures` in config.json names it."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HunyuanLargeConfig) -> None:
        super().__init__(config)
        self.model = HunyuanModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        cache: Cache | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """logits_to_keep: only of the last so many positions; 0 for all. Otherwise as HunyuanModel's."""
        inputs = input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cache
        outputs = self.model(*inputs, **others)
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, **{CACHE: getattr(outputs, CACHE)})


def register() -> None:
    """AutoConfig and AutoModelForCausalLM know Hunyuan-Large in this process. May be called again."""
    register_config()
    AutoModelForCausalLM.register(HunyuanLargeConfig, HunYuanForCausalLM, exist_ok=True)
