"""`plan` and `verify --engine` on checkpoints quantized for real, whole and damaged: exit codes 0, 1, 2 and what is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantkit
from quantkit.checkpoint.by_name import spec_of
from quantkit.checkpoint.opened import misfits, schemes_of
from quantkit.checkpoint.reader import INDEX, CheckpointReader
from quantkit.cli import main
from quantkit.engines.held import Deployment
from quantkit.engines.on_file import random_experts
from quantkit.engines.registry import ENGINES, engine_named
from quantkit.engines.replay import parameter, replay
from quantkit.engines.rules import Verdict
from quantkit.recipe import Recipe
from tests.conftest import CONFIG, SMALL, random_weights, write_checkpoint
from tests.helpers.commands import accepted, refused
from tests.helpers.engine_models import seen

A13B: dict[str, Any] = {
    **CONFIG,
    "architectures": ["HunYuanMoEV1ForCausalLM"],
    "model_type": "hunyuan_v1_moe",
    "use_cla": False,
    "moe_topk": [2] * 4,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
}
EXPERT = "model.layers.1.mlp.experts.2"


def ask(*arguments: object, code: int) -> dict[str, Any]:
    """Run a command with --json, which must exit with that code."""
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hunyuan-A13B and a Hunyuan-Large in BF16; of the first an INT4 and a static FP8, of the second an INT4."""
    folder = tmp_path_factory.mktemp("engines")
    large = {**CONFIG, "intermediate_size": 11 * 32, "num_hidden_layers": 2}  # 11 is odd, as 143 is in the real one
    for name, config in (("a13b", A13B), ("large", large)):
        write_checkpoint(folder / name, config, random_weights(config))
    quantkit.quantize(folder / "a13b", folder / "int4", Recipe(scheme="W4A16", method="rtn", group_size=32))
    quantkit.quantize(folder / "a13b", folder / "fp8", Recipe(scheme="FP8", **SMALL))
    quantkit.quantize(folder / "large", folder / "large-int4", Recipe(scheme="W4A16", method="rtn", group_size=32))
    return folder


def test_plan_says_what_loads_and_what_would(models: Path) -> None:
    command = ("plan", models / "a13b", "--group-size", 64, "--engine")
    found = ask(*command, "vllm", code=0)["engine"]
    assert found["loads"] and found["version"] == "0.33" and {row["verdict"] for row in found["weights"]} == {"loads"}
    assert found["verdict"] == "loads" and found["format"] == "compressed-tensors"
    found = ask(*command, "vllm", "--tp", 4, code=1)["engine"]  # 128 / 4 = 32 columns, half a group
    (row,) = [row for row in found["weights"] if row["weight"] == "w2"]
    assert (
        row["verdict"] == "does not load" and row["layers"] == [0, 1] and row["on_device"] == {"rows": [128], "columns": 32}
    )
    assert [finding["rule"] for finding in row["findings"]] == ["vllm.moe-group-shards"]
    assert {"--group-size 32", "--ep", "--experts FP8_DYNAMIC", "--tp 2"} <= set(row["instead"])
    assert "--group-size 64" not in row["instead"]
    for words in row["instead"][:3]:  # what it proposes is true for the experts
        again = ask(*command, "vllm", "--tp", 4, *words.split(), code=1 if "group" not in words else 3)["engine"]
        assert all(r["verdict"] == "loads" for r in again["weights"] if r["role"] == "experts"), words
    assert ask(*command, "transformers", code=0)["engine"]["loads"]
    assert not ask(*command, "transformers", "--experts", "W8A8", code=1)["engine"]["loads"]
    assert ask(*command, "vllm==0.32.1", code=0)["engine"]["version"] == "0.32"
    assert ask(*command, "transformers==5.23.0", code=0)["engine"]["version"] == "5.23"


def test_plan_without_an_engine_is_the_dry_run(models: Path, tmp_path: Path) -> None:
    options = ("--attention", "FP8_DYNAMIC", "--group-size", 32)
    dry = ask("quantize", models / "large", "-o", tmp_path / "out", "--dry-run", *options, code=0)
    dry["notes"].remove(next(note for note in dry["notes"] if "is nearly all of one kind" in note))  # plan reads no text
    assert ask("plan", models / "large", *options, code=0) == dry
    (models / "large" / "tokenizer.json").rename(tmp_path / "tokenizer.json")  # plan needs headers only
    without = ask("plan", models / "large", *options, code=0)
    assert without.pop("notes")[1:] == dry.pop("notes") and without == dry  # the first says that there is none
    (tmp_path / "tokenizer.json").rename(models / "large" / "tokenizer.json")


