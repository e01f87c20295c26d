"""`--method learned` from the command to OUT: what is learned, what is kept and said, and a kill between units."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checkpoint.bounds import range_of, wrong_scales
from quantkit.checkpoint.verify import verify
from quantkit.errors import ConfigError
from quantkit.job import pipeline
from quantkit.job.partial import WORK, partial_of
from quantkit.quant.solve import rtn
from quantkit.recipe import Recipe
from quantkit.scheme import Scheme, weight_only
from tests.conftest import SMALL
from tests.helpers.paths import ROOT

# Few steps and few tokens, since each of them is a step of Python.
FEW: dict[str, Any] = {
    **SMALL,
    "scheme": "W4A16",
    "samples": 17,
    "seq_len": 32,
    "method": "learned",
    "steps": 5,
    "fisher_tokens": 128,
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    from tests.conftest import CONFIG, random_weights, write_checkpoint

    root = tmp_path_factory.mktemp("learned")
    model = write_checkpoint(root / "model", CONFIG, random_weights(CONFIG))
    return model, root / "out", quantkit.quantize(model, root / "out", Recipe(**FEW))


def test_each_part_is_learned_on_its_own_tokens_and_judged_by_others(learned: tuple[Path, Path, dict[str, Any]]) -> None:
    _, _, record = learned
    rows = record["linears"]
    assert all("learned" in row for row in rows.values())
    for name, row in rows.items():
        said, part = row["learned"], name.rsplit(".", 1)[0]
        together = [other["learned"] for key, other in rows.items() if key.rsplit(".", 1)[0] == part]
        assert len({(one["kept"], one["steps"], one.get("after")) for one in together}) == 1
        if said["kept"]:
            assert (
                row["method"] == "learned" and said["after"] < said["before"] and not row["fallback"] and said["flipped"] > 0
            )
        else:
            assert row["method"] in ("gptq", "rtn") and "GPTQ's codes are kept" in row["fallback"]
            assert record["fallbacks"][name] == row["fallback"]
    assert {row["method"] for row in rows.values()} > {"learned"}  # some were, some were not
    assert record["learning"] == {
        "linears": len(rows),
        "kept": sum(row["method"] == "learned" for row in rows.values()),
        "overflowed": 0,
    }
    assert {row["learned"]["metric"] for row in rows.values() if row["learned"]["steps"]} == {"fisher"}
    attention, experts = (
        next(row["learned"] for name, row in rows.items() if part in name) for part in ("0.self_attn", "0.mlp.experts")
    )
    assert attention["tokens"] == 16 * 32 > experts["tokens"] > 0


@pytest.mark.slow
def test_what_was_learned_loses_less_than_gptq(tmp_path: Path) -> None:
    """On the bundled model, which is trained, with a tenth of the tokens that learning asks for."""
    model, few = ROOT / "examples" / "tiny-hunyuan", {"scheme": "W4A16", "samples": 80, "seq_len": 512}
    kl = {}
    for method in ("learned", "gptq"):
        quantkit.quantize(model, tmp_path / method, Recipe(method=method, **few))  # type: ignore[arg-type]
        kl[method] = quantkit.evaluate(tmp_path / method, model, "stdlib-held-out", windows=24)["kl"]["mean"]
    assert kl["learned"] < 0.85 * kl["gptq"]


def test_verify_knows_the_method_and_what_bounds_it(learned: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    model, out, record = learned
    assert not verify(out, model).not_checked
    stated = json.loads((out / "quantkit.json").read_text())["linears"]
    assert {row["method"] for row in stated.values()} == {row["method"] for row in record["linears"].values()} >= {"learned"}
    weight, grid = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), weight_only(4, True, 32).weight
    q = rtn(weight, Scheme("W4A16", grid))
    for factor, methods in ((0.75, ("learned", "gptq")), (1.3, ("learned",)), (-1.3, ("learned",)), (1.5, ()), (0.3, ())):
        scaled = dataclasses.replace(q, scale=(q.scale.float() * factor).bfloat16())
        for method in ("learned", "gptq"):
            assert bool(wrong_scales(scaled, range_of(weight, grid), method).any()) == (method not in methods), (
                factor,
                method,
            )


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "lost", [pytest.param((), marks=pytest.mark.slow), ("tape-*.f32", "ahead-*.f32")], ids=["nothing", "both"]
)
def test_killed_between_units_and_after_tapes_were_lost_it_ends_with_the_same_bytes(
    lost: tuple[str, ...], learned: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    model, out, _ = learned

    def stop(step: pipeline.Step) -> None:
        if step.layer == 3:
            raise Killed

    with pytest.raises(Killed):
        quantkit.quantize(model, tmp_path / "out", Recipe(**FEW), progress=stop)
    work = partial_of(tmp_path / "out") / WORK
    assert {path.name for path in work.glob("*.f32")} >= {"tape-2.f32", "ahead-2.f32"}
    for pattern in lost:
        for path in work.glob(pattern):
            path.unlink()
    layers = list[int]()
    record = quantkit.quantize(model, tmp_path / "out", Recipe(**FEW), progress=lambda step: layers.append(step.layer))
    assert layers == [2, 3] and record["resumed_at_unit"] == 2
    assert (tmp_path / "out" / "SHA256SUMS").read_bytes() == (out / "SHA256SUMS").read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in out.iterdir()}


def test_only_four_bits_are_learned_unless_a_rule_says_so(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model(num_hidden_layers=2)
    rules = [{"match": "*.layers.1.self_attn.*", "method": "learned", "steps": 2}]
    recipe = Recipe(**{**FEW, "attention": "W8A16", "shared_experts": "FP8_DYNAMIC", "rules": rules, "fisher_tokens": 0})
    record = quantkit.quantize(model, tmp_path / "out", recipe)
    for name, row in record["linears"].items():
        wanted = "experts" in name or "layers.1.self_attn" in name
        assert ("learned" in row) == wanted, name
        assert wanted or row["method"] == "rtn"
    assert record["linears"]["model.layers.1.self_attn.q_proj"]["learned"]["steps"] == 2


def test_what_cannot_be_learned_is_refused(model: Path, tmp_path: Path) -> None:
    rules = [{"match": "*.self_attn.*", "scheme": "FP8_DYNAMIC", "method": "learned"}]
    with pytest.raises(ConfigError, match="its codes are no integers"):
        quantkit.quantize(model, tmp_path / "out", Recipe(**{**FEW, "rules": rules}))
    with pytest.raises(ConfigError, match="'steps'"):
        Recipe(**{**FEW, "steps": 0})
    with pytest.raises(ConfigError, match="2 windows"):
        quantkit.quantize(model, tmp_path / "out", Recipe(**{**FEW, "samples": 1}))


def test_an_expert_without_a_token_keeps_its_codes_and_says_so(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model(num_hidden_layers=2)
    shard = next(path for path in model.glob("*.safetensors") if "model.layers.0.mlp.gate.wg.weight" in load_file(path))
    tensors = load_file(shard)
    router = tensors["model.layers.0.mlp.gate.wg.weight"]
    router[3] = router[:3].float().mean(0).bfloat16()  # a mean is never the largest
    save_file(tensors, shard, metadata={"format": "pt"})
    record = quantkit.quantize(model, tmp_path / "out", Recipe(**FEW))
    idle = {name: row for name, row in record["linears"].items() if row["coverage"] == 0}
    assert len(idle) == 3
    for row in idle.values():
        assert "no token to learn from: GPTQ's codes are kept" in row["fallback"] and row["learned"]["steps"] == 0


def test_an_effort_is_a_bundle_that_what_is_given_overrides(model: Path) -> None:
    from quantkit.checkpoint.reader import CheckpointReader
    from quantkit.job.plan import make_plan

    def learned(**fields: Any) -> set[str]:
        plan = make_plan(CheckpointReader(model), Recipe(scheme="W4A16", group_size=32, **fields))
        return {ref.role.value for ref in plan.spec.linears() if plan.methods[ref.key].name == "learned"}

    assert learned(effort="fast") == learned() == set()
    assert learned(effort="default") == {"attention", "shared_experts"}
    assert learned(effort="best") == {"attention", "shared_experts", "experts"}
    assert learned(effort="best", attention="W8A16") == {"shared_experts", "experts"}
    assert learned(effort="best", method="gptq") == set()
    mix = make_plan(CheckpointReader(model), Recipe(group_size=32, effort="default"))
    assert any("effort default changes nothing" in note for note in mix.notes)
    assert Recipe(effort="best").samples == 854 and Recipe(effort="best", seq_len=2048).samples == 214
    assert Recipe(effort="best", samples=9).samples == 9 and Recipe(effort="default").samples is None


def test_a_plan_says_what_learning_reads_and_needs(model: Path) -> None:
    from quantkit.checkpoint.reader import CheckpointReader
    from quantkit.job.plan import make_plan, summary

    reader = CheckpointReader(model)
    plain = summary(make_plan(reader, Recipe(**{**FEW, "method": "gptq", "steps": None, "fisher_tokens": None})))
    plan = summary(make_plan(reader, Recipe(**FEW)))
    assert plan["tape_bytes"] > plain["tape_bytes"] and "learning" not in plain
    assert plan["learning"]["steps"] == 5 and plan["learning"]["tokens"] == 16 * 32
    assert any("fresh" in note for note in plan["notes"])
    tuned = summary(make_plan(reader, Recipe(**FEW, tune=True)))
    assert tuned["tape_bytes"] > plan["tape_bytes"] and tuned["tuning"]["steps"] == 1
    assert tuned["tuning"]["codes_read"] == 2 * tuned["output_bytes"]
