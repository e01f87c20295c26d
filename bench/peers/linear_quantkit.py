"""One linear by quantkit, of the tree on PYTHONPATH: FOLDER with weight and tokens, RUNS; writes what it took and made."""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantkit.job.group import GroupJob
from quantkit.quant.method import Method
from quantkit.scheme import scheme_named
from quantkit.stats import LinearStats

BATCH = 4096

torch.set_num_threads(1)
folder, runs = Path(sys.argv[1]), int(sys.argv[2])
scheme, cpu, took = scheme_named("W4A16", 128), torch.device("cpu"), []
assert scheme
for _ in range(runs):
    given = load_file(folder / "given.safetensors")
    with torch.inference_mode():
        begun = time.process_time()
        stats = LinearStats.empty(given["weight"].shape[1], cpu, with_hessian=True)
        for batch in given["tokens"].split(BATCH):
            stats.add(batch)
        gathered = time.process_time()
        (one,) = GroupJob((given["weight"],), stats, scheme, Method("gptq")).run(cpu)
        quantized, outcome = one if isinstance(one, tuple) else (one.quantized, one.outcome)  # as older trees have it
        took.append({"statistics": gathered - begun, "solve": time.process_time() - gathered})
    del stats
assert not outcome.fallback, outcome.fallback
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
save_file({"value": quantized.dequantize().bfloat16()}, folder / "made.safetensors")
(folder / "took.json").write_text(json.dumps({"runs": took, "peak_gb": peak}))
