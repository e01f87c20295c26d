"""From a checkpoint to a quantized one, through the command line: what is written, what it loses, what is recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import quantkit
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.verify import verify
from quantkit.cli import main
from quantkit.measure.divergence import TokenScores, bootstrap, score, summary
from quantkit.model.registry import build_spec
from quantkit.recipe import Recipe
from quantkit.scheme import PRESETS
from tests.conftest import CONFIG, SMALL, random_weights, write_checkpoint


def run(*arguments: object) -> Any:
    """Run the command line, which must succeed; the JSON it prints."""
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("scheme", PRESETS)
def test_every_scheme_end_to_end(scheme: str, make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Quantize, verify against the source, load and run: a layer's output moves as little as the scheme promises."""
    model, out = make_model(intermediate_size=128), tmp_path / "out"
    record = quantkit.quantize(model, out, Recipe(scheme=scheme, **SMALL))
    assert record["fallbacks"] == {} and {o["scheme"] for o in record["linears"].values()} == {scheme}
    linears = list(build_spec(CONFIG, "test").linears())
    assert record["linears"].keys() == {ref.key for ref in linears}
    report = verify(out, model)
    assert report.linears == len(linears)
    ids = torch.arange(1, 41).view(2, 20)
    base, quant = quantkit.load(model), quantkit.load(out, kernels="reference")
    logits = quant.logits(ids)
    assert logits.shape == (2, 20, 257) and logits.dtype is torch.float32 and torch.isfinite(logits).all()
    before, after = next(base.layers(ids)), next(quant.layers(ids))
    assert before.routing is not None and after.routing is not None
    same = (before.routing.experts == after.routing.experts).flatten()  # a token whose expert flips moves far
    assert same.double().mean() >= 0.7
    moved, whole = (after.hidden - before.hidden).flatten(0, 1)[same], before.hidden.flatten(0, 1)[same]
    # A wrong layout or scale gives 1 and more. Rounding alone: 13 % (INT4), 2.6 % (FP8, in weight and activation) or
    # 0.6 % (INT8) a linear, and a token passes five of them in a layer of random weights.
    assert 0 < moved.norm() / whole.norm() < (0.4 if "4" in scheme else 0.15 if "FP8" in scheme else 0.03)


def test_defaults_and_record(model: Path, tmp_path: Path) -> None:
    record = run("quantize", model, "-o", tmp_path / "out", "--samples", 8, "--seq-len", 64, "--group-size", 32)
    assert {(".experts." in key, o["method"]) for key, o in record["linears"].items()} == {(True, "gptq"), (False, "rtn")}
    assert record == json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["calibration_tokens"] == 8 * 64 and record["peak_memory_bytes"] > 0
    assert 0 < record["linears"]["model.layers.0.self_attn.q_proj"]["error"] < 0.05
    covered = [record["linears"][f"model.layers.0.mlp.experts.{e}.gate_proj"]["coverage"] for e in range(4)]
    assert sum(covered) * 128 == pytest.approx(8 * 64, abs=0.1)  # every token is routed to one expert, none dropped
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "SHA256SUMS",
        "config.json",
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
        "quantkit.json",
        "run.json",
        "tokenizer.json",
    ]
    assert not (tmp_path / "out.partial").exists()


