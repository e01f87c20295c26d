"""Changes to a checkpoint's files, in place or in a copy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

SHARD = "model-00001-of-00002.safetensors"
Break = Callable[[Path], object]


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Break:
    """Change a JSON file of the model in place."""

    def apply(model: Path) -> None:
        data = json.loads((model / name).read_text())
        change(data)
        (model / name).write_text(json.dumps(data))

    return apply


def replace(name: str, data: bytes | None) -> Break:
    return lambda model: (model / name).unlink() if data is None else (model / name).write_bytes(data)


def rescaled(source: Path, target: Path, prefix: str, factor: float) -> Path:
    """A copy in which the scales of the linears that begin with `prefix` are `factor` times what they were."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("eval"))
    weight_map = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    names = [name for name in weight_map if name.startswith(prefix) and name.endswith("weight_scale")]
    assert names
    for name in names:
        tensors = load_file(target / weight_map[name])
        tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)
        save_file(tensors, target / weight_map[name], metadata={"format": "pt"})
    return target
