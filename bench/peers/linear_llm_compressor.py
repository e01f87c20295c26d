"""One linear by llm-compressor's GPTQ, with an interpreter that has it: FOLDER with weight and tokens, RUNS, and the
observer of weights; writes what it took and made. What its modifier does to a module is called as it calls it."""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, initialize_module_for_quantization
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization.calibration import initialize_observer, observe
from safetensors.torch import load_file, save_file

BATCH = 4096

torch.set_num_threads(1)
folder, runs, observer, took = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], []
for _ in range(runs):
    given = load_file(folder / "given.safetensors")
    out_features, in_features = given["weight"].shape
    module = torch.nn.Linear(in_features, out_features, bias=False, dtype=given["weight"].dtype)
    module.weight.data = given["weight"]
    args = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 128, "observer": observer}
    args = QuantizationArgs(**args, actorder="weight")  # its default, which it calls static
    initialize_module_for_quantization(module, QuantizationScheme(targets=["Linear"], weights=args))
    modifier = GPTQModifier(targets=["Linear"], scheme="W4A16")
    modifier._module_names = {module: "linear"}
    with torch.inference_mode():
        begun = time.process_time()
        for batch in given["tokens"].split(BATCH):
            modifier.calibrate_module(module, (batch[None],), None)
        gathered = time.process_time()
        initialize_observer(module, "weight")
        observe(module, "weight")
        modifier.compress_module_list([module])
        took.append({"statistics": gathered - begun, "solve": time.process_time() - gathered})
    made = module.weight.detach().bfloat16().contiguous()
    del module, modifier
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
save_file({"value": made}, folder / "made.safetensors")
(folder / "took.json").write_text(json.dumps({"runs": took, "peak_gb": peak}))
