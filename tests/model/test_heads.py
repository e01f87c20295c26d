"""The head that runs is the one that is stored, and of two sets of weights it is said which is read."""

from __future__ import annotations

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
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.sets import weight_sets
from quantkit.cli import main
from quantkit.errors import CheckpointError
from quantkit.recipe import Recipe
from tests.conftest import CONFIG, random_weights, write_checkpoint
from tests.helpers.architectures import A13B, TINY
from tests.helpers.commands import not_quantized, refused, run

IDS = torch.arange(1, 13).unsqueeze(0)
EVERY = {"hunyuan": CONFIG, "hunyuan_v1_moe": A13B, **TINY}
ROUND = Recipe(scheme="W8A16", group_size=16, method="rtn")


def tied(root: Path, config: dict[str, Any], head: Callable[[Tensor], Tensor], **changes: Any) -> Path:
    """A checkpoint with tied weights in which a head, made from the embedding, is stored all the same."""
    config = {**config, "tie_word_embeddings": True, **changes}
    weights = random_weights(config)
    return write_checkpoint(root, config, {**weights, "lm_head.weight": head(weights["model.embed_tokens.weight"])})


def other(embedding: Tensor) -> Tensor:
    return (embedding.float().flip(0) * 3).bfloat16()


@pytest.mark.parametrize("name", EVERY)
def test_a_tied_head_that_differs_is_refused(name: str, tmp_path: Path) -> None:
    """For every architecture, since transformers and vLLM disagree about all of them."""
    folder = tied(tmp_path / "model", EVERY[name], other)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        quantkit.quantize(folder, tmp_path / "out", ROUND)
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true, but 'lm_head.weight' differs"):
        quantkit.load(folder, kernels="reference")


def test_every_command_sees_it(tmp_path: Path) -> None:
    folder = tied(tmp_path / "model", CONFIG, other)
    assert "tie_word_embeddings: false" in not_quantized(folder, "--group-size", "32", "--method", "rtn")
    for arguments in (("plan", folder, "--group-size", "32"), ("eval", folder, "--baseline", folder)):
        assert "'lm_head.weight' differs" in refused(*arguments)
    assert "'lm_head.weight' differs" in run("inspect", folder)["notes"][0]


