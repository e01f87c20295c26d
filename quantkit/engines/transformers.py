"""transformers 5.23 and 5.24 with compressed-tensors 0.20: what from_pretrained does. "run": tried on tiny models against
the dequantized weights, with 5.23 where no version is said; "read": its code. What reads quantized weights is the same in
5.24, byte for byte."""

from __future__ import annotations

from quantkit.engines import checks, on_file, other_formats
from quantkit.engines.rules import Check, Engine, Hit, Rule, Verdict, View, engines
from quantkit.formats import compressed_tensors
from quantkit.model.spec import Role
from quantkit.scheme import Kind, Scheme

__all__ = ["TRANSFORMERS"]

# read: models/auto; `hunyuan` is a model_type of remote code only.
ARCHITECTURES = {
    "hunyuan": "HunYuanForCausalLM, after quantkit.engines.transformers_model.register()",
    "hunyuan_v1_moe": "HunYuanMoEV1ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def _in_one_tensor(check: Check) -> Check:
    """The check where experts become one tensor at load. In quantkit's class of Hunyuan-Large each stays a linear."""
    return lambda view: [] if view.model_type == "hunyuan" else check(view)


def _zero_points(view: View) -> list[Hit]:
    hits = [*checks.schemed(("W4A16_ASYM",), experts=False)(view)]
    return hits + ([*checks.schemed(("W4A16_ASYM",), experts=True)(view)] if view.model_type == "hunyuan" else [])


def _register(view: View) -> list[Hit]:
    return [Hit(None, "model_type 'hunyuan'")] if view.config.get("model_type") == "hunyuan" else []


def _kv_cache(view: View) -> list[Hit]:
    return [Hit(None, "the config has a kv_cache_scheme")] if view.quantization.get("kv_cache_scheme") else []


def _experts_scheme(view: View) -> tuple[str, Scheme] | None:
    """The group that it takes for all experts (get_experts_scheme): the first with an `re:` target that has "experts" in
    it, else the first with any other target, else the first."""
    groups = view.quantization.get("config_groups") or {}
    named = [k for k, g in groups.items() if any(t.startswith("re:") and "experts" in t for t in g["targets"])]
    plain = [k for k, g in groups.items() if any(not t.startswith("re:") for t in g["targets"])]
    name = next(iter([*named, *plain, *groups]), None)
    return (name, compressed_tensors.groups(view.quantization)[name]) if name else None


def _experts_group(view: View) -> list[Hit]:
    experts = [weight for weight in view.weights if weight.role is Role.EXPERTS and weight.scheme]
    group = _experts_scheme(view) if experts else None
    return [Hit(h, f"it takes {group[1].name} of {group[0]}") for h in experts if group and h.scheme != group[1]]


def _experts_kept(view: View) -> list[Hit]:
    experts = [weight for weight in view.weights if weight.role is Role.EXPERTS and not weight.scheme]
    group = _experts_scheme(view) if experts else None
    if group is None or group[1].weight.kind is Kind.FLOAT:
        return []
    return [Hit(weight, f"it takes {group[1].name} of {group[0]}") for weight in experts]


def _unscaled_fp4(view: View) -> list[Hit]:
    has_experts = any(weight.role is Role.EXPERTS for weight in view.weights)
    for name, group in (view.quantization.get("config_groups") or {}).items():
        weights = group.get("weights") or {}
        if has_experts and weights.get("num_bits") == 4 and weights.get("strategy") == "tensor_group":
            return [Hit(None, f"config group {name} is NVFP4")]
    return []


def _router(view: View) -> list[Hit]:
    return [Hit(None, f"'{key}' is not ignored") for key in checks.routers_not_ignored(view, ("hunyuan_v1_moe",))]


def _head(view: View) -> list[Hit]:
    targets = [t for group in (view.quantization.get("config_groups") or {}).values() for t in group.get("targets", [])]
    ignored = "lm_head" in (view.quantization.get("ignore") or [])
    return [Hit(None, "'Linear' is a target and lm_head is not ignored")] if "Linear" in targets and not ignored else []


def _devices(view: View) -> list[Hit]:
    many = view.deployment.tp > 1 or view.deployment.pp > 1 or view.deployment.ep
    return [Hit(None, "more than one device")] if many else []


def _mixed(view: View) -> list[Hit]:
    names = {weight.scheme.name for weight in view.weights if weight.scheme and weight.role is not Role.EXPERTS}
    return [Hit(None, f"{', '.join(sorted(names))} outside the experts")] if len(names) > 1 else []


RULES = (
    Rule(
        "transformers.architecture",
        Verdict.REFUSED,
        "The model_type must be one that it has.",
        "run: 'hunyuan' is unknown to 5.17, 5.19 and 5.23",
        checks.architecture(ARCHITECTURES),
        raw=True,
    ),
    Rule(
        "transformers.register",
        Verdict.LOADS,
        "model_type 'hunyuan' is brought by quantkit, in a process that asks for it.",
        "run: tests/rules/test_hunyuan_engines.py; without it from_pretrained raises",
        _register,
        fix="call quantkit.engines.transformers_model.register() first (docs/vllm.md)",
        raw=True,
    ),
    Rule(
        "transformers.experts-int8",
        Verdict.REFUSED,
        "W8A8 experts cannot be converted.",
        "run: RuntimeError at load for hunyuan_v1_moe, deepseek_v2, qwen3_moe",
        _in_one_tensor(checks.schemed(("W8A8",), experts=True)),
    ),
    Rule(
        "transformers.experts-block",
        Verdict.REFUSED,
        "FP8_BLOCK experts cannot be converted: their scales do not broadcast.",
        "run: RuntimeError at load for hunyuan_v1_moe, deepseek_v2",
        _in_one_tensor(checks.schemed(("FP8_BLOCK",), experts=True)),
    ),
    Rule(
        "transformers.experts-zero-points",
        Verdict.REFUSED,
        "Experts with zero points cannot be converted.",
        "run: 'Asymmetric quant requires zero-point values', with dequantize=True too",
        _in_one_tensor(checks.schemed(("W4A16_ASYM",), experts=True)),
    ),
    Rule(
        "transformers.linear-zero-points",
        Verdict.REFUSED,
        "Linears with zero points load with dequantize=True only; by default their sizes do not agree.",
        "run: dense Llama, weight_zero_point size mismatch",
        _zero_points,
        fix="where all linears have zero points: CompressedTensorsConfig(dequantize=True)",
    ),
    Rule(
        "transformers.experts-group",
        Verdict.WRONG,
        "The experts of all layers take one scheme: that of the first config group with 'experts' in a pattern, "
        "'shared_experts' included.",
        "read: get_experts_scheme; run: W8A16 experts in one layer, W4A16 in the others load and compute something else",
        _in_one_tensor(_experts_group),
        fix="give all experts one scheme, and --shared-experts the same where they are called shared_experts",
    ),
    Rule(
        "transformers.experts-kept",
        Verdict.REFUSED,
        "Experts in BF16 beside integers cannot be converted; beside FP8 they can.",
        "run: RuntimeError beside W4A16, W8A16, W8A8, in one layer too; beside FP8_DYNAMIC, FP8, FP8_BLOCK they load",
        _in_one_tensor(_experts_kept),
        fix="quantize the experts of every layer, or give the others FP8_DYNAMIC",
    ),
    Rule(
        "transformers.experts-nvfp4",
        Verdict.WRONG,
        "NVFP4 experts load thousands of times too large: the global scale is dropped.",
        "run: 7,000 to 35,000 times, in 5.17, 5.19 and 5.23, without a message",
        _in_one_tensor(_unscaled_fp4),
        fix="dequantize, or use vLLM",
        raw=True,
    ),
    Rule(
        "transformers.mixtral-names",
        Verdict.WRONG,
        "Mixtral's experts are w1, w2, w3 on disk; named gate_proj, up_proj, down_proj they stay random.",
        "run: logits of llm-compressor's Mixtral outputs are those of random experts, without an error",
        on_file=on_file.random_experts,
    ),
    Rule(
        "transformers.experts-inputs",
        Verdict.LOADS,
        "Experts are unpacked at load and their inputs are not rounded to FP8; input_scale is reported as unexpected.",
        "run: weights exact, activations not simulated",
        _in_one_tensor(checks.schemed(("FP8_DYNAMIC", "FP8"), experts=True)),
        fix="judge FP8 with quantkit eval",
    ),
    Rule(
        "transformers.router",
        Verdict.REFUSED,
        "The router of hunyuan_v1_moe is an nn.Linear, and must be ignored by name.",
        "read: modeling_hunyuan_v1_moe.py; compressed-tensors matches every nn.Linear",
        _router,
        raw=True,
    ),
    Rule(
        "transformers.head",
        Verdict.REFUSED,
        "lm_head is an nn.Linear, and must be ignored where 'Linear' is a target.",
        "read: compressed-tensors matches every nn.Linear",
        _head,
        raw=True,
    ),
    Rule(
        "transformers.mixed",
        Verdict.LOADS,
        "With dequantize=True all linears outside the experts take one scheme: do not use it on this checkpoint.",
        "read: integrations/compressed_tensors.py get_dense_scheme",
        _mixed,
    ),
    Rule(
        "transformers.devices",
        Verdict.UNKNOWN,
        "Quantized checkpoints over several devices (tp_plan) were not tried.",
        "not tried",
        _devices,
        raw=True,
    ),
    Rule(
        "transformers.kv-cache",
        Verdict.UNKNOWN,
        "What becomes of a kv_cache_scheme was not looked at.",
        "not looked at",
        _kv_cache,
        raw=True,
    ),
    Rule(
        "transformers.w4afp8",
        Verdict.UNKNOWN,
        "INT4 with FP8 inputs was not tried.",
        "not tried",
        checks.schemed(("W4AFP8",)),
    ),
    Rule(
        "transformers.scheme",
        Verdict.UNKNOWN,
        "Integers that are none of quantkit's schemes, and FP8 with other scales, were not looked at.",
        "not looked at",
        checks.unheard_of,
    ),
    *other_formats.TRANSFORMERS,
)


def _loader(view: View, kind: str, of_expert: bool) -> Verdict:
    """run: what is missing stays random, what is too much is left out, each with a line in a report. Experts that become one
    tensor are converted: one that is missing is an error there, a scale with one row is spread over all."""
    converted = of_expert and view.model_type != "hunyuan"
    if kind == "missing":
        return Verdict.REFUSED if converted else Verdict.WRONG
    if kind == "shape":
        return Verdict.WRONG if converted else Verdict.REFUSED
    return Verdict.WRONG if kind == "unmatched" else Verdict.REFUSED


TRANSFORMERS = engines(("5.23", "5.24"), Engine("transformers", "", ARCHITECTURES, RULES, _loader))
