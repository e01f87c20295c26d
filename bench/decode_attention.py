"""Attention of one token over a long cache, as it was and as it is; writes results/decode_attention.json.

Before, K and V were decoded to float32 whole, copied for each query head and masked, and the latents of DeepSeek-V2 expanded
by kv_b. Both in turns, one thread; times are the thread's own, which other work on the machine disturbs least. The goal at
8,192 positions of Hunyuan-Large is 40 ms.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from quantkit.model.attend import attend
from quantkit.model.attention import Positions
from quantkit.model.cache import Cache, Kept, KVFormat
from quantkit.model.mla import Latent
from quantkit.model.spec import MLA, Linear, Role
from quantkit.model.weights import Weights

RESULTS = Path(__file__).parent / "results"
GROUPED = {"Hunyuan-Large": (80, 8, 80), "Hunyuan-A13B": (32, 8, 128), "80 heads of 128": (80, 8, 128)}
POSITIONS = (128, 512, 2048, 8192)


def before(q: Tensor, k: Kept, v: Kept, scale: float | None = None) -> Tensor:
    keys, values = (x.codes.float() if x.scale is None else x.codes.float() * x.scale.float() for x in (k, v))
    keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (keys, values))
    visible = torch.arange(keys.shape[2]) <= torch.tensor([[keys.shape[2] - 1]])
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible, scale=scale)
    return out.transpose(1, 2).flatten(2)


def grouped(shape: tuple[int, int, int], positions: int, how: KVFormat) -> dict[str, Callable[[], Tensor]]:
    heads, kv_heads, d = shape
    q, kv = torch.randn(1, heads, 1, d), torch.randn(1, kv_heads, positions, d)
    k, v = Cache(how).append(0, (kv, kv.flip(-1)))
    return {"before": lambda: before(q, k, v), "now": lambda: attend(q, k, v)}


def latent(heads: int, positions: int) -> dict[str, Callable[[], Tensor]]:
    """DeepSeek-V2's sizes; kv_b in BF16, the cache too."""

    def linear(out: int, inputs: int) -> Linear:
        return Linear("x", out, inputs, Role.ATTENTION)

    kv_b, other = linear(heads * 256, 512), linear(1, 1)
    a = MLA(None, None, other, other, "", kv_b, other, heads, 512, 128, 64, 128, 192**-0.5, 1e-6, 0)
    weight: Tensor = (torch.randn(kv_b.out_features, 512) * 512**-0.5).bfloat16()
    q = torch.randn(1, heads, 1, 192)
    kept = Cache(KVFormat.BF16).append(0, (torch.randn(1, 1, positions, 512), torch.randn(1, 1, positions, 64)))

    class OfKVB(Weights):
        def tensor(self, key: str) -> Tensor:
            return weight

        def linear(self, ref: Linear, x: Tensor) -> Tensor:
            out: Tensor = F.linear(x.bfloat16(), weight).float()
            return out

    weights = OfKVB()

    def expanded() -> Tensor:
        both = weights.linear(kv_b, kept[0].codes[:, 0].float()).unflatten(-1, (heads, 256)).transpose(1, 2)
        keys = torch.cat((both[..., :128], kept[1].codes.float().expand(-1, heads, -1, -1)), dim=-1)
        return before(q, Kept(keys), Kept(both[..., 128:]), a.scale)

    return {"before": expanded, "now": lambda: Latent().core(a, q, kept, weights, Positions((q, q)))}


def measure(run: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, in turns."""
    old, new = (make() for make in run.values())
    if (old - new).norm() > 0.02 * old.norm():  # products in BF16 on one side only
        raise SystemExit("the two do not agree")
    spent: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(rounds):
        for name, make in run.items():
            begun = time.thread_time()
            make()
            spent[name].append(1e3 * (time.thread_time() - begun))
    return {name: round(median(values), 3) for name, values in spent.items()}


def processor() -> str:
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return f"{fields.get('model name')}, family {fields.get('cpu family')} model {fields.get('model')}"


@click.command()
@click.option("--rounds", default=9)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "decode_attention.json")
@torch.inference_mode()
def main(rounds: int, out: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name, shape in GROUPED.items():
        for how in KVFormat:
            rows.append({"shape": name, "cache": how.value, "positions": 8192, **measure(grouped(shape, 8192, how), rounds)})
    for name, heads in (("DeepSeek-V2", 128), ("DeepSeek-V2-Lite", 16)):
        for positions in POSITIONS:
            rows.append(
                {"shape": name, "cache": "bf16", "positions": positions, **measure(latent(heads, positions), rounds)}
            )
    table = Table(
        "shape", "cache", "positions", "before, ms", "now, ms", "times", title="attention of one token, one thread"
    )
    for row in rows:
        cells = f"{row['before']:.1f}", f"{row['now']:.1f}", f"{row['before'] / row['now']:.1f}"
        table.add_row(row["shape"], row["cache"], str(row["positions"]), *cells)
    Console().print(table)
    about = {"processor": processor(), "threads": 1, "torch": torch.__version__, "clock": "processor time of the thread"}
    shapes = {name: dict(zip(("heads", "kv_heads", "head_dim"), shape, strict=True)) for name, shape in GROUPED.items()}
    out.write_text(json.dumps({**about, "shapes": shapes, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
