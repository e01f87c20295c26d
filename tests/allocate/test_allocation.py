"""From sensitivities to a recipe that the plan and an engine take, on the small random model of conftest.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from quantkit.allocate import measuring
from quantkit.allocate.choose import Target, allocate, bytes_of
from quantkit.allocate.engine import Served, ties
from quantkit.allocate.groups import groups_of, label, named
from quantkit.allocate.measuring import Extent, measure, measuring_of
from quantkit.allocate.sensitivity import Sensitivity
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.engines.held import Deployment
from quantkit.engines.registry import engine_named
from quantkit.errors import ConfigError
from quantkit.job.plan import make_plan
from quantkit.model.registry import build_spec
from quantkit.recipe import Recipe
from tests.conftest import CONFIG
from tests.helpers.architectures import TINY
from tests.helpers.commands import accepted, cli, refused, run

SCHEMES = ("W4A16", "W8A16")
RECIPE = Recipe(samples=4, seq_len=48, group_size=32)
OPTIONS = ("--samples", 4, "--seq-len", 48, "--group-size", 32)
EXTENT = Extent(tuple(named(name, 32) for name in SCHEMES), windows=3)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sensitivity]:
    from tests.conftest import random_weights, write_checkpoint

    folder = write_checkpoint(tmp_path_factory.mktemp("sensed") / "model", CONFIG, random_weights(CONFIG))
    reader = CheckpointReader(folder)
    out = folder.parent / "s.json"
    return folder, measure(reader, measuring_of(reader, RECIPE, EXTENT), out, "cpu")


def test_each_group_loses_less_in_more_bits(measured: tuple[Path, Sensitivity]) -> None:
    folder, found = measured
    assert Sensitivity.read(folder.parent / "s.json") == found and not (folder.parent / "s.json.partial").exists()
    spec = build_spec(CONFIG, "test")
    assert sorted(key for row in found.groups for key in row.linears) == sorted(ref.key for ref in spec.linears())
    assert all(0 < row.kl["W8A16:32"] < row.kl["W4A16:32"] for row in found.groups)
    assert len(found.anchors) == 2 and found.anchors[0].kl > found.anchors[1].kl > 0
    assert found.tokens == 3 * 47 and found.passes == 1


def test_a_variant_is_the_model_with_that_group_quantized(measured: tuple[Path, Sensitivity], tmp_path: Path) -> None:
    """Its KL is that of a checkpoint which `quantize` makes with that group alone, on the same windows: of a group of the
    first layer, whose inputs are the BF16 model's in both."""
    import quantkit
    from quantkit.calib.documents import read_documents
    from quantkit.calib.tokenizer import load_text_tokenizer
    from quantkit.calib.tokens import spare_windows
    from quantkit.measure.divergence import score
    from quantkit.run.model import Model

    folder, found = measured
    rules = [{"match": "model.layers.0.self_attn.[qkv]_proj", "scheme": "W4A16"}]
    fields = {**RECIPE.model_dump(), "scheme": "BF16", "experts": "BF16", "attention": "BF16", "shared_experts": "BF16"}
    quantkit.quantize(folder, tmp_path / "out", Recipe.of({**fields, "rules": rules}), device="cpu")
    ids = spare_windows(load_text_tokenizer(folder), read_documents("stdlib"), 4, 3, 48, 0)
    place = torch.device("cpu")
    p, q = (Model(path, place).logits(ids)[:, :-1].flatten(0, 1) for path in (folder, tmp_path / "out"))
    expected = float(score(p, q, ids[:, 1:].flatten()).kl.mean())
    assert found.kl("layer 0 attention q_proj,k_proj,v_proj", "W4A16:32") == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("target", [Target(bits=6.0), Target(nbytes=700_000), Target(kl=1e-3)], ids=["bits", "size", "kl"])
