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


def architecture(known: Collection[str]) -> Check:
    def check(view: View) -> Iterator[Hit]:
        if view.model_type not in known:
            yield Hit(None, f"model_type '{shown(view.model_type)}' is none of {', '.join(known)}")

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
    for held in view.weights:
        for ref, rows in zip(held.linears, held.parts, strict=True):
            if rows is None:
                yield Hit(held, f"{ref.out_features} rows over {held.ways} devices")
        if held.inputs is None:
            yield Hit(held, f"{held.in_features} columns over {held.ways} devices")


def cut_groups(experts: bool) -> Check:
    """Row-parallel weights whose scale groups would straddle devices."""

    def check(view: View) -> Iterator[Hit]:
        for held in _of(view, experts):
            size = held.scheme.weight.group_size if held.scheme else None
            if size and held.split is Split.ROW and held.inputs and held.inputs % size:
                yield Hit(held, f"{held.in_features} / {held.ways} = {held.inputs} columns, groups of {size}")

    return check


def cut_blocks(experts: bool) -> Check:
    """Blocks of weights that share a scale, cut by devices or by fusing.

    Linears: rows of each part when devices cut them; when only fused, all but the last part; columns when devices cut
    them. Experts: the rows of gate and up always, which are the columns of down.
    """

    def check(view: View) -> Iterator[Hit]:
        for held in _of(view, experts):
            if held.scheme is None or held.scheme.weight.strategy is not Strategy.BLOCK:
                continue
            rows, columns = held.scheme.weight.block or (1, 1)
            parts = held.parts if held.ways > 1 or experts else held.parts[:-1]
            if held.split is not Split.ROW:
                for part in parts:
                    if part and part % rows:
                        yield Hit(held, f"{part} rows on a device, blocks of {rows}")
                        break
            elif held.ways > 1 and held.inputs and held.inputs % columns:
                yield Hit(held, f"{held.in_features} / {held.ways} = {held.inputs} columns, blocks of {columns}")

    return check


def group_size(allowed: Mapping[int, tuple[int, ...]], experts: bool) -> Check:
    """Packed integers whose group size is none that the engine's kernels take, by bits."""

    def check(view: View) -> Iterator[Hit]:
        for held in _of(view, experts):
            grid = held.scheme.weight if held.scheme and held.scheme.activation is None else None
            sizes = allowed.get(grid.bits) if grid and grid.kind is Kind.INT else None
            if grid and sizes and grid.group_size and grid.group_size not in sizes:
                yield Hit(held, f"groups of {grid.group_size}, and there are kernels for {', '.join(map(str, sizes))}")

    return check


def smaller_groups(least: int) -> Check:
    """Packed integers with groups below that size."""

    def check(view: View) -> Iterator[Hit]:
        for held in view.weights:
            size = held.scheme.weight.group_size if held.scheme and held.scheme.activation is None else None
            if size and size < least:
                yield Hit(held, f"groups of {size}")

    return check


def undivided(name: str, unit: int) -> Check:
    """Experts with that scheme of which a side on a device is no multiple of unit."""

    def check(view: View) -> Iterator[Hit]:
        for held in _of(view, True):
            sides = [*held.parts, held.inputs] if held.scheme and held.scheme.name == name else []
            if odd := [side for side in sides if side and side % unit]:
                yield Hit(held, f"{odd[0]} on a device, no multiple of {unit}")

    return check


def unheard_of(view: View) -> Iterator[Hit]:
    """Schemes that other tools write and quantkit only reads: no rule is about them."""
    for held in view.weights:
        scheme = held.scheme
        if scheme and (scheme.name not in PRESETS or scheme.weight.block != PRESETS[scheme.name].weight.block):
            yield Hit(held, scheme.name + (f" with blocks of {scheme.weight.block}" if scheme.weight.block else ""))


def fused_alike(view: View) -> Iterator[Hit]:
    for held in view.weights:
        schemes = {view.schemes[ref.key] for ref in held.linears}
        if len(schemes) > 1 and held.role is not Role.EXPERTS:
            names = ", ".join(ref.key.rpartition(".")[2] for ref in held.linears)
            yield Hit(held, f"{names} have {_names(schemes)}")


