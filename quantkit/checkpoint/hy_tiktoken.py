"""Hunyuan's own tokenizer file, `hy.tiktoken`, as a `tokenizers.Tokenizer`, without running the model's own code.

The file has a base64 token a line, in order of rank; 127,957 of them in the released model. Special tokens follow the
last rank: five and 204 extra ones, or 205 in Hunyuan-A13B. Text is normalised to NFC and split by the pattern below (each
digit alone) before byte-level BPE.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.reader import load_json
from quantkit.errors import CheckpointError
from quantkit.model.hunyuan_a13b import is_a13b

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["FILE", "load", "settings", "special_tokens"]

FILE = "hy.tiktoken"
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
START, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"


def special_tokens(config: Mapping[str, Any]) -> list[str]:
    """Those that follow the last rank, in order. config: config.json."""
    extra = 205 if _a13b(config) else 204
    return [END, START, "<|bos|>", "<|eos|>", PAD, *(f"<|extra_{i}|>" for i in range(extra))]


def settings(stated: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with what Hunyuan-Large's own tokenizer class takes where it states nothing."""
    defaults = {} if _a13b(config) else {"bos_token": START, "eos_token": END, "pad_token": PAD}
    return {**defaults, **stated}


def _a13b(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "hunyuan_v1_moe" or is_a13b(dict(config))


def load(path: Path) -> Tokenizer:
    """The tokenizer of a file in a model's folder. Raises CheckpointError for a file that is not in this format.

    Text gets no special tokens that are not in it, unless tokenizer_config.json says `add_bod_token`: then it begins with
    <|startoftext|>. It never ends with <|endoftext|>, which the released class may add: nothing could be continued then.
    """
    from tokenizers import normalizers, processors
    from transformers.convert_slow_tokenizer import TikTokenConverter  # seconds to import

    class Converter(TikTokenConverter):  # type: ignore[misc]
        """transformers' conversion of ranks to merges; its own reader wants a package whose cache outlives the file."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return read_ranks(Path(tiktoken_url))

    special = special_tokens(_beside(path, "config.json"))
    tokenizer: Tokenizer = Converter(str(path), pattern=PATTERN, extra_special_tokens=special).converted()
    tokenizer.normalizer = normalizers.NFC()
    if _beside(path, "tokenizer_config.json").get("add_bod_token") is True:
        begun = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, tokenizer.token_to_id(START))])
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, begun])
    return tokenizer


def _beside(path: Path, name: str) -> dict[str, Any]:
    return load_json(path.with_name(name)) if path.with_name(name).is_file() else {}


def read_ranks(path: Path) -> dict[bytes, int]:
    """token -> rank. Raises CheckpointError."""
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
        for line in filter(None, lines):
            ranks[base64.b64decode(line.split()[0], validate=True)] = len(ranks)
    except (OSError, binascii.Error, IndexError) as error:
        raise CheckpointError(f"{path} line {len(ranks) + 1} is not a base64 token: {error}", "fetch it again") from error
    if len(ranks) != len([line for line in lines if line]) or not all(bytes([b]) in ranks for b in range(256)):
        raise CheckpointError(f"{path} repeats tokens, or lacks some single bytes", "fetch the file again")
    return ranks