def test_roles_kept_tensors_and_inspect(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ("--experts", "W4A16", "--attention", "FP8_DYNAMIC", "--shared-experts", "BF16", "--method", "rtn")
    run("quantize", model, "-o", out, *args, "--group-size", 32)
    found = run("inspect", out)
    schemes = {role: row["schemes"] for role, row in found["roles"].items()}
    assert schemes["experts"] == ["W4A16"] and schemes["attention"] == ["FP8_DYNAMIC"]
    assert schemes["shared_experts"] == schemes["norms and router"] == schemes["embedding and head"] == ["BF16"]
    assert found["roles"]["experts"]["bits_per_weight"] == pytest.approx(4 + 16 / 32, abs=0.02)
    assert found["unknown_bytes"] == 0
    total = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert found["total"]["bytes"] == pytest.approx(total, rel=0.2) and found["total"]["bytes"] < total
    source, result = CheckpointReader(model), CheckpointReader(out)
    for key in source.entries:
        if any(part in key for part in ("norm", "gate.wg", "embed", "shared_mlp")):
            assert torch.equal(source.tensor(key), result.tensor(key)), key
    plan = run("quantize", model, "-o", tmp_path / "other", "--dry-run", *args, "--group-size", 32)
    assert plan["output_bytes"] == found["total"]["bytes"] and not (tmp_path / "other").exists()
    assert run("inspect", model)["total"]["bits_per_weight"] == 16


def test_a_model_without_a_tokenizer(model: Path, tmp_path: Path) -> None:
    """The weights are worth having; that nobody can serve them so is said."""
    (model / "tokenizer.json").unlink()
    command = ["quantize", str(model), "--method", "rtn", "--group-size", "32", "--quiet", "--json", "-o"]
    made = CliRunner().invoke(main, [*command, str(tmp_path / "out")])
    assert (
        made.exit_code == 0 and made.stderr.startswith("warning: no tokenizer") and f"in {tmp_path / 'out'}" in made.stderr
    )
    assert any(note.startswith("no tokenizer") for note in json.loads(made.stdout)["notes"])
    (model / "tokenizer.model").touch()
    made = CliRunner().invoke(main, [*command, str(tmp_path / "other")])
    assert made.stderr == "" and not any("tokenizer" in note for note in json.loads(made.stdout)["notes"])


def test_options_that_change_nothing_are_named(model: Path, tmp_path: Path) -> None:
    given = ("--scheme", "W8A8", "--group-size", 32, "--calibration", "none.txt")
    notes = run("quantize", model, "-o", tmp_path / "out", "--dry-run", *given)["notes"]
    assert any("group size 32 changes nothing" in note for note in notes)
    assert any("'none.txt' is not read" in note for note in notes)


def test_recipe_file_and_options_give_the_same_bytes(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("experts: W8A16\nattention: BF16\nshared_experts: W8A8\ngroup_size: 16\nsamples: 999\nmethod: rtn\n")
    run("quantize", model, "-o", tmp_path / "a", "--recipe", recipe, "--samples", 8)
    options = "--experts W8A16 --attention BF16 --shared-experts W8A8 --group-size 16 --samples 8 --method rtn"
    run("quantize", model, "-o", tmp_path / "b", *options.split())
    assert (tmp_path / "a" / "SHA256SUMS").read_bytes() == (tmp_path / "b" / "SHA256SUMS").read_bytes()


def test_an_expert_without_tokens_is_lent_some(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    for i in range(4):  # the router never chooses expert 3: its row opposes all others
        router = weights[f"model.layers.{i}.mlp.gate.wg.weight"]
        router[3] = -router[:3].float().sum(0).bfloat16() * 10
        weights[f"model.layers.{i}.post_attention_layernorm.weight"][:] = 1
        router[:3] += router[:3].float().abs().mean().bfloat16()
    model = write_checkpoint(tmp_path / "model", CONFIG, weights)
    record = quantkit.quantize(model, tmp_path / "out", Recipe(scheme="W4A16", **SMALL))
    thin = {k: o for k, o in record["linears"].items() if o["coverage"] is not None and o["coverage"] < 1}
    assert thin and all(o["lent"] > 0 and o["method"] == "gptq" for o in thin.values())
    assert record["lent_tokens"] == len(thin) + sum(o["lent"] > 0 for k, o in record["linears"].items() if k not in thin)
    verify(tmp_path / "out", model)


def test_static_scales_are_calibrated_on_what_flows(model: Path, tmp_path: Path) -> None:
    quantkit.quantize(model, tmp_path / "out", Recipe(scheme="FP8", **SMALL))
    reader = CheckpointReader(tmp_path / "out")
    prefix = "model.layers.0.self_attn"
    scales = [reader.tensor(f"{prefix}.{p}_proj.input_scale").item() for p in "qkv"]
    assert len(set(scales)) == 1 and 0 < scales[0] < 1
    prefix = "model.layers.2.mlp.experts.1"
    assert reader.tensor(f"{prefix}.gate_proj.input_scale") == reader.tensor(f"{prefix}.up_proj.input_scale")
    assert reader.tensor(f"{prefix}.gate_proj.weight_scale") == reader.tensor(f"{prefix}.up_proj.weight_scale")


def test_dense_layers_and_a13b(make_model: Callable[..., Path], tmp_path: Path) -> None:
    dense = make_model("dense", num_experts=1, use_mixed_mlp_moe=False)
    quantkit.quantize(dense, tmp_path / "d", Recipe(scheme="W4A16", **SMALL))
    assert verify(tmp_path / "d", dense).linears == 4 * 7 - 4
    config = {**CONFIG, "architectures": ["HunYuanMoEV1ForCausalLM"], "model_type": "hunyuan_v1_moe", "use_cla": False}
    config["moe_topk"] = [2] * 4
    a13b = write_checkpoint(tmp_path / "a13b", config, random_weights(config))
    record = quantkit.quantize(a13b, tmp_path / "a", Recipe(scheme="W4A16", **SMALL))
    covered = [record["linears"][f"model.layers.3.mlp.experts.{e}.gate_proj"]["coverage"] for e in range(4)]
    assert sum(covered) * 128 == pytest.approx(2 * 8 * 64, abs=0.1)
    result = quantkit.evaluate(tmp_path / "a", a13b, seq_len=32, windows=4)
    assert 0 < result["kl"]["mean"] < 1


def test_eval_keys_and_identity(model: Path, tmp_path: Path) -> None:
    same = run("eval", model, "--baseline", model, "--seq-len", 32, "--windows", 6)
    assert same["kl"] == dict.fromkeys(["mean", "median", "p90", "p99", "p999", "max"], 0.0)
    assert same["top1_agreement"] == same["router_agreement"] == 1.0
    assert same["perplexity"]["baseline"] == same["perplexity"]["quantized"]
    quantkit.quantize(model, tmp_path / "out", Recipe(scheme="W4A16", method="rtn", group_size=32))
    text = tmp_path / "t.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 3}) for i in range(9)))
    result = run("eval", tmp_path / "out", "--baseline", model, "--text", text, "--seq-len", 40, "--windows", 12)
    assert result["units"] == 9 and result["bootstrap_unit"] == "document" and result["windows"] == 12
    low, high = result["ci95"]["kl.mean"]
    assert 0 < low < result["kl"]["mean"] < high
    assert [row["layer"] for row in result["layers"]] == [0, 1, 2, 3]
    assert all(row["hidden_error"] > 0 and 0 < row["router_agreement"] <= 1 for row in result["layers"])


def test_eval_against_arithmetic_by_hand(model: Path, tmp_path: Path) -> None:
    quantkit.quantize(model, tmp_path / "out", Recipe(scheme="W4A16", method="rtn", group_size=32))
    text = tmp_path / "t.txt"
    text.write_text("for x in range(10): print(x)")
    result = run("eval", tmp_path / "out", "--baseline", model, "--text", text, "--seq-len", 64)
    from quantkit.calib.tokenizer import load_tokenizer

    ids = torch.tensor([load_tokenizer(model).encode(text.read_text()).ids])
    p = quantkit.load(model, kernels="reference").logits(ids)[0, :-1].double().softmax(-1)
    q = quantkit.load(tmp_path / "out", kernels="reference").logits(ids)[0, :-1].double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    assert result["kl"]["mean"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert result["kl"]["max"] == pytest.approx(kl.max().item(), rel=1e-4)
    nll = -p.gather(1, ids[0, 1:, None]).log().mean()
    assert result["perplexity"]["baseline"] == pytest.approx(nll.exp().item(), rel=1e-4)
    assert result["tokens"] == ids.shape[1] - 1


def test_bootstrap_covers_and_pairs() -> None:
    """Intervals of clustered data are wider than those of the same values without clusters, and cover the mean."""
    generator = torch.Generator().manual_seed(0)
    effect = torch.randn(40, generator=generator).repeat_interleave(50)
    values = (effect + 0.1 * torch.randn(2000, generator=generator)).double().numpy() ** 2
    units = torch.arange(40).repeat_interleave(50).numpy()
    clustered = TokenScores(values, values, values + 0.5, *[values] * 4, units, units)
    flat = TokenScores(values, values, values + 0.5, *[values] * 4, torch.arange(2000).numpy(), units)
    (low, high), (flat_low, flat_high) = bootstrap(clustered)["kl.mean"], bootstrap(flat)["kl.mean"]
    assert low < values.mean() < high and high - low > 3 * (flat_high - flat_low)
    ratio = bootstrap(clustered)["perplexity.ratio"]  # a constant difference has no spread when pairs stay together
    assert ratio[0] == pytest.approx(ratio[1]) == pytest.approx(2.718281828**0.5)
    assert summary(clustered)["perplexity"]["ratio"] == pytest.approx(2.718281828**0.5)


def test_score_by_hand() -> None:
    base, quant = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0986123]])  # q = (1/4, 3/4)
    found = score(base, quant, torch.tensor([1]))
    kl, nll_base, nll_quant, same = found.kl, found.nll_baseline, found.nll_quantized, found.same_top1
    assert kl.item() == pytest.approx(0.5 * torch.tensor(2.0).log().item() + 0.5 * torch.tensor(2 / 3).log().item())
    assert nll_base.item() == pytest.approx(0.693147, rel=1e-5) and nll_quant.item() == pytest.approx(0.287682, rel=1e-5)
    assert same.item() == 0
