"""Recipes that speak per rule, an option for dense MLPs, and the table of code types behind every scheme."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import quantkit
from quantkit.checkpoint.inspect import inspect
from quantkit.checkpoint.opened import schemes_of
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.verify import verify
from quantkit.engines.held import Deployment
from quantkit.engines.rules import Verdict, view_of
from quantkit.errors import ConfigError
from quantkit.formats import compressed_tensors as ct
from quantkit.formats.packing import unpack_rows
from quantkit.job.plan import Plan, make_plan
from quantkit.kernels.reference import linear, round_activation
from quantkit.model.registry import build_spec
from quantkit.model.spec import OPTION_ROLES, Linear, Role
from quantkit.quant.method import DAMPING, PARAMETERS, Method
from quantkit.quant.rounding import rtn
from quantkit.quant.solve import solve
from quantkit.recipe import Recipe, Rule
from quantkit.scheme import CODES, PRESETS, Activation, Grid, Kind, Packing, Scheme, Strategy, scheme_named
from quantkit.stats import LinearStats
from tests.conftest import CONFIG, SMALL, random_weights, write_checkpoint
from tests.helpers.architectures import RELEASED, TINY
from tests.helpers.engine_models import broken, seen, verdict

Make = Callable[..., Path]
EXPERT, Q = "model.layers.0.mlp.experts.1.up_proj", "model.layers.2.self_attn.q_proj"
HUNYUAN = build_spec(CONFIG, "test")


def rules(*said: dict[str, Any], **fields: Any) -> Recipe:
    return Recipe.of({"scheme": "W4A16", **SMALL, **fields, "rules": said})


def planned(folder: Path, *said: dict[str, Any], **fields: Any) -> Plan:
    return make_plan(CheckpointReader(folder), rules(*said, **fields))


def ref_of(key: str) -> Linear:
    return next(ref for ref in HUNYUAN.linears() if ref.key == key)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for shard in CheckpointReader(folder).shards for key, tensor in load_file(folder / shard).items()}


# Rules


def test_what_a_rule_leaves_out_comes_from_role_and_recipe() -> None:
    recipe = rules(
        {"match": "model.layers.0.*", "group_size": 16},
        {"match": "model.layers.0.*", "scheme": "W8A8"},  # never: the first that matches wins
        {"match": "*.layers.2.*", "method": "gptq", "damping": 0.3},
        {"match": "*.layers.3.*", "scheme": "W8A16", "group_size": 64, "method": "gptq"},
        attention="W8A16",
        damping=0.02,
    )
    found = {key: (recipe.scheme_of(ref_of(key)), recipe.method_of(ref_of(key))) for key in (EXPERT, Q)}
    assert found == {
        EXPERT: (scheme_named("W4A16", 16), Method("gptq", 0.02)),
        Q: (scheme_named("W8A16", 32), Method("gptq", 0.3)),
    }
    third, first = ref_of("model.layers.3.mlp.shared_mlp.down_proj"), ref_of("model.layers.1.self_attn.o_proj")
    assert (recipe.scheme_of(third), recipe.method_of(third)) == (scheme_named("W8A16", 64), Method("gptq", 0.02))
    assert (recipe.scheme_of(first), recipe.method_of(first)) == (scheme_named("W8A16", 32), Method("rtn"))
    assert Recipe.of({"keep": ["*"]}).method_of(first) is None


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "nothing said": ({}, ("'rules.0'", "says nothing", "scheme, group_size, method, damping")),
    "another field": ({"scheme": "W8A8", "bits": 4}, ("'rules.0.bits' is 4", "match, scheme, group_size, method, damping")),
    "a parameter of another method": ({"method": "rtn", "damping": 0.1}, ("'rules.0.damping' is 0.1", "rtn has no such")),
    "no such method": ({"method": "awq"}, ("'rules.0.method' is 'awq'", "rtn", "gptq")),
    "damping of nothing": ({"damping": 0}, ("'rules.0.damping' is 0", "greater than 0")),
    "damping without end": ({"damping": float("inf")}, ("'rules.0.damping' is inf", "finite")),
    "damping in words": ({"damping": "0.1"}, ("'rules.0.damping' is '0.1'", "number")),
    "small groups": ({"group_size": 4}, ("'rules.0.group_size' is 4", "8")),
    "no such scheme": ({"scheme": "W3"}, ("unknown scheme 'W3'", "W4AFP8")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rules_are_refused_by_field(case: str) -> None:
    said, words = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        rules({"match": "*", **said})
    assert all(word in str(error.value) for word in words)


def test_a_general_parameter_is_of_the_general_method() -> None:
    with pytest.raises(ConfigError, match="'damping' is 0.1: .*rtn has no such parameter"):
        Recipe(method="rtn", damping=0.1)


IDLE: dict[str, tuple[list[dict[str, Any]], str]] = {
    "groups of a scheme without": ([{"match": "*", "scheme": "W8A8", "group_size": 32}], "group_size is 32"),
    "damping where nothing is solved": ([{"match": "*", "scheme": "W8A8", "damping": 0.1}], "damping is 0.1"),
    "a method of what is kept": ([{"match": "*.self_attn.*", "scheme": "BF16", "method": "gptq"}], "method is gptq"),
    "behind another": ([{"match": "*", "scheme": "W8A8"}, {"match": "*.layers.0.*", "method": "rtn"}], "method is rtn"),
}


@pytest.mark.parametrize("case", IDLE)
def test_a_field_that_changes_nothing_is_refused(case: str, model: Path) -> None:
    said, words = IDLE[case]
    with pytest.raises(ConfigError, match=f"rule '.*': {words}, and changes nothing"):
        planned(model, *said)


def test_a_field_may_say_nothing_of_some(model: Path) -> None:
    """Groups for whatever has groups, in a layer that mixes schemes."""
    plan = planned(model, {"match": "*.layers.0.*", "group_size": 16}, attention="FP8_DYNAMIC", damping=0.1)
    assert plan.schemes[EXPERT] == scheme_named("W4A16", 16)
    assert plan.schemes["model.layers.0.self_attn.q_proj"] == PRESETS["FP8_DYNAMIC"]
    assert not [note for note in plan.notes if "changes nothing" in note]
    idle = planned(model, scheme="W8A8", damping=0.1, group_size=None)
    assert "damping 0.1 changes nothing: no linear is made by a method that has it" in idle.notes


def test_an_expert_does_not_stay_behind_a_rule_that_speaks_of_groups(model: Path) -> None:
    with pytest.raises(ConfigError, match="would stay in BF16 because the general scheme is BF16"):
        planned(model, {"match": "*.experts.*", "group_size": 16}, scheme="BF16", attention="W4A16", shared_experts="W4A16")


@pytest.mark.parametrize(
    ("match", "said", "words"),
    [
        ("*.q_proj", {"method": "rtn"}, r"q_proj' and '.*k_proj' get different methods \(rtn; gptq, damping 0.05\)"),
        ("*.experts.*.gate_proj", {"damping": 0.5}, r"\(gptq, damping 0.5; gptq, damping 0.05\)"),
        ("*.shared_mlp.up_proj", {"method": "rtn"}, r"up_proj' get different methods \(gptq, damping 0.05; rtn\)"),
    ],
)
def test_what_is_solved_as_one_has_one_method(match: str, said: dict[str, Any], words: str, model: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        planned(model, {"match": match, **said})
    assert planned(model, {"match": match, "method": "gptq", "damping": 0.05}).methods  # as the others have it


def test_groups_of_experts_are_a_layers(model: Path) -> None:
    """Engines fuse a layer's experts, down_proj too: one size of groups for all; another layer may have another."""
    for match in ("*.experts.1.*", "*.experts.*.down_proj"):
        with pytest.raises(ConfigError, match="get different schemes, but engines fuse a layer's experts"):
            planned(model, {"match": match, "group_size": 16})
    assert planned(model, {"match": "*.layers.1.mlp.experts.*", "group_size": 16}).methods


