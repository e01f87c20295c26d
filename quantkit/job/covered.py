"""Windows chosen so that no expert is short, and kept beside OUT, since choosing costs a pass of the BF16 model."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from quantkit.calib import tokens
from quantkit.calib.covering import POOL, chosen_windows, lacking, needed, routed_tokens
from quantkit.calib.mixture import Mixture
from quantkit.calib.tokenizer import TextTokenizer
from quantkit.checkpoint.folder import write_json
from quantkit.checkpoint.reader import CheckpointReader, load_json
from quantkit.errors import CheckpointError, ConfigError
from quantkit.job.plan import Plan

__all__ = ["chosen_file", "covered"]


def chosen_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.coverage.json")


def covered(
    reader: CheckpointReader, plan: Plan, tokenizer: TextTokenizer, mixture: Mixture, device: torch.device, target: Path
) -> tuple[Tensor, dict[str, Any]]:
    """int64 [samples, seq_len], and what run.json says of the choice: which windows of the pool, and for how many experts
    they hold too few tokens, beside evenly spread ones. Raises ConfigError for a model without experts."""
    if not plan.model.moes():
        raise ConfigError("--cover chooses windows for experts, and the model has none", "leave it out")
    recipe = plan.recipe
    pool = mixture.windows(tokenizer, POOL * plan.samples, recipe.seq_len, recipe.seed)
    key = {"pool": tokens.digest(pool), "source": reader.fingerprint(), "samples": plan.samples}
    choice = _known(chosen_file(target), key)
    if choice is None:
        with TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}-coverage-") as scratch:
            counts = routed_tokens(reader, plan.model, pool, device, Path(scratch))
        need = needed(plan.model)
        chosen = chosen_windows(counts, plan.samples, need)
        spread = torch.linspace(0, len(pool) - 1, plan.samples).long()  # of all sources, as without a choice
        choice = {
            "chosen": chosen.tolist(),
            "experts": len(need),
            "short": lacking(counts[chosen], need),
            "short_without": lacking(counts[spread], need),
        }
        write_json(chosen_file(target), {**key, **choice})
    return pool[torch.tensor(choice["chosen"])], choice


def _known(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier call has chosen, if it was for the same pool and model."""
    if not path.is_file():
        return None
    try:
        data = load_json(path)
    except CheckpointError as error:
        raise CheckpointError(error.problem, f"remove {path}") from error
    if any(data.get(name) != value for name, value in key.items()):
        return None
    return {name: data[name] for name in ("chosen", "experts", "short", "short_without")}
