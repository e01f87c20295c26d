"""Runs under vLLM's python, not under pytest's: one job a line on standard input, "done" a line on standard output.

vLLM takes most of a minute to import, so it is imported once and each model is served by a fork of this process. A job is
{"model": folder, "prompts": [[ids]], "new_tokens": n, "options": LLM's, "out": stem}. Written are stem.npz (float32
log-probabilities of each prompt, [positions - 1, vocab], at every position after the first) and stem.json (greedy
continuations and what the cache holds, or the error).
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

import numpy as np


def serve(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    if job["options"].get("tensor_parallel_size", 1) > 1:  # by default it wants a NUMA node for each of its processes
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    llm = LLM(
        job["model"],
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=4,
        max_logprobs=-1,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        **{"enforce_eager": True, **job["options"]},
    )
    how = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, detokenize=False, prompt_logprobs=-1)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], how, use_tqdm=False)
    tables = {}
    for i, output in enumerate(outputs):
        rows = [[row[token].logprob for token in range(len(row))] for row in output.prompt_logprobs[1:]]
        tables[str(i)] = np.array(rows, dtype=np.float32)
    np.savez(job["out"] + ".npz", **tables)
    greedy = [list(output.outputs[0].token_ids) for output in outputs]
    executor = llm.llm_engine.model_executor
    if not hasattr(executor, "driver_worker"):  # its workers are other processes
        return {"greedy": greedy}
    return {"greedy": greedy, **held(executor.driver_worker.worker.model_runner)}


def held(runner: Any) -> dict[str, Any]:
    """Of the KV cache: its size, where each layer's lies, and which layers read another's."""
    layers = runner.compilation_config.static_forward_context
    caches = {name: layer.kv_cache for name, layer in layers.items() if hasattr(layer, "kv_cache")}
    return {
        "blocks": runner.kv_cache_config.num_blocks,
        "block_size": runner.cache_config.block_size,
        "cache_bytes": sum(tensor.size for tensor in runner.kv_cache_config.kv_cache_tensors),
        "cache_of": {name: cache.data_ptr() for name, cache in caches.items()},
        "shared": dict(runner.shared_kv_cache_layers),
    }


def main() -> None:
    import vllm
    from vllm import LLM  # noqa: F401  the import that takes long
    from vllm.platforms import current_platform

    print("ready", vllm.__version__, type(current_platform).__name__, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            log = os.open(job["out"] + ".log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                result = serve(job)
            except BaseException as error:
                traceback.print_exc()
                result = {"error": f"{type(error).__name__}: {error}"}
            with open(job["out"] + ".json", "w") as file:
                json.dump(result, file)
            os._exit(0)
        os.waitpid(child, 0)
        print("done", flush=True)


if __name__ == "__main__":
    main()
