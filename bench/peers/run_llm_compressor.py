"""One run of llm-compressor, with an interpreter that has it: MODEL WINDOWS.json OUT GROUP METHOD THREADS."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

model, windows, out, group, method, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
ids = json.loads(Path(windows).read_text())
weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": int(group)}
if method == "gptq+imatrix":  # scales searched under the mean square of each input
    weights["observer"] = "imatrix_mse"
recipe = GPTQModifier(
    config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
    ignore=["lm_head", "re:.*mlp.gate$", "re:.*mlp.gate.wg$"],
)
oneshot(
    model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
    tokenizer=AutoTokenizer.from_pretrained(model),
    dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}),
    recipe=recipe,
    num_calibration_samples=len(ids),
    max_seq_length=len(ids[0]),
    output_dir=out,
)