def test_a_recipe_without_the_new_fields_is_what_it_was(model: Path) -> None:
    """In quantkit.json and in the job's key: the same names, and rules with what they say alone."""
    plan = planned(model, {"match": "*.layers.0.*", "scheme": "BF16"}, method="rtn", scheme="W8A8")
    assert plan.resolved == {
        **dict.fromkeys(("scheme", "experts", "shared_experts", "attention"), "W8A8"),
        "linears": [],
        "rules": [{"match": "*.layers.0.*", "scheme": "BF16"}],
        "group_size": 32,
        "method": "rtn",
    }
    calibrated = planned(model).resolved
    assert planned(model, damping=DAMPING[0]).resolved == calibrated and "damping" not in calibrated
    assert planned(model, damping=0.1).resolved == {**calibrated, "damping": 0.1}


def test_each_rule_is_done_as_it_says(model: Path, tmp_path: Path) -> None:
    """One run with four rules: the method, groups and damping of each linear, read back from what lies on disk."""
    said = [
        {"match": "*.layers.0.self_attn.*", "method": "rtn"},
        {"match": "*.layers.0.mlp.experts.*", "group_size": 16},
        {"match": "*.layers.1.mlp.experts.*", "damping": 1.0},
        {"match": "*.layers.1.mlp.shared_mlp.*", "scheme": "W8A8", "method": "gptq"},
    ]
    quantkit.quantize(model, tmp_path / "out", rules(*said, samples=4, seq_len=32))
    stated = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert stated["recipe"]["rules"] == said
    assert {key for key, row in stated["linears"].items() if row["method"] == "rtn"} == {
        f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"
    }
    out, source, scheme = tensors(tmp_path / "out"), tensors(model), scheme_named("W4A16", 32)
    assert scheme is not None
    first = "model.layers.0.self_attn.q_proj"
    codes = {key: rtn(source[f"{key}.weight"].float(), scheme).codes for key in (first, Q)}
    same = {key: torch.equal(unpack_rows(out[f"{key}.weight_packed"], 4), codes[key]) for key in codes}
    assert same == {first: True, Q: False}  # the other is GPTQ's
    assert out[f"{EXPERT}.weight_scale"].shape == (64, 8)
    report = verify(tmp_path / "out", model)  # by what the method of each linear allows
    assert not report.not_checked

    schemes = schemes_of(CheckpointReader(tmp_path / "out"))
    assert {schemes[EXPERT], schemes[Q]} == {scheme_named("W4A16", 16), scheme_named("W4A16", 32)}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    sizes = [group["weights"]["group_size"] for group in config["config_groups"].values()]
    assert sorted(sizes, key=str) == [16, 32, None] and config["format"] == "mixed-precision"
    assert inspect(tmp_path / "out")["roles"]["experts"]["schemes"] == ["W4A16 in groups of 16", "W4A16 in groups of 32"]
    assert inspect(tmp_path / "out")["roles"]["attention"]["schemes"] == ["W4A16 in groups of 32"]


