"""Files of text as people have them, as documents: a plain text, or a conversation that a chat template will write."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, overload

from quantkit.calib import hub
from quantkit.calib.corpus import NAMED, named_documents
from quantkit.errors import CalibrationError, counted
from quantkit.extras import need

__all__ = ["LAYOUTS", "Conversation", "Document", "Documents", "read_documents"]

LAYOUTS = "'text'; 'messages' or 'conversations'; or 'instruction', 'input' and 'output'"
_FILES = "a .txt, .jsonl, .json (all three also as .gz) or .parquet file, or a data set of the hub as OWNER/NAME"
_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
_KEYS = ("text", "messages", "conversations", "instruction")  # what decides the layout; the first that a row has
_ALPACA = ("instruction", "input", "output")
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
_KINDS: dict[type, str] = {str: "string", list: "list"}
_CALLS = ("function_call", "tool_call")


@dataclass(frozen=True)
class Conversation:
    """Messages in transformers' form ({"role", "content", ...}), and what else their row holds. where: file and row."""

    messages: list[dict[str, Any]]
    variables: dict[str, Any] = field(default_factory=dict)
    where: str = "the conversation"


Document = str | Conversation


class Skipped(Enum):
    """A row without content: passed over and counted."""

    EMPTY = "empty"
    NULL = "null"


class Documents(Sequence[Document]):
    """The documents of a text, in order. skipped: how many rows were empty or null, by that word."""

    def __init__(self, documents: Iterable[Document], skipped: dict[str, int] | None = None) -> None:
        self._found, self.skipped = list(documents), skipped or {}

    def __len__(self) -> int:
        return len(self._found)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...
    def __getitem__(self, index: int | slice) -> Document | list[Document]:
        return self._found[index]

    @property
    def conversations(self) -> int:
        return sum(isinstance(document, Conversation) for document in self._found)

    def note(self, name: str) -> str | None:
        """What to tell of rows that were skipped."""
        if not self.skipped:
            return None
        kinds = " and ".join(f"{count:,} {kind}" for kind, count in sorted(self.skipped.items()))
        return f"text '{name}': {counted(sum(self.skipped.values()), 'row')} skipped ({kinds}), {len(self):,} used"


def read_documents(source: str) -> Documents:
    """The documents of a file, a named text or a data set of the hub. Raises CalibrationError, and ConfigError where the
    library that reads it is not installed."""
    if source in NAMED:
        return Documents(named_documents(source))
    path = Path(source)
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if not os.path.isfile(path) and hub.is_name(source) and suffix not in _SUFFIXES:
        return _documents(((f"{source} row {n}", row) for n, row in enumerate(hub.rows(source), 1)), source)
    if not os.path.isfile(path):
        raise CalibrationError(f"text '{source}' is neither a file nor one of {', '.join(NAMED)}", f"give {_FILES}")
    if suffix not in _SUFFIXES or path.suffix == ".gz" and suffix == ".parquet":
        raise CalibrationError(f"{path} ends in '{path.suffix}'", f"give {_FILES}")
    if suffix == ".parquet":
        need("parquet", f"text '{source}'")
        return _documents(_parquet(path), source)
    try:
        text = _read(path)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read as UTF-8 text: {error}", f"give {_FILES}") from error
    if suffix == ".txt":
        return Documents([text] if text else [])
    return _documents(_lines(path, text) if suffix == ".jsonl" else _json(path, text), source)


def _read(path: Path) -> str:
    """Whatever ends lines becomes a line feed; a byte-order mark goes."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    return path.read_text("utf-8-sig")


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """(where, row) of one JSON value a line; an empty line is an empty row."""
    lines = text.split("\n")
    for number, line in enumerate(lines[:-1] if not lines[-1].strip() else lines, start=1):
        where = f"{path} line {number}"
        try:
            yield where, json.loads(line) if line.strip() else ""
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{where} is not JSON: {error}", "one JSON object a line") from error


def _json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """(where, row) of a list, of the list under "data", of a single row, or of lines after all."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _lines(path, text)
            return
        raise CalibrationError(f"{path} is not JSON: {error}", "give a list of rows, or a row a line") from error
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path} is not JSON: {error}", "give a list of rows, or a row a line") from error
    if isinstance(data, dict):
        data = data["data"] if isinstance(data.get("data"), list) else [data]
    if not isinstance(data, list):
        raise CalibrationError(f"{path} holds a {type(data).__name__}", 'give a list of rows, or {"data": a list of rows}')
    yield from ((f"{path} row {number}", row) for number, row in enumerate(data, start=1))


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row), of the text column alone where nothing else could be a document."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if not set(names) & set(_KEYS):
            fix = f"rename the one that holds text, or give columns {LAYOUTS}"
            raise CalibrationError(f"{path} has columns {names}, none of them {', '.join(_KEYS)}", fix)
        number = 0
        plain = set(names) & set(_KEYS) == {"text"}
        for batch in file.iter_batches(columns=["text"] if plain else None):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"{path} cannot be read: {error}", f"give a parquet file with columns {LAYOUTS}") from error


def _documents(rows: Iterable[tuple[str, Any]], source: str) -> Documents:
    documents: list[Document] = []
    skipped: Counter[str] = Counter()
    for where, row in rows:
        document = _of_row(row, where)
        if isinstance(document, Skipped):
            skipped[document.value] += 1
        else:
            documents.append(document)
    if not documents and skipped:
        raise CalibrationError(
            f"text '{source}' has {counted(sum(skipped.values()), 'row')}, all empty or null", "give more text"
        )
    return Documents(documents, dict(skipped))


