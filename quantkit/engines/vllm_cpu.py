"""vLLM on a CPU: what its kernels there demand. Sources are as in `vllm`."""

from __future__ import annotations

from quantkit.engines import checks
from quantkit.engines.held import CPUS
from quantkit.engines.rules import Hit, Rule, Verdict, View
from quantkit.model.spec import GQA, MLA, Role

__all__ = ["RULES"]

_ALL = ("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8", "FP8_BLOCK")
_ZEN_HAS_NOT = ("W4A16_ASYM", "W8A16", "FP8_DYNAMIC", "FP8", "FP8_BLOCK")


def _latent(view: View) -> list[Hit]:
    rank, rope = view.config.get("kv_lora_rank"), view.config.get("qk_rope_head_dim")
    if view.deployment.on_gpu or not isinstance(rank, int) or (rank, rope) == (512, 64):
        return []
    return [Hit(None, f"kv_lora_rank {rank} and qk_rope_head_dim {rope}")]


def _rotary(view: View) -> list[Hit]:
    latent = any(isinstance(layer.attention, MLA) for layer in view.spec.layers)
    if view.deployment.on_gpu or not view.deployment.eager or not latent or view.spec.rope.scaling:
        return []
    return [Hit(None, "latent attention without YaRN, not compiled")]


def _fp8_cache(view: View) -> bool:
    fp8 = view.deployment.kv_cache == "fp8" or bool(view.quantization.get("kv_cache_scheme"))
    return fp8 and not view.deployment.on_gpu


def _truncated(view: View) -> list[Hit]:
    return [Hit(None, f"an FP8 cache on {view.deployment.hardware}")] if _fp8_cache(view) else []


def _cache_heads(view: View) -> list[Hit]:
    sizes = {a.head_dim for a in (layer.attention for layer in view.spec.layers) if isinstance(a, GQA)}
    odd = sorted(size for size in sizes if size % 32) if _fp8_cache(view) else []
    return [Hit(None, f"heads of {size}") for size in odd]


def _cache_latent(view: View, *hardware: str) -> list[Hit]:
    latent = any(isinstance(layer.attention, MLA) for layer in view.spec.layers)
    there = latent and _fp8_cache(view) and view.deployment.hardware in hardware
    return [Hit(None, f"latent attention and an FP8 cache on {view.deployment.hardware}")] if there else []


def _parallel_experts(view: View) -> list[Hit]:
    split = view.deployment.ep and view.deployment.tp > 1 and not view.deployment.on_gpu
    experts = [weight for weight in view.weights if weight.role is Role.EXPERTS and weight.scheme is None]
    return [Hit(weight, f"BF16 experts, --tp {view.deployment.tp} --ep") for weight in experts if split]


def _zen_ep(view: View) -> list[Hit]:
    experts = any(weight.scheme and weight.role is Role.EXPERTS for weight in view.weights)
    return [Hit(None, "--ep on zen")] if view.deployment.ep and view.deployment.hardware == "zen" and experts else []


def _odd_sizes(view: View) -> list[Hit]:
    hits = []
    for weight in view.weights:
        packed = weight.scheme is not None and weight.scheme.name in ("W4A16", "W4A16_ASYM")
        if view.deployment.hardware in ("cpu", "amx") and packed and weight.role is not Role.EXPERTS:
            out, inputs = sum(part or 0 for part in weight.parts), weight.inputs or 0
            hits += [Hit(weight, f"[{out}, {inputs}] on a device")] if out % 32 or inputs % 32 else []
    return hits


RULES = (
    Rule(
        "vllm.cpu-experts",
        Verdict.REFUSED,
        "x86 without AMX tiles has no kernel for quantized experts.",
        "run: W4A16, W8A16, W8A8, FP8_DYNAMIC, FP8, FP8_BLOCK experts all fail; read: they gate on _is_amx_tile_supported",
        checks.schemed(_ALL, experts=True, hardware=("cpu",)),
        fix="--hardware zen (AMD with zentorch) runs W4A16 and W8A8 experts",
    ),
    Rule(
        "vllm.zen-experts",
        Verdict.REFUSED,
        "zentorch runs symmetric INT4 (as dynamic W4A8) and W8A8 experts only, and no expert parallelism.",
        "run: W4A16 and W8A8 serve, W8A16, FP8, FP8_DYNAMIC, FP8_BLOCK fail; read: int_wna16.py refuses zero points",
        lambda view: [*checks.schemed(_ZEN_HAS_NOT, experts=True, hardware=("zen",))(view), *_zen_ep(view)],
    ),
    Rule(
        "vllm.amx",
        Verdict.UNKNOWN,
        "With AMX other kernels run than without; of quantized weights only W4A16 was tried there.",
        "run: Llama and Mixtral in W4A16; read: cpu_moe.py and scaled_mm/cpu.py gate on _is_amx_tile_supported",
        checks.schemed([name for name in _ALL if name != "W4A16"], hardware=("amx",)),
    ),
    Rule(
        "vllm.cpu-kept-experts",
        Verdict.REFUSED,
        "Experts in BF16 that are spread over processes load, and the first request raises.",
        "run: BF16 experts with --enable-expert-parallel over two processes",
        _parallel_experts,
        fix="leave out --ep: tensor parallel alone runs",
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
        raw=True,
    ),
    Rule(
        "vllm.cpu-rotary",
        Verdict.WRONG,
        "Without compilation the CPU's rotary op turns only the first vectors of a query with a dimension for heads, which "
        "DeepSeek-V2 without YaRN gives it: no message, other numbers.",
        "run: tests/engines; read: csrc/cpu/pos_encoding.cpp counts heads by size(-1) / head_size",
        _rotary,
        fix='leave out --enforce-eager, or give --compilation-config \'{"custom_ops": ["none"]}\'',
        raw=True,
    ),
    Rule(
        "vllm.cpu-cache-heads",
        Verdict.REFUSED,
        "An FP8 cache on the CPU needs heads of a multiple of 32.",
        "read: v1/attention/backends/cpu_attn.py _get_attn_isa raises NotImplementedError",
        _cache_heads,
        raw=True,
    ),
    Rule(
        "vllm.cpu-cache-latent",
        Verdict.REFUSED,
        "Latent attention on the CPU has no FP8 cache.",
        "read: platforms/cpu.py",
        lambda view: _cache_latent(view, *CPUS),
        raw=True,
        versions=("0.33",),
    ),
    Rule(
        "vllm.cpu-cache-latent",
        Verdict.REFUSED,
        "Latent attention with AMX has no FP8 cache.",
        "run: 'AMXMLAImpl only supports an unquantized (bf16) KV cache'",
        lambda view: _cache_latent(view, "amx"),
        raw=True,
        versions=("0.32",),
    ),
    Rule(
        "vllm.cpu-cache-latent-reference",
        Verdict.UNKNOWN,
        "Latent attention without AMX names no FP8 cache among what it has, and nothing refuses one.",
        "read: mla/cpu_mla.py supported_kv_cache_dtypes; not run",
        lambda view: _cache_latent(view, "cpu", "zen"),
        raw=True,
        versions=("0.32",),
    ),
    Rule(
        "vllm.cpu-cache",
        Verdict.LOADS,
        "The CPU's FP8 cache cuts values off instead of rounding them: 0.956 of a value on average, 3.7 times the squared "
        "error. What it loses above `quantkit eval --kv-cache fp8` is that.",
        "read: csrc/cpu/cpu_attn_fp8.hpp",
        _truncated,
        raw=True,
    ),
)
