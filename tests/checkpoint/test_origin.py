"""quantkit.json says what a checkpoint was made from, how, and what each weight lost, and nothing that time changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import quantkit
from quantkit.checkpoint.opened import schemes_of
from quantkit.checkpoint.origin import content_digest, read_statement, tensor_digest
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.verify import stated
from quantkit.formats.compressed_tensors import FORMAT
from quantkit.model.registry import build_spec
from quantkit.recipe import Recipe
from quantkit.stats import weight_error
from tests.conftest import CONFIG, SMALL, random_weights, write_checkpoint


def test_weight_error_by_hand_and_for_any_number_of_threads() -> None:
    weight = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert weight_error(weight, torch.tensor([[3.0, 0.0], [3.0, 4.0]])) == 3 / 5
    assert weight_error(weight, weight) == weight_error(0 * weight, 0 * weight) == 0
    assert weight_error(0 * weight, weight) == float("inf")
    wide = torch.randn(700, 3000, generator=torch.Generator().manual_seed(0))
    rounded, found = wide.bfloat16().float(), set[float]()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.add(weight_error(wide, rounded))
    torch.set_num_threads(1)
    assert len(found) == 1
    assert found.pop() == pytest.approx(float((wide - rounded).double().norm() / wide.double().norm()), rel=1e-12)


def test_content_digest_is_of_the_tensors_alone(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    readers = [CheckpointReader(write_checkpoint(tmp_path / str(n), CONFIG, weights, shards=n)) for n in (1, 3)]
    one, other = ({name: tensor_digest(reader.tensor(name)) for name in reader.entries} for reader in readers)
    assert content_digest(readers[0].entries, one) == content_digest(readers[1].entries, other)
    changed = weights["model.norm.weight"].clone()
    changed.view(torch.int16)[5] ^= 1
    other["model.norm.weight"] = tensor_digest(changed)
    assert content_digest(readers[0].entries, one) != content_digest(readers[1].entries, other)


def test_what_out_says_of_itself(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = quantkit.quantize(model, out, Recipe(experts="W4A16", attention="FP8", **SMALL))  # type: ignore[arg-type]
    said = read_statement(out)
    assert said is not None and "quantkit.json" in stated(out)
    source, written = CheckpointReader(model), CheckpointReader(out)
    digests = {name: tensor_digest(source.tensor(name)) for name in source.entries}
    assert said["source"]["digest"] == content_digest(source.entries, digests)
    assert said["source"]["files"] == {"tokenizer.json": stated(out)["tokenizer.json"]}
    recipe = said["recipe"]
    assert (recipe["experts"], recipe["attention"], recipe["shared_experts"]) == ("W4A16", "FP8", "W8A16")
    schemes = schemes_of(written)
    for ref in build_spec(CONFIG, "test").linears():
        row, scheme = said["linears"][ref.key], schemes[ref.key]
        assert scheme is not None and row["scheme"] == scheme.name and row["method"] == record["linears"][ref.key]["method"]
        value = FORMAT.decode(ref, scheme, written.tensors()).dequantize()
        assert row["weight_error"] == weight_error(source.tensor(ref.weight).float(), value) > 0
    assert said["linears"].keys() == record["linears"].keys()


def test_a_converted_checkpoint_says_so_and_keeps_what_it_knows(model: Path, tmp_path: Path) -> None:
    quantkit.quantize(model, tmp_path / "out", Recipe(scheme="W4A16", method="rtn", group_size=32))
    for to in ("gptq", "bf16"):
        quantkit.convert(tmp_path / "out", tmp_path / to, to)
    first, gptq, plain = (read_statement(tmp_path / name) for name in ("out", "gptq", "bf16"))
    assert first and gptq and plain
    assert gptq == {**first, "converted": {"from": "compressed-tensors", "to": "gptq"}} and plain["linears"] == {}
    (tmp_path / "gptq" / "quantkit.json").unlink()  # as another tool would leave it
    (tmp_path / "gptq" / "SHA256SUMS").unlink()
    quantkit.convert(tmp_path / "gptq", tmp_path / "awq", "awq")
    foreign, reader = read_statement(tmp_path / "awq"), CheckpointReader(tmp_path / "gptq")
    digests = {name: tensor_digest(reader.tensor(name)) for name in reader.entries}
    assert foreign and foreign["source"]["digest"] == content_digest(reader.entries, digests) and foreign["linears"] == {}


def test_without_calibration_nothing_of_it_is_said(model: Path, tmp_path: Path) -> None:
    """Options that decide nothing do not make another checkpoint."""
    for name, seed in (("a", 0), ("b", 7)):
        quantkit.quantize(model, tmp_path / name, Recipe(scheme="W4A16", method="rtn", group_size=32, seed=seed))
    assert (tmp_path / "a" / "SHA256SUMS").read_bytes() == (tmp_path / "b" / "SHA256SUMS").read_bytes()
    recipe = json.loads((tmp_path / "a" / "quantkit.json").read_text())["recipe"]
    assert not {"calibration", "samples", "seed"} & recipe.keys()
