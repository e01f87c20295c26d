"""What learned rounding will read and need, from the recipe alone, and the refusal of what it cannot learn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.calib.extent import STEP_TOKENS, apart
from quantkit.errors import ConfigError, counted
from quantkit.model.spec import ModelSpec
from quantkit.quant.method import STEPS, Method
from quantkit.recipe import Recipe

__all__ = ["learning", "learning_notes", "tape_bytes", "tuning"]

_LONGEST = 8192  # tokens of a window, which a step holds whole
# How often a token passes a layer: the BF16 model ahead; the parts that are not quantized yet, once to add them and once to
# take them away; GPTQ's statistics, twice where two inputs are wanted; quantized, to be added there and to go on.
_PASSES = 7
_STEP_PASSES = 3  # forward, and backward for inputs and for weights


def _windows(recipe: Recipe) -> int:
    """Of the text that is learned from; a plan has chosen how many."""
    assert recipe.samples is not None
    return recipe.samples


def _steps(methods: Mapping[str, Method]) -> int:
    return max((method.steps for method in methods.values() if method.name == "learned"), default=0)


def learning(recipe: Recipe, methods: Mapping[str, Method], fisher_windows: int) -> dict[str, Any]:
    """In numbers. tokens: learned from. apart: by which iterates are judged. epochs: how often a part that reads all tokens
    learns from each. passes: how often all tokens pass a layer, where backward counts as two. source_reads: of each weight,
    by GPTQ, ahead, to be taken away from the rest, to be learned; and forward and backward in the Fisher pass."""
    steps, total = _steps(methods), _windows(recipe) * recipe.seq_len
    judged_by = apart(_windows(recipe)) * recipe.seq_len
    read = steps * min(STEP_TOKENS, total - judged_by)
    return {
        "linears": sum(method.name == "learned" for method in methods.values()),
        "steps": steps,
        "tokens": total - judged_by,
        "apart": judged_by,
        "epochs": round(read / (total - judged_by), 2),
        "fisher_tokens": fisher_windows * recipe.seq_len,
        "passes": round(_PASSES + (_STEP_PASSES * read + (_STEP_PASSES + 1) * fisher_windows * recipe.seq_len) / total, 2),
        "source_reads": 6 if fisher_windows else 4,
    }


def learning_notes(recipe: Recipe, methods: Mapping[str, Method]) -> list[str]:
    """What a user should know before it is begun. Raises ConfigError."""
    steps = _steps(methods)
    if not steps and not recipe.tune:
        return []
    if _windows(recipe) < 2:
        raise ConfigError("learning needs 2 windows: one to learn from, one to judge by", "raise --samples")
    if recipe.seq_len > _LONGEST:
        raise ConfigError(
            f"a step of learning holds whole windows, and seq_len is {recipe.seq_len}", f"give --seq-len {_LONGEST} or less"
        )
    fresh, needed = (_windows(recipe) - apart(_windows(recipe))) * recipe.seq_len, steps * STEP_TOKENS
    if fresh >= needed:  # also where only scales are tuned
        return []
    enough = -(-needed * 16 // (15 * recipe.seq_len))
    return [
        f"{counted(steps, 'step')} of learning read {needed:,} tokens, and {fresh:,} fresh ones are given: each is read "
        f"{needed / fresh:.1f} times, and more text would lose less (--samples {enough})"
    ]


def tape_bytes(spec: ModelSpec, tokens: int, fisher_tokens: int) -> int:
    """Scratch disk of learning beside calibration's: the BF16 stream's hidden states in and out, MLP input and K/V, and what
    other parts add. Of the Fisher pass: states between groups of layers, two gradients, MLP input and K/V, and metrics."""
    hidden, kv = spec.hidden, spec.layers[0].attention.kv_width
    boundaries = fisher_tokens * ((len(spec.groups()) + 4) * hidden + kv) if fisher_tokens else 0
    metrics = 2 * len(spec.layers) * hidden**2 if fisher_tokens else 0
    return 4 * (tokens * (4 * hidden + kv) + boundaries + metrics)


def tuning(recipe: Recipe, output_bytes: int) -> dict[str, Any]:
    """Of tuning, in numbers. codes_read: bytes, where codes are not held in memory."""
    fresh = (_windows(recipe) - apart(_windows(recipe))) * recipe.seq_len
    steps = max(1, min(STEPS, fresh // STEP_TOKENS))
    return {"steps": steps, "tokens": min(fresh, steps * STEP_TOKENS), "codes_read": 2 * steps * output_bytes}
