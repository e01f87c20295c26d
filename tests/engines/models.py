"""Small models of every architecture, of sizes that vLLM's kernels on a CPU take, and with distributions that have a peak.

A KL divergence between two nearly uniform distributions is small whatever is wrong: the head is scaled so that logits have
a standard deviation of about 3 (2.4 nats of entropy, of 5.5). Random layers without more ado amplify rounding: a token near
the border between two experts goes to either, and with it all that follows. As in a trained model, here a layer adds little
to a large hidden state and routers are decided. Tied heads would then repeat the input, so heads are not tied; the
bundled model's is.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.checkpoint.reader import CheckpointReader
from quantkit.engines.assess import assess
from quantkit.engines.held import Deployment
from quantkit.engines.registry import engine_named
from quantkit.engines.rules import Verdict
from quantkit.formats import compressed_tensors
from quantkit.model.registry import build_spec
from quantkit.model.spec import ModelSpec
from quantkit.recipe import Recipe
from quantkit.scheme import BF16, PRESETS
from tests.conftest import CONFIG, random_weights, write_checkpoint
from tests.helpers.architectures import RELEASED, TINY

_SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 512,
    "vocab_size": 257,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "Hunyuan-Large": {**CONFIG, **_SIZES, "intermediate_size": 128},
    "Hunyuan-A13B": {
        **RELEASED["hunyuan-a13b"],
        **_SIZES,
        "head_dim": 64,
        "attention_head_dim": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": [128] * 4,
        "moe_topk": [2] * 4,
        "num_experts": 8,
        "num_shared_expert": [1] * 4,
    },
    "Mixtral": {**TINY["mixtral"], **_SIZES, "intermediate_size": 128, "head_dim": 64},
    "DeepSeek-V2": {
        **TINY["deepseek_v2"],
        **_SIZES,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 128,
        "q_lora_rank": 128,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "routed_scaling_factor": 2.0,
    },
    "Llama 3.1": {**TINY["llama"], **_SIZES, "head_dim": 64},
    "Qwen3-MoE": {
        **TINY["qwen3_moe"],
        **_SIZES,
        "head_dim": 64,
        "moe_intermediate_size": 128,
        # As the released ones. Where schemes are mixed vLLM does not find that of a dense layer here.
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
# What README recommends: routed experts in INT4, what every token passes through in eight bits.
_BESIDE = {"Experts W4A16, rest W8A16": "W8A16", "Experts W4A16, rest FP8_DYNAMIC": "FP8_DYNAMIC"}
RECIPES: dict[str, dict[str, str]] = {
    # No engine runs INT4 with FP8 inputs on a CPU.
    **{scheme: {"scheme": scheme} for scheme in (BF16, *PRESETS) if scheme != "W4AFP8"},
    **{name: {"scheme": scheme, "experts": "W4A16"} for name, scheme in _BESIDE.items()},
}
CASES = [(name, column) for column in RECIPES for name in MODELS if name != "Llama 3.1" or column not in _BESIDE]
EMBEDDING, ADDED, HEAD, ROUTER = 16.0, 0.5, 3.0, 4.0  # times what gives an output the variance of its input


def weights_of(config: dict[str, Any]) -> dict[str, Tensor]:
    spec, weights = build_spec(config, "test"), random_weights(config)
    assert spec.head
    weights[spec.embedding] *= EMBEDDING
    weights[spec.head] *= HEAD
    for layer in spec.layers:
        for ref in (layer.attention.o, *(mlp.down for mlp in layer.mlps())):
            weights[ref.weight] *= ADDED
    for moe in spec.moes():
        weights[moe.router.weight] *= ROUTER
    return weights


def make_model(name: str, folder: Path, **changes: Any) -> Path:
    """changes: of its config."""
    config = {**MODELS[name], **changes}
    return write_checkpoint(folder, config, weights_of(config), shards=1)


def recipe(column: str) -> Recipe:
    """INT4 by GPTQ, half of whose scales are negative; the rest by rounding."""
    how: dict[str, Any] = {"method": "rtn"}
    if column == "W4A16":
        how = {"method": "gptq", "samples": 4, "seq_len": 32}
    return Recipe(**how, **RECIPES[column])


def negative_scales(folder: Path) -> bool:
    """Whether any weight there has one."""
    reader = CheckpointReader(folder)
    return any(bool((reader.tensor(name) < 0).any()) for name in reader.entries if name.endswith("weight_scale"))


def said(engine: str, model: str, column: str, deployment: Deployment) -> Verdict:
    """What quantkit's rules say of that model in that recipe."""
    spec = build_spec(MODELS[model], model)
    schemes = {ref.key: recipe(column).scheme_of(ref) for ref in spec.linears()}
    written = compressed_tensors.written(schemes, [moe.router.key for moe in spec.moes()])
    return assess(engine_named(engine), spec, MODELS[model], schemes, written, deployment).verdict


def damaged(folder: Path, out: Path) -> Path:
    """A copy in which two experts of the last layer that has some, or the MLPs of the last two layers, change places."""
    shutil.copytree(folder, out)
    spec: ModelSpec = build_spec(json.loads((folder / "config.json").read_text()), "test")
    mlps = spec.moes()[-1].experts[:2] if spec.moes() else (spec.layers[-1].mlps()[0], spec.layers[-2].mlps()[0])
    first, second = (mlp.gate.key.rpartition(".")[0] + "." for mlp in mlps)
    shards = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    everything = {key: tensor for shard in shards.values() for key, tensor in shard.items()}
    for name, shard in shards.items():
        swapped = {key: key.replace(first, "*").replace(second, first).replace("*", second) for key in shard}
        save_file({key: everything[swapped[key]] for key in shard}, out / name, metadata={"format": "pt"})
    return out
