"""Checkpoints of true size that take no room: shards with honest headers, whose data is a hole in the file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from quantkit.job.placement import MAX_SHARD_BYTES, shard_name
from quantkit.model.registry import build_spec
from quantkit.model.spec import MoE


def write_sparse(folder: Path, config: dict[str, Any]) -> int:
    """A checkpoint of `config`'s architecture in BF16 (Hunyuan's routers in float32, as released); returns its bytes."""
    spec = build_spec(config, "sparse")
    routers = {layer.mlp.router.weight for layer in spec.layers if isinstance(layer.mlp, MoE)}
    wide = routers if spec.architecture.startswith("hunyuan") else set()
    shards: list[dict[str, Any]] = [{}]
    end = 0
    for key, shape in spec.tensors().items():
        dtype, size = ("F32", 4) if key in wide else ("BF16", 2)
        if shards[-1] and end + math.prod(shape) * size > MAX_SHARD_BYTES:
            shards.append({})
            end = 0
        start, end = end, end + math.prod(shape) * size
        shards[-1][key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(shards, start=1):
        name = shard_name(number, len(shards))
        header = json.dumps(tensors).encode()
        data = max(entry["data_offsets"][1] for entry in tensors.values())
        with open(folder / name, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + data)
        weight_map.update(dict.fromkeys(tensors, name))
        total += data
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total