def test_a_target_is_met_by_an_ordinary_recipe(measured: tuple[Path, Sensitivity], target: Target, tmp_path: Path) -> None:
    folder, found = measured
    reader = CheckpointReader(folder)
    if target.nbytes:
        target = Target(nbytes=allocate(reader, RECIPE, found, Target(bits=6.5)).point.nbytes)
    if target.kl:
        target = Target(kl=allocate(reader, RECIPE, found, Target(bits=6.5)).point.kl)
    allocation = allocate(reader, RECIPE, found, target)
    plan = make_plan(reader, allocation.recipe)
    assert plan.output_bytes == allocation.point.nbytes
    if target.bits:
        assert allocation.point.bits <= 6.0
        assert len(set(allocation.chosen.values())) == 2  # a mixture
    elif target.nbytes:
        assert plan.output_bytes <= target.nbytes
    else:
        assert allocation.point.kl <= (target.kl or 0) * (1 + 1e-9)
    by_key = {key: row.name for row in found.groups for key in row.linears}
    assert all(label(scheme) == allocation.chosen[by_key[key]] for key, scheme in plan.schemes.items())
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(allocation.recipe.model_dump(mode="json", exclude_none=True)))
    assert make_plan(reader, Recipe.read(file, {})).schemes == plan.schemes
    sizes, losses = ([getattr(p, name) for p in allocation.curve] for name in ("nbytes", "kl"))
    assert sizes == sorted(sizes) and losses == sorted(losses, reverse=True) and len(sizes) > 4


def test_what_cannot_be_met_says_the_least(measured: tuple[Path, Sensitivity]) -> None:
    folder, _ = measured
    given = ("plan", folder, *OPTIONS, "--sensitivity", folder.parent / "s.json")
    said = refused(*given, "--target-bits", 3)
    assert "3 bits a weight cannot be met with W4A16:32, W8A16:32: the least is 4.5" in said
    unmeasured = refused("plan", folder, *OPTIONS, "--target-bits", 3)  # known before anything is measured
    assert "3 bits a weight cannot be met with W4A16:32, W8A16:32: the least is 4.5" in unmeasured
    assert "100.0 kB cannot be met" in (said := refused(*given, "--target-size", "100kB")) and "442.5 kB in all" in said
    assert "the least is" in refused(*given, "--target-kl", 1e-9)
    assert "no size" in refused(*given, "--target-size", "much")
    assert "2 targets" in refused(*given, "--target-bits", 5, "--target-kl", 1)
    assert "without a target" in refused(*given)
    assert "--scheme W8A16 and a target" in refused(*given, "--target-bits", 5, "--scheme", "W8A16")
    said = refused(*given, "--target-bits", 5, "--schemes", "W4A16,FP8_DYNAMIC")
    assert "was measured with --schemes W4A16:32,W8A16:32, and W4A16:32,FP8_DYNAMIC is asked for" in said
    assert "measured with method" in refused(*given, "--target-bits", 5, "--method", "rtn")


