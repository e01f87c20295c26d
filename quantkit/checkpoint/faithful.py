"""What OUT has from its source beside the weights, and what it says of itself: `verify` holds each against the source."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256 as sha256_of
from pathlib import Path
from typing import Any

from quantkit.atomic import sha256
from quantkit.checkpoint.folder import carried
from quantkit.checkpoint.origin import RECORD, STATEMENT, SUMS, content_digest, tensor_digest
from quantkit.checkpoint.published import published_config, published_files
from quantkit.checkpoint.reader import INDEX, CheckpointReader
from quantkit.errors import shown
from quantkit.scheme import Scheme

__all__ = ["OWN", "config_differences", "file_differences", "is_source", "settings_unknown", "statement_problems"]

OWN = ("config.json", INDEX, STATEMENT, SUMS, RECORD)  # files that quantkit writes into every OUT
_SETTINGS = {"quant_method", "config_groups", "format", "quantization_status", "ignore"}
_GROUP = {"targets", "weights", "input_activations", "format"}
_ARGUMENTS = {"num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic"}


def config_differences(written: Mapping[str, Any], source: Mapping[str, Any]) -> list[str]:
    """Where config.json is not the source's with its own quantization_config and what quantkit changes on purpose."""
    expected = published_config(source, written.get("quantization_config"))
    return [
        f"config.json: '{shown(key)}' is {_value(written, key)}, and from the source it would be {_value(expected, key)}"
        for key in sorted(written.keys() | expected.keys())
        if key not in written or key not in expected or _json(written[key]) != _json(expected[key])
    ]


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _value(config: Mapping[str, Any], key: str) -> str:
    return shown(_json(config[key]), 80) if key in config else "missing"


def file_differences(present: Mapping[str, str], source: Path, config: Mapping[str, Any]) -> list[str]:
    """Files of OUT that are neither the source's, byte by byte, nor made from it, and those of the source that OUT lacks.

    present: sha256 of each file of OUT that is not one of `OWN` or a shard. config: the source's.
    """
    changed = published_files(source, config)
    expected = {path.name: sha256(path) for path in carried(source, changed)}
    expected |= {name: sha256_of(data).hexdigest() for name, data in changed.items() if data is not None}
    problems = [f"{shown(name)} is not from {source}" for name in sorted(present.keys() - expected.keys())]
    problems += [f"{shown(name)} of {source} is missing" for name in sorted(expected.keys() - present.keys())]
    return problems + [
        f"{shown(name)} is another than in {source}"
        for name in sorted(present.keys() & expected.keys())
        if present[name] != expected[name]
    ]


def settings_unknown(quantization: Mapping[str, Any]) -> list[str]:
    """What a quantization_config of compressed-tensors says beyond what quantkit writes: an engine may act on it."""
    return [
        f"config.json: quantization_config says {shown(setting, 80)}, which quantkit does not"
        for setting in _extra(quantization)
    ]


def _extra(quantization: Mapping[str, Any]) -> Iterator[str]:
    levels = [("", quantization, _SETTINGS)]
    for name, group in quantization.get("config_groups", {}).items():
        levels.append((f"{name}.", group, _GROUP))
        arguments = (group.get("weights"), group.get("input_activations"))
        levels += [(f"{name}.", values, _ARGUMENTS) for values in arguments if isinstance(values, dict)]
    for where, values, allowed in levels:
        yield from (f"{where}{key} {_json(values[key])}" for key in values if key not in allowed and values[key])


def statement_problems(statement: Mapping[str, Any], schemes: Mapping[str, Scheme | None]) -> list[str]:
    """Where quantkit.json names other linears or schemes than the checkpoint has. Empty where it knows of no linear."""
    linears = statement.get("linears")
    if not isinstance(linears, dict) or not all(isinstance(row, dict) for row in linears.values()):
        return [f"{STATEMENT} has no table of linears"]
    scheme_names = {key: scheme.name for key, scheme in schemes.items() if scheme is not None}
    if not linears:
        return []
    differing = linears.keys() ^ scheme_names.keys()
    if not statement.get("converted"):  # in another format a scheme may have another name
        differing |= {key for key in linears.keys() & scheme_names.keys() if linears[key].get("scheme") != scheme_names[key]}
    return [f"{STATEMENT} does not say of '{shown(key)}' what config.json says" for key in sorted(differing)]


def is_source(statement: Mapping[str, Any] | None, original: CheckpointReader) -> bool | None:
    """Whether quantkit.json was written for the weights of `original`, which are all read; None where it does not say."""
    source = statement.get("source") if statement else None
    digest = source.get("digest") if isinstance(source, dict) else None
    return None if digest is None else digest == content_digest(original.entries, _digests(original, original.entries))


def _digests(reader: CheckpointReader, names: Iterable[str]) -> dict[str, str]:
    return {name: tensor_digest(reader.stored(name)) for name in names}
