"""`--linears`: which matrices of an unknown architecture its patterns take, and the refusal of what they cannot take.

A pattern is matched with a tensor's name without `.weight`. Whatever it matches that is no linear is refused by name, so
that nothing a user asked for is passed over; '*' alone stands for every linear, and passes over vectors. Routers, embedding,
head, gates with one output and multi-token prediction are taken only by a pattern that spells what they are called.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from quantkit.checkpoint.by_name import NamedSpec
from quantkit.checkpoint.reader import CheckpointReader, Entry
from quantkit.dtypes import FLOATS
from quantkit.errors import ConfigError, counted
from quantkit.model.names import Special, experts_of, fused_with, specials, target
from quantkit.model.spec import Linear
from quantkit.recipe import Recipe
from quantkit.scheme import BF16

__all__ = ["Chosen", "choose", "is_kept_by_rule", "joined"]

EVERYTHING = "*"


@dataclass(frozen=True)
class Chosen:
    """The linears to quantize, by key, and what is to be said of those that a pattern matches and does not take."""

    keys: frozenset[str]
    notes: tuple[str, ...]


def is_kept_by_rule(recipe: Recipe, name: str) -> bool:
    """Whether the first rule that matches says BF16."""
    return next((rule.scheme == BF16 for rule in recipe.rules if fnmatchcase(name, rule.match)), False)


def choose(reader: CheckpointReader, spec: NamedSpec, recipe: Recipe) -> Chosen:
    """Raises ConfigError for a pattern that matches what is no linear, or nothing that it may take."""
    matrices = {ref.key: specials(ref.key, (ref.out_features, ref.in_features), reader.config) for ref in spec.linears()}
    linears = {ref.weight for ref in spec.linears()}
    others = {target(name): entry for name, entry in reader.entries.items() if name not in linears}
    selected: set[str] = set()
    left: dict[str, dict[str, Special]] = {}
    for pattern in recipe.linears:
        hits = [key for key in matrices if fnmatchcase(key, pattern)]
        _refuse_others(reader, pattern, others, recipe, bool(hits))
        free = [key for key in hits if _spelled(pattern, matrices[key])]
        if not free:
            _refuse_empty(reader, pattern, hits, matrices)
        selected.update(free)
        left.update({key: matrices[key] for key in hits})
    notes = _left_notes(
        {key: parts for key, parts in left.items() if key not in selected and not is_kept_by_rule(recipe, key)}
    )
    return Chosen(frozenset(selected), notes)


def _spelled(pattern: str, parts: Mapping[str, Special]) -> bool:
    """Whether a pattern names, without a wildcard, every part that makes a matrix special."""
    return parts.keys() <= set(pattern.split("."))


def _refuse_others(
    reader: CheckpointReader, pattern: str, others: Mapping[str, Entry], recipe: Recipe, matches: bool
) -> None:
    """Fused experts, biases, norms, convolutions, tables: what no scheme of this format can hold."""
    for name, entry in others.items():
        if not fnmatchcase(name, pattern) or is_kept_by_rule(recipe, name):
            continue
        wide = len(entry.shape) > 1 and (entry.dtype in FLOATS or f"{name}.weight" in reader.entries)
        if pattern == EVERYTHING and not wide:
            continue
        why = "the format holds one matrix a tensor" if len(entry.shape) > 2 else "it is no matrix called '*.weight'"
        problem = f"'{name}', {entry.dtype} {list(entry.shape)}, cannot be quantized: {why}"
        if not matches:
            fix = "name linears as in 'model.layers.*.mlp.*_proj', without '.weight'"
            raise ConfigError(f"pattern '{pattern}' matches no matrix of {reader.folder}; {problem}", fix)
        raise ConfigError(
            f"pattern '{pattern}' also matches what is no linear of {reader.folder}: {problem}",
            f"narrow the pattern, as in '*_proj', or say that it stays: --keep '{name}'",
        )


def _refuse_empty(
    reader: CheckpointReader, pattern: str, hits: list[str], matrices: Mapping[str, Mapping[str, Special]]
) -> None:
    if not hits:
        raise ConfigError(
            f"pattern '{pattern}' matches no matrix of {reader.folder}; there are {len(matrices)}, such as "
            f"{list(matrices)[:3]}",
            "name linears as in 'model.layers.*.mlp.*_proj', without '.weight'",
        )
    part, special = next(iter(matrices[hits[0]].items()))
    raise ConfigError(
        f"pattern '{pattern}' matches only what wildcards do not take, such as '{hits[0]}' ({special.value})",
        f"spell '{part}' in the pattern if that is meant",
    )


def _left_notes(left: Mapping[str, Mapping[str, Special]]) -> tuple[str, ...]:
    """One line for each kind that was matched by a wildcard and stays."""
    kinds: dict[Special, list[str]] = {}
    for key, parts in left.items():
        kinds.setdefault(next(iter(parts.values())), []).append(key)
    return tuple(
        f"wildcards leave {counted(len(keys), 'tensor')} in BF16 ({special.value}), such as '{keys[0]}': spell the name to "
        "take it"
        for special, keys in kinds.items()
    )


def joined(spec: NamedSpec) -> Iterable[tuple[list[Linear], str]]:
    """Linears that engines hold as one weight, and how; each group has two or more."""
    by_key, experts = {ref.key: ref for ref in spec.linears()}, dict[str, list[Linear]]()
    for key, ref in by_key.items():
        names = [name for name in fused_with(key) if name in by_key]
        if len(names) > 1 and names[0] == key:
            yield [by_key[name] for name in names], "engines fuse them into one weight"
        if layer := experts_of(key):
            experts.setdefault(layer, []).append(ref)
    for refs in experts.values():
        yield refs, "engines fuse a layer's experts"
