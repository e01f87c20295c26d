"""One run of AutoRound, with an interpreter that has it: MODEL WINDOWS.json OUT GROUP ITERATIONS THREADS."""

import json
import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

model, windows, out, group, method, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
ids = torch.tensor(json.loads(Path(windows).read_text()))
rounder = AutoRound(
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
    AutoTokenizer.from_pretrained(model),
    bits=4,
    group_size=int(group),
    sym=True,
    iters=int(method),
    nsamples=len(ids),
    seqlen=ids.shape[1],
    dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids],
    enable_torch_compile=False,
    device_map="cpu",
)
rounder.quantize_and_save(out, format="auto_gptq")
