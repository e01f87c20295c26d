"""`verify --source` finds every way in which a checkpoint may differ from what its source and its method give, though all of
its files have the hashes that SHA256SUMS states; and says what it could not look at."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantkit
from quantkit.checkpoint.bounds import misplaced_codes, range_of, wrong_scales
from quantkit.checkpoint.reader import INDEX
from quantkit.checkpoint.verify import verify
from quantkit.cli import main
from quantkit.errors import QuantkitError, VerificationError
from quantkit.qtensor import QuantizedTensor
from quantkit.quant.grid import search_scale
from quantkit.quant.rounding import rtn
from quantkit.recipe import Recipe
from quantkit.scheme import PRESETS, scheme_named
from tests.conftest import CONFIG, SMALL, random_weights, write_checkpoint

Break = Callable[[Path], object]
Tensors = dict[str, Tensor]
LAYER = "model.layers.1."
EXPERT = f"{LAYER}mlp.experts.0.down_proj."
RECIPES = {
    "learned": Recipe(experts="W4A16", shared_experts="W8A8", attention="FP8", **SMALL),  # type: ignore[arg-type]
    "rounded": Recipe(scheme="W4A16_ASYM", attention="FP8_BLOCK", method="rtn", group_size=32),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and what was made of it, with GPTQ and by rounding."""
    root = tmp_path_factory.mktemp("wrong")
    model = write_checkpoint(root / "model", {**CONFIG, "auto_map": {"AutoModel": "modeling_x.X"}}, random_weights(CONFIG))
    (model / "generation_config.json").write_text('{"top_k": 5}')
    (model / "modeling_x.py").write_text("pass")
    for name, recipe in RECIPES.items():
        quantkit.quantize(model, root / name, recipe)
    return root


def resum(out: Path) -> None:
    """SHA256SUMS as whoever changed the files could write it."""
    files = [path for path in sorted(out.iterdir()) if path.is_file() and path.name not in ("run.json", "SHA256SUMS")]
    lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    (out / "SHA256SUMS").write_text("".join(lines))


def tensors(change: Callable[[Tensors], object]) -> Break:
    """Change tensors by name, wherever they lie."""

    def apply(out: Path) -> None:
        shards = {path: load_file(path) for path in sorted(out.glob("*.safetensors"))}
        found = {key: value.clone() for held in shards.values() for key, value in held.items()}
        change(found)
        for path, held in shards.items():
            save_file({key: found[key].contiguous() for key in held}, path, metadata={"format": "pt"})

    return apply


def each(ending: str, change: Callable[[Tensor], Tensor]) -> Break:
    return tensors(lambda t: t.update({key: change(t[key]) for key in t if key.endswith(ending)}))


def one(name: str, change: Callable[[Tensor], Tensor]) -> Break:
    return tensors(lambda t: t.update({name: change(t[name])}))


def bit(at: int, number: int) -> Callable[[Tensor], Tensor]:
    def flip(tensor: Tensor) -> Tensor:
        tensor.view(-1).view(torch.uint8)[at] ^= 1 << number
        return tensor

    return flip


def row_of_fp8(weight: Tensor) -> Tensor:
    return zero_row(weight.view(torch.int8)).view(weight.dtype)


def one_wider(scale: Tensor) -> Tensor:
    scale[2, 0] *= 1.2
    return scale


def zero_row(codes: Tensor) -> Tensor:
    codes[3] = 0 if codes.element_size() == 1 else -2004318072  # 0x88888888: eight codes of 0
    return codes


def swap(a: str, b: str) -> Break:
    """Exchange all tensors that begin so."""

    def change(t: Tensors) -> None:
        for key in [key for key in t if key.startswith(a)]:
            other = b + key.removeprefix(a)
            t[key], t[other] = t[other], t[key]

    return tensors(change)


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Break:
    def apply(out: Path) -> None:
        data = json.loads((out / name).read_text())
        change(data)
        (out / name).write_text(json.dumps(data))

    return apply


def config(change: Callable[[dict[str, Any]], object]) -> Break:
    return edit("config.json", change)


def quantization(change: Callable[[dict[str, Any]], object]) -> Break:
    return config(lambda c: change(c["quantization_config"]))


def stated(change: Callable[[dict[str, Any]], object]) -> Break:
    """Change what quantkit.json says of one linear."""
    return edit("quantkit.json", lambda said: change(said["linears"][EXPERT[:-1]]))


def write(name: str, text: str) -> Break:
    return lambda out: (out / name).write_text(text)


def added(name: str, tensor: Tensor) -> Break:
    """One more tensor, in the last shard and in the index."""

    def apply(out: Path) -> None:
        shard = max(out.glob("*.safetensors"))
        save_file({**load_file(shard), name: tensor}, shard, metadata={"format": "pt"})
        edit(INDEX, lambda index: index["weight_map"].update({name: shard.name}))(out)

    return apply


