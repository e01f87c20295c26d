"""A stand-in for the folder that Hunyuan-Large is released as: `hy.tiktoken` and Python files, and no tokenizer.json.

Its vocabulary is small and made by hand. Any of its Python files, if it were run, would leave a file `ran` in the folder.
"""

from __future__ import annotations

import base64
import json
import unicodedata
from pathlib import Path
from typing import Any

import tiktoken

from quantkit.checkpoint import hy_tiktoken

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
VOCAB = len(RANKS) + 209
VARIED = [
    "the thing is in\n\n  the 1234 re-ring",
    "人人生而自由，在尊严和权利上一律平等。the人's",
    "def f(x):\n    return {'a': x[0], \"b\": 1.5e-3}  # don't\r\n\t\n",
    "e\u0301 is \u00e9; \u1e9b\u0323 \uac00\u1100\u1161; \ufb01",
    "👩‍👩‍👧 🇨🇳 🙂\U0001f9d1\U0001f3fd‍💻",
    "<|startoftext|>the<|extra_0|>in<|eos|> <|endoftext|><|extra_203|><|extra_204|><|bos|><|pad|>",
    "\t\r\n  x  \u3000\u00a0\u2028 y\x00\x7f\x85z \u0661\u0662\u00bd ",
    "",
]


def code_of(folder: Path) -> str:
    return f"open({str(folder / 'ran')!r}, 'w')\n"


def released_layout(folder: Path) -> Path:
    """Turn a checkpoint folder with a tokenizer.json into one of that layout."""
    (folder / "tokenizer.json").unlink()
    (folder / "hy.tiktoken").write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for t, i in RANKS.items()))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": AUTO_MAP}))
    for name in CODE_FILES:
        (folder / name).write_text(code_of(folder))
    return folder


def their_ids(text: str, extra: int = 204) -> list[int]:
    """As the released code reads text: NFC, then tiktoken with every special token allowed."""
    names = ["<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>", *(f"<|extra_{i}|>" for i in range(extra))]
    special = {name: len(RANKS) + i for i, name in enumerate(names)}
    encoding = tiktoken.Encoding("hy", pat_str=hy_tiktoken.PATTERN, mergeable_ranks=RANKS, special_tokens=special)
    return encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")