def one_expert_scheme(view: View) -> Iterator[Hit]:
    for layer in view.spec.layers:
        if isinstance(layer.mlp, MoE):
            schemes = {view.schemes[ref.key] for expert in layer.mlp.experts for ref in expert.linears()}
            if len(schemes) > 1:
                held = next(w for w in view.weights if w.layer == layer.index and w.role is Role.EXPERTS)
                yield Hit(held, f"experts of one layer have {_names(schemes)}")


def schemed(
    names: Iterable[str],
    *,
    experts: bool | None = None,
    last: str | None = None,
    hardware: Iterable[str] | None = None,
) -> Check:
    """Weights with one of these schemes: experts only or others only, of that name, on that hardware."""
    wanted, places = tuple(names), tuple(hardware) if hardware else None

    def check(view: View) -> Iterator[Hit]:
        if places and view.deployment.hardware not in places:
            return
        for held in view.weights if experts is None else _of(view, experts):
            if held.scheme and held.scheme.name in wanted and (last is None or held.name == last):
                yield Hit(held, f"{held.scheme.name}" + (f" on {view.deployment.hardware}" if places else ""))

    return check


def older(capability: int, names: Iterable[str], experts: bool | None = None) -> Check:
    """Weights with one of these schemes on a GPU below that compute capability (times ten)."""
    wanted = tuple(names)

    def check(view: View) -> Iterator[Hit]:
        if not view.deployment.on_gpu or view.deployment.capability >= capability:
            return
        for held in view.weights if experts is None else _of(view, experts):
            if held.scheme and held.scheme.name in wanted:
                yield Hit(held, f"{held.scheme.name} on {view.deployment.hardware}")

    return check


def zero_points(view: View) -> Iterator[Hit]:
    """Zero points of experts are packed eight to a word along the rows: a device must hold whole words."""
    for held in _of(view, True):
        if held.scheme and not held.scheme.weight.symmetric and all(held.parts):
            rows = sum(part or 0 for part in held.parts)
            if rows % 8:
                yield Hit(held, f"{rows} rows on a device, packed by 8")


def kv_cache(view: View) -> Iterator[Hit]:
    scheme = view.quantization.get("kv_cache_scheme")
    if not scheme:
        return
    seen = (scheme.get("type"), scheme.get("num_bits"), bool(scheme.get("symmetric", True)), scheme.get("strategy"))
    if seen[:3] != ("float", 8, True) or seen[3] not in ("tensor", "attn_head"):
        yield Hit(None, f"kv_cache_scheme is {seen}")


def routers_not_ignored(view: View, model_types: Iterable[str]) -> list[str]:
    """Routers that a config would quantise, in the models where the engine asks."""
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
        for held in view.weights:
            found = _found(naming, view, held)
            if found == SPLIT:
                yield Hit(held, f"only some parts of {held.name} are ignored")
            elif found == UNMATCHED and (held.scheme or naming.unmatched_raises):
                yield Hit(held, f"no target of the config matches '{_name(naming, view, held)}'")
            elif found not in (SPLIT, UNMATCHED) and (schemes[found] if found else None) != held.scheme:
                yield Hit(held, f"the config says {found or 'ignore'} for '{_name(naming, view, held)}'")

    return check


def _name(naming: Naming, view: View, held: Held) -> str:
    prefix = held.prefix.rpartition(".")[0] if held.role is Role.EXPERTS else held.prefix  # without the expert's number
    if view.model_type in naming.nameless:
        prefix = {Role.ATTENTION: ".self_attn", Role.MLP: ".mlp"}.get(held.role, "")
    if held.role is not Role.EXPERTS:
        return f"{prefix}.{held.name}"
    gate, _, down = naming.experts.get(view.model_type, ("gate_proj", "up_proj", "down_proj"))
    return f"{prefix}.0.{gate if held.name == 'w13' else down}"


def _found(naming: Naming, view: View, held: Held) -> str | None:
    name = _name(naming, view, held)
    known = held.name in naming.fused[view.model_type] and held.role is not Role.EXPERTS
    parts = [f"{name.rpartition('.')[0]}.{ref.key.rpartition('.')[2]}" for ref in held.linears]
    return lookup(name, parts, view.quantization, fused=known, class_first=naming.class_first, suffixes=naming.suffixes)


def _of(view: View, experts: bool) -> Iterator[Held]:
    return (held for held in view.weights if (held.role is Role.EXPERTS) is experts)


def _names(schemes: Iterable[Scheme | None]) -> str:
    return ", ".join(sorted(labels(schemes).values()))