def test_damping_decides_codes_and_is_raised_from_where_it_is(make_model: Make, tmp_path: Path) -> None:
    folder = make_model(num_hidden_layers=2)
    for name, fields in {"usual": {}, "same": {"damping": 0.05}, "more": {"damping": 1.0}}.items():
        quantkit.quantize(folder, tmp_path / name, rules(**{**fields, "samples": 4, "seq_len": 32}))
    sums = {name: (tmp_path / name / "SHA256SUMS").read_text() for name in ("usual", "same", "more")}
    assert sums["usual"] == sums["same"] != sums["more"]
    assert Method("gptq", 0.01).dampings == (0.01, *DAMPING) and Method("gptq", 0.2).dampings == (0.2, 1.0)
    assert Method("gptq", 3.0).dampings == (3.0,)
    with pytest.raises(ValueError, match="rtn has no damping"):
        Method("rtn", 0.1)

    scheme, weight, stats = scheme_named("W4A16", 32), torch.randn(8, 64), LinearStats.empty(64, torch.device("cpu"), True)
    assert scheme is not None
    stats.add(torch.randn(3, 64))
    stats.hessian -= 0.1 * stats.hessian.diagonal().mean() * torch.eye(64)  # its least eigenvalue is negative
    fallbacks = [solve([weight], scheme, Method("gptq", d), stats)[0][1].fallback for d in (0.05, 0.2, 0.15)]
    assert fallbacks == ["damping raised to 0.2", "", ""]


def test_parameters_are_fields_of_rules_and_recipes() -> None:
    """Or a method that gets one would have it in the table alone."""
    for parameter in {name for names in PARAMETERS.values() for name in names}:
        assert parameter in Rule.model_fields and parameter in Recipe.model_fields