def test_hunyuan_large_loads_where_quantkit_brings_it(models: Path) -> None:
    for engine, rules, code in (
        ("vllm", ["vllm.plugin", "vllm.marlin-int8-inputs"], 0),
        ("sglang", ["sglang.architecture"], 1),
        ("transformers", ["transformers.register"], 0),
    ):
        found = ask("plan", models / "large", "--group-size", 32, "--engine", engine, code=code)["engine"]
        assert [f["rule"] for f in found["model"]] == rules and "'hunyuan'" in found["model"][0]["why"]
        again = ask("verify", models / "large-int4", "--engine", engine, code=code)
        assert again["problems"] == [] and [f["rule"] for f in again["model"]] == rules
    found = ask("plan", models / "large", "--group-size", 32, "--engine", "vllm", "--pp", 2, code=1)["engine"]
    assert "vllm.plugin-stages" in [f["rule"] for f in found["model"]]
    found = ask("plan", models / "large", "--group-size", 32, "--engine", "vllm", "--tp", 2, code=1)["engine"]
    refused_there = {row["weight"] for row in found["weights"] if row["verdict"] == "does not load"}
    assert refused_there == {"w2", "down_proj"}  # 352 / 2 = 5.5 groups of 32, in routed and shared experts
    found = ask("plan", models / "large", "--group-size", 32, "--engine", "vllm", "--tp", 2, "--ep", code=1)["engine"]
    assert {row["weight"] for row in found["weights"] if row["verdict"] == "does not load"} == {"down_proj"}


def test_tables_for_people(models: Path) -> None:
    result = CliRunner().invoke(main, ["plan", str(models / "large"), "--group-size", "32", "--engine", "vllm", "--tp", "2"])
    assert result.exit_code == 1 and "vllm 0.33: does not load" in result.stdout
    for words in ("vllm 0.33 on gpu, tp 2", "vllm.plugin", "352 / 2 = 176", "would load with --ep"):
        assert words in " ".join(result.stdout.split()), words
    accepted("verify", models / "int4", "--engine", "vllm")
    result = CliRunner().invoke(main, ["verify", str(models / "int4"), "--engine", "vllm", "--tp", "2"])
    assert result.exit_code == 3 and "vllm 0.33: nobody looked" in result.stdout


def test_whole_checkpoints_load(models: Path) -> None:
    for name in ("int4", "fp8"):
        for engine in ("vllm", "sglang", "transformers"):
            found = ask("verify", models / name, "--engine", engine, code=0)
            assert found["loads"] and found["problems"] == [] and found["counts"] == {}
    assert ask("verify", models / "int4", "--engine", "vllm", "--tp", 8, code=1)["problems"] == []  # 4 heads


def test_names_as_loaders_map_them() -> None:
    assert parameter("model.layers.3.self_attn.k_proj.weight_scale", {}) == (
        "model.layers.3.self_attn.qkv_proj.weight_scale",
        "k_proj",
    )
    assert parameter(f"{EXPERT}.up_proj.weight_packed", {}) == ("model.layers.1.mlp.experts.w13_weight_packed", "2.up_proj")
    assert parameter(f"{EXPERT}.down_proj.weight_packed", {})[0] == "model.layers.1.mlp.experts.w2_weight_packed"
    assert parameter("model.layers.0.mlp.gate.wg.weight", {}) == ("model.layers.0.mlp.gate.wg.weight", "")
    mixtral = "model.layers.0.block_sparse_moe.experts.5.gate_proj.weight"
    same = parameter(mixtral.replace("gate_proj", "w1"), {})
    assert parameter(mixtral, {"gate_proj": "w1"}) == same != parameter(mixtral, {})


Change = Callable[[dict[str, Tensor]], object]


def rewritten(models: Path, tmp_path: Path, name: str, change: Change) -> Path:
    """A copy of a checkpoint with its tensors changed, in one file."""
    out = Path(shutil.copytree(models / name, tmp_path / "damaged"))
    tensors: dict[str, Tensor] = {}
    for shard in sorted(out.glob("*.safetensors")):
        tensors.update(load_file(shard))
        shard.unlink()
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / INDEX).unlink()
    return out


def drop(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if key.startswith(f"{EXPERT}.")]:
        del tensors[key]


