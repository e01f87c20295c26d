"""Shards written tensor by tensor are safetensors; a checkpoint's config says to engines what lies on disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from quantkit.atomic import write_bytes
from quantkit.checkpoint.fingerprint import fingerprint
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.writer import ShardPlan, ShardWriter
from quantkit.dtypes import ITEMSIZE, TensorPlan, torch_dtype
from quantkit.errors import ConfigError, OutputError
from quantkit.formats import compressed_tensors as ct
from quantkit.job.journal import Journal
from quantkit.model.registry import build_spec
from quantkit.model.spec import Linear, Role
from quantkit.qtensor import QuantizedTensor
from quantkit.quant.method import Method
from quantkit.quant.rounding import rtn
from quantkit.quant.solve import solve
from quantkit.recipe import Recipe
from quantkit.scheme import PRESETS, scheme_named
from quantkit.stats import LinearStats
from tests.conftest import CONFIG


def test_shard_is_what_safetensors_reads(tmp_path: Path) -> None:
    dtypes = {name: torch_dtype(name) for name in ITEMSIZE}
    assert {name: dtype.itemsize for name, dtype in dtypes.items()} == ITEMSIZE
    tensors = {
        name: torch.arange(n).to(dtype) for n, (name, dtype) in enumerate(dtypes.items(), start=3) if name != "BOOL"
    } | {"empty": torch.empty(0, 4), "matrix": torch.randn(3, 5), "scalar": torch.tensor(7.0)}
    dtype_names = {dtype: name for name, dtype in dtypes.items()}
    plan = ShardPlan("a.safetensors", [TensorPlan(k, dtype_names[t.dtype], tuple(t.shape)) for k, t in tensors.items()])
    with ShardWriter(tmp_path, plan) as writer:
        for key in sorted(tensors, reverse=True):  # any order
            writer.write(key, tensors[key])
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert loaded[key].dtype is tensor.dtype
        assert torch.equal(loaded[key].view(torch.uint8), tensor.view(torch.uint8)) if tensor.ndim else True
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shard_appears_only_when_complete(tmp_path: Path) -> None:
    plan = ShardPlan("a.safetensors", [TensorPlan("x", "F32", (2,)), TensorPlan("y", "F32", (2,))])
    with pytest.raises(ValueError, match="misses 1 tensors: y"), ShardWriter(tmp_path, plan) as writer:
        writer.write("x", torch.zeros(2))
    with pytest.raises(ValueError, match="planned F32"), ShardWriter(tmp_path, plan) as writer:
        writer.write("x", torch.zeros(3))
    with pytest.raises(KeyError), ShardWriter(tmp_path, plan) as writer:
        writer.write("z", torch.zeros(2))
    assert list(tmp_path.iterdir()) == []


def test_write_bytes_replaces_whole_files(tmp_path: Path) -> None:
    write_bytes(tmp_path / "f", b"one")
    write_bytes(tmp_path / "f", b"two")
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_bytes() == b"two"


@pytest.mark.parametrize("name", PRESETS)
def test_encode_is_as_planned_and_decodes_to_itself(name: str) -> None:
    scheme = scheme_named(name, 32)
    assert scheme is not None
    ref, w = Linear("a.b", 48, 64, Role.EXPERTS), torch.randn(48, 64)
    stats = LinearStats.empty(64, w.device, with_hessian=False)
    stats.add(torch.randn(4, 64))
    ((q, _),) = solve([w], scheme, Method("rtn"), stats)
    tensors = ct.encode(ref, scheme, q)
    planned = {t.name: (torch_dtype(t.dtype), t.shape) for t in ct.planned(ref, scheme)}
    assert {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()} == planned
    again = ct.decode(ref, scheme, tensors)
    assert torch.equal(again.dequantize(), q.dequantize())
    bits = 8 * sum(t.nbytes for t in ct.planned(ref, scheme) if not t.name.endswith(("_shape", "input_scale"))) / (48 * 64)
    assert bits == pytest.approx(scheme.bits_per_weight(48, 64))


def test_quantized_tensor_checks_itself() -> None:
    q, grid = rtn(torch.randn(8, 32), PRESETS["W8A8"]), PRESETS["W8A8"].weight
    for broken in (
        {"codes": q.codes.float()},
        {"scale": q.scale[:4]},
        {"zero": torch.zeros(8, 1, dtype=torch.int8)},
    ):
        with pytest.raises(ValueError, match=r"codes|scale|zero"):
            QuantizedTensor(**{"codes": q.codes, "scale": q.scale, "zero": None, "grid": grid, **broken})


RECIPES = {
    "uniform": Recipe(scheme="W4A16", group_size=32),
    "per role": Recipe(experts="W4A16", attention="FP8_DYNAMIC", shared_experts="BF16", group_size=32),
    "rules": Recipe(
        scheme="W8A8",
        rules=(
            {"match": "model.layers.0.*", "scheme": "BF16"},  # type: ignore[arg-type]
            {"match": "*.experts.*", "scheme": "W4A16_ASYM"},  # type: ignore[arg-type]
        ),
        group_size=32,
    ),
    "two group sizes": Recipe.of({"group_size": 32, "rules": [{"match": "*.[02].mlp.*", "group_size": 16}]}),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_config_says_what_the_recipe_means(recipe: Recipe) -> None:
    """Read back by our parser, and by the library's own matching, which engines share."""
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    spec = build_spec(CONFIG, "test")
    assigned = {ref.key: recipe.scheme_of(ref) for ref in spec.linears()}
    routers = [f"model.layers.{i}.mlp.gate.wg" for i in range(4)]
    config = ct.config(assigned, routers)
    assert ct.parse(config, assigned) == assigned
    theirs = QuantizationConfig.model_validate(config)
    assert theirs.ignore is not None
    for key in [*routers, "lm_head"]:
        assert any(match_name(key, target) for target in theirs.ignore), key
    for key, scheme in assigned.items():
        ignored = any(match_name(key, target) for target in theirs.ignore)
        assert ignored == (scheme is None), key
        if scheme is not None:
            groups = [g for g in theirs.config_groups.values() if any(match_name(key, t) for t in g.targets)]
            found = groups or [g for g in theirs.config_groups.values() if g.targets == ["Linear"]]
            assert len(found) == 1 and found[0].weights.num_bits == scheme.weight.bits, key


