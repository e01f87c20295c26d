"""A small random checkpoint in Hugging Face layout, made anew for each test that asks: Hunyuan-Large's architecture,
4 layers in 2 CLA pairs, 4 experts, two shards with an index, and a byte-level tokenizer of 257 ids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

import quantkit
from quantkit.model.registry import build_spec
from quantkit.recipe import Recipe

CONFIG: dict[str, Any] = {
    "architectures": ["HunYuanForCausalLM"],
    "model_type": "hunyuan",
    "vocab_size": 257,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "moe_topk": 1,
    "use_mixed_mlp_moe": True,
    "num_shared_expert": 1,
    "use_cla": True,
    "cla_share_factor": 2,
    "use_qk_norm": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
SMALL = {"samples": 8, "seq_len": 64, "group_size": 32}
torch.set_num_threads(1)  # tests run side by side


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in build_spec(config, "test").tensors().items():
        scale = 1.0 if len(shape) == 1 else shape[1] ** -0.5
        value = torch.randn(shape, generator=generator) * scale
        weights[key] = (value * 0.1 + 1 if len(shape) == 1 else value).bfloat16()
    return weights


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<|end|>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_checkpoint(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], shards: int = 2) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    keys, weight_map = sorted(weights), {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: weights[key] for key in keys[i::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """make_model(name='model', **config overrides) -> folder of a fresh checkpoint."""

    def make(name: str = "model", **overrides: Any) -> Path:
        config = {**CONFIG, **overrides}
        return write_checkpoint(tmp_path / name, config, random_weights(config))

    return make


@pytest.fixture
def model(make_model: Callable[..., Path]) -> Path:
    return make_model()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A quantized model and its baseline, which reads 512 positions."""
    root = tmp_path_factory.mktemp("flow")
    base = write_checkpoint(root / "base", {**CONFIG, "max_position_embeddings": 512}, random_weights(CONFIG))
    quantkit.quantize(base, root / "out", Recipe(scheme="W8A16", **SMALL))  # type: ignore[arg-type]
    return root / "out", base


@pytest.fixture
def out(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(pair[0], tmp_path / "out")
