"""SGLang 0.5.23: what its loader demands. All of this was read in the code of that wheel; nothing was run."""

from __future__ import annotations

from quantkit.engines import checks, on_file, other_formats
from quantkit.engines.held import Held
from quantkit.engines.rules import Engine, Hit, Naming, Rule, Verdict, View, engines
from quantkit.model.spec import Role

__all__ = ["SGLANG"]

# read: EntryClass of each file in srt/models; HunYuanForCausalLM is in none.
ARCHITECTURES = {
    "hunyuan_v1_moe": "HunYuanMoEV1ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
# read: packed_modules_mapping of each class (Mixtral and Llama have none, DeepSeek only the latent's). Experts are looked up
# as gate_proj, up_proj, down_proj whatever they are called on disk. HunYuanModel builds its layers without a prefix.
NAMING = Naming(
    fused={
        "hunyuan_v1_moe": frozenset({"qkv_proj", "gate_up_proj"}),
        "mixtral": frozenset(),
        "deepseek_v2": frozenset({"fused_qkv_a_proj"}),
        "llama": frozenset(),
        "qwen3_moe": frozenset({"qkv_proj", "gate_up_proj"}),
    },
    experts={},
    nameless=frozenset({"hunyuan_v1_moe"}),
    class_first=True,
    suffixes=True,
    unmatched_raises=True,
)
_COUNTED = ("hunyuan_v1_moe", "qwen3_moe", "deepseek_v2")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def _too_many_devices(view: View) -> list[Hit]:
    count = next((view.config[key] for key in _COUNTS if key in view.config), None)
    few = view.model_type in _COUNTED and isinstance(count, int) and 1 < count < view.deployment.tp
    return [Hit(None, f"{view.deployment.tp} devices, {count} experts")] if few else []


def _spelling(view: View) -> list[Hit]:
    model_type = str(view.config.get("model_type"))
    return [Hit(None, f"model_type '{model_type}'")] if model_type != view.model_type else []


def _groups(view: View, experts: bool, triton: bool) -> list[Hit]:
    """Groups that Marlin has not. Of experts: where Triton has the kernels (symmetric INT4 from 10.0 on), or not."""
    hits = checks.group_size({4: (32, 64, 128), 8: (32, 64, 128)}, experts)(view)
    return [hit for hit in hits if not experts or _triton(view, hit.held) is triton]


def _triton(view: View, weight: Held | None) -> bool:
    symmetric = weight is not None and weight.scheme is not None and weight.scheme.name == "W4A16"
    named = view.deployment.hardware.startswith("sm")
    return symmetric and named and view.deployment.capability >= 100


def _kv_cache(view: View) -> list[Hit]:
    scheme = view.quantization.get("kv_cache_scheme")
    return [Hit(None, f"kv_cache_scheme with strategy {scheme.get('strategy')}")] if isinstance(scheme, dict) else []


def _cpu(view: View) -> list[Hit]:
    return [] if view.deployment.on_gpu else [Hit(None, f"hardware {view.deployment.hardware}")]


def _mixed(view: View) -> list[Hit]:
    packed = ("W4A16", "W4A16_ASYM", "W4AFP8", "W8A16")
    experts = [h for h in view.weights if h.role is Role.EXPERTS and h.scheme and h.scheme.name in packed]
    overall = view.quantization.get("format")
    return [Hit(weight, f"the config's format is {overall}") for weight in experts if overall != "pack-quantized"]


RULES = (
    Rule(
        "sglang.architecture",
        Verdict.REFUSED,
        "The model class must be one that it has, and transformers must know the model_type.",
        "read: EntryClass in srt/models",
        checks.architecture(ARCHITECTURES),
        raw=True,
    ),
    Rule(
        "sglang.spelling",
        Verdict.REFUSED,
        "A Hunyuan-A13B that calls itself 'hunyuan' is taken for a model that it has not.",
        "read: EntryClass in srt/models",
        _spelling,
        fix="write model_type 'hunyuan_v1_moe' into config.json",
        raw=True,
    ),
    Rule(
        "sglang.heads",
        Verdict.REFUSED,
        "Attention heads divide over tensor parallel devices; key/value heads do, or are repeated whole.",
        "read: assertions in hunyuan.py, mixtral.py, llama.py, qwen3_moe.py, deepseek_v2.py",
        checks.heads,
        raw=True,
    ),
    Rule(
        "sglang.divisible",
        Verdict.REFUSED,
        "A weight that devices share is cut into equal parts.",
        "read: linear.py, fused_moe_triton/layer.py assertions",
        checks.divisible,
        raw=True,
    ),
    Rule(
        "sglang.more-devices-than-experts",
        Verdict.REFUSED,
        "Hunyuan, Qwen3-MoE and DeepSeek need at least as many experts as devices.",
        "read: ValueError in hunyuan.py, qwen3_moe.py, deepseek_v2.py",
        _too_many_devices,
        raw=True,
    ),
    Rule(
        "sglang.targets",
        Verdict.REFUSED,
        "The config, asked with SGLang's own names, gives each weight its scheme. Names of parts help only where the class "
        "lists its fused weights, experts are always gate_proj, up_proj and down_proj, and Hunyuan's layers have no names: "
        "there only one scheme for all works.",
        "read: compressed_tensors/utils.py find_matched_target raises ValueError; compressed_tensors.py get_moe_scheme",
        checks.matched(NAMING),
    ),
    Rule(
        "sglang.fused-scheme",
        Verdict.REFUSED,
        "q, k, v; gate, up; and q_a, kv_a become one weight each, and share one scheme.",
        "read: should_ignore_layer raises ValueError",
        checks.fused_alike,
    ),
    Rule(
        "sglang.one-expert-scheme",
        Verdict.REFUSED,
        "Expert 0's scheme is taken for the whole layer, and gate, up and down must agree.",
        "read: get_moe_scheme raises ValueError",
        checks.one_expert_scheme,
    ),
    Rule(
        "sglang.packed-experts-mixed",
        Verdict.REFUSED,
        "Packed INT experts need pack-quantized as the format of the whole config, so nothing beside them may have another.",
        "read: compressed_tensors_wNa16_moe.py raises ValueError",
        _mixed,
    ),
    Rule(
        "sglang.int8-experts",
        Verdict.REFUSED,
        "W8A8 INT8 experts run on Ascend NPUs only.",
        "read: get_moe_scheme raises NotImplementedError",
        checks.schemed(("W8A8",), experts=True),
    ),
    Rule(
        "sglang.group-shards",
        Verdict.REFUSED,
        "A row-parallel linear gives each device whole scale groups.",
        "read: an assertion in compressed_tensors_wNa16.py",
        checks.cut_groups(experts=False),
    ),
    Rule(
        "sglang.moe-group-shards",
        Verdict.WRONG,
        "Nothing checks that a device holds whole scale groups of an expert: the count is rounded down and scales would "
        "belong to other columns.",
        "read: compressed_tensors_wNa16_moe.py num_groups_w2, fused_moe_triton/layer.py _load_w2",
        checks.cut_groups(experts=True),
    ),
    Rule(
        "sglang.block-shards",
        Verdict.REFUSED,
        "FP8 blocks of linears are not cut by devices or by fusing.",
        "read: fp8_utils.py validate_fp8_block_shape",
        checks.cut_blocks(experts=False),
    ),
    Rule(
        "sglang.moe-block-shards",
        Verdict.REFUSED,
        "An expert's intermediate size on a device is whole blocks, on one device too.",
        "read: compressed_tensors_w8a8_fp8_moe.py raises ValueError",
        checks.cut_blocks(experts=True),
    ),
    Rule(
        "sglang.group-size",
        Verdict.UNKNOWN,
        "Its Marlin kernels are made for groups of 32, 64 and 128; the loader does not check linears.",
        "read: marlin_utils.py MARLIN_SUPPORTED_GROUP_SIZES",
        lambda view: _groups(view, experts=False, triton=False),
    ),
    Rule(
        "sglang.moe-group-size",
        Verdict.REFUSED,
        "Marlin's fused experts take groups of 32, 64 and 128, and others are refused at the first request.",
        "read: moe_wna16_marlin.cuh; not run",
        lambda view: _groups(view, experts=True, triton=False),
    ),
    Rule(
        "sglang.moe-group-size-triton",
        Verdict.UNKNOWN,
        "Symmetric INT4 experts are Triton's from compute capability 10.0; its other groups were not looked at.",
        "read: compressed_tensors.py, groups of 32 and 128",
        lambda view: _groups(view, experts=True, triton=True),
    ),
    Rule(
        "sglang.kv-cache",
        Verdict.UNKNOWN,
        "What it does with a kv_cache_scheme was not looked at; with a scale per head it warns and ignores it.",
        "read: compressed_tensors.py, strategy attn_head",
        _kv_cache,
        raw=True,
    ),
    Rule(
        "sglang.gpu-age",
        Verdict.REFUSED,
        "Quantized weights need compute capability 8.0.",
        "read: get_min_capability of its WNA16, W8A8Int8, W8A16Fp8 and W8A8Fp8MoE schemes",
        checks.older(80, ("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8", "FP8_BLOCK")),
    ),
    Rule(
        "sglang.gpu-fp8",
        Verdict.LOADS,
        "Below compute capability 8.9 FP8 linears keep their weights and leave their inputs unrounded.",
        "read: compressed_tensors.py falls back to CompressedTensorsW8A16Fp8",
        checks.older(89, ("FP8_DYNAMIC", "FP8", "FP8_BLOCK"), experts=False),
    ),
    Rule(
        "sglang.w4afp8",
        Verdict.UNKNOWN,
        "What it computes of INT4 experts with FP8 inputs was not looked at.",
        "not looked at",
        checks.schemed(("W4AFP8",), experts=True),
    ),
    Rule(
        "sglang.w4afp8-linear",
        Verdict.REFUSED,
        "INT4 with FP8 inputs is for experts only.",
        "read: compressed_tensors.py knows it for experts alone",
        checks.schemed(("W4AFP8",), experts=False),
    ),
    Rule(
        "sglang.cpu",
        Verdict.UNKNOWN,
        "SGLang on a CPU was not looked at.",
        "not looked at",
        _cpu,
        raw=True,
    ),
    Rule(
        "sglang.scheme",
        Verdict.UNKNOWN,
        "Integers that are none of quantkit's schemes, and FP8 with other scales, were not looked at.",
        "not looked at",
        checks.unheard_of,
    ),
    *other_formats.SGLANG,
    Rule(
        "sglang.input-scales",
        Verdict.REFUSED,
        "Static FP8: gate and up of an expert have the same input_scale, within 1e-5.",
        "read: fused_moe_triton/layer.py raises ValueError",
        on_file=on_file.unequal_input_scales,
    ),
    Rule(
        "sglang.kv-b-proj-packed",
        Verdict.REFUSED,
        "kv_b_proj is taken apart by its .weight, which a packed linear does not have.",
        "read: deepseek_weight_loader.py post-load",
        checks.schemed(("W4A16", "W4A16_ASYM", "W8A16"), last="kv_b_proj"),
        fix="keep it: rules: [{match: '*.kv_b_proj', scheme: BF16}]",
    ),
    Rule(
        "sglang.kv-b-proj-fp8",
        Verdict.LOADS,
        "An FP8 kv_b_proj is rounded again to one scale for the whole weight.",
        "read: deepseek_weight_loader.py channel_quant_to_tensor_quant",
        checks.schemed(("FP8_DYNAMIC", "FP8"), last="kv_b_proj"),
        fix="keep it: rules: [{match: '*.kv_b_proj', scheme: BF16}]",
    ),
    Rule(
        "sglang.kv-b-proj-int8",
        Verdict.UNKNOWN,
        "An INT8 kv_b_proj is turned around before it is taken apart; whether that fits was not tried.",
        "read: compressed_tensors_w8a8_int8.py, deepseek_weight_loader.py",
        checks.schemed(("W8A8",), last="kv_b_proj"),
        fix="keep it: rules: [{match: '*.kv_b_proj', scheme: BF16}]",
    ),
)


def _loader(view: View, kind: str, of_expert: bool) -> Verdict:
    """read: load_weights of its models skips a tensor that no parameter takes, and asks for none that did not come. What
    becomes of other shapes and dtypes was not looked at."""
    return Verdict.WRONG if kind in ("missing", "unmatched") else Verdict.UNKNOWN


SGLANG = engines(("0.5.23",), Engine("sglang", "", ARCHITECTURES, RULES, _loader))