def test_foreign_configs_are_refused() -> None:
    with pytest.raises(ConfigError, match="quant_method 'gptq'"):
        ct.parse({"quant_method": "gptq"}, [])
    strange = {"weights": {"num_bits": 3, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}}
    with pytest.raises(ConfigError, match="group_0"):
        ct.parse({"quant_method": "compressed-tensors", "config_groups": {"group_0": {**strange, "targets": []}}}, [])


def test_reader_is_lazy_and_complete(make_model: Callable[..., Path]) -> None:
    folder = make_model()
    reader = CheckpointReader(folder)
    assert len(reader.entries) == len(build_spec(CONFIG, "test").tensors()) and len(reader.shards) == 2
    key = "model.layers.1.mlp.experts.2.down_proj.weight"
    assert reader.entry(key).nbytes == 128 * 64 * 2 and reader.tensor(key).shape == (128, 64)
    first = reader.fingerprint()
    os.utime(folder / reader.shards[0], ns=(1, 1))
    shutil.copytree(folder, folder.with_name("copy"))
    assert reader.fingerprint() == first == CheckpointReader(folder.with_name("copy")).fingerprint()
    for byte in (10, -1):  # of the header, and of a tensor
        data = bytearray((folder / reader.shards[0]).read_bytes())
        data[byte] ^= 1
        (folder.with_name("copy") / reader.shards[0]).write_bytes(data)
        assert fingerprint(folder.with_name("copy"), reader.shards) != first


def test_journal_keeps_every_sound_line(tmp_path: Path) -> None:
    key = {"source": "a", "recipe": "b"}
    journal = Journal(tmp_path / "job" / "work", key, {"threads": 3})
    journal.commit(0, {"says": "x"})
    journal.commit(1, {"says": "y"})
    with pytest.raises(OutputError, match="another process"):
        Journal(tmp_path / "job" / "work", key)
    journal.close()
    whole = journal.path.read_bytes()

    def units(data: bytes) -> set[int]:
        journal.path.write_bytes(data)
        again = Journal(tmp_path / "job" / "work", key, {"threads": 8})
        again.close()
        assert again.begun == ({"threads": 3} if again.units else again.begun)
        assert all(again.units[n]["says"] == "xy"[n] for n in again.units)
        return set(again.units)

    ends = [i for i, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole)):  # torn
        assert units(whole[:cut]) == {n for n in (0, 1) if cut >= ends[n + 1]}
    for at in range(0, len(whole), 3):  # a bit flipped, also in the line that names the job
        data = bytearray(whole)
        data[at] ^= 1
        line = sum(at > end for end in ends)
        hurt = {line - 1} if at not in ends else {line - 1, line}
        assert units(bytes(data)) == {0, 1} - hurt, at
    journal.path.write_bytes(whole[: ends[1] + 20])
    torn = Journal(tmp_path / "job" / "work", key)
    torn.commit(1, {"says": "z"})
    torn.close()
    assert units(journal.path.read_bytes().replace(b"z", b"y")) == {0}  # the later line stands apart from what was torn
    with pytest.raises(OutputError, match="these differ:\n  recipe: b there, c here"):
        Journal(tmp_path / "job" / "work", {**key, "recipe": "c"})
    journal.path.write_bytes(b"1234abcd {}\n")
    with pytest.raises(OutputError, match="no sound line"):  # not begun anew: what it vouched for would go
        Journal(tmp_path / "job" / "work", key)
