"""Which set of weights in a folder is read where there are several, and who would read another."""

from __future__ import annotations

import os
from pathlib import Path

from quantkit.checkpoint.reader import INDEX, SINGLE, load_json

__all__ = ["weight_sets"]


def weight_sets(folder: Path) -> list[str]:
    """What to say of weights beside those that `CheckpointReader` reads; empty for a folder with one set.

    It is said and not refused: the two are often the same weights (shards that were merged, say), the index decides without
    doubt, and vLLM decides alike. transformers looks for model.safetensors first, and for an adapter before that.
    """
    notes: list[str] = []
    if not os.path.isdir(folder):  # unlike Path.is_dir, False for a name that is too long
        return notes
    if (folder / INDEX).is_file():
        listed = load_json(folder / INDEX).get("weight_map")
        if (folder / SINGLE).is_file() and isinstance(listed, dict) and SINGLE not in listed.values():
            notes.append(
                f"{folder} holds two sets of weights: the shards that {INDEX} lists are read, as vLLM does; transformers "
                f"would read {SINGLE}"
            )
    elif others := sorted(path.name for path in folder.glob("*.safetensors") if path.name != SINGLE):
        more = f" and {len(others) - 1} more" if others[1:] else ""
        notes.append(
            f"{folder} holds weights beside {SINGLE}, which alone is read, as transformers does; vLLM would read "
            f"{others[0]}{more} too: there is no {INDEX} that says what belongs together"
        )
    if (folder / "adapter_config.json").is_file():
        notes.append(
            f"{folder} holds an adapter_config.json, which is not read; transformers would load that adapter and the model "
            "that it names, where peft is installed"
        )
    return notes
