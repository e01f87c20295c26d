"""Which entry of a quantization_config an engine finds for a weight, replayed from the names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["SPLIT", "UNMATCHED", "lookup"]

UNMATCHED = "(no group)"
SPLIT = "(ignored in part)"


def _equal(target: str, name: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


def _ignored(entry: str, name: str, suffixes: bool) -> bool:
    return _equal(entry, name) or (suffixes and not entry.startswith("re:") and name.endswith("." + entry))


def lookup(
    name: str,
    parts: Iterable[str],
    quantization: Mapping[str, Any],
    *,
    fused: bool,
    class_first: bool = False,
    suffixes: bool = False,
) -> str | None:
    """The config group of the weight `name`, None where it is ignored, UNMATCHED, or SPLIT when only some parts are ignored.

    parts: names on disk of what was fused into it. fused: whether the engine knows that; otherwise only `name` itself is
    looked up. "Linear" matches every weight by its class, before the parts if class_first. suffixes: a plain ignore entry
    also matches the end of a name.
    """
    ignore, looked_up = quantization.get("ignore") or [], [name]
    if fused and not any(_ignored(entry, name, suffixes) for entry in ignore):
        looked_up = list(parts)
    ignored = {any(_ignored(entry, part, suffixes) for entry in ignore) for part in looked_up}
    if len(ignored) > 1:
        return SPLIT
    if True in ignored:
        return None
    groups = {key: group.get("targets") or [] for key, group in (quantization.get("config_groups") or {}).items()}
    by_class = next((key for key, targets in groups.items() if "Linear" in targets), None)
    by_part = [_group(part, groups) for part in parts] if fused else [None]
    by_parts = by_part[0] if all(by_part) else None
    candidates = (_group(name, groups), *((by_class, by_parts) if class_first else (by_parts, by_class)))
    return next((key for key in candidates if key is not None), UNMATCHED)


def _group(name: str, groups: Mapping[str, list[str]]) -> str | None:
    return next((key for key, targets in groups.items() if any(_equal(target, name) for target in targets)), None)
