"""Hunyuan-Large on vLLM's own layers: tensor and expert parallel, quantized as its compressed-tensors loader finds it.

Cross-layer attention shares the cache for real. A key is kept rotated and normalised WITHOUT a weight, once per group, and
each layer multiplies its query by its own key-norm weight: a score only sees q_norm_w * k_norm_w * (q_hat . k_hat). Cross
layers name the owner of their cache to vLLM, which allocates none for them; see `quantkit.model.attention`.

This module can be imported only where vLLM is installed. It was run with vLLM 0.32.
"""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from quantkit.engines.vllm_plugin import PACKED, RENAMED, kv_target, stacked, with_idle_expert
from quantkit.model.spec import GQA, MLP, Layer, ModelSpec, MoE

__all__ = ["HunYuanForCausalLM"]


class HunyuanAttention(nn.Module):
    def __init__(self, vllm_config: VllmConfig, spec: ModelSpec, index: int, layers: str) -> None:
        super().__init__()
        config, quant, prefix = vllm_config.model_config.hf_config, vllm_config.quant_config, f"{layers}.{index}.self_attn"
        a = spec.layers[index].attention
        assert isinstance(a, GQA)
        target, size = kv_target(spec, index, layers), a.head_dim
        if target:
            self.q_proj = ColumnParallelLinear(
                a.q.in_features, a.q.out_features, False, quant_config=quant, prefix=f"{prefix}.q_proj"
            )
        else:
            self.qkv_proj = QKVParallelLinear(
                a.q.in_features, size, a.heads, a.kv_heads, bias=False, quant_config=quant, prefix=f"{prefix}.qkv_proj"
            )
        self.o_proj = RowParallelLinear(
            a.o.in_features, a.o.out_features, bias=False, quant_config=quant, prefix=f"{prefix}.o_proj"
        )
        parts = vllm_config.parallel_config.tensor_parallel_size
        self.head_dim, self.heads, self.kv_heads = size, a.heads // parts, max(1, a.kv_heads // parts)
        self.shared, self.normed = target is not None, a.q_norm is not None
        if self.normed:
            self.query_layernorm = RMSNorm(size, eps=spec.eps)
            self.key_layernorm = RMSNorm(size, eps=spec.eps)  # its weight goes to the query
            self.key_hat = RMSNorm(size, eps=spec.eps, has_weight=False)
        self.rotary_emb = get_rope(
            size, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters, is_neox_style=True
        )
        self.attn = Attention(
            self.heads,
            size,
            size**-0.5,
            num_kv_heads=self.kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant,
            prefix=f"{prefix}.attn",
            kv_sharing_target_layer_name=target,
        )

    def forward(self, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden] -> [tokens, hidden]."""
        k = v = None
        if self.shared:
            q, _ = self.q_proj(x)
        else:
            qkv, _ = self.qkv_proj(x)
            width = self.kv_heads * self.head_dim
            q, k, v = qkv.split([self.heads * self.head_dim, width, width], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        if self.normed:
            q = self.query_layernorm(self._heads(q)) * self.key_layernorm.weight
            q, k = q.flatten(-2), k if k is None else self.key_hat(self._heads(k)).flatten(-2)
        out, _ = self.o_proj(self.attn(q, k, v))
        return out

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).contiguous()


class HunyuanMLP(nn.Module):
    def __init__(self, vllm_config: VllmConfig, spec: MLP, prefix: str, reduce: bool = True) -> None:
        super().__init__()
        hidden, size, quant = spec.gate.in_features, spec.gate.out_features, vllm_config.quant_config
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, [size, size], bias=False, quant_config=quant, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            size, hidden, bias=False, quant_config=quant, reduce_results=reduce, prefix=f"{prefix}.down_proj"
        )
        self.act = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(x)
        out, _ = self.down_proj(self.act(gate_up))
        return out


class HunyuanMoE(nn.Module):
    """Router in float32; the top-1 weight is the raw softmax probability. The runner adds the shared expert's output."""

    def __init__(self, vllm_config: VllmConfig, spec: MoE, prefix: str) -> None:
        super().__init__()
        router, float32 = spec.router, torch.float32
        self.gate = GateLinear(
            router.in_features, router.out_features, out_dtype=float32, params_dtype=float32, prefix=f"{prefix}.gate"
        )
        shared = HunyuanMLP(vllm_config, spec.shared, f"{prefix}.shared_mlp", reduce=False) if spec.shared else None
        self.shared_mlp = shared
        self.idle = router.top_k == 1 and current_platform.is_zen_cpu()
        self.experts = FusedMoEFactory(
            num_experts=len(spec.experts) + self.idle,
            top_k=router.top_k + self.idle,
            hidden_size=router.in_features,
            intermediate_size=spec.experts[0].gate.out_features,
            renormalize=router.renormalise,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.experts",
            shared_experts=shared,
        )
        if self.idle:
            for key, parameter in self.experts.routed_experts.named_parameters():
                if "input" not in key:  # weights and their scales, of the last expert
                    parameter.data[-1].zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits, _ = self.gate(x.float())
        logits = with_idle_expert(logits) if self.idle else logits
        out: torch.Tensor = self.experts(hidden_states=x, router_logits=logits)
        return out


