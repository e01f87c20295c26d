"""The questions that rules ask of a view. A rule is one of these with an engine's numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from quantkit.engines.held import Held, Split
from quantkit.engines.names import SPLIT, UNMATCHED, lookup
from quantkit.engines.rules import Check, Hit, Naming, View
from quantkit.errors import shown
from quantkit.formats import compressed_tensors
from quantkit.model.spec import MoE, Role
from quantkit.scheme import PRESETS, Kind, Scheme, Strategy, labels

__all__ = [
    "architecture",
    "cut_blocks",
    "cut_groups",
    "divisible",
    "fused_alike",
    "group_size",
    "heads",
    "kv_cache",
    "matched",
    "older",
    "one_expert_scheme",
    "routers_not_ignored",
    "schemed",
    "smaller_groups",
    "unheard_of",
    "undivided",
    "zero_points",
]


def architecture(model_types: Collection[str]) -> Check:
    def check(view: View) -> Iterator[Hit]:
        if view.model_type not in model_types:
            yield Hit(None, f"model_type '{shown(view.model_type)}' is none of {', '.join(model_types)}")

    return check


def heads(view: View) -> Iterator[Hit]:
    """Query heads divide over the devices; key/value heads do, or are repeated."""
    tp = view.deployment.tp
    query, kv = view.config.get("num_attention_heads"), view.config.get("num_key_value_heads")
    if isinstance(query, int) and query % tp:
        yield Hit(None, f"{query} attention heads over {tp} devices")
    elif isinstance(kv, int) and kv % tp and tp % kv:
        yield Hit(None, f"{kv} key/value heads over {tp} devices")


def divisible(view: View) -> Iterator[Hit]:
    for weight in view.weights:
        for ref, rows in zip(weight.linears, weight.parts, strict=True):
            if rows is None:
                yield Hit(weight, f"{ref.out_features} rows over {weight.ways} devices")
        if weight.inputs is None:
            yield Hit(weight, f"{weight.in_features} columns over {weight.ways} devices")


def cut_groups(experts: bool) -> Check:
    """Row-parallel weights whose scale groups would straddle devices."""

    def check(view: View) -> Iterator[Hit]:
        for weight in _of(view, experts):
            size = weight.scheme.weight.group_size if weight.scheme else None
            if size and weight.split is Split.ROW and weight.inputs and weight.inputs % size:
                yield Hit(weight, f"{weight.in_features} / {weight.ways} = {weight.inputs} columns, groups of {size}")

    return check


def cut_blocks(experts: bool) -> Check:
    """Blocks of weights that share a scale, cut by devices or by fusing.

    Linears: rows of each part when devices cut them; when only fused, all but the last part; columns when devices cut
    them. Experts: the rows of gate and up always, which are the columns of down.
    """

    def check(view: View) -> Iterator[Hit]:
        for weight in _of(view, experts):
            if weight.scheme is None or weight.scheme.weight.strategy is not Strategy.BLOCK:
                continue
            rows, columns = weight.scheme.weight.block or (1, 1)
            parts = weight.parts if weight.ways > 1 or experts else weight.parts[:-1]
            if weight.split is not Split.ROW:
                for part in parts:
                    if part and part % rows:
                        yield Hit(weight, f"{part} rows on a device, blocks of {rows}")
                        break
            elif weight.ways > 1 and weight.inputs and weight.inputs % columns:
                yield Hit(weight, f"{weight.in_features} / {weight.ways} = {weight.inputs} columns, blocks of {columns}")

    return check


def group_size(allowed: Mapping[int, tuple[int, ...]], experts: bool) -> Check:
    """Packed integers whose group size is none that the engine's kernels take, by bits."""

    def check(view: View) -> Iterator[Hit]:
        for weight in _of(view, experts):
            grid = weight.scheme.weight if weight.scheme and weight.scheme.activation is None else None
            sizes = allowed.get(grid.bits) if grid and grid.kind is Kind.INT else None
            if grid and sizes and grid.group_size and grid.group_size not in sizes:
                yield Hit(weight, f"groups of {grid.group_size}, and there are kernels for {', '.join(map(str, sizes))}")

    return check


def smaller_groups(least: int) -> Check:
    """Packed integers with groups below that size."""

    def check(view: View) -> Iterator[Hit]:
        for weight in view.weights:
            size = weight.scheme.weight.group_size if weight.scheme and weight.scheme.activation is None else None
            if size and size < least:
                yield Hit(weight, f"groups of {size}")

    return check


def undivided(name: str, unit: int) -> Check:
    """Experts with that scheme of which a side on a device is no multiple of unit."""

    def check(view: View) -> Iterator[Hit]:
        for weight in _of(view, True):
            sides = [*weight.parts, weight.inputs] if weight.scheme and weight.scheme.name == name else []
            if odd := [side for side in sides if side and side % unit]:
                yield Hit(weight, f"{odd[0]} on a device, no multiple of {unit}")

    return check


def unheard_of(view: View) -> Iterator[Hit]:
    """Schemes that other tools write and quantkit only reads: no rule is about them."""
    for weight in view.weights:
        scheme = weight.scheme
        if scheme and (scheme.name not in PRESETS or scheme.weight.block != PRESETS[scheme.name].weight.block):
            yield Hit(weight, scheme.name + (f" with blocks of {scheme.weight.block}" if scheme.weight.block else ""))


