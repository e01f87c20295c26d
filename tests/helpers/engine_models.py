"""Models as the rules of engines see them, without weights: each architecture's names and true sizes, in two layers."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from quantkit.engines.held import Deployment
from quantkit.engines.registry import ENGINES
from quantkit.engines.rules import Verdict, View, view_of, worst
from quantkit.formats import compressed_tensors
from quantkit.model.spec import GQA, MLA, MLP, Linear, MoE, Role, Rope, Yarn
from quantkit.scheme import FP8_TENSOR, Scheme, scheme_named

# hidden, query heads, key/value heads, head_dim, intermediate, experts (of which the view has four)
SIZES: dict[str, tuple[int, int, int, int, int, int]] = {
    "hunyuan": (6400, 80, 8, 80, 18304, 16),
    "hunyuan_v1_moe": (4096, 32, 8, 128, 3072, 64),
    "mixtral": (6144, 48, 8, 128, 16384, 8),
    "qwen3_moe": (2048, 32, 4, 128, 768, 128),
    "deepseek_v2": (5120, 128, 128, 128, 1536, 160),
    "llama": (8192, 64, 8, 128, 28672, 0),
}
YARN = Yarn(40, 4096, 32, 1, 0.7, 0.7)


def mlp(prefix: str, hidden: int, size: int, role: Role, names: tuple[str, str, str]) -> MLP:
    gate, up, down = (f"{prefix}.{name}" for name in names)
    return MLP(Linear(gate, size, hidden, role), Linear(up, size, hidden, role), Linear(down, hidden, size, role))


def attention(kind: str, index: int) -> list[Linear]:
    hidden, heads, kv, dim, *_ = SIZES[kind]
    shapes = {"q_proj": (heads * dim, hidden), "k_proj": (kv * dim, hidden), "v_proj": (kv * dim, hidden)}
    if kind == "deepseek_v2":
        shapes = {"q_a_proj": (1536, hidden), "kv_a_proj_with_mqa": (576, hidden), "q_b_proj": (heads * 192, 1536)}
        shapes["kv_b_proj"] = (heads * 256, 512)
    if kind == "hunyuan" and index % 2:  # a cross layer
        shapes = {"q_proj": shapes["q_proj"]}
    shapes["o_proj"] = (hidden, heads * dim)
    prefix = f"model.layers.{index}.self_attn"
    return [Linear(f"{prefix}.{name}", out, inputs, Role.ATTENTION) for name, (out, inputs) in shapes.items()]


def layer(kind: str, index: int, inter: int | None) -> SimpleNamespace:
    hidden, size, count = SIZES[kind][0], inter or SIZES[kind][4], SIZES[kind][5]
    usual = ("gate_proj", "up_proj", "down_proj")
    where = f"model.layers.{index}.{'block_sparse_moe' if kind == 'mixtral' else 'mlp'}"
    if not count:
        block: MLP | MoE = mlp(where, hidden, size, Role.MLP, usual)
    else:
        names = ("w1", "w3", "w2") if kind == "mixtral" else usual
        router = Linear(f"{where}.gate{'.wg' if kind.startswith('hunyuan') else ''}", count, hidden, Role.ROUTER)
        shared = {"hunyuan": "shared_mlp", "hunyuan_v1_moe": "shared_mlp", "deepseek_v2": "shared_experts"}.get(kind)
        parts: dict[str, Any] = {
            "router": router,
            "experts": tuple(mlp(f"{where}.experts.{e}", hidden, size, Role.EXPERTS, names) for e in range(4)),
            "shared": mlp(f"{where}.{shared}", hidden, size, Role.SHARED_EXPERTS, usual) if shared else None,
        }
        block = MoE(**{field.name: parts.get(field.name) for field in fields(MoE)})
    experts = list(block.experts) if isinstance(block, MoE) else [block]
    inner = [*([block.shared] if isinstance(block, MoE) and block.shared else []), *experts]
    linears = [*attention(kind, index), *(ref for part in inner for ref in part.linears())]
    return SimpleNamespace(index=index, mlp=block, attention=attention_kind(kind), linears=lambda: linears)


def attention_kind(kind: str) -> Any:
    """An attention without linears: rules ask its class and its head size."""
    settings = {field.name: None for field in fields(MLA if kind == "deepseek_v2" else GQA)}
    return MLA(**settings) if kind == "deepseek_v2" else GQA(**{**settings, "head_dim": SIZES[kind][3]})  # type: ignore


def seen(
    kind: str,
    scheme: str = "W4A16",
    *,
    group: int | None = None,
    parts: dict[str, str] | None = None,
    inter: int | None = None,
    config: dict[str, Any] | None = None,
    quantization: dict[str, Any] | None = None,
    rope: Rope | None = None,
    format: str = compressed_tensors.FORMAT.name,
    **deployment: Any,
) -> View:
    """A view. parts: the scheme of linears with that in their name. config, quantization: changes to those of the model."""
    layers = [layer(kind, index, inter) for index in range(2)]
    spec: Any = SimpleNamespace(layers=layers, rope=rope or Rope(64, 1e4, YARN))
    linears = [ref for one_layer in layers for ref in one_layer.linears()]
    spec.linears = lambda: iter(linears)
    spec.moes = lambda: [one_layer.mlp for one_layer in layers if isinstance(one_layer.mlp, MoE)]
    one = FP8_TENSOR if scheme == FP8_TENSOR.name else scheme_named(scheme, group)
    schemes: dict[str, Scheme | None] = {ref.key: one for ref in linears}
    for part, name in (parts or {}).items():
        schemes.update({key: scheme_named(name, group) for key in schemes if part in key})
    heads = {"num_attention_heads": SIZES[kind][1], "num_key_value_heads": SIZES[kind][2]}
    counts = {"n_routed_experts": SIZES[kind][5]} if kind == "deepseek_v2" else {"num_experts": SIZES[kind][5]}
    routers = [moe.router.key for moe in spec.moes()]
    written = {**compressed_tensors.written(schemes, routers), **(quantization or {})}
    settings = {"model_type": kind, **heads, **counts, **(config or {})}
    return view_of(spec, settings, schemes, written, Deployment(**deployment), format)


def broken(engine: str, view: View) -> dict[str, list[str]]:
    """Rule to what it saw, for every rule of the engine that has something to say."""
    hits = ((rule.id, hit.why) for rule in ENGINES[engine].rules if rule.check for hit in rule.check(view))
    found: dict[str, list[str]] = {}
    for rule, why in hits:
        found.setdefault(rule, []).append(why)
    return found


def verdict(engine: str, view: View) -> Verdict:
    verdicts = {rule.id: rule.verdict for rule in ENGINES[engine].rules}
    return worst(verdicts[rule] for rule in broken(engine, view))
