"""One run of GPTQModel, with an interpreter that has it: MODEL WINDOWS.json OUT GROUP METHOD THREADS."""

import json
import sys
from pathlib import Path

import torch
from gptqmodel import GPTQModel, QuantizeConfig

model, windows, out, group, method, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
ids = json.loads(Path(windows).read_text())
loaded = GPTQModel.load(model, QuantizeConfig(bits=4, group_size=int(group), sym=True), device="cpu")
loaded.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids], batch_size=1)
loaded.save(out)
