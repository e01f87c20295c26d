"""One engine of llama_generate.py in a process of its own: python llama_worker.py quantkit|llama MODEL THREADS [KERNELS].

A line of JSON on standard input asks for a prompt of `positions` ids and `tokens` more, one at a time; a line on standard
output says how many seconds the prompt took, and each token, by the clock and of processor time. Any Python with the engine
runs it.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def quantkit_steps(model: str, threads: int, kernels: str) -> Callable[[list[int]], Iterator[Any]]:
    import torch

    import quantkit

    torch.set_num_threads(threads)
    loaded = quantkit.load(model, kernels=kernels)  # type: ignore[arg-type]
    return lambda ids: loaded.stream(torch.tensor([ids]), new_tokens=256)


def llama_steps(model: str, threads: int) -> Callable[[list[int]], Iterator[Any]]:
    import numpy as np
    from llama_cpp import Llama  # type: ignore[import-not-found]

    sizes = {"n_ctx": 2048, "n_batch": 2048, "n_threads": threads, "n_threads_batch": threads}
    engine = Llama(model_path=model, verbose=False, **sizes)

    def steps(ids: list[int]) -> Iterator[int]:
        engine.reset()
        following = ids
        while True:
            engine.eval(following)
            logits = np.ctypeslib.as_array(engine._ctx.get_logits_ith(-1), shape=(engine.n_vocab(),))
            following = [int(logits.argmax())]
            yield following[0]

    return steps


def peak() -> int:
    """Bytes resident at most, so far; getrusage would count what the parent had."""
    status = Path("/proc/self/status").read_text("utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def main() -> None:
    engine, model, threads, *kernels = sys.argv[1:]
    importlib.import_module("llama_cpp" if engine == "llama" else "quantkit.run.model")
    runtime = peak()  # of an engine without a model
    begin = llama_steps(model, int(threads)) if engine == "llama" else quantkit_steps(model, int(threads), *kernels)
    for line in sys.stdin:
        asked = json.loads(line)
        ids = [(7919 * i + asked["seed"]) % 40000 + 100 for i in range(asked["positions"])]
        stream, clocks = begin(ids), []
        for _ in range(asked["tokens"] + 1):
            start = time.perf_counter(), time.process_time()
            next(stream)
            clocks.append([time.perf_counter() - start[0], time.process_time() - start[1]])
        print(json.dumps({"prefill": clocks[0], "tokens": clocks[1:], "peak": peak(), "runtime": runtime}), flush=True)


if __name__ == "__main__":
    main()