# Roles


def test_every_role_of_a_known_model_has_an_option() -> None:
    for name, config in {**TINY, **RELEASED}.items():
        assert {ref.role for ref in build_spec(config, name).linears()} <= set(OPTION_ROLES), name
    assert {role.value for role in OPTION_ROLES} <= Recipe.model_fields.keys()
    assert Role.SHARED_EXPERTS.option == "--shared-experts"


def test_dense_mlps_have_an_option(tmp_path: Path, model: Path) -> None:
    config = TINY["llama"]
    folder = write_checkpoint(tmp_path / "llama", config, random_weights(config))
    recipe = Recipe(scheme="W8A8", mlp="FP8_DYNAMIC")
    quantkit.quantize(folder, tmp_path / "out", recipe)
    schemes = schemes_of(CheckpointReader(tmp_path / "out"))
    assert {key: s.name for key, s in schemes.items() if s} == {
        key: "FP8_DYNAMIC" if ".mlp." in key else "W8A8" for key in schemes
    }
    stated = json.loads((tmp_path / "out" / "quantkit.json").read_text())["recipe"]
    alike = make_plan(CheckpointReader(folder), Recipe(scheme="W8A8", mlp="W8A8"))
    assert stated["mlp"] == "FP8_DYNAMIC" and "mlp" not in alike.resolved
    with pytest.raises(ConfigError, match="mlp is W8A8, and .* has no linear with the role mlp"):
        planned(model, mlp="W8A8")


# Code types


def test_the_table_of_code_types() -> None:
    assert {key: (row.smallest, row.largest, row.dtype) for key, row in CODES.items()} == {
        (Kind.INT, 4): (-8, 7, "I8"),
        (Kind.INT, 8): (-128, 127, "I8"),
        (Kind.FLOAT, 8): (-448, 448, "F8_E4M3"),
    }
    packing = {name: scheme.packing.value for name, scheme in PRESETS.items()}
    words, floats = dict.fromkeys(("W4A16", "W4A16_ASYM", "W4AFP8", "W8A16"), "pack-quantized"), "float-quantized"
    assert packing == {**words, "W8A8": "int-quantized", "FP8_DYNAMIC": floats, "FP8": floats, "FP8_BLOCK": floats}
    assert {grid.scale_dtype for grid in (s.weight for s in PRESETS.values())} == {row.scale_dtype for row in CODES.values()}


def test_what_has_no_place_on_disk_is_said() -> None:
    int8 = Activation(Kind.INT, Strategy.TOKEN, dynamic=True)
    with pytest.raises(ConfigError, match="4-bit int codes with inputs rounded to int have no place"):
        _ = Scheme("W4A8", Grid(Kind.INT, 4, Strategy.CHANNEL), int8).packing
    with pytest.raises(ConfigError, match="no 3-bit int codes"):
        _ = Grid(Kind.INT, 3, Strategy.CHANNEL).qmax


def test_int4_with_fp8_inputs_is_written_as_int4() -> None:
    scheme, ref = scheme_named("W4AFP8", 32), Linear("a.b", 16, 64, Role.EXPERTS)
    assert scheme is not None and scheme.packing is Packing.WORDS
    q = rtn(torch.randn(16, 64), scheme)
    written = ct.encode(ref, scheme, q)
    assert {name.rpartition(".")[2]: (t.dtype, tuple(t.shape)) for name, t in written.items()} == {
        "weight_packed": (torch.int32, (16, 8)),
        "weight_scale": (torch.bfloat16, (16, 2)),
        "weight_shape": (torch.int64, (2,)),
    }
    assert torch.equal(unpack_rows(written["a.b.weight_packed"], 4), q.codes)
    assert scheme.misfit(16, 60) and not scheme.misfit(16, 64)


