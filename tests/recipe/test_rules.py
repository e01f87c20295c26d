"""A recipe with rules costs what one without does: the config grows with the kinds of linears, not with their number."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit.checkpoint.reader import CheckpointReader
from quantkit.formats import compressed_tensors
from quantkit.job.plan import make_plan
from quantkit.model.registry import build_spec
from quantkit.recipe import Recipe
from quantkit.scheme import Scheme, scheme_named
from tests.conftest import CONFIG, SMALL

RULES = [{"match": "model.layers.0.*", "scheme": "BF16"}, {"match": "model.layers.[13].mlp.*", "scheme": "W8A16"}]
RECIPE = Recipe.of({"scheme": "W4A16", "method": "rtn", "rules": RULES, **SMALL})


def written(layers: int, experts: int) -> tuple[dict[str, Scheme | None], list[str], list[str]]:
    """What each linear gets, the targets, and the ignored names."""
    spec = build_spec({**CONFIG, "num_hidden_layers": layers, "num_experts": experts}, "test")
    schemes = {ref.key: RECIPE.scheme_of(ref) for ref in spec.linears()}
    said = compressed_tensors.written(schemes, [moe.router.key for moe in spec.moes()])
    return schemes, [t for group in said["config_groups"].values() for t in group["targets"]], said["ignore"]


def test_a_config_names_sets_of_layers() -> None:
    small, large = written(8, 4), written(64, 16)
    assert len(small[0]) == 8 * 17 + 4 * 2 and len(large[0]) == 64 * 53 + 32 * 2
    assert [len(part) for part in large[1:]] == [len(part) for part in small[1:]] and len(large[1] + large[2]) < 40
    for schemes, targets, ignored in (small, large):
        for key, scheme in schemes.items():
            hits = [t for t in targets if (re.match(t[3:], key) if t.startswith("re:") else t == key)]
            assert len(hits) == (scheme is not None), key
            assert any(re.match(i[3:], key) if i.startswith("re:") else i == key for i in ignored) == (scheme is None)
    assert r"re:^model\.layers\.(?:1|3)\.mlp\.experts\.\d+\.up_proj$" in large[1]


def test_a_plan_with_rules_asks_of_each_name_once_for_each_pattern(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matches that are tried, for twice the layers: twice as many, where all against all would be four times."""
    tried: list[str] = []

    class Counted(compressed_tensors._Names):
        def catch(self, key: str) -> bool:
            tried.extend([key] * (len(self.patterns) + 1))
            return super().catch(key)

    monkeypatch.setattr(compressed_tensors, "_Names", Counted)
    counts = []
    for layers in (8, 16):
        plan = make_plan(CheckpointReader(make_model(f"m{layers}", num_hidden_layers=layers)), RECIPE)
        counts.append(len(tried) / len(plan.schemes))
        tried.clear()
    assert counts[1] < 1.1 * counts[0] < 200, counts


def test_foreign_configs_that_list_every_name_are_read_by_looking_up() -> None:
    """llm-compressor's `ignore` holds each linear by itself."""
    w4, keys = scheme_named("W4A16", 128), [f"model.layers.{i}.q_proj" for i in range(20_000)]
    said = compressed_tensors.written(dict.fromkeys(keys, w4), [])
    half, names = {**said, "ignore": keys[::2]}, []

    class Name(str):
        def __eq__(self, other: object) -> bool:
            names.append(other)
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    read = compressed_tensors.parse(half, [Name(key) for key in keys])
    assert list(read.values())[:2] == [None, w4] and len(names) <= 3 * len(keys)


@pytest.mark.parametrize("seed", range(20))
def test_patterns_catch_the_chosen_and_no_others(seed: int) -> None:
    """Any subset of layers and experts, and names without numbers, with one at an end, or with several families."""
    draw = random.Random(seed)
    every = [f"m.layers.{i}.mlp.experts.{j}.up-x" for i in range(12) for j in range(5)] + ["head", "m.3", "m.layers.7.o"]
    every += [f"m.layers.{i}.{name}" for i in range(12) for name in ("q", "k.0.x")]
    w4, w8 = scheme_named("W4A16"), scheme_named("W8A16")
    by_layer = {key: w4 if draw.random() < 0.5 else w8 for key in {re.sub(r"\.\d+\.up", ".up", key) for key in every}}
    assigned = {key: by_layer[re.sub(r"\.\d+\.up", ".up", key)] if seed % 2 else draw.choice((w4, w8)) for key in every}
    wanted = {key for key, scheme in assigned.items() if scheme == w4}
    shuffled = dict(draw.sample(list(assigned.items()), len(assigned)))
    found = compressed_tensors._targets(wanted, shuffled, w4)
    assert found == compressed_tensors._targets(wanted, assigned, w4)  # whatever the order, the same bytes
    for key in every:
        hits = [t for t in found if (re.match(t[3:], key) if t.startswith("re:") else t == key)]
        assert len(hits) == (key in wanted), (key, hits)
    if seed % 2:  # whole sets of experts
        assert len(found) <= 6
