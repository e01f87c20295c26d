"""What a run will do, from headers alone: every linear its scheme, every tensor its shard, every byte counted.

All that can be refused is refused here, before any work: unknown names, shapes that do not fit, groups that an engine
would not load.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from quantkit.errors import CheckpointError, ConfigError
from quantkit.formats import compressed_tensors
from quantkit.formats.dtypes import FLOATS, TensorPlan
from quantkit.formats.reader import CheckpointReader
from quantkit.formats.writer import ShardPlan
from quantkit.model.registry import build_spec
from quantkit.model.spec import Layer, Linear, ModelSpec, MoE, Role
from quantkit.scheme import Recipe, Scheme, Strategy

__all__ = ["Plan", "Unit", "make_plan"]

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Unit:
    """What is committed at once: layers that share K/V (none for the tensors around the layers), and their shards."""

    layers: tuple[Layer, ...]
    kept: tuple[str, ...]
    shards: tuple[ShardPlan, ...]


@dataclass(frozen=True)
class Plan:
    """The whole run. schemes: by linear, None where it is kept. calibrated: whether any linear needs tokens."""

    spec: ModelSpec
    recipe: Recipe
    schemes: dict[str, Scheme | None]
    units: tuple[Unit, ...]
    quantization_config: dict[str, Any]
    source_bytes: int
    output_bytes: int
    notes: tuple[str, ...]

    @property
    def calibrated(self) -> bool:
        return any(needs_tokens(self.recipe, scheme) for scheme in self.schemes.values())

    @property
    def tape_bytes(self) -> int:
        """Scratch disk: hidden states in and out, K/V, and the widest stage input, float32 per calibration token."""
        if not self.calibrated:
            return 0
        a = self.spec.layers[0].attention
        width = 3 * self.spec.hidden + 2 * a.kv_heads * a.head_dim + max(self.spec.hidden, a.o.in_features)
        return self.recipe.samples * self.recipe.seq_len * width * 4

    def by_role(self) -> dict[str, dict[str, Any]]:
        """Per role: the schemes, how many linears and weights, and bits per weight on disk."""
        table: dict[str, dict[str, Any]] = {}
        for ref in self.spec.linears():
            scheme, count = self.schemes[ref.key], ref.out_features * ref.in_features
            row = table.setdefault(ref.role.value, {"schemes": [], "linears": 0, "weights": 0, "bits": 0.0})
            name = scheme.name if scheme else "BF16"
            if name not in row["schemes"]:
                row["schemes"].append(name)
            row["linears"] += 1
            row["weights"] += count
            row["bits"] += count * (scheme.bits_per_weight(ref.out_features, ref.in_features) if scheme else 16)
        for row in table.values():
            row["bits_per_weight"] = round(row.pop("bits") / row["weights"], 3)
        return table


def needs_tokens(recipe: Recipe, scheme: Scheme | None) -> bool:
    """Whether quantising to this scheme looks at calibration text."""
    return scheme is not None and (scheme.static or recipe.method_of(scheme) == "gptq")


def make_plan(reader: CheckpointReader, recipe: Recipe) -> Plan:
    """Check the checkpoint against its architecture and the recipe against both. Raises CheckpointError, ConfigError."""
    where = str(reader.folder / "config.json")
    if reader.config.get("quantization_config"):
        raise ConfigError(
            f"{where} says the model is already quantised", "start from the BF16 model, or use 'quantkit convert --to bf16'"
        )
    spec = build_spec(reader.config, where)
    _check_names(reader, spec)
    schemes = _assign(reader, spec, recipe)
    units = _units(reader, spec, schemes)
    routers = [layer.mlp.router.key for layer in spec.layers if isinstance(layer.mlp, MoE)]
    return Plan(
        spec=spec,
        recipe=recipe,
        schemes=schemes,
        units=units,
        quantization_config=compressed_tensors.config(schemes, routers),
        source_bytes=sum(entry.nbytes for entry in reader.entries.values()),
        output_bytes=sum(shard.nbytes for unit in units for shard in unit.shards),
        notes=tuple(_engine_notes(spec, schemes)),
    )


def _check_names(reader: CheckpointReader, spec: ModelSpec) -> None:
    expected = spec.tensors()
    if "lm_head.weight" in reader.entries:  # a tied head may be stored once more; it is carried over
        expected["lm_head.weight"] = expected[spec.embedding]
    missing = sorted(expected.keys() - reader.entries.keys())
    extra = sorted(reader.entries.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(
            f"{reader.folder}: tensors do not match architecture {spec.architecture}: {len(missing)} missing "
            f"{missing[:3]}, {len(extra)} unexpected {extra[:3]}",
            "check config.json against the weights (layers, experts, cross-layer attention, tied head)",
        )
    for key, shape in expected.items():
        entry = reader.entries[key]
        if entry.shape != shape or entry.dtype not in FLOATS:
            raise CheckpointError(
                f"{reader.folder / entry.shard}: tensor '{key}' is {entry.dtype} {entry.shape}, expected "
                f"{' or '.join(FLOATS)} {shape}",
                "check config.json against the weights",
            )


def _assign(reader: CheckpointReader, spec: ModelSpec, recipe: Recipe) -> dict[str, Scheme | None]:
    schemes: dict[str, Scheme | None] = {}
    for ref in spec.linears():
        scheme = recipe.scheme_of(ref)
        problem = scheme.misfit(ref.out_features, ref.in_features) if scheme else None
        if problem:
            assert scheme
            raise ConfigError(
                f"tensor '{ref.weight}' [{ref.out_features}, {ref.in_features}] cannot take {scheme.name}: {problem}",
                "choose a --group-size that divides it, another scheme, or BF16 for its role",
            )
        schemes[ref.key] = scheme
    for rule in recipe.rules:
        if not any(fnmatchcase(ref.key, rule.match) for ref in spec.linears()):
            raise ConfigError(f"rule '{rule.match}' matches no linear", "name linears as in 'model.layers.0.mlp.*'")
    if not any(schemes.values()):
        raise ConfigError("every linear is kept in BF16: there is nothing to quantise", "choose a scheme")
    for layer in spec.layers:
        for group in layer.same_input():
            _same_scheme(group, schemes, "engines fuse them into one weight")
        if isinstance(layer.mlp, MoE):
            _same_scheme([ref for e in layer.mlp.experts for ref in e.linears()], schemes, "engines fuse a layer's experts")
    return schemes


def _same_scheme(refs: list[Linear] | tuple[Linear, ...], schemes: dict[str, Scheme | None], why: str) -> None:
    for ref in refs[1:]:
        if schemes[ref.key] != schemes[refs[0].key]:
            raise ConfigError(
                f"'{refs[0].key}' and '{ref.key}' get different schemes, but {why}",
                "write a rule that covers both alike",
            )


def _units(reader: CheckpointReader, spec: ModelSpec, schemes: dict[str, Scheme | None]) -> tuple[Unit, ...]:
    """Around the layers first, then each group of layers; every tensor placed in a shard of at most MAX_SHARD_BYTES."""

    def plain(key: str) -> TensorPlan:
        return TensorPlan(key, reader.entries[key].dtype, reader.entries[key].shape)

    around = [key for key in (spec.embedding, spec.final_norm, "lm_head.weight") if key in reader.entries]
    drafts: list[tuple[tuple[Layer, ...], tuple[str, ...], list[TensorPlan]]] = [
        ((), tuple(around), [plain(key) for key in around])
    ]
    for layers in spec.groups():
        kept: list[str] = []
        tensors: list[TensorPlan] = []
        for layer in layers:
            kept += layer.kept()
            tensors += [plain(key) for key in layer.kept()]
            for ref in layer.linears():
                scheme = schemes[ref.key]
                tensors += compressed_tensors.planned(ref, scheme) if scheme else [plain(ref.weight)]
        drafts.append((layers, tuple(kept), tensors))
    split = [_split(tensors) for _, _, tensors in drafts]
    total, number, units = sum(map(len, split)), 0, []
    for (layers, kept_keys, _), parts in zip(drafts, split, strict=True):
        shards = []
        for part in parts:
            number += 1
            shards.append(ShardPlan(f"model-{number:05d}-of-{total:05d}.safetensors", part))
        units.append(Unit(layers, kept_keys, tuple(shards)))
    return tuple(units)


def _split(tensors: list[TensorPlan]) -> list[list[TensorPlan]]:
    parts: list[list[TensorPlan]] = [[]]
    size = 0
    for tensor in tensors:
        if parts[-1] and size + tensor.nbytes > MAX_SHARD_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.nbytes
    return parts


def _engine_notes(spec: ModelSpec, schemes: dict[str, Scheme | None]) -> list[str]:
    """Where tensor parallelism would cut a group or block: engines refuse to load that."""
    notes: dict[str, None] = {}
    for ref in spec.linears():
        scheme = schemes[ref.key]
        if scheme is None or not ref.key.endswith(("down_proj", "o_proj")):
            continue
        unit = {Strategy.GROUP: scheme.weight.group_size, Strategy.BLOCK: (scheme.weight.block or (0, 0))[1]}.get(
            scheme.weight.strategy
        )
        if unit:
            degree = max(tp for tp in (1, 2, 4, 8, 16) if ref.in_features % (tp * unit) == 0)
            if degree < 16:
                other = " or expert parallel" if ref.role is Role.EXPERTS else ""
                notes[f"{ref.role.value} {ref.key.rsplit('.', 1)[-1]}: tensor parallel up to {degree}{other}"] = None
    return list(notes)