def test_another_models_sensitivities_are_refused(
    measured: tuple[Path, Sensitivity], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    file, other = measured[0].parent / "s.json", make_model(intermediate_size=96)
    said = refused("plan", other, *OPTIONS, "--target-bits", 5, "--sensitivity", file)
    assert "these sensitivities are not of" in said
    (tmp_path / "x.json").write_text(json.dumps({"schema_version": 1}))
    assert "holds no sensitivities" in refused("plan", other, "--target-bits", 5, "--sensitivity", tmp_path / "x.json")
    assert "are not there" in refused("plan", other, "--target-bits", 5, "--sensitivity", tmp_path / "y.json")


def test_what_the_recipe_says_is_no_choice(measured: tuple[Path, Sensitivity]) -> None:
    folder, found = measured
    reader = CheckpointReader(folder)
    recipe = RECIPE.model_copy(update={"experts": "W4A16"})
    allocation = allocate(reader, recipe, found, Target(bits=5.5))
    plan = make_plan(reader, allocation.recipe)
    assert all(s and s.name == "W4A16" for key, s in plan.schemes.items() if ".experts." in key)
    kept = Recipe.of({**recipe.model_dump(), "keep": ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj"]})
    plan = make_plan(reader, allocate(reader, kept, found, Target(bits=6.5)).recipe)
    assert plan.schemes["model.layers.1.self_attn.o_proj"] is None


def test_readings_are_committed_and_resumed(
    measured: tuple[Path, Sensitivity], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several readings find what one finds; one that was done is not read again."""
    folder, found = measured
    reader = CheckpointReader(folder)
    small = measuring_of(reader, RECIPE, Extent(EXTENT.schemes, windows=3, tapes=15 * 3 * 48 * 4 * 384))
    assert len(small.passes) > 1 and small.variants == 40 and small.summary()["readings"] == len(small.passes)
    ran: list[int] = []
    real = measuring.run_pass

    def failing(*arguments: Any) -> Any:
        ran.append(len(arguments[4]))
        if len(ran) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(measuring, "run_pass", failing)
    out = tmp_path / "s.json"
    with pytest.raises(KeyboardInterrupt):
        measure(reader, small, out, "cpu")
    assert not out.exists()
    again = measure(reader, small, out, "cpu")
    assert len(ran) == 2 + len(small.passes) - 1 and again.groups == found.groups and again.exponent == found.exponent


def test_plan_says_what_measuring_costs(model: Path) -> None:
    found = run("plan", model, *OPTIONS, "--target-bits", 5, "--schemes", "W4A16,W8A16")
    assert found["measuring"]["variants"] == 40 and found["measuring"]["readings"] == 1
    assert found["measuring"]["read_bytes"] == found["source_bytes"] and "allocation" not in found


@pytest.mark.parametrize("engine", ["vllm", "transformers", "sglang"])
def test_ties_are_what_the_rules_say(engine: str) -> None:
    """transformers gives the experts of all layers one scheme; the others take one for each layer."""
    config = {**TINY["qwen3_moe"], "mlp_only_layers": [], "decoder_sparse_step": 1}
    spec = build_spec(config, "test")
    groups = groups_of(spec, Recipe(), (named("W4A16:32"), named("W8A16:32")))
    served = Served(engine_named(engine), Deployment(), config)
    tied = [len(members) for members in ties(served, spec, groups) if members[0].role.value == "experts"]
    assert tied == ([len(spec.layers)] if engine == "transformers" else [1] * len(spec.layers))


def test_an_engine_that_lacks_a_scheme_is_not_given_it() -> None:
    config = {**TINY["qwen3_moe"], "mlp_only_layers": [], "decoder_sparse_step": 1}
    spec = build_spec(config, "test")
    groups = groups_of(spec, Recipe(), (named("W4A16:32"), named("W8A8"), named("W8A16:32")))
    served = Served(engine_named("vllm"), Deployment(hardware="zen"), config)
    for members in ties(served, spec, groups):
        assert {label(s) for s in members[0].choices} == {"W4A16:32", "W8A8"}
    with pytest.raises(ConfigError, match="loads this model in no combination of W8A16:32"):
        ties(served, spec, groups_of(spec, Recipe(), (named("W8A16:32"),)))


def test_bands_put_neighbouring_layers_together() -> None:
    spec = build_spec({**CONFIG, "num_hidden_layers": 8}, "test")
    groups = groups_of(spec, Recipe(), (named("W4A16:32"), named("W8A16:32")), bands=2)
    assert {g.layers for g in groups if g.role.value == "experts"} == {(0, 1, 2, 3), (4, 5, 6, 7)}
    assert {g.layers for g in groups if g.name.endswith("k_proj,v_proj")} == {(0, 2), (4, 6)}  # cross layers have none


def test_sizes() -> None:
    assert [bytes_of(text) for text in ("200GB", "1.5 MB", "2GiB", "77")] == [200 * 10**9, 1_500_000, 2**31, 77]


def test_from_the_command_line_to_the_report(model: Path, tmp_path: Path) -> None:
    """One command measures, chooses and quantizes; run.json and the reports have it, and the recipe stands for it."""
    out = tmp_path / "out"
    choice = ("--schemes", "W4A16,W8A16", "--sensitivity-windows", 2, "--bands", 1, "--engine", "vllm")
    given = ("quantize", model, "-o", out, *OPTIONS, "--target-bits", 6, *choice)
    record = run(*given)
    assert record["allocation"]["bits_per_weight"] <= 6 and record["output_bytes"] == record["allocation"]["output_bytes"]
    assert (tmp_path / "out.sensitivity.json").is_file()
    accepted(*given, "--quiet")  # finished: the same again, without another measurement
    accepted("verify", out)
    assert cli("eval", out, "--baseline", model, "--seq-len", 48, "--windows", 4, "--samples", 0).exit_code == 0
    report = json.loads((out / "eval" / "report.json").read_text())
    assert report["allocation"]["predicted_kl"] == record["allocation"]["predicted_kl"]
    assert "Allocated for 6 bits a weight" in (out / "eval" / "report.md").read_text()
    assert "Allocation of bits" in (out / "eval" / "report.html").read_text()
