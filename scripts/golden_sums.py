"""The sums of what `quantize` writes for small models of every architecture: `python scripts/golden_sums.py` prints what
differs from tests/golden/sums.json, and `--write` records this machine's.

Only the public interface is used, and the models are frozen in tests/golden/models.json, so that whatever moves inside
quantkit neither changes this nor is hidden by it.

Of each run the sums of all shards, of config.json and of the index are kept. Of the other files that SHA256SUMS names,
tokenizer.json is a copy of the source's, and quantkit.json says with which version and recipe the weights were made; they
may vary, as run.json may.

A run that only rounds compares, divides and rounds numbers one by one, which every machine does alike. A calibrated run
sums, in an order that libraries choose by the processor: its sums are kept by torch's version and what run.json says of
the processor. config.json has keys of the compressed-tensors library, so both hold for its version in constraints.txt.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import quantkit

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
SUMS = GOLDEN / "sums.json"
RECORD = "python scripts/golden_sums.py --write"
ROLES = ("experts", "attention", "shared_experts")
TOKENS = {"samples": 8, "seq_len": 32}
ALL_PRESETS: tuple[dict[str, Any], ...] = (
    {"scheme": "W4A16", "attention": "W8A8", "shared_experts": "FP8_BLOCK"},
    {"scheme": "FP8_DYNAMIC", "attention": "W4A16_ASYM", "shared_experts": "W8A16"},
    {"scheme": "FP8"},
)
MIXED = {"scheme": "W8A8", "experts": "W4A16_ASYM", "attention": "FP8", "shared_experts": "W8A16", "group_size": 32}
RULES = {
    "keep": ["*.layers.0.mlp.experts.*", "*.layers.1.self_attn.o_proj"],
    "rules": [{"match": "*.layers.2.mlp.experts.*", "scheme": "W8A16"}, {"match": "*.shared_mlp.*", "scheme": "W8A8"}],
    "group_size": 32,
}
BY_NAME = {"linears": ["h.*.in_proj", "*.out_proj"], "group_size": 32, "method": "rtn"}

Sums = dict[str, str]  # sha256 by file
Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A run: which of the frozen models, and the recipe's fields.

    silent: no router chooses its last expert, which is thus calibrated on lent tokens alone. shards: of the source.
    """

    model: str
    recipe: dict[str, Any]
    silent: bool = False
    shards: int = 2

    @property
    def name(self) -> str:
        said = [
            f"{key}={value if isinstance(value, str | int) else json.dumps(value)}" for key, value in self.recipe.items()
        ]
        return f"{self.model}: {' '.join(said)}{', a silent expert' if self.silent else ''}"

    @property
    def calibrated(self) -> bool:
        """Whether the recipe looks at tokens: for GPTQ, which 4 bits get unless it says rtn, or for FP8's input scale."""
        schemes = [str(self.recipe.get(key, "")) for key in ("scheme", *ROLES)]
        method = self.recipe.get("method", "gptq" if any("W4" in scheme for scheme in schemes) else "rtn")
        return method == "gptq" or "FP8" in schemes


def _cases() -> Iterator[Case]:
    for model in models():
        if model == "unknown":
            yield from (Case(model, {"scheme": scheme, **BY_NAME}) for scheme in ("W4A16", "W8A8", "FP8_DYNAMIC"))
            continue
        if model == "hunyuan, one pair":
            continue
        yield Case(model, {"scheme": "W4A16", "group_size": 32})
        yield Case(model, {"scheme": "W4A16_ASYM", "group_size": 32, "method": "rtn"}, shards=3)
    for method in ("rtn", "gptq"):
        yield from (Case("hunyuan, one pair", {**schemes, "method": method}, shards=1) for schemes in ALL_PRESETS)
        yield Case("hunyuan", {"scheme": "W4A16", **RULES, "method": method})
    yield from (Case("hunyuan, one pair", {"scheme": scheme}) for scheme in ("W8A16", "FP8_BLOCK"))
    yield Case("hunyuan", MIXED)
    yield Case("hunyuan", {"scheme": "W4A16", "experts": "FP8", "group_size": 32, "method": "gptq"}, silent=True)
    yield Case("deepseek_v2", {"scheme": "FP8"})
    yield Case("mixtral", {"scheme": "W4A16_ASYM", "attention": "FP8", "group_size": 16, "seed": 7})
    keep = ["*.mlp.*_proj"]
    yield Case("llama", {"attention": "W8A16", "keep": keep, "group_size": 16})


