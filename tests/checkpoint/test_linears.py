"""`--linears` on a checkpoint that has all that a glob can catch: what is taken, what wildcards leave, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantkit
from quantkit.checkpoint.opened import schemes_of
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.errors import ConfigError
from quantkit.job.plan import make_plan
from quantkit.model.names import Special, specials
from quantkit.recipe import Recipe
from tests.helpers.commands import refused, run

CONFIG = {"model_type": "mamba9", "text_config": {"vocab_size": 48, "num_hidden_layers": 2, "num_experts": 2}}
ROUTERS = {f"model.layers.{i}.mlp.gate" for i in range(2)}
GATES = {f"model.layers.{i}.mlp.shared_expert_gate" for i in range(2)}
MTP = {"model.layers.2.eh_proj", "model.layers.2.self_attn.q_proj", "mtp.fc"}
AROUND = {"model.embed_tokens", "lm_head"}


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (48, 64), "lm_head.weight": (48, 64)}
    found["model.norm.weight"] = (64,)
    for i in range(2):
        prefix = f"model.layers.{i}"
        found |= {f"{prefix}.self_attn.{name}_proj.weight": (64, 64) for name in "qkvo"}
        found |= {f"{prefix}.input_layernorm.weight": (64,), f"{prefix}.self_attn.q_proj.bias": (64,)}
        found |= {f"{prefix}.mlp.gate.weight": (2, 64), f"{prefix}.mlp.shared_expert_gate.weight": (1, 64)}
        for e in range(2):
            part = f"{prefix}.mlp.experts.{e}"
            found |= {f"{part}.gate_proj.weight": (64, 64), f"{part}.up_proj.weight": (64, 64)}
            found |= {f"{part}.down_proj.weight": (64, 64)}
    return {**found, **{f"{key}.weight": (4, 64) for key in MTP}}


LINEARS = {name.removesuffix(".weight") for name in shapes() if "_proj.weight" in name} - MTP


def checkpoint(folder: Path, more: dict[str, tuple[int, ...]], config: dict[str, Any]) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {
        name: torch.randn(shape, generator=generator).bfloat16() for name, shape in {**shapes(), **more}.items()
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda config=CONFIG, **more: checkpoint(tmp_path / "model", more.get("tensors", {}), config)


def planned(folder: Path, *linears: str, **fields: Any) -> tuple[set[str], tuple[str, ...]]:
    """The linears that a run would quantize, and its notes."""
    plan = make_plan(CheckpointReader(folder), Recipe.of({"scheme": "FP8_DYNAMIC", "linears": linears, **fields}))
    return {key for key, scheme in plan.schemes.items() if scheme}, plan.notes


def test_everything_is_every_linear_of_a_layer(make: Make) -> None:
    taken, notes = planned(make(), "*")
    assert taken == LINEARS
    said = "\n".join(notes)
    for special, key in (("router", "model.layers.0.mlp.gate"), ("head", "lm_head"), ("embedding", "model.embed_tokens")):
        assert f"({special}), such as '{key}'" in said
    assert "wildcards leave 2 tensors in BF16 (gate with one output)" in said and "(multi-token prediction)" in said


@pytest.mark.parametrize(
    ("pattern", "more"),
    [
        ("lm_head", {"lm_head"}),
        ("model.embed_tokens", {"model.embed_tokens"}),
        ("model.layers.0.mlp.gate", {"model.layers.0.mlp.gate"}),
        ("*.gate", ROUTERS),
        ("*.mlp.shared_expert_gate", GATES),
        ("model.layers.2.*_proj", {"model.layers.2.self_attn.q_proj"}),
        ("model.layers.2.eh_proj", {"model.layers.2.eh_proj"}),
        ("mtp.fc", {"mtp.fc"}),
    ],
)
def test_what_is_named_is_taken(pattern: str, more: set[str], make: Make) -> None:
    assert planned(make(), "*", pattern)[0] == LINEARS | more


@pytest.mark.parametrize("pattern", ["*head", "*gate", "*embed*", "*.eh_*", "model.layers.2*", "mtp*"])
def test_a_wildcard_that_catches_only_these_is_refused(pattern: str, make: Make) -> None:
    message = refused("plan", make(), "--linears", pattern, "--scheme", "W8A8")
    assert "matches only what wildcards do not take" in message and "spell '" in message


FUSED = {f"model.layers.{i}.mlp.experts.gate_up_proj": (2, 128, 64) for i in range(2)}
NOT_LINEAR: dict[str, tuple[str, tuple[int, ...]]] = {
    "*experts*": ("model.layers.0.mlp.experts.gate_up_proj", (2, 128, 64)),
    "*_proj": ("model.layers.0.mlp.experts.down_proj", (2, 64, 64)),
    "*.down_proj*": ("model.layers.0.mlp.experts.down_proj.weight", (2, 64, 64)),
    "*proj*": ("model.layers.0.self_attn.q_proj.bias", (64,)),
    "*_proj.bias": ("model.layers.0.self_attn.q_proj.bias", (64,)),
    "*.*": ("model.layers.0.input_layernorm.weight", (64,)),
    "*layers*": ("model.layers.0.input_layernorm.weight", (64,)),
    "*.k_pro?*": ("model.layers.0.self_attn.k_proj_table", (8, 64)),
    "*conv*": ("model.layers.0.conv1d.weight", (64, 1, 4)),
    "*": ("model.layers.0.conv1d.weight", (64, 1, 4)),
}


@pytest.mark.parametrize("pattern", NOT_LINEAR)
def test_what_is_no_linear_is_refused_by_name(pattern: str, make: Make, tmp_path: Path) -> None:
    name, shape = NOT_LINEAR[pattern]
    folder = make(tensors={name: shape})
    message = refused("quantize", folder, "-o", tmp_path / "out", "--linears", pattern, "--scheme", "W8A8")
    assert f"'{name.removesuffix('.weight')}', BF16 {list(shape)}" in message
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_said_to_stay_it_stays(make: Make, tmp_path: Path) -> None:
    """A 3-D tensor cannot be quantized; --keep says that its user knows."""
    folder = make(tensors=FUSED)
    options = ("--linears", "*", "--scheme", "W8A8")
    assert "the format holds one matrix a tensor" in refused("plan", folder, *options)
    out = tmp_path / "out"
    record = run("quantize", folder, "-o", out, *options, "--keep", "*.gate_up_proj")
    assert set(record["linears"]) == LINEARS
    assert record["recipe"]["rules"] == [{"match": "*.gate_up_proj", "scheme": "BF16"}]
    assert {key for key, scheme in schemes_of(CheckpointReader(out)).items() if scheme} == LINEARS
    share = run("verify", out, "--source", folder)["bf16_share"]
    fused, small = 2 * 2 * 128 * 64, 2 * 3 * 64 + 3 * 4 * 64
    assert share["of_matrices_in_layers"] == pytest.approx((fused + small) / (fused + small + len(LINEARS) * 64 * 64))
    assert run("inspect", out)["bf16_share"] == record["bf16_share"] == share


JOINED = {
    "*.self_attn.q_proj": ("q_proj", "k_proj"),
    "*.self_attn.[kv]_proj": ("q_proj", "k_proj"),
    "*.gate_proj": ("gate_proj", "up_proj"),
    "*.experts.1.*": ("experts.0", "experts.1"),
    "*.experts.*.down_proj": ("gate_proj", "down_proj"),
}


@pytest.mark.parametrize("pattern", JOINED)
def test_what_engines_fuse_must_agree(pattern: str, make: Make) -> None:
    message = refused("plan", make(), "--linears", pattern, "--scheme", "W8A8")
    assert "get different schemes" in message and all(name in message for name in JOINED[pattern])


@pytest.mark.parametrize("match", ["*.gate_up_proj", "*.mlp.experts.*", "model.layers.0.mlp.gate"])
def test_a_rule_for_what_no_pattern_takes_is_refused(match: str, make: Make) -> None:
    """It would do nothing, and its user would believe that it was done."""
    folder = make(tensors=FUSED)
    keep = [{"match": name, "scheme": "BF16"} for name in ("*.gate_up_proj", "*.experts.*")]
    rule = {"match": match, "scheme": "W8A16"}
    with pytest.raises(ConfigError, match="matches no linear"):
        planned(folder, "*.self_attn.?_proj", rules=[*keep, rule], group_size=32)
    assert planned(folder, "*.self_attn.?_proj", rules=keep)[0]


def test_keep_must_match_something(make: Make) -> None:
    assert "rule '*.nothing' matches no linear" in refused(
        "plan", make(), "--linears", "*", "--scheme", "W8A8", "--keep", "*.nothing"
    )


@pytest.mark.parametrize(("first", "second"), [("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"), ("wq", "wv")])
def test_other_names_of_what_is_fused(first: str, second: str, make: Make) -> None:
    more = {f"model.layers.0.mix.{name}.weight": (64, 64) for name in (first, second)}
    folder = make(tensors=more)
    message = refused("plan", folder, "--linears", f"*.{first}", "--scheme", "W8A8")
    assert f"'model.layers.0.mix.{first}' and 'model.layers.0.mix.{second}' get different schemes" in message
    rules = [{"match": f"*.{first}", "scheme": "W8A16"}]
    with pytest.raises(ConfigError, match="get different schemes"):
        planned(folder, "*", rules=rules, group_size=32)
    assert len(planned(folder, "*", rules=[*rules, {"match": f"*.{second}", "scheme": "W8A16"}], group_size=32)[0])


def test_more_than_5_percent_is_not_left_unsaid(make: Make, tmp_path: Path) -> None:
    folder, out = make(), tmp_path / "out"
    options = ("--linears", "*.mlp.*_proj", "--scheme", "W8A8")
    message = refused("quantize", folder, "-o", out, *options)
    assert "of the bytes of the matrices inside the layers would stay in BF16" in message
    assert "'model.layers.*.self_attn.k_proj' with 9." in message and "--keep 'model.layers.*.self_attn.q_proj'" in message
    fix = message.split("meant: ")[1].split()
    record = run("quantize", folder, "-o", out, *options, *(word.strip("'") for word in fix))
    assert {key for key in record["linears"]} == {key for key in LINEARS if ".mlp." in key}
    assert 0.39 < record["bf16_share"]["of_matrices_in_layers"] < 0.45
    assert record["bf16_share"]["of_all"] > record["bf16_share"]["of_matrices_in_layers"]


def test_a_tensor_that_no_pattern_matches_counts(make: Make) -> None:
    """Fused experts that a narrow pattern goes past are found by their bytes."""
    message = refused("plan", make(tensors=FUSED), "--linears", "*.self_attn.?_proj", "--scheme", "W8A8")
    assert "'model.layers.*.mlp.experts.gate_up_proj' with " in message


def test_a_library_call_too(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing says that they should"):
        quantkit.quantize(make(), tmp_path / "out", Recipe(scheme="W8A8", linears=("*.self_attn.?_proj",)))


SPECIAL = {
    "transformer.wte": ((50, 64), Special.EMBEDDING),
    "transformer.wpe": ((128, 64), Special.EMBEDDING),
    "output": ((99, 64), Special.HEAD),
    "thing.table": ((48, 64), Special.EMBEDDING),
    "transformer.output_layer": ((99, 64), Special.HEAD),
    "score": ((8, 64), Special.HEAD),
    "model.layers.2.shared_head.head": ((48, 64), Special.HEAD),
    "model.layers.0.block_sparse_moe.gate": ((8, 64), Special.ROUTER),
    "model.layers.0.mlp.gate.wg": ((8, 64), Special.ROUTER),
    "model.layers.0.mlp.router.gate": ((8, 64), Special.ROUTER),
    "model.layers.0.mlp.router.layer": ((8, 64), Special.ROUTER),
    "model.layers.1.shared_expert_gate": ((1, 64), Special.GATE),
    "model.layers.2.mlp.down_proj": ((64, 64), Special.MTP),
    "model.language_model.layers.7.mlp.down_proj": ((64, 64), Special.MTP),
    "mtp.layers.0.mlp.down_proj": ((64, 64), Special.MTP),
    "model.mtp_layers.0.eh_proj": ((64, 64), Special.MTP),
}


@pytest.mark.parametrize("key", SPECIAL)
def test_what_is_special(key: str) -> None:
    shape, special = SPECIAL[key]
    assert special in specials(key, shape, CONFIG).values()


@pytest.mark.parametrize(
    "key",
    [
        *("model.layers.1.mlp.gate_proj", "model.layers.0.self_attn.q_b_proj", "visual.blocks.30.attn.qkv", "h.1.mlp.c_fc"),
        *("model.layers.0.linear_attn.in_proj_qkvz", "model.layers.1.mlp.experts.5.w1", "model.layers.1.attn.output.dense"),
    ],
)
def test_what_is_not(key: str) -> None:
    assert specials(key, (64, 64), CONFIG) == {}


def test_a_width_within_a_layer_may_be_the_size_of_a_vocabulary() -> None:
    """As in models of sound, whose codes are few: what lies in a layer is a linear, and counts as one."""
    for key in ("model.layers.1.mlp.down_proj", "talker.code_predictor.model.layers.0.self_attn.o_proj"):
        assert specials(key, (48, 64), {**CONFIG, "talker_config": {"vocab_size": 48}}) == {}


def test_layers_are_counted_in_the_language_model() -> None:
    config = {**CONFIG, "vision_config": {"num_hidden_layers": 27}}
    assert specials("model.language_model.layers.2.mlp.down_proj", (64, 64), config) == {"2": Special.MTP}
    assert specials("model.layers.26.mlp.down_proj", (64, 64), {"vision_config": config["vision_config"]}) == {}


def test_a_matrix_of_codes_is_not_passed_over(make: Make) -> None:
    """It has no scale that could be read: nobody quantized it so that it could be used."""
    folder = make()
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="'model.layers.0.self_attn.q_proj', I8"):
        planned(folder, "*")
