"""Text to token windows: for calibration (packed, all of one length) and for evaluation (by document, padded)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from quantkit.calib.corpus import NAMED, named_documents
from quantkit.errors import CalibrationError, CheckpointError
from quantkit.formats.reader import load_json

__all__ = ["EvalSet", "calibration_windows", "digest", "documents", "evaluation_set", "load_tokenizer"]

_FORMATS = "a .txt, .jsonl (with 'text' or 'messages') or .parquet file (with a 'text' column)"


def load_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json of a model folder. Raises CheckpointError when there is none that can be read."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json", "add one: quantkit runs no tokenizer code that comes with a model"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception for a file it cannot parse
        raise CheckpointError(f"{path} is not a tokenizer: {error}", "fetch the file again") from error


def documents(source: str, folder: Path) -> list[str]:
    """The documents of a file or of a named corpus. `folder`: the model's, whose chat template `messages` need."""
    if source in NAMED:
        return named_documents(source)
    path = Path(source)
    if not path.is_file():
        raise CalibrationError(f"text '{source}' is neither a file nor one of {', '.join(NAMED)}", f"give {_FORMATS}")
    try:
        if path.suffix == ".txt":
            return [path.read_text("utf-8")]
        if path.suffix == ".jsonl":
            return _jsonl(path, folder)
        if path.suffix == ".parquet":
            return _parquet(path)
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read as UTF-8 text: {error}", f"give {_FORMATS}") from error
    raise CalibrationError(f"{path} ends in '{path.suffix}'", f"give {_FORMATS}")


def _jsonl(path: Path, folder: Path) -> list[str]:
    texts = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{path} line {number} is not JSON: {error}", "one JSON object a line") from error
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            texts.append(row["text"])
        elif isinstance(row, dict) and isinstance(row.get("messages"), list):
            texts.append(_chat(row["messages"], folder, f"{path} line {number}"))
        else:
            raise CalibrationError(f"{path} line {number} has neither 'text' nor 'messages'", "add one of them")
    return texts


def _chat(messages: list[Any], folder: Path, where: str) -> str:
    """Messages through the model's own chat template, rendered by transformers' sandboxed Jinja."""
    from transformers import PreTrainedTokenizerFast  # seconds to import

    config = load_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    template = folder / "chat_template.jinja"
    source = template.read_text("utf-8") if template.exists() else config.get("chat_template")
    if not isinstance(source, str):
        raise CalibrationError(f"{where} has 'messages', but {folder} has no chat template", "give 'text' instead")
    special = {k: v for k, v in config.items() if k in ("bos_token", "eos_token", "pad_token") and isinstance(v, str)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=load_tokenizer(folder), chat_template=source, **special)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template may raise anything; it is data of the model
        raise CalibrationError(f"{where}: the chat template refuses these messages: {error}", "check roles") from error


def _parquet(path: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, columns=["text"])
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"{path} cannot be read: {error}", "give a parquet file with a 'text' column") from error
    if "text" not in table.column_names:
        raise CalibrationError(f"{path} has no 'text' column", "rename the column that holds the text to 'text'")
    return [str(value) for value in table.column("text").to_pylist() if value]


def calibration_windows(tokenizer: Tokenizer, texts: list[str], samples: int, seq_len: int, seed: int) -> Tensor:
    """int64 [samples, seq_len]: the documents joined, cut into windows, `samples` of them drawn evenly at random.

    Raises CalibrationError when the text is too short for that many.
    """
    parts = [np.array(encoding.ids, dtype=np.int64) for encoding in tokenizer.encode_batch(texts)]
    stream = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    count = len(stream) // seq_len
    if count < samples:
        raise CalibrationError(
            f"the calibration text has {len(stream):,} tokens: {count} windows of {seq_len}, and {samples} are asked for",
            "give more text, or lower --samples or --seq-len",
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(count)[:samples])
    return torch.from_numpy(stream[: count * seq_len].reshape(count, seq_len)[chosen])


@dataclass(frozen=True)
class EvalSet:
    """Windows to score. ids int64 [n, seq_len], right-padded with 0; lengths int64 [n]; unit int64 [n].

    unit: which document a window belongs to, or itself when there is but one: what the bootstrap resamples.
    """

    ids: Tensor
    lengths: Tensor
    unit: Tensor
    unit_name: str


def evaluation_set(tokenizer: Tokenizer, texts: list[str], seq_len: int, max_windows: int) -> EvalSet:
    """The first windows of every document in turn, until `max_windows`. Raises CalibrationError when nothing can be scored."""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    cuts = [[ids[i : i + seq_len] for i in range(0, len(ids), seq_len)] for ids in encoded]
    # Round-robin: every document gives its first window before any gives its second.
    order = sorted((w, d) for d, windows in enumerate(cuts) for w in range(len(windows)) if len(windows[w]) >= 2)
    chosen = sorted((d, w) for w, d in order[:max_windows])
    if not chosen:
        raise CalibrationError("the evaluation text has no document of two tokens or more", "give more text")
    ids = torch.zeros(len(chosen), seq_len, dtype=torch.int64)
    for row, (d, w) in enumerate(chosen):
        ids[row, : len(cuts[d][w])] = torch.tensor(cuts[d][w])
    lengths = torch.tensor([len(cuts[d][w]) for d, w in chosen])
    several = len({d for d, _ in chosen}) > 1
    unit = torch.tensor([d for d, _ in chosen]) if several else torch.arange(len(chosen))
    return EvalSet(ids, lengths, unit, "document" if several else "window")


def digest(ids: Tensor) -> str:
    """sha256 of token ids and their shape."""
    return hashlib.sha256(f"{tuple(ids.shape)}".encode() + ids.numpy().tobytes()).hexdigest()