WEIGHTS: dict[str, tuple[Break, str]] = {
    "all scales x 1.2": (each("weight_scale", lambda s: (s.float() * 1.2).to(s.dtype)), "differs from its source|scales"),
    "one scale x 1.2": (one(f"{EXPERT}weight_scale", one_wider), "'model"),
    "sign of a scale": (one(f"{EXPERT}weight_scale", bit(11, 7)), EXPERT[:-1]),
    "last bit of a scale": (one(f"{EXPERT}weight_scale", bit(10, 0)), EXPERT[:-1]),
    "every code off by one": (each("weight_packed", lambda words: words ^ 0x11111111), "experts"),
    "last bit of a code": (one(f"{EXPERT}weight_packed", bit(100, 0)), EXPERT[:-1]),
    "a row of zeros": (one(f"{EXPERT}weight_packed", zero_row), EXPERT[:-1]),
    "a row of zeros in attention": (one("model.layers.0.self_attn.o_proj.weight", row_of_fp8), "o_proj"),
    "two experts exchanged": (swap(f"{LAYER}mlp.experts.0.", f"{LAYER}mlp.experts.1."), "experts.0"),
    "gate and up exchanged": (swap(f"{LAYER}mlp.experts.0.gate_proj.", f"{LAYER}mlp.experts.0.up_proj."), "experts.0"),
    "a bit of a norm": (one(f"{LAYER}input_layernorm.weight", bit(20, 2)), "should be unchanged"),
    "rows of the router": (one(f"{LAYER}mlp.gate.wg.weight", lambda w: w[[1, 0, 2, 3]]), "should be unchanged"),
    "norms exchanged": (swap("model.layers.1.input_layernorm.", "model.layers.2.input_layernorm."), "should be unchanged"),
    "one more tensor": (added("model.layers.9.more", torch.ones(2)), "unexpected"),
    "another head": (added("lm_head.weight", torch.randn(257, 128).bfloat16()), "lm_head"),
    "a scale of the cache": (added("model.layers.0.self_attn.k_scale", torch.tensor(1e6)), "k_scale"),
}  # fmt: skip
BESIDE: dict[str, tuple[Break, str]] = {
    "rope_theta": (config(lambda c: c.update(rope_theta=5e5)), r"'rope_theta' is 500000\.0, and from the source .* 10000"),
    "rope alpha": (config(lambda c: c["rope_scaling"].update(alpha=1.0)), "'rope_scaling'"),
    "eps": (config(lambda c: c.update(rms_norm_eps=1e-2)), "'rms_norm_eps'"),
    "top-k": (config(lambda c: c.update(moe_topk=2)), "'moe_topk' is 2, .* 1"),
    "end token": (config(lambda c: c.update(eos_token_id=5)), "'eos_token_id' is 5, .* missing"),
    "a key less": (config(lambda c: c.pop("torch_dtype")), "'torch_dtype' is missing"),
    "true for 1": (config(lambda c: c.update(moe_topk=True)), "moe_topk"),
    "code of its own": (config(lambda c: c.update(auto_map={"AutoModel": "evil--x.M"})), "'auto_map'"),
    "scales of the cache": (quantization(lambda q: q.update(kv_cache_scheme={"num_bits": 8})), "kv_cache_scheme"),
    "act-order": (quantization(lambda q: q["config_groups"]["group_0"]["weights"].update(actorder="group")), "actorder"),
    "tokenizer replaced": (write("tokenizer.json", "{}"), "tokenizer.json is another than in"),
    "tokenizer removed": (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json of .* is missing"),
    "sampling changed": (write("generation_config.json", '{"top_k": 1}'), "generation_config.json is another"),
    "code added": (write("modeling_x.py", "pass"), "modeling_x.py is not from"),
    "file added": (write("extra.bin", ""), "extra.bin is not from"),
    "shard added": (write("model-9.safetensors", ""), "model-9.safetensors is not from"),
    "folder added": (lambda out: ((out / "sub").mkdir(), (out / "sub" / "pytorch_model.bin").touch()), "folder sub"),
    "another error stated": (stated(lambda row: row.update(weight_error=row["weight_error"] * 1.0001)), "states"),
    "no error stated": (stated(lambda row: row.pop("weight_error")), "states"),
    "another method stated": (stated(lambda row: row.update(method="magic")), "'magic'"),
    "another scheme stated": (stated(lambda row: row.update(scheme="W8A16")), "does not say"),
    "a linear not stated": (edit("quantkit.json", lambda said: said["linears"].pop(EXPERT[:-1])), "does not say"),
    "no table of linears": (edit("quantkit.json", lambda said: said.update(linears=[])), "no table"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*WEIGHTS, *BESIDE])
@pytest.mark.parametrize("base", RECIPES)
def test_what_is_wrong_is_found(base: str, case: str, made: Path, tmp_path: Path) -> None:
    spoil, words = {**WEIGHTS, **BESIDE}[case]
    out = Path(shutil.copytree(made / base, tmp_path / "out"))
    spoil(out)
    resum(out)
    with pytest.raises(QuantkitError, match=words):
        verify(out, made / "model")


@pytest.mark.parametrize("case", ["a scale x 1.03", "last bit of a scale", "scale of the inputs"])
def test_calibrated_scales(case: str, made: Path, tmp_path: Path) -> None:
    """Static FP8: q, k and v share a scale, which is that of all three; the inputs' is stated."""
    name, factor = "model.layers.0.self_attn.q_proj.", 1.03 if case == "a scale x 1.03" else 1 + 2**-7
    name += "input_scale" if case == "scale of the inputs" else "weight_scale"
    out = Path(shutil.copytree(made / "learned", tmp_path / "out"))
    one(name, lambda scale: (scale.float() * factor).to(scale.dtype))(out)
    resum(out)
    with pytest.raises(VerificationError, match="input scale .* states" if "input" in name else "q_proj': 1 of 1 scale"):
        verify(out, made / "model")


@pytest.mark.parametrize("base", RECIPES)
def test_what_is_sound_is_sound(base: str, made: Path, tmp_path: Path) -> None:
    """Also when SHA256SUMS is written anew, in another format, and beside a report of `eval`."""
    out = Path(shutil.copytree(made / base, tmp_path / "out"))
    resum(out)
    (out / "eval").mkdir()
    assert verify(out, made / "model").not_checked == ()
    assert "give --source" in verify(out).not_checked[0]
    if base == "rounded":
        return
    plain = write_checkpoint(tmp_path / "plain", CONFIG, random_weights(CONFIG))
    quantkit.quantize(plain, tmp_path / "int4", Recipe(scheme="W4A16", **SMALL))  # type: ignore[arg-type]
    for name in ("gptq", "awq"):
        quantkit.convert(tmp_path / "int4", tmp_path / name, name)
        assert verify(tmp_path / name, plain).not_checked == ()


@pytest.mark.parametrize("base", RECIPES)
def test_without_a_statement_it_says_so(base: str, made: Path, tmp_path: Path) -> None:
    """A checkpoint from before quantkit.json: nothing is wrong with it, and that is not called sound."""
    out = Path(shutil.copytree(made / base, tmp_path / "out"))
    (out / "quantkit.json").unlink()
    resum(out)
    linears = len(json.loads((made / base / "quantkit.json").read_text())["linears"])
    missing = verify(out, made / "model").not_checked
    assert f"{linears} linears by more than a general bound" in missing[0] and "quantkit.json" in missing[0]
    assert any("input scale" in words for words in missing) == (base == "learned")
    said = CliRunner().invoke(main, ["verify", str(out), "--source", str(made / "model")])
    assert said.exit_code == 0 and "not checked: " in said.stdout
    assert "sound" not in said.stdout and "verified" not in said.stdout
    said = CliRunner().invoke(main, ["verify", str(made / base), "--source", str(made / "model")])
    assert said.exit_code == 0 and ": sound. " in said.stdout


@pytest.mark.parametrize("preset", PRESETS)
def test_bounds_know_rounding_and_the_search(preset: str) -> None:
    """For every grid: what rounding gives passes, one bit of a scale and one step of a code do not."""
    scheme = scheme_named(preset, 32)
    assert scheme is not None
    weight = torch.randn(136, 160, generator=torch.Generator().manual_seed(0))
    weight[:, :32] = 0  # a group of nothing
    q, span = rtn(weight, scheme), range_of(weight, scheme.weight)
    assert not wrong_scales(q, span, "rtn").any() and not misplaced_codes(weight, q, q.dequantize()).any()
    scale, zero = search_scale(weight, scheme.weight, torch.rand(160))
    searched = QuantizedTensor(q.codes, scale, zero, scheme.weight)
    assert not wrong_scales(searched, span, "gptq").any()
    assert bool((scale < 0).any()) == scheme.weight.signed
    turned = QuantizedTensor(q.codes, -q.scale, q.zero, scheme.weight)
    assert wrong_scales(turned, span, "rtn").all()  # which a search may choose only where integers are symmetric
    assert wrong_scales(turned, span, "gptq")[q.scale != 1].any() == (not scheme.weight.signed)
    wide = QuantizedTensor(q.codes, (scale.float() * 2.2).bfloat16(), zero, scheme.weight)
    assert wrong_scales(wide, span, "gptq").any()
    bits = q.scale.clone()
    bits.view(torch.int16)[(0,) * bits.ndim] ^= 1
    assert int(wrong_scales(QuantizedTensor(q.codes, bits, q.zero, scheme.weight), span, "rtn").sum()) == 1
    codes = q.codes.clone()
    codes.view(torch.int8)[1, 40] += 1 if codes.view(torch.int8)[1, 40] < 7 else -1
    moved = QuantizedTensor(codes, q.scale, q.zero, scheme.weight)
    assert misplaced_codes(weight, moved, moved.dequantize()).nonzero().tolist() == [[1, 40]]
