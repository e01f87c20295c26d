"""Quantized linears as other tools write them, packed number by number from the published layouts.

Nothing of quantkit packs or unpacks here, so these are an oracle for `quantkit/formats`: each linear comes with what its
numbers mean, worked out from the unpacked codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.model.registry import build_spec
from tests.conftest import CONFIG, random_weights, write_checkpoint

SMALL_CONFIG = {**CONFIG, "num_hidden_layers": 2, "num_experts": 2, "intermediate_size": 128}
KEPT = "model.layers.1.self_attn.q_proj"  # left in BF16 by every foreign checkpoint
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def words(values: np.ndarray[Any, Any], bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """[rows, n] unsigned -> int32 [rows, n * bits / 32]: nibble or byte i of a word is value order[i] of its run."""
    per_word = 32 // bits
    order = order or tuple(range(per_word))
    packed = np.zeros((values.shape[0], values.shape[1] // per_word), dtype=np.uint32)
    for row in range(packed.shape[0]):
        for column in range(packed.shape[1]):
            for i, place in enumerate(order):
                packed[row, column] |= np.uint32(int(values[row, column * per_word + place]) << (bits * i))
    return torch.from_numpy(packed.view(np.int32).copy())


@dataclass
class Foreign:
    """One quantized linear: its tensors by suffix, and its weight float64 [out, in]."""

    tensors: dict[str, Tensor]
    weight: Tensor


Make = Callable[[int, int, np.random.Generator], Foreign]


def integers(
    out: int,
    inputs: int,
    rng: np.random.Generator,
    *,
    awq: bool = False,
    bits: int = 4,
    group: int = 32,
    sym: bool = True,
    version: int = 1,
    g_idx: bool = True,
    scales: torch.dtype = torch.float16,
) -> Foreign:
    """GPTQ or AWQ: (q - z) * s with unsigned q and z, group -1 for a whole row."""
    size = inputs if group == -1 else group
    q = rng.integers(0, 2**bits, (inputs, out))
    z = np.full((inputs // size, out), 2 ** (bits - 1)) if sym else rng.integers(1, 2**bits, (inputs // size, out))
    s = torch.from_numpy(rng.uniform(0.001, 0.02, z.shape) * (rng.choice([-1, 1], z.shape) if sym else 1)).to(scales)
    groups = np.arange(inputs) // size
    weight = torch.from_numpy(q - z[groups]).double() * s.double()[groups]
    if awq:
        tensors = {"qweight": words(q, 4, AWQ_COLUMNS), "qzeros": words(z, 4, AWQ_COLUMNS), "scales": s}
    else:
        stored = z - 1 if version == 1 else z
        tensors = {"qweight": words(q.T, bits).T.contiguous(), "qzeros": words(stored, bits), "scales": s}
        if g_idx:
            tensors["g_idx"] = torch.from_numpy(groups.astype(np.int32))
    return Foreign(tensors, weight.T.contiguous())


def fp8(
    out: int,
    inputs: int,
    rng: np.random.Generator,
    *,
    block: tuple[int, int] | None = None,
    static: bool = False,
    names: tuple[str, str] = ("weight_scale", "input_scale"),
    shape: tuple[int, ...] = (),
    scales: torch.dtype = torch.float32,
) -> Foreign:
    """float8 times a scale, of the whole weight or of each block."""
    codes = torch.from_numpy(rng.standard_normal((out, inputs)) * 100).to(torch.float8_e4m3fn)
    if block is None:
        step = torch.tensor(rng.uniform(0.0001, 0.001)).to(scales).reshape(shape)
        weight = codes.double() * step.double()
    else:
        step = torch.from_numpy(rng.uniform(0.0001, 0.001, (-(-out // block[0]), -(-inputs // block[1])))).to(scales)
        rows, columns = torch.arange(out) // block[0], torch.arange(inputs) // block[1]
        weight = codes.double() * step.double()[rows][:, columns]
    tensors = {"weight": codes, names[0]: step}
    if static:
        tensors[names[1]] = torch.tensor(rng.uniform(0.01, 0.1)).to(scales).reshape(shape)
    return Foreign(tensors, weight)


@dataclass
class Case:
    """A kind of checkpoint: its quantization_config, how a linear is written, and what quantkit should call both."""

    config: dict[str, Any]
    make: Make
    format: str
    scheme: str
    extra: dict[str, Tensor] = field(default_factory=dict)

    def write(self, folder: Path, model: dict[str, Any] | None = None) -> dict[str, Tensor]:
        """Write a small checkpoint in which every linear but KEPT is quantized; its weights float64 by linear."""
        model, rng = {**SMALL_CONFIG, **(model or {})}, np.random.default_rng(0)
        spec, tensors, weights = build_spec(model, "test"), random_weights(model), {}
        for ref in spec.linears():
            if ref.key == KEPT:
                continue
            made = self.make(ref.out_features, ref.in_features, rng)
            del tensors[ref.weight]
            tensors |= {f"{ref.key}.{suffix}": tensor for suffix, tensor in made.tensors.items()}
            weights[ref.key] = made.weight
        write_checkpoint(folder, {**model, "quantization_config": self.config}, tensors | self.extra)
        return weights


def gptq_config(**fields: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, **fields}


def _gptq(name: str, scheme: str, config: dict[str, Any], **options: Any) -> Case:
    make: Make = lambda out, inputs, rng: integers(out, inputs, rng, **options)  # noqa: E731
    return Case(gptq_config(**config), make, name, scheme)


def _fp8(name: str, scheme: str, config: dict[str, Any], extra: dict[str, Tensor] | None = None, **options: Any) -> Case:
    make: Make = lambda out, inputs, rng: fp8(out, inputs, rng, **options)  # noqa: E731
    return Case({"quant_method": "fp8", **config}, make, name, scheme, extra or {})


HF_NAMES = ("weight_scale_inv", "activation_scale")
KV_SCALES = {f"model.layers.0.self_attn.{kind}_scale": torch.tensor([0.5]) for kind in "kv"}
V1, V2 = {"checkpoint_format": "gptq"}, {"checkpoint_format": "gptq_v2"}
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "GEMM"}
# As AngelSlim writes Hunyuan-A13B-Instruct-GPTQ-Int4 and -FP8, but for the sizes.
A13B_INT4 = {**V1, "static_groups": True, "true_sequential": True}
A13B_FP8 = {"activation_scheme": "static", "ignored_layers": ["lm_head"], "kv_cache_scheme": "static"}

CASES: dict[str, Case] = {
    "gptq": _gptq("gptq", "W4A16", A13B_INT4),
    "gptq asym": _gptq("gptq", "W4A16_ASYM", {**V1, "sym": False}, sym=False),
    "gptq 8 bits": _gptq("gptq", "W8A16", {"bits": 8}, bits=8, g_idx=False),
    "gptq 8 bits asym": _gptq("gptq", "W8A16_ASYM", {"bits": 8, "sym": False}, bits=8, sym=False),
    "gptq row": _gptq("gptq", "W4A16_CHANNEL", {"group_size": -1, "desc_act": True}, group=-1),
    "gptq 8 bits row": _gptq("gptq", "W8A16_CHANNEL", {"bits": 8, "group_size": -1}, bits=8, group=-1),
    "gptq bfloat16": _gptq("gptq", "W4A16", {"dynamic": {"-:.*q_proj": {}}}, scales=torch.bfloat16),
    "gptq, zeros of v2": _gptq("gptq", "W4A16", V1, version=2),
    "gptq-v2": _gptq("gptq-v2", "W4A16", V2, version=2),
    "gptq-v2 asym": _gptq("gptq-v2", "W4A16_ASYM", {**V2, "sym": False}, version=2, sym=False),
    "awq": Case(AWQ_CONFIG, lambda o, i, rng: integers(o, i, rng, awq=True, sym=False), "awq", "W4A16_ASYM"),
    "fp8 static": _fp8("fp8", "FP8", A13B_FP8, KV_SCALES, static=True),
    "fp8 static [1]": _fp8("fp8", "FP8", {"activation_scheme": "static"}, static=True, shape=(1,)),
    "fp8 bfloat16": _fp8("fp8", "FP8", {"activation_scheme": "static"}, static=True, scales=torch.bfloat16),
    "fp8 dynamic": _fp8("fp8", "FP8_TENSOR", {"activation_scheme": "dynamic"}),
    "fp8-transformers": _fp8("fp8-transformers", "FP8", {"activation_scheme": "static"}, static=True, names=HF_NAMES),
    "deepseek-fp8": _fp8("deepseek-fp8", "FP8_BLOCK", {"weight_block_size": [128, 128]}, block=(128, 128), names=HF_NAMES),
    "deepseek-fp8 of 96 x 32": _fp8(
        "deepseek-fp8", "FP8_BLOCK", {"weight_block_size": [96, 32], "fmt": "e4m3"}, block=(96, 32), names=HF_NAMES
    ),
}