@cache
def models() -> dict[str, dict[str, Any]]:
    """By name, the config.json and the shape of every tensor."""
    return dict(json.loads((GOLDEN / "models.json").read_text("utf-8")))


def cases() -> list[Case]:
    return list(_cases())


def weights(case: Case) -> dict[str, Tensor]:
    """BF16 tensors, nearly normal: sums of four 16-bit numbers of a generator whose stream is fixed, divided once."""
    stream, tensors = np.random.PCG64(0), {}
    for name, shape in sorted(models()[case.model]["tensors"].items()):
        count = math.prod(shape)
        whole = stream.random_raw(count).view(np.uint16).reshape(count, 4).astype(np.int64).sum(1) - 2 * 65535
        scale = math.sqrt(math.prod(shape[1:])) * 37837
        value = torch.from_numpy(whole / scale).view(shape)
        tensors[name] = (value * 0.1 + 1 if len(shape) == 1 else value).bfloat16()
    if case.silent:
        _silence(tensors)
    return tensors


def _silence(tensors: dict[str, Tensor]) -> None:
    """Two rows of each router oppose each other and the last is nothing: one of the two always wins."""
    for name, router in tensors.items():
        if name.endswith(".gate.wg.weight"):
            router[-2], router[-1] = -router[-3], 0


def _tokenizer() -> dict[str, Any]:
    """A token for each byte, as tokenizer.json."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's alphabet: the others are moved past 255
    letters = [chr(byte) for byte in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    vocab = {"<|end|>": 0, **{letter: i + 1 for i, letter in enumerate(sorted(letters))}}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }


def write_model(case: Case, folder: Path) -> Path:
    """The checkpoint of a case, in as many shards as it says."""
    folder.mkdir()
    tensors, places = weights(case), {}
    (folder / "config.json").write_text(json.dumps(models()[case.model]["config"]))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    for i in range(case.shards):
        part = {name: tensors[name] for name in sorted(tensors)[i :: case.shards]}
        save_file(part, folder / (file := f"part-{i}.safetensors"), metadata={"format": "pt"})
        places.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def run(case: Case) -> tuple[Sums, Record]:
    """Quantize the case's model on the CPU with one thread: the sums that must be equal, and what run.json says."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        text = " ".join(str(i * i % 9973) for i in range(400))
        (root / "text.txt").write_text(text)
        fields = {**case.recipe, **(TOKENS | {"calibration": str(root / "text.txt")} if case.calibrated else {})}
        out, before = root / "out", torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            record = quantkit.quantize(write_model(case, root / "model"), out, quantkit.Recipe(**fields), device="cpu")
        finally:
            torch.set_num_threads(before)
        lines = [line.split("  ", 1) for line in (out / "SHA256SUMS").read_text("utf-8").splitlines()]
    varying = ("tokenizer.json", "quantkit.json")
    return {name: digest for digest, name in lines if name not in varying}, record


def machine(record: Record) -> str:
    """What decides the last bits of a sum, from run.json."""
    return f"torch {record['job']['torch']}, {record['job']['device']}"


def recorded() -> dict[str, dict[str, Sums]]:
    """Sums of every case by machine; those of the runs that only round are under "every machine"."""
    return dict(json.loads(SUMS.read_text("utf-8"))) if SUMS.exists() else {}


def differences(seen: Sums, expected: Sums | None) -> list[str]:
    """The files whose sums differ, or that only one of them names."""
    if expected is None:
        return ["not recorded"]
    return sorted(name for name in seen.keys() | expected.keys() if seen.get(name) != expected.get(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record the sums instead of comparing them")
    write, known, differing = parser.parse_args().write, recorded(), 0
    fresh: dict[str, dict[str, Sums]] = {}
    for case in cases():
        seen, record = run(case)
        where = machine(record) if case.calibrated else "every machine"
        fresh.setdefault(where, {})[case.name] = seen
        if names := differences(seen, known.get(where, {}).get(case.name)):
            differing += 1
            print(f"{case.name}: {', '.join(names)}", flush=True)
    if write:
        SUMS.write_text(json.dumps({**known, **fresh}, indent=1) + "\n", "utf-8")
    elif differing:
        sys.exit(f"{differing} of {len(cases())} runs differ from {SUMS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