def test_a_model_of_int4_with_fp8_inputs(model: Path, tmp_path: Path) -> None:
    """Written, read back, verified, run: the codes of W4A16 by rounding, with inputs rounded to FP8 per token."""
    for name in ("W4AFP8", "W4A16"):
        quantkit.quantize(model, tmp_path / name, Recipe(scheme=name, method="rtn", group_size=32))
    mine, plain = tensors(tmp_path / "W4AFP8"), tensors(tmp_path / "W4A16")
    assert mine.keys() == plain.keys() and all(torch.equal(mine[key], plain[key]) for key in mine)
    config = json.loads((tmp_path / "W4AFP8" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert config["format"] == group["format"] == "pack-quantized"
    inputs = group["input_activations"]
    assert (inputs["type"], inputs["num_bits"], inputs["strategy"], inputs["dynamic"]) == ("float", 8, "token", True)
    assert not verify(tmp_path / "W4AFP8", model).not_checked

    loaded = quantkit.load(tmp_path / "W4AFP8", kernels="reference")
    ref = next(ref for ref in loaded.spec.linears() if ref.key == EXPERT)
    scheme, x = schemes_of(loaded.weights.reader)[EXPERT], torch.randn(5, ref.in_features)
    assert scheme == scheme_named("W4AFP8", 32)
    q = loaded.weights.quantized(ref, scheme)
    rounded = round_activation(x, Activation(Kind.FLOAT, Strategy.TOKEN, dynamic=True), None)
    assert not torch.equal(rounded, x)
    torch.testing.assert_close(loaded.weights.linear(ref, x), rounded @ q.dequantize().T)
    torch.testing.assert_close(linear(x, q, scheme.activation), rounded @ q.dequantize().T)
    assert {row["kernel"] for row in loaded.explain()} == {"reference"}


def test_int4_in_bytes_is_refused() -> None:
    """As compressed-tensors writes that preset unless it is told otherwise."""
    said = ct.written({EXPERT: PRESETS["W4AFP8"]}, [])
    assert ct.parse(said, [EXPERT]) == {EXPERT: PRESETS["W4AFP8"]}
    said["config_groups"]["group_0"]["format"] = "int-quantized"
    with pytest.raises(ConfigError, match="format 'int-quantized', and its numbers are of pack-quantized"):
        ct.parse(said, [EXPERT])


def test_engines_see_the_groups_of_each_layer(model: Path) -> None:
    """The experts of one layer in groups of 16: its own row, refused where only its groups are."""
    recipe = rules({"match": "*.layers.1.mlp.experts.*", "group_size": 16}, group_size=32)
    schemes = {ref.key: recipe.scheme_of(ref) for ref in HUNYUAN.linears()}
    said = ct.written(schemes, [moe.router.key for moe in HUNYUAN.moes()])
    view = view_of(HUNYUAN, CONFIG, schemes, said, Deployment(tp=2))
    assert "vllm.one-expert-scheme" not in broken("vllm", view) and "vllm.targets" not in broken("vllm", view)
    # 64 / 4 = 16 columns on a device: whole groups of 16, half groups of 32.
    cut = broken("vllm", view_of(HUNYUAN, CONFIG, schemes, said, Deployment(tp=4)))["vllm.moe-group-shards"]
    assert cut == ["64 / 4 = 16 columns, groups of 32"] * 3
    schemes["model.layers.1.mlp.experts.2.down_proj"] = scheme_named("W4A16", 32)
    mixed = broken("vllm", view_of(HUNYUAN, CONFIG, schemes, said, Deployment()))["vllm.one-expert-scheme"]
    assert mixed == ["experts of one layer have W4A16 in groups of 16, W4A16 in groups of 32"]


@pytest.mark.parametrize(
    ("engine", "kind", "hardware", "expected"),
    [
        ("vllm", "mixtral", "sm90", Verdict.UNKNOWN),
        ("vllm", "mixtral", "gpu", Verdict.UNKNOWN),
        ("vllm", "mixtral", "sm100", Verdict.REFUSED),
        ("vllm", "mixtral", "zen", Verdict.UNKNOWN),
        ("vllm", "hunyuan", "sm90", Verdict.REFUSED),
        ("sglang", "mixtral", "gpu", Verdict.REFUSED),
        ("transformers", "mixtral", "gpu", Verdict.UNKNOWN),
    ],
)
def test_no_engine_is_said_to_load_int4_with_fp8_inputs(engine: str, kind: str, hardware: str, expected: Verdict) -> None:
    assert verdict(engine, seen(kind, "W4AFP8", hardware=hardware)) is expected