class HunyuanLayer(nn.Module):
    def __init__(self, vllm_config: VllmConfig, spec: ModelSpec, layer: Layer, layers: str) -> None:
        super().__init__()
        self.self_attn = HunyuanAttention(vllm_config, spec, layer.index, layers)
        name, mlp = f"{layers}.{layer.index}.mlp", layer.mlp
        self.mlp = HunyuanMoE(vllm_config, mlp, name) if isinstance(mlp, MoE) else HunyuanMLP(vllm_config, mlp, name)
        self.input_layernorm = RMSNorm(spec.hidden, eps=spec.eps)
        self.post_attention_layernorm = RMSNorm(spec.hidden, eps=spec.eps)

    def forward(
        self, positions: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual, x = x, self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        x, residual = self.post_attention_layernorm(self.self_attn(positions, x), residual)
        return self.mlp(x), residual


@support_torch_compile
class HunyuanModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        spec: ModelSpec = vllm_config.model_config.hf_config.spec()
        self.embed_tokens = VocabParallelEmbedding(spec.vocab, spec.hidden)
        layers = maybe_prefix(prefix, "layers")
        self.layers = nn.ModuleList(HunyuanLayer(vllm_config, spec, layer, layers) for layer in spec.layers)
        self.norm = RMSNorm(spec.hidden, eps=spec.eps)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        for layer in self.layers:
            x, residual = layer(positions, x, residual)
        out, _ = self.norm(x, residual)
        return out


class HunYuanForCausalLM(nn.Module):
    """Named as `architectures` in config.json names it."""

    packed_modules_mapping = PACKED
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_substr=RENAMED)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config, self.quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.spec: ModelSpec = self.config.spec()
        _refuse(self.spec, vllm_config)
        self.model = HunyuanModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.spec.vocab, self.spec.hidden, quant_config=self.quant_config, prefix=maybe_prefix(prefix, "lm_head")
        )
        if self.spec.head is None:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(self.spec.vocab)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        mapper = self.hf_to_vllm_mapper | WeightsMapper(orig_to_new_stacked=stacked(self.spec))
        return AutoWeightsLoader(self).load_weights(weights, mapper=mapper)


def _refuse(spec: ModelSpec, vllm_config: VllmConfig) -> None:
    """What would give wrong numbers in silence."""
    if spec.rope.bf16_frequencies:
        raise ValueError("without rope_scaling Hunyuan-Large rounds its RoPE frequencies to bfloat16, which vLLM does not")
    if getattr(vllm_config.quant_config, "kv_cache_scheme", None):
        raise ValueError("KV scales of a checkpoint belong to one layer, and Hunyuan-Large's layers share a cache")