def rename(tensors: dict[str, Tensor]) -> None:
    tensors[f"{EXPERT}.upp_proj.weight_packed"] = tensors.pop(f"{EXPERT}.up_proj.weight_packed")


def narrow(tensors: dict[str, Tensor]) -> None:
    key = "model.layers.0.self_attn.o_proj.weight_scale"
    tensors[key] = tensors[key][:, :1].contiguous()


def double(tensors: dict[str, Tensor]) -> None:
    tensors[f"{EXPERT}.up_proj.input_scale"] *= 2


def quantize_router(tensors: dict[str, Tensor]) -> None:
    weight = tensors.pop("model.layers.0.mlp.gate.wg.weight")
    tensors["model.layers.0.mlp.gate.wg.weight_packed"] = torch.zeros(4, 16, dtype=torch.int32)
    tensors["model.layers.0.mlp.gate.wg.weight_scale"] = weight[:, :4].contiguous()


def add_zero_point(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.o_proj.weight_zero_point"] = torch.zeros(16, 4, dtype=torch.int32)


REFUSED, WRONG, UNKNOWN = Verdict.REFUSED, Verdict.WRONG, Verdict.UNKNOWN
# what, damage, problems, words, and what vLLM and SGLang make of it
DAMAGE: dict[str, tuple[str, Change, dict[str, int], str, Verdict, Verdict]] = {
    "expert missing": ("int4", drop, {"missing": 9}, f"'{EXPERT}.down_proj.weight_packed' is missing: of ", WRONG, WRONG),
    "renamed": (
        "int4",
        rename,
        {"missing": 1, "unmatched": 1},
        f"'{EXPERT}.upp_proj.weight_packed': the engine has no",
        REFUSED,
        WRONG,
    ),
    "scale of another shape": (
        "int4",
        narrow,
        {"shape": 1},
        "o_proj.weight_scale' is BF16 (128, 1), the engine wants",
        REFUSED,
        UNKNOWN,
    ),
    "input scales differ": ("fp8", double, {"rule": 1}, f"'{EXPERT}.up_proj.input_scale' is ", REFUSED, REFUSED),
    "router quantized": (
        "int4",
        quantize_router,
        {"missing": 1, "unmatched": 2},
        "routers and the head are never quantized",
        REFUSED,
        WRONG,
    ),
    "zero point": ("int4", add_zero_point, {"unmatched": 1}, "W4A16 is symmetric and has no zero point", REFUSED, WRONG),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_verify_finds_damage(case: str, models: Path, tmp_path: Path) -> None:
    name, change, counts, words, *verdicts = DAMAGE[case]
    out = rewritten(models, tmp_path, name, change)
    for engine, verdict in zip(("vllm", "sglang"), verdicts, strict=True):
        found = ask("verify", out, "--engine", engine, code=verdict.exit_code)
        assert found["counts"] == counts and not found["loads"] and found["verdict"] == verdict.value
        assert any(words in problem["problem"] for problem in found["problems"]), found["problems"]


def test_transformers_fills_what_is_missing_with_noise(models: Path, tmp_path: Path) -> None:
    """Outside the experts; an expert that is missing stops their conversion."""

    def norm(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.0.input_layernorm.weight"]

    found = ask("verify", rewritten(models, tmp_path, "int4", norm), "--engine", "transformers", code=1)
    assert found["verdict"] == "loads and is wrong" and found["counts"] == {"missing": 1}
    found = ask("verify", rewritten(models, tmp_path / "2", "int4", drop), "--engine", "transformers", code=1)
    assert found["verdict"] == "does not load"


def test_another_format_is_judged_as_what_it_is(models: Path, tmp_path: Path) -> None:
    """Not as BF16 that does not load: with its own schemes, names and shapes."""
    of_transformers = {"gptq": REFUSED, "gptq-v2": REFUSED, "awq": WRONG, "fp8": REFUSED, "fp8-transformers": UNKNOWN}
    schemes = {"awq": "W4A16_ASYM", "fp8": "FP8", "fp8-transformers": "FP8"}
    for form, of_experts in of_transformers.items():
        out = tmp_path / form
        quantkit.convert(models / ("fp8" if "fp8" in form else "int4"), out, form)
        for engine in ENGINES:
            verdict = of_experts if engine == "transformers" else UNKNOWN
            found = ask("verify", out, "--engine", engine, code=verdict.exit_code)
            assert found["format"] == form and found["problems"] == [] and found["verdict"] == verdict.value
            assert {row["scheme"] for row in found["weights"]} == {schemes.get(form, "W4A16")}
    found = ask("verify", tmp_path / "fp8-transformers", "--engine", "transformers", "--hardware", "cpu", code=0)
    assert found["verdict"] == "loads"
    found = ask("verify", tmp_path / "gptq", "--engine", "vllm", "--tp", 8, code=1)  # 4 heads: whatever the format
    assert "vllm.heads" in {finding["rule"] for finding in found["model"]}
    tensors = rewritten(tmp_path, tmp_path / "x", "gptq", lambda t: t.pop(f"{EXPERT}.up_proj.qweight"))
    assert ask("verify", tensors, "--engine", "vllm", code=1)["counts"] == {"missing": 1}


def test_a_format_that_quantkit_does_not_read(models: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(models / "int4", tmp_path / "other"))
    config(lambda q: q.update(quant_method="bitsandbytes"))(out)
    for engine in ENGINES:
        found = ask("verify", out, "--engine", engine, code=3)
        assert found["verdict"] == "nobody looked" and found["counts"] == {"scheme": 1}
        assert {(row["scheme"], row["verdict"]) for row in found["weights"]} == {("unknown", "nobody looked")}


def test_what_quantkits_plugin_refuses(models: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(models / "large-int4", tmp_path / "kv"))
    scheme = {"type": "float", "num_bits": 8, "symmetric": True, "strategy": "tensor"}
    config(lambda q: q.update(kv_cache_scheme=scheme))(out)
    found = ask("verify", out, "--engine", "vllm", code=1)
    assert found["verdict"] == "does not load" and "vllm.plugin-cache" in {f["rule"] for f in found["model"]}
    whole = json.loads((models / "large" / "config.json").read_text())
    plain = Path(shutil.copytree(models / "large", tmp_path / "plain"))
    (plain / "config.json").write_text(json.dumps({**whole, "rope_scaling": None}))
    found = ask("plan", plain, "--group-size", 32, "--engine", "vllm", code=1)["engine"]
    assert "vllm.plugin-rope" in {f["rule"] for f in found["model"]}


@pytest.mark.parametrize("name", ["k_scale", "attn.v_scale", "k_proj.output_scale", "kv_scale"])
def test_scales_of_the_cache_are_those_that_a_checkpoint_may_have(models: Path, tmp_path: Path, name: str) -> None:
    """In every spelling that `convert` carries along and `verify` accepts; without a scheme for them they are nothing."""

    def scaled(tensors: dict[str, Tensor]) -> None:
        tensors[f"model.layers.0.self_attn.{name}"] = torch.tensor(1.0)

    out = rewritten(models, tmp_path, "int4", scaled)
    reader = CheckpointReader(out)
    assert misfits(reader, spec_of(reader), schemes_of(reader)) == []
    engine = engine_named("vllm")
    assert replay(out, engine, Deployment())["counts"] == {"unmatched": 1}
    scheme = {"type": "float", "num_bits": 8, "symmetric": True, "strategy": "tensor"}
    config(lambda q: q.update(kv_cache_scheme=scheme))(out)
    assert replay(out, engine, Deployment())["counts"] == {}


def test_no_advice_for_a_model_that_an_engine_has_not(models: Path, tmp_path: Path) -> None:
    found = ask("plan", models / "large", "--group-size", 32, "--engine", "sglang", "--experts", "W8A8", code=1)["engine"]
    assert "sglang.int8-experts" in {f["rule"] for row in found["weights"] for f in row["findings"]}
    assert all(row["instead"] == [] for row in found["weights"]) and found["model"][0]["fix"] == ""
    out = Path(shutil.copytree(models / "a13b", tmp_path / "spelled"))
    (out / "config.json").write_text(json.dumps({**A13B, "model_type": "hunyuan"}))
    command = ("plan", out, "--group-size", 32, "--engine")
    found = ask(*command, "sglang", code=1)["engine"]
    assert [f["rule"] for f in found["model"]] == ["sglang.spelling"] and "hunyuan_v1_moe" in found["model"][0]["fix"]
    found = ask(*command, "transformers", "--experts", "W8A8", code=1)["engine"]  # it is no Hunyuan-Large
    assert "transformers.experts-int8" in {f["rule"] for row in found["weights"] for f in row["findings"]}


def test_an_expert_missing_from_one_shard(models: Path, tmp_path: Path) -> None:
    """The index promises it, its shard does not hold it: that is no checkpoint, whatever the engine."""
    out = Path(shutil.copytree(models / "int4", tmp_path / "damaged"))
    index = json.loads((out / INDEX).read_text())["weight_map"]
    shard = index[f"{EXPERT}.up_proj.weight_packed"]
    tensors = load_file(out / shard)
    drop(tensors)
    save_file(tensors, out / shard)
    message = refused("verify", out, "--engine", "vllm")
    assert EXPERT in message and shard in message and "does not hold it" in message


def config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(out: Path) -> None:
        data = json.loads((out / "config.json").read_text())
        change(data["quantization_config"])
        (out / "config.json").write_text(json.dumps(data))

    return apply


def test_an_ignore_pattern_that_catches_too_much(models: Path, tmp_path: Path) -> None:
    """`re:.*mlp.gate.*` is meant for the router and catches shared_mlp.gate_proj as well."""
    out = Path(shutil.copytree(models / "int4", tmp_path / "damaged"))
    config(lambda q: q.update(ignore=["lm_head", "re:.*mlp.gate.*"]))(out)
    found = ask("verify", out, "--engine", "vllm", code=1)
    (row,) = [row for row in found["weights"] if row["weight"] == "gate_up_proj"]
    rules = {finding["rule"]: finding["why"] for finding in row["findings"]}
    assert rules["vllm.fused-scheme"] == "gate_proj, up_proj have BF16, W4A16"
    name = "model.layers.0.mlp.shared_mlp.gate_proj.weight_packed"
    assert f"'{name}': the config says it is not quantized" in found["problems"][0]["problem"]


def test_nvfp4_is_not_read_as_something_else(models: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(models / "int4", tmp_path / "damaged"))
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    config(lambda q: q["config_groups"]["group_0"].update(weights=weights, format="nvfp4-pack-quantized"))(out)
    found = ask("verify", out, "--engine", "transformers", code=1)
    assert found["verdict"] == "loads and is wrong"
    assert "transformers.experts-nvfp4" in {finding["rule"] for finding in found["model"]}
    assert "none of the schemes" in found["problems"][0]["problem"]
    found = ask("verify", out, "--engine", "vllm", code=3)
    assert found["verdict"] == "nobody looked" and {row["scheme"] for row in found["weights"]} == {"unknown"}


def test_mixtral_experts_under_names_that_transformers_does_not_read() -> None:
    entries = {"model.layers.0.block_sparse_moe.experts.0.gate_proj.weight": None}
    reader: Any = SimpleNamespace(entries=entries)
    assert "stay random" in next(random_experts(seen("mixtral"), reader))
    reader.entries = {"model.layers.0.block_sparse_moe.experts.0.w1.weight": None}
    assert not list(random_experts(seen("mixtral"), reader))
    reader.entries = entries
    assert not list(random_experts(seen("qwen3_moe"), reader))


BAD: dict[str, tuple[tuple[object, ...], str]] = {
    "engine": (("--engine", "llama.cpp"), "unknown engine 'llama.cpp'"),
    "version": (("--engine", "vllm==0.31"), "no rules for vllm==0.31"),
    "no version": (("--engine", "vllm=="), "no rules for vllm=="),
    "devices": (("--engine", "vllm", "--tp", 0), "--tp 0"),
    "stages": (("--engine", "vllm", "--pp", 9), "--pp 9, and the model has 2 layers"),
    "cache": (("--engine", "vllm", "--kv-cache", "int8"), "unknown --kv-cache 'int8'"),
    "hardware": (("--engine", "vllm", "--hardware", "tpu"), "unknown hardware 'tpu'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, models: Path) -> None:
    options, words = BAD[case]
    for command in (("plan", models / "a13b", "--group-size", 32), ("verify", models / "int4")):
        assert words in refused(*command, *options)


def test_more_bad_input(models: Path, make_model: Callable[..., Path]) -> None:
    dense = make_model("dense", num_experts=1, use_mixed_mlp_moe=False)
    assert "no experts" in refused("plan", dense, "--group-size", 32, "--engine", "vllm", "--ep")
    assert "no quantization_config" in refused("verify", models / "a13b", "--engine", "vllm")
    assert "check different things" in refused("verify", models / "int4", "--engine", "vllm", "--source", models / "a13b")
    assert "already quantized" in refused("plan", models / "int4", "--engine", "vllm")
    assert "architecture that quantkit knows" in refused("plan", models / "a13b", "--engine", "vllm", "--linears", "*")