def test_one_changed_value_is_seen(tmp_path: Path) -> None:
    def nudged(embedding: Tensor) -> Tensor:
        head = embedding.clone()
        head[-1, -1] += 0.5
        return head

    with pytest.raises(CheckpointError, match=r"'lm_head.weight' differs"):
        quantkit.load(tied(tmp_path / "model", TINY["llama"], nudged), kernels="reference")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_equal_head_is_carried_over(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tied(tmp_path / "model", TINY["llama"], lambda embedding: embedding.to(dtype).clone())
    quantkit.quantize(folder, tmp_path / "out", ROUND)
    assert CheckpointReader(tmp_path / "out").tensor("lm_head.weight").dtype is dtype
    bare = write_checkpoint(
        tmp_path / "bare",
        {**TINY["llama"], "tie_word_embeddings": True},
        random_weights({**TINY["llama"], "tie_word_embeddings": True}),
    )
    logits = [quantkit.load(path, kernels="reference").logits(IDS) for path in (folder, bare)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe", "deepseek_v2", "hunyuan_v1_moe"])
def test_transformers_runs_the_stored_head(name: str, tmp_path: Path) -> None:
    """What the refusal is about: the tie in the config is not what transformers 5 runs."""
    folder = tied(tmp_path / "model", EVERY[name], other)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(model.lm_head.weight, CheckpointReader(folder).tensor("lm_head.weight"))


@pytest.mark.parametrize("name", ["llama", "hunyuan", "hunyuan_v1_moe"])
def test_without_the_key_the_head_is_its_own(name: str, tmp_path: Path) -> None:
    """A config without tie_word_embeddings means false to every class here; the head that is stored runs."""
    config = {k: v for k, v in EVERY[name].items() if k != "tie_word_embeddings"}
    weights = random_weights({**config, "tie_word_embeddings": False})
    folder = write_checkpoint(tmp_path / "model", config, weights)
    stated = write_checkpoint(tmp_path / "stated", {**config, "tie_word_embeddings": False}, weights)
    logits = [quantkit.load(path, kernels="reference").logits(IDS) for path in (folder, stated)]
    assert torch.equal(*logits)
    if name != "hunyuan":
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits
        assert (theirs - logits[0]).abs().max() < 2e-3
    del weights["lm_head.weight"]
    for given in (config, {**config, "tie_word_embeddings": False}):
        bare = write_checkpoint(tmp_path / f"bare{len(given)}", given, weights)
        with pytest.raises(CheckpointError, match="lm_head.weight") as error:
            quantkit.quantize(bare, tmp_path / "out", ROUND)
        assert "tie_word_embeddings: true" in error.value.fix
        with pytest.raises(CheckpointError, match="'lm_head.weight' is missing"):
            quantkit.load(bare, kernels="reference")


def both_sets(folder: Path) -> Path:
    """Another model.safetensors beside the shards that the index lists: merged weights, say, and a stale index."""
    tensors = {key: value for shard in folder.glob("*.safetensors") for key, value in load_file(shard).items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_two_sets_are_named_everywhere(model: Path, tmp_path: Path) -> None:
    before = quantkit.load(model, kernels="reference").logits(IDS)
    both_sets(model)
    says = "model.safetensors.index.json lists are read, as vLLM does; transformers would read model.safetensors"
    assert torch.equal(quantkit.load(model, kernels="reference").logits(IDS), before)
    options = ("--scheme", "W8A16", "--group-size", "32")
    assert any(says in note for note in run("plan", model, *options)["notes"])
    assert any(says in note for note in run("inspect", model)["notes"])
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["quantize", str(model), "-o", str(out), *options], catch_exceptions=False)
    assert result.exit_code == 0 and f"warning: {model} holds two sets" in result.stderr
    assert any(says in note for note in json.loads((out / "run.json").read_text())["notes"])
    result = CliRunner().invoke(
        main, ["eval", str(out), "--baseline", str(model), "--windows", "2", "--seq-len", "32", "--samples", "0"]
    )
    assert says in result.stderr.replace("\n", " ")
    result = CliRunner().invoke(main, ["generate", str(model), "--prompt", "a", "--max-tokens", "1"])
    assert result.exit_code == 0 and says in result.stderr
    assert any(says in note for note in json.loads((out / "eval" / "report.json").read_text())["notes"])


def test_transformers_reads_the_other_set(tmp_path: Path) -> None:
    config = TINY["llama"]
    folder = both_sets(write_checkpoint(tmp_path / "model", config, random_weights(config)))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).model.norm.weight
    ours = CheckpointReader(folder).tensor("model.norm.weight")
    assert torch.equal(theirs, load_file(folder / "model.safetensors")["model.norm.weight"]) and not torch.equal(
        theirs, ours
    )


def test_sets_without_an_index_and_adapters(model: Path) -> None:
    assert weight_sets(model) == []
    shutil.copy(both_sets(model) / "model.safetensors.index.json", model / "kept.json")
    (model / "model.safetensors.index.json").unlink()
    assert "vLLM would read model-00001-of-00002.safetensors and 1 more too" in weight_sets(model)[0]
    for shard in model.glob("model-*"):
        shard.unlink()
    assert weight_sets(model) == []
    (model / "adapter_config.json").write_text("{}")
    assert "adapter" in weight_sets(model)[0]
    index = {"weight_map": dict.fromkeys(load_file(model / "model.safetensors"), "model.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "adapter_config.json").unlink()
    assert weight_sets(model) == []


def test_the_head_of_a_finished_output_is_checked(tmp_path: Path) -> None:
    folder = tied(tmp_path / "model", TINY["llama"], lambda embedding: embedding.clone())
    quantkit.quantize(folder, tmp_path / "out", ROUND)
    shard = next(p for p in (tmp_path / "out").glob("*.safetensors") if "lm_head.weight" in load_file(p))
    tensors = load_file(shard)
    save_file({**tensors, "lm_head.weight": other(tensors["lm_head.weight"])}, shard)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' differs"):
        quantkit.load(tmp_path / "out", kernels="reference")
