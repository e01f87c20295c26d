"""RULER's tasks (Hsieh et al., arXiv 2404.06654) through lm-evaluation-harness: what it needs to know before it makes their
texts, which are as long as one asks and counted in the model's own tokens."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantkit.calib.tokenizer import load_tokenizer
from quantkit.checkpoint.reader import load_json
from quantkit.errors import ConfigError

__all__ = ["LENGTH", "is_ruler", "lacking", "needle_settings"]

LENGTH = 4096  # the harness's own


def is_ruler(descriptions: Sequence[Path | None]) -> bool:
    """Whether one of these files of the harness describes a task of RULER's."""
    return any(path is not None and path.parent.name == "ruler" for path in descriptions)


def lacking(needs: str, offline: bool) -> tuple[str, str] | None:
    """What a needle task needs and cannot have here, and the fix; None where nothing is missing. needs: of its row in the
    suite. offline: --data-dir is given, which stands for a run without a network."""
    if needs not in ("words", "essays"):
        return None
    if missing := next((name for name in ("wonderwords", "nltk") if importlib.util.find_spec(name) is None), None):
        return f"needs the library {missing}, which is not installed", "pip install 'quantkit[tasks]'"
    if needs == "essays" and offline:
        fix = (
            "niah_single_1, niah_multikey_2 and niah_multikey_3 need none; or leave --data-dir out where there is a network"
        )
        return "hides needles in essays that the harness fetches from the hub", fix
    return None


def needle_settings(scratch: Path, model: Path, length: int) -> dict[str, Any]:
    """The task's `metadata`: how long its texts are, and a tokenizer to count them with.

    The harness would load the model's with `trust_remote_code`, so it gets a copy in `scratch` that has no code beside it.
    Raises ConfigError where the model reads less than `length`.
    """
    limit = load_json(model / "config.json").get("max_position_embeddings")
    if isinstance(limit, int) and length > limit:
        problem = f"--ruler-length {length} is longer than {model} reads: its max_position_embeddings is {limit}"
        raise ConfigError(problem, f"give at most {limit}")
    folder = scratch / "tokenizer"
    folder.mkdir(exist_ok=True)
    load_tokenizer(model).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}), "utf-8")
    return {"max_seq_lengths": [length], "tokenizer": str(folder)}