def _of_row(row: Any, where: str) -> Document | Skipped:
    """What a row holds, whatever its layout. null stands for a value that is not there. Raises CalibrationError."""
    if row is None:
        return Skipped.NULL
    if isinstance(row, str):
        return _text(row, where)
    if not isinstance(row, dict):
        raise CalibrationError(f"{where} is of type {type(row).__name__}, not an object", f"give rows with {LAYOUTS}")
    if not row:
        return Skipped.EMPTY
    fields = {str(key): value for key, value in row.items() if value is not None}
    layout = next((key for key in _KEYS if fields.get(key)), next((key for key in _KEYS if key in fields), None))
    if layout is None and any(key in row for key in _KEYS):
        return Skipped.NULL
    if layout is None:
        actual = ", ".join(f"'{key}'" for key in list(row)[:12])
        raise CalibrationError(f"{where} has {actual}, none of them {', '.join(_KEYS)}", f"give rows with {LAYOUTS}")
    kind = list if layout in ("messages", "conversations") else str
    value = fields[layout]
    if not isinstance(value, kind):
        actual = f"'{layout}' of type {type(value).__name__}"
        raise CalibrationError(f"{where} has {actual}, not a {_KINDS[kind]}", f"give rows with {LAYOUTS}")
    if isinstance(value, str) and layout == "text":
        return _text(value, where)
    messages = _alpaca(fields, where) if layout == "instruction" else [_message(one, where) for one in value]
    if not messages:
        return Skipped.EMPTY
    own = (*_ALPACA, *_KEYS) if layout == "instruction" else _KEYS
    return _conversation(messages, {key: value for key, value in fields.items() if key not in own}, where)


def _text(text: str, where: str) -> str | Skipped:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair
        raise CalibrationError(f"{where} is not Unicode text: {error}", "repair or drop it") from error
    return text or Skipped.EMPTY


def _conversation(messages: list[dict[str, Any]], rest: dict[str, Any], where: str) -> Conversation:
    """A system prompt of the row becomes the first message; tools may be JSON in a string, since columns have one type."""
    if isinstance(system := rest.pop("system", None), str) and system:
        own = next((message.get("content") for message in messages if message["role"] == "system"), None)
        if own not in (None, system):
            raise CalibrationError(f"{where} has 'system' and also a system message", "keep one of them")
        messages = messages if own else [{"role": "system", "content": system}, *messages]
    if isinstance(tools := rest.get("tools"), str):
        try:
            rest["tools"] = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{where}: 'tools' is not JSON: {error}", "give a list of tools") from error
    variables = {key: value for key, value in rest.items() if value is not None and not (key == "tools" and not value)}
    return Conversation(messages, variables, where)


def _alpaca(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    for key in (*_ALPACA, "history"):
        kind = list if key == "history" else str
        if key in row and not isinstance(row[key], kind):
            raise CalibrationError(f"{where} has '{key}' of type {type(row[key]).__name__}", f"give a {_KINDS[kind]}")
    if "output" not in row:
        problem = f"{where} has 'instruction' without 'output'; it has {', '.join(sorted(map(repr, row)))}"
        raise CalibrationError(problem[:300], "call the answer 'output' and what it is about 'input', or give 'messages'")
    turns = [*row.pop("history", []), ["\n\n".join(filter(None, (row["instruction"], row.get("input")))), row.get("output")]]
    if any(not isinstance(turn, list) or len(turn) != 2 for turn in turns):
        raise CalibrationError(f"{where}: 'history' is not a list of [instruction, output]", "repair or drop it")
    pairs = (zip(("user", "assistant"), turn, strict=True) for turn in turns)
    return [{"role": role, "content": text} for turn in pairs for role, text in turn if text]


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message in transformers' form, from that form or from ShareGPT's {"from", "value"}."""
    if not isinstance(message, dict):
        raise CalibrationError(f"{where} has a message of type {type(message).__name__}", "give 'role' and 'content'")
    if isinstance(message.get("role"), str):
        return message
    speaker, value = message.get("from"), message.get("value")
    rest = {key: entry for key, entry in message.items() if key not in ("from", "value", "role")}
    if isinstance(speaker, str) and speaker.lower() in _ROLES and isinstance(value, str):
        return {**rest, "role": _ROLES[speaker.lower()], "content": value}
    if speaker in _CALLS and isinstance(value, str):
        return {**rest, "role": "assistant", "tool_calls": _calls(value, where)}
    actual = f"a message with {', '.join(map(repr, message))}" if speaker is None else f"a message from {speaker!r}"
    actual += "" if speaker is None or isinstance(value, str) else f" whose 'value' is of type {type(value).__name__}"
    fix = f"give 'role' and 'content', or 'value' and 'from' as one of {', '.join((*_ROLES, *_CALLS))}"
    raise CalibrationError(f"{where} has {actual[:200]}", fix)


def _calls(value: str, where: str) -> list[dict[str, Any]]:
    try:
        calls = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where} has a function call that is not JSON: {error}", "repair or drop it") from error
    calls = calls if isinstance(calls, list) else [calls]
    if any(not isinstance(call, dict) or "name" not in call for call in calls):
        raise CalibrationError(f"{where} has a function call without a name", "give {'name': ..., 'arguments': ...}")
    return [{"type": "function", "function": call} for call in calls]