def fused_alike(view: View) -> Iterator[Hit]:
    for weight in view.weights:
        schemes = {view.schemes[ref.key] for ref in weight.linears}
        if len(schemes) > 1 and weight.role is not Role.EXPERTS:
            names = ", ".join(ref.key.rpartition(".")[2] for ref in weight.linears)
            yield Hit(weight, f"{names} have {_names(schemes)}")


def one_expert_scheme(view: View) -> Iterator[Hit]:
    for layer in view.spec.layers:
        if isinstance(layer.mlp, MoE):
            schemes = {view.schemes[ref.key] for expert in layer.mlp.experts for ref in expert.linears()}
            if len(schemes) > 1:
                weight = next(w for w in view.weights if w.layer == layer.index and w.role is Role.EXPERTS)
                yield Hit(weight, f"experts of one layer have {_names(schemes)}")


def schemed(
    names: Iterable[str],
    *,
    experts: bool | None = None,
    last: str | None = None,
    hardware: Iterable[str] | None = None,
) -> Check:
    """Weights with one of these schemes: experts only or others only, of that name, on that hardware."""
    scheme_names, places = tuple(names), tuple(hardware) if hardware else None

    def check(view: View) -> Iterator[Hit]:
        if places and view.deployment.hardware not in places:
            return
        for weight in view.weights if experts is None else _of(view, experts):
            if weight.scheme and weight.scheme.name in scheme_names and (last is None or weight.name == last):
                yield Hit(weight, f"{weight.scheme.name}" + (f" on {view.deployment.hardware}" if places else ""))

    return check


def older(capability: int, names: Iterable[str], experts: bool | None = None) -> Check:
    """Weights with one of these schemes on a GPU below that compute capability (times ten)."""
    scheme_names = tuple(names)

    def check(view: View) -> Iterator[Hit]:
        if not view.deployment.on_gpu or view.deployment.capability >= capability:
            return
        for weight in view.weights if experts is None else _of(view, experts):
            if weight.scheme and weight.scheme.name in scheme_names:
                yield Hit(weight, f"{weight.scheme.name} on {view.deployment.hardware}")

    return check


def zero_points(view: View) -> Iterator[Hit]:
    """Zero points of experts are packed eight to a word along the rows: a device must hold whole words."""
    for weight in _of(view, True):
        if weight.scheme and not weight.scheme.weight.symmetric and all(weight.parts):
            rows = sum(part or 0 for part in weight.parts)
            if rows % 8:
                yield Hit(weight, f"{rows} rows on a device, packed by 8")


def kv_cache(view: View) -> Iterator[Hit]:
    scheme = view.quantization.get("kv_cache_scheme")
    if not scheme:
        return
    arguments = (scheme.get("type"), scheme.get("num_bits"), bool(scheme.get("symmetric", True)), scheme.get("strategy"))
    if arguments[:3] != ("float", 8, True) or arguments[3] not in ("tensor", "attn_head"):
        yield Hit(None, f"kv_cache_scheme is {arguments}")


def routers_not_ignored(view: View, model_types: Iterable[str]) -> list[str]:
    """Routers that a config would quantize, in the models where the engine asks."""
    if view.model_type not in tuple(model_types):
        return []
    routers = [layer.mlp.router.key for layer in view.spec.layers if isinstance(layer.mlp, MoE)]
    return [key for key in routers if lookup(key, [key], view.quantization, fused=False) not in (None, UNMATCHED)]


def matched(naming: Naming) -> Check:
    """Weights for which the engine, asking by its own names, finds another scheme than is meant."""

    def check(view: View) -> Iterator[Hit]:
        if view.model_type not in naming.fused:
            return
        schemes = compressed_tensors.groups(view.quantization)
        for weight in view.weights:
            group = _found(naming, view, weight)
            if group == SPLIT:
                yield Hit(weight, f"only some parts of {weight.name} are ignored")
            elif group == UNMATCHED and (weight.scheme or naming.unmatched_raises):
                yield Hit(weight, f"no target of the config matches '{_name(naming, view, weight)}'")
            elif group not in (SPLIT, UNMATCHED) and (schemes[group] if group else None) != weight.scheme:
                yield Hit(weight, f"the config says {group or 'ignore'} for '{_name(naming, view, weight)}'")

    return check


def _name(naming: Naming, view: View, weight: Held) -> str:
    # Without the expert's number.
    prefix = weight.prefix.rpartition(".")[0] if weight.role is Role.EXPERTS else weight.prefix
    if view.model_type in naming.nameless:
        prefix = {Role.ATTENTION: ".self_attn", Role.MLP: ".mlp"}.get(weight.role, "")
    if weight.role is not Role.EXPERTS:
        return f"{prefix}.{weight.name}"
    gate, _, down = naming.experts.get(view.model_type, ("gate_proj", "up_proj", "down_proj"))
    return f"{prefix}.0.{gate if weight.name == 'w13' else down}"


def _found(naming: Naming, view: View, weight: Held) -> str | None:
    name = _name(naming, view, weight)
    fused = weight.name in naming.fused[view.model_type] and weight.role is not Role.EXPERTS
    parts = [f"{name.rpartition('.')[0]}.{ref.key.rpartition('.')[2]}" for ref in weight.linears]
    return lookup(name, parts, view.quantization, fused=fused, class_first=naming.class_first, suffixes=naming.suffixes)


def _of(view: View, experts: bool) -> Iterator[Held]:
    return (weight for weight in view.weights if (weight.role is Role.EXPERTS) is experts)


def _names(schemes: Iterable[Scheme | None]) -> str:
    return ", ".join(sorted(labels(schemes).values()))
