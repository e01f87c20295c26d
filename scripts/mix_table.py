"""Write how many bytes the recommended recipe gives for each model of the README's table, from published shapes: by the
plan, on checkpoints whose data is a hole. `python scripts/mix_table.py`, from the root."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from measured import ROOT, between

sys.path.insert(0, str(ROOT))
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.job.plan import make_plan
from quantkit.model.registry import build_spec
from quantkit.recipe import Recipe
from tests.helpers.architectures import RELEASED, SMALLER
from tests.helpers.sparse import write_sparse

PAGE, MARK = ROOT / "docs" / "accuracy.md", "<!-- mix: scripts/mix_table.py -->"
RECIPES = {
    "W4A16": Recipe(scheme="W4A16"),
    "recommended": Recipe(),
    "FP8_DYNAMIC for W8A16": Recipe(attention="FP8_DYNAMIC", shared_experts="FP8_DYNAMIC", mlp="FP8_DYNAMIC"),
}
BEYOND = {
    "qwen3-235b-a22b": {
        **SMALLER["qwen3-30b-a3b"],
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_attention_heads": 64,
        "num_hidden_layers": 94,
    },
}
GROUPS = {"deepseek-v2-lite": 64}  # its dense layer has 10944 inputs
NAMES = {
    "hunyuan-large": "Hunyuan-Large",
    "hunyuan-a13b": "Hunyuan-A13B",
    "mixtral-8x7b": "Mixtral 8x7B",
    "mixtral-8x22b": "Mixtral 8x22B",
    "deepseek-v2-lite": "DeepSeek-V2-Lite, groups of 64",
    "deepseek-v2": "DeepSeek-V2, V2.5",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "qwen3-235b-a22b": "Qwen3-235B-A22B",
    "llama-3.1-70b": "Llama 3.1 70B",
    "llama-3.1-405b": "Llama 3.1 405B",
}


def _sizes(name: str) -> list[str]:
    """BF16, then each recipe's, in GB; a scheme for a role that the model lacks is left out."""
    config = {**RELEASED, **SMALLER, **BEYOND}[name]
    with tempfile.TemporaryDirectory() as folder:
        write_sparse(Path(folder) / "model", config)
        reader = CheckpointReader(Path(folder) / "model")
        roles = {ref.role.value for ref in build_spec(config, name).linears()}
        cells = [f"{sum(entry.nbytes for entry in reader.entries.values()) / 1e9:.1f}"]
        for recipe in RECIPES.values():
            lacking = {role: None for role in ("attention", "shared_experts", "mlp", "experts") if role not in roles}
            dense = "experts" not in roles and recipe.scheme is None and recipe.attention is not None
            sized = recipe.model_copy(update={**lacking, "group_size": GROUPS.get(name)})
            plan = None if dense else make_plan(reader, sized)
            cells.append("" if plan is None else f"{plan.output_bytes / 1e9:.1f}")
    return cells


def table() -> list[str]:
    lines = [f"| GB | BF16 | {' | '.join(RECIPES)} |", "|---|---|---|---|---|"]
    return [*lines, *(f"| {title} | {' | '.join(_sizes(name))} |" for name, title in NAMES.items())]


if __name__ == "__main__":
    PAGE.write_text(between(PAGE.read_text("utf-8"), MARK, "<!-- end of mix -->", table()), "utf-8")
