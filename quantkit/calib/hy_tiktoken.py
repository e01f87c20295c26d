"""Hunyuan-Large's own tokenizer file, `hy.tiktoken`, as a `tokenizers.Tokenizer`, without running the model's own code.

The file has a base64 token a line, in order of rank; 127,957 of them in the released model. Special tokens follow the
last rank. Text is normalised to NFC and split by the pattern below (each digit alone) before byte-level BPE.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from tokenizers import Tokenizer, normalizers

from quantkit.errors import CheckpointError

__all__ = ["FILE", "load"]

FILE = "hy.tiktoken"
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ["<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>", *(f"<|extra_{i}|>" for i in range(204))]


def load(path: Path) -> Tokenizer:
    """Raises CheckpointError for a file that is not in this format."""
    from transformers.convert_slow_tokenizer import TikTokenConverter  # seconds to import

    class Converter(TikTokenConverter):  # type: ignore[misc]
        """transformers' conversion of ranks to merges; its own reader wants a package whose cache outlives the file."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return read_ranks(Path(tiktoken_url))

    tokenizer: Tokenizer = Converter(str(path), pattern=PATTERN, extra_special_tokens=SPECIAL).converted()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


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
