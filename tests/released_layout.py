"""A stand-in for the folder that Hunyuan-Large is released as: `hy.tiktoken` and Python files, and no tokenizer.json.

Its vocabulary is small and made by hand. Each Python file, were it run, would leave a file `ran` beside itself.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
CODE_FILES = ("configuration_hunyuan.py", "modeling_hunyuan.py", "tokenization_hy.py")
AUTO_MAP = {
    "AutoConfig": "configuration_hunyuan.HunYuanConfig",
    "AutoModelForCausalLM": "modeling_hunyuan.HunYuanForCausalLM",
}
TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}<|startoftext|>{% endif %}{{ m.content }}"
    "{% if m.role == 'user' %}<|extra_0|>{% else %}<|eos|>{% endif %}{% endfor %}"
)
TOKENIZER_CONFIG: dict[str, Any] = {
    "model_max_length": 1048576,
    "tokenizer_class": "HYTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_hy.HYTokenizer", None]},
    "eos_token": "<|eos|>",
    "pad_token": "<|pad|>",
    "additional_special_tokens": ["<|startoftext|>", "<|extra_0|>", "<|extra_4|>", "<|extra_5|>", "<|eos|>"],
    "chat_template": TEMPLATE,
}
_WORDS = ["th", "the", " t", " the", "in", "ing", "re", " 1", "\n\n", "  ", "    ", "de", "def", " (", "):", "人", "，"]
# Each piece after the first byte by byte, so that every token can be merged from two that come before it.
_MERGES = [word.encode()[:end] for word in _WORDS for end in range(2, len(word.encode()) + 1)]
RANKS = {token: i for i, token in enumerate(dict.fromkeys([*(bytes([b]) for b in range(255, -1, -1)), *_MERGES]))}


def released_layout(folder: Path) -> Path:
    """Turn a checkpoint folder with a tokenizer.json into one of that layout."""
    (folder / "tokenizer.json").unlink()
    (folder / "hy.tiktoken").write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for t, i in RANKS.items()))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": AUTO_MAP}))
    for name in CODE_FILES:
        (folder / name).write_text(CODE)
    return folder
