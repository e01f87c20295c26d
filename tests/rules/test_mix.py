"""The recipe that nobody has to name, INT4 experts and INT8 elsewhere: what it is, and which engine takes it how."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from quantkit.allocate.engine import Served, ties
from quantkit.allocate.groups import groups_of, named
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.engines.held import Deployment
from quantkit.engines.registry import engine_named
from quantkit.job.plan import make_plan
from quantkit.model.registry import build_spec
from quantkit.recipe import Recipe
from quantkit.scheme import labels
from tests.helpers.architectures import RELEASED, TINY
from tests.helpers.commands import cli, run
from tests.helpers.sparse import write_sparse


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hunyuan-Large's own shapes, two layers of them."""
    folder = tmp_path_factory.mktemp("large") / "model"
    write_sparse(folder, {**RELEASED["hunyuan-large"], "num_hidden_layers": 2})
    return folder


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v2", "llama"])
def test_what_every_token_passes_has_8_bits(name: str, tmp_path: Path) -> None:
    """In a model with experts; a dense one is INT4."""
    write_sparse(tmp_path / "model", TINY[name])
    plan = make_plan(CheckpointReader(tmp_path / "model"), Recipe(group_size=16, seq_len=64))
    names = {ref.key: ref.role.value for ref in plan.spec.linears()}
    seen = Counter((names[key] == "experts", scheme.name) for key, scheme in plan.schemes.items() if scheme)
    assert set(seen) == ({(False, "W4A16")} if name == "llama" else {(True, "W4A16"), (False, "W8A16")})


def test_a_named_scheme_is_for_all(large: Path) -> None:
    reader = CheckpointReader(large)
    assert labels(make_plan(reader, Recipe(scheme="W4A16")).schemes.values()).keys() == {Recipe(scheme="W4A16").scheme_of(
        next(iter(make_plan(reader, Recipe()).spec.linears()))
    )}  # fmt: skip
    mixed = make_plan(reader, Recipe(attention="FP8_DYNAMIC"))
    assert {k: v["schemes"] for k, v in mixed.by_role().items()} == {
        "attention": ["FP8_DYNAMIC"], "shared_experts": ["W8A16"], "experts": ["W4A16"]
    }  # fmt: skip


@pytest.mark.parametrize(("tp", "size"), [(1, None), (2, 64), (4, 32)])
def test_the_largest_groups_that_an_engine_loads(large: Path, tp: int, size: int | None) -> None:
    """18304 inputs over 4 devices are 4576: no whole groups of 128 or 64. With --ep experts are not cut, but the shared one
    is."""
    found = run("plan", large, "--engine", "vllm", "--tp", tp)
    assert found["engine"]["loads"] and found["recipe"]["group_size"] == size
    assert run("plan", large, "--engine", "vllm", "--tp", 4, "--ep")["recipe"]["group_size"] == 32
    assert cli("plan", large, "--engine", "vllm", "--tp", 4, "--group-size", 128).exit_code == 1  # a size that was named


def test_what_an_allocation_may_choose_is_asked_of_each_kind(large: Path) -> None:
    """Over 4 devices down_proj takes groups of 32; q, k and v are cut by rows, and take any."""
    reader = CheckpointReader(large)
    spec = build_spec(reader.config, "test")
    schemes = tuple(map(named, ("W4A16", "W4A16:32", "W8A16", "W8A16:32")))
    served = Served(engine_named("vllm"), Deployment(tp=4), reader.config)
    found = {group.kind: len(group.choices) for (group,) in ties(served, spec, groups_of(spec, Recipe(), schemes))}
    assert found["attention q_proj,k_proj,v_proj"] == found["shared_experts gate_proj,up_proj"] == 4
    assert found["shared_experts down_proj"] == found["experts"] == 2
    cost = run("sensitivity", large, "-o", "x.json", "--dry-run", "--engine", "vllm", "--tp", 4)
    assert cost["schemes"] == ["W4A16:32", "W8A16:32"]


@pytest.mark.parametrize(
    ("engine", "code", "said"),
    [
        (("vllm",), 0, "vllm 0.33: loads"),
        (("transformers",), 0, "transformers 5.24: loads"),
        (("vllm", "--hardware", "zen"), 1, "attention would load with --attention FP8_DYNAMIC, or --attention W8A8"),
        (("vllm", "--hardware", "cpu"), 1, "has no kernel for quantized experts"),
    ],
    ids=["vllm", "transformers", "zen", "cpu"],
)
def test_engines(large: Path, engine: tuple[str, ...], code: int, said: str) -> None:
    done = cli("plan", large, "--engine", *engine)
    assert done.exit_code == code and said in " ".join(done.stdout.split()), done.stdout
