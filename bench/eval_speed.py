"""What `quantkit eval` costs over the two forward passes that it cannot do without; goal: at most twice their time.

Both on the bundled model in INT4, 64 windows of 512 tokens, in turns, so that both meet the same machine. A forward pass is
all layers and the head, batch by batch as `eval` runs them, weights read from disk each time; eval is everything that its
report needs but the plots: comparison, floor, forced routing, errors of experts and weights, generated samples.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

import quantkit
from quantkit.calib import tokens
from quantkit.calib.documents import read_documents
from quantkit.calib.tokenizer import load_text_tokenizer
from quantkit.measure.divergence import chunks
from quantkit.measure.evaluate import Extent, measure
from quantkit.measure.run import BATCH_TOKENS
from quantkit.recipe import Recipe
from quantkit.run.model import Model

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "eval_speed.json"


@torch.inference_mode()
def forwards(folders: list[Path], windows: int, seq_len: int) -> None:
    texts = read_documents("stdlib-held-out")
    data = tokens.evaluation_set(load_text_tokenizer(folders[0]), texts, seq_len, windows)
    for folder in folders:
        model = Model(folder, torch.device("cpu"), hold=False)
        for ids in data.ids.split(max(1, BATCH_TOKENS // seq_len)):
            *_, last = model.layers(ids)
            flat = last.hidden.flatten(0, 1)
            for part in chunks(len(flat), model.spec.vocab):
                model.head(flat[part])


def timed(function: Callable[[], object]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


@click.command()
@click.option("--windows", default=64)
@click.option("--seq-len", default=512)
@click.option("--rounds", default=5)
def main(windows: int, seq_len: int, rounds: int) -> None:
    model = ROOT / "examples" / "tiny-hunyuan"
    with tempfile.TemporaryDirectory() as folder:
        out, cache = Path(folder) / "out", Path(folder) / "cache"
        quantkit.quantize(model, out, Recipe(scheme="W4A16", method="rtn"))
        runs: dict[str, Callable[[], object]] = {
            "two forward passes": lambda: forwards([model, out], windows, seq_len),
            "eval": lambda: measure(out, model, extent=Extent(seq_len=seq_len, windows=windows)),
            "eval, baseline cached": lambda: measure(
                out, model, extent=Extent(seq_len=seq_len, windows=windows, cache=cache)
            ),
        }
        for run in runs.values():  # the first is a warm-up, and fills the cache
            run()
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                seconds[name].append(timed(run))
        size = sum(path.stat().st_size for path in cache.rglob("*.safetensors"))
    found = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: value / found["two forward passes"] for name, value in found.items()}
    for name, value in found.items():
        click.echo(f"{name}: {value:.2f} s, {ratios[name]:.2f} times two forward passes")
    click.echo(f"cache of the baseline: {size / 1e6:.1f} MB for {windows} x {seq_len} tokens")
    RESULTS.parent.mkdir(exist_ok=True)
    data = {"seconds": seconds, "ratio": ratios, "cache_bytes": size, "threads": torch.get_num_threads()}
    RESULTS.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
