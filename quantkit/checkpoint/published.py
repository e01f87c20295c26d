"""What OUT says otherwise than its source beside the weights: known here to those who write it and to `verify`.

An architecture that quantkit and engines know themselves needs no code that comes with the model, so engines are not told
of any: OUT names none, holds none, and has the tokenizer as data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from quantkit.checkpoint import hy_tiktoken
from quantkit.checkpoint.folder import CODE
from quantkit.checkpoint.reader import load_json
from quantkit.model.registry import ARCHITECTURES

__all__ = ["native", "published_config", "published_files", "published_notes"]

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


def native(config: Mapping[str, Any]) -> bool:
    """Whether engines run this model without code of its own. config: config.json."""
    architecture, classes = ARCHITECTURES.get(str(config.get("model_type"))), config.get("architectures")
    return architecture is not None and (
        not isinstance(classes, list) or all(name in architecture.native for name in classes)
    )


def published_config(source: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> dict[str, Any]:
    """config.json of OUT: from that of its source, with this `quantization_config` or (None) without one, and without
    `auto_map` where no code of the model's own is needed."""
    dropped = {"quantization_config", *(["auto_map"] if native(source) else [])}
    config = {key: value for key, value in source.items() if key not in dropped}
    return config if quantization is None else {**config, "quantization_config": dict(quantization)}


def published_files(folder: Path, config: Mapping[str, Any]) -> dict[str, bytes | None]:
    """Files of OUT, by name, that are not those of the source folder byte by byte; None for one that is not there.

    config: the source's. A tokenizer without a file that engines read keeps what its own code needs.
    Raises CheckpointError for a tokenizer that cannot be read.
    """
    files: dict[str, bytes | None] = dict.fromkeys(_dropped(folder, config))
    if not native(config):
        return files
    stated, own = _tokenizer_config(folder), _own_class(folder, config)
    if _needs_code(folder, config):
        if "auto_map" not in stated:  # it was in config.json
            files[TOKENIZER_CONFIG] = _written({**stated, "auto_map": {"AutoTokenizer": own}})
        return files
    settings = {key: value for key, value in stated.items() if key != "auto_map"}
    if converted := _is_made(folder):
        files[TOKENIZER] = hy_tiktoken.load(folder / hy_tiktoken.FILE).to_str().encode()
        settings = hy_tiktoken.settings(settings, config)
    if converted or own:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # it reads tokenizer.json, whatever the model
    if settings != stated:
        files[TOKENIZER_CONFIG] = _written(settings)
    return files


def published_notes(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """What `published_config` and `published_files` do to this source, in words, from names alone."""
    notes = []
    named = "auto_map" in config or "auto_map" in _tokenizer_config(folder) and not _needs_code(folder, config)
    if native(config) and named:
        notes.append(f"auto_map is left out: engines know '{config['model_type']}' without code of its own")
    if dropped := _dropped(folder, config):
        notes.append(f"not carried over, as no engine needs its code: {', '.join(dropped)}")
    if native(config) and _is_made(folder):
        notes.append(f"{TOKENIZER} is made from {hy_tiktoken.FILE}")
    if native(config) and _needs_code(folder, config):
        notes.append(f"the tokenizer has no {TOKENIZER}: engines need its own code, and a flag that allows it")
    return notes


def _dropped(folder: Path, config: Mapping[str, Any]) -> list[str]:
    patterns = () if not native(config) else CODE[:2] if _needs_code(folder, config) else CODE
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name.isprintable())
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _is_made(folder: Path) -> bool:
    """Whether tokenizer.json is lacking and quantkit can make it."""
    return not (folder / TOKENIZER).is_file() and (folder / hy_tiktoken.FILE).is_file()


def _needs_code(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether only its own code reads the tokenizer."""
    return bool(_own_class(folder, config)) and not (folder / TOKENIZER).is_file() and not _is_made(folder)


def _own_class(folder: Path, config: Mapping[str, Any]) -> object:
    """What names the tokenizer's own class, if something does: a mapping, or in old files a list."""
    named = _tokenizer_config(folder).get("auto_map", config.get("auto_map"))
    return named.get("AutoTokenizer") if isinstance(named, dict) else named


def _written(settings: Mapping[str, Any]) -> bytes:
    return json.dumps(settings, indent=2, ensure_ascii=False).encode() + b"\n"


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / TOKENIZER_CONFIG
    return load_json(path) if path.is_file() else {}
