"""Text files as people have them: layouts, compression, marks, empty rows; data sets of the hub by name."""

from __future__ import annotations

import gzip
import json
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from quantkit.calib import hub
from quantkit.calib.documents import Conversation, Documents, read_documents
from quantkit.errors import CalibrationError

TEXTS = ["def f(x):\n    return x\n", "The quick brown fox.", "人人生而自由"]
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, text: str, crlf: bool = False) -> str:
    """As UTF-8; with crlf also with the byte-order mark that Windows writes."""
    data = text.replace("\n", "\r\n").encode("utf-8-sig") if crlf else text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def test_every_file_format_gives_the_same_documents(tmp_path: Path) -> None:
    rows = [{"text": text} for text in TEXTS]
    texts = {
        "a.jsonl": lines(rows),
        "a.jsonl.gz": lines(rows),
        "a.json": json.dumps(rows),
        "b.json": json.dumps({"data": rows, "version": 1}),
        "c.json": lines(rows),  # as data sets of the hub name them
        "a.json.gz": json.dumps(rows),
        "d.json": json.dumps(TEXTS),
    }
    for crlf in (False, True):
        for name, text in texts.items():
            assert list(read_documents(write(tmp_path / name, text, crlf))) == TEXTS, name
        for name in ("a.txt", "a.txt.gz"):
            assert list(read_documents(write(tmp_path / name, TEXTS[0], crlf))) == TEXTS[:1]
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "other": [1, 2, 3]}), tmp_path / "a.parquet")
    assert list(read_documents(str(tmp_path / "a.parquet"))) == TEXTS


SYSTEM = {"role": "system", "content": "Be brief."}
CALLED = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
LAYOUTS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]] = {
    "messages": ({"messages": MESSAGES, "id": 1}, MESSAGES, {"id": 1}),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, MESSAGES, {}),
    "ShareGPT with a system prompt": (
        {"conversations": [{"from": "Human", "value": "hi"}], "system": "Be brief."},
        [SYSTEM, MESSAGES[0]],
        {},
    ),
    "ShareGPT with tools": (
        {
            "conversations": [
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2", "weight": 0},
            ],
            "tools": '[{"name": "f"}]',
        },
        [{"role": "assistant", "tool_calls": [CALLED]}, {"role": "tool", "content": "2", "weight": 0}],
        {"tools": [{"name": "f"}]},
    ),
    "conversations with roles": ({"conversations": MESSAGES}, MESSAGES, {}),
    "Alpaca": ({"instruction": "hi", "input": "", "output": "ho"}, MESSAGES, {}),
    "Alpaca with input": (
        {"instruction": "Add", "input": "1 2", "output": "3", "history": [["hi", "ho"]]},
        [*MESSAGES, {"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}],
        {},
    ),
    "empty text, but messages": ({"text": "", "messages": MESSAGES}, MESSAGES, {}),
    "no text, but messages": ({"text": None, "messages": MESSAGES, "tools": []}, MESSAGES, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_conversations(layout: str, tmp_path: Path) -> None:
    row, messages, variables = LAYOUTS[layout]
    for name, text in {
        "a.jsonl": lines([row]),
        "a.json": json.dumps([row]),
        "a.json.gz": json.dumps({"data": [row]}),
    }.items():
        (found,) = read_documents(write(tmp_path / name, text))
        assert isinstance(found, Conversation) and found.where.startswith(str(tmp_path / name))
        assert (found.messages, found.variables) == (messages, variables)


def test_parquet_with_messages(tmp_path: Path) -> None:
    """Fields that other rows have are null there."""
    rows = {
        "messages": [MESSAGES, [{"role": "user", "content": "x", "name": "n"}], None, []],
        "tools": [None, None, None, None],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    found = read_documents(str(tmp_path / "a.parquet"))
    assert found.skipped == {"null": 1, "empty": 1} and found.conversations == len(found) == 2
    assert isinstance(found[0], Conversation) and found[0].messages[0] == {**MESSAGES[0], "name": None}
    assert found[0].variables == {}
    pyarrow.parquet.write_table(pyarrow.table({"text": [None, "a"], "messages": [MESSAGES, None]}), tmp_path / "b.parquet")
    (first, second) = read_documents(str(tmp_path / "b.parquet"))
    assert isinstance(first, Conversation) and second == "a"


def test_empty_and_null_rows_are_counted(tmp_path: Path) -> None:
    rows = [
        {"text": "a"},
        {"text": ""},
        {"text": None},
        None,
        {"messages": []},
        {},
        {"instruction": "", "output": ""},
        {"text": "b"},
    ]
    for name, text in {"a.jsonl": lines(rows) + "\n", "a.json": json.dumps([*rows, ""])}.items():
        found = read_documents(write(tmp_path / name, text))
        assert list(found) == ["a", "b"] and found.skipped == {"empty": 5, "null": 2}
        assert found.note("t") == "text 't': 7 rows skipped (5 empty and 2 null), 2 used"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, ""]}), tmp_path / "a.parquet")
    assert read_documents(str(tmp_path / "a.parquet")).skipped == {"empty": 1, "null": 1}
    with pytest.raises(CalibrationError, match="has 2 rows, all empty or null"):
        read_documents(write(tmp_path / "b.jsonl", lines([None, {"text": ""}])))
    assert Documents(["a"]).note("t") is None


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"body": "a"}, "has 'body', none of them text, messages"),
        (5, "is of type int"),
        ({"text": 5}, "'text' of type int, not a string"),
        ({"messages": "hi"}, "'messages' of type str, not a list"),
        ({"messages": ["hi"]}, "a message of type str"),
        ({"messages": [{"content": "hi"}]}, "a message with 'content'"),
        ({"conversations": [{"from": "moon", "value": "a"}]}, "a message from 'moon'"),
        ({"conversations": [{"from": "human", "value": None}]}, "a message from 'human' whose 'value' is of type NoneType"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "a function call that is not JSON"),
        ({"conversations": [{"from": "function_call", "value": "[1]"}]}, "a function call without a name"),
        ({"instruction": "a", "input": 1}, "'input' of type int"),
        ({"instruction": "a", "output": "b", "history": ["b"]}, "'history' is not a list of"),
        ({"instruction": "a", "context": "b", "response": "c"}, "'instruction' without 'output'; it has 'context', "),
        ({"messages": [SYSTEM], "system": "other"}, "'system' and also a system message"),
        ({"messages": MESSAGES, "tools": "f("}, "'tools' is not JSON"),
        ({"text": "\ud800"}, "not Unicode"),
    ],
)
def test_rows_that_fit_no_layout_are_refused_with_their_place(row: Any, words: str, tmp_path: Path) -> None:
    for name, text, place in (("a.jsonl", lines(["a", row]), "line 2"), ("a.json", json.dumps(["a", row]), "row 2")):
        with pytest.raises(CalibrationError, match=f"{name} {place}") as caught:
            read_documents(write(tmp_path / name, text))
        assert words in str(caught.value)


def test_files_that_are_not_what_they_are_called(tmp_path: Path) -> None:
    cut = gzip.compress(b"words " * 999)[:-20]
    for name, data in {
        "a.txt.gz": b"words",
        "b.jsonl.gz": cut,
        "c.json": b"[1,",
        "d.json": b"3",
        "e.parquet.gz": b"",
        "f.gz": b"",
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CalibrationError, match=name):
            read_documents(str(tmp_path / name))


# Data sets of the hub


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> list[dict[str, Any]]:
        asked.append((name, config, split, streaming))
        return [{"messages": MESSAGES}, {"messages": None}, {"text": "a"}, {"text": "b"}]

    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(load_dataset=load_dataset, __spec__=1))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, timeout: asked.append(timeout))
    monkeypatch.setattr(hub, "MAX_ROWS", 3)
    for source in ("owner/set", "owner/set:test", "owner/set:en:dev"):
        found = read_documents(source)
        assert isinstance(found[0], Conversation) and found[1] == "a" and len(found) == 2 and found.skipped == {"null": 1}
        assert found[0].where == f"{source} row 1"
    assert asked == [
        5,
        ("owner/set", None, "train", True),
        5,
        ("owner/set", None, "test", True),
        5,
        ("owner/set", "en", "dev", True),
    ]


def test_without_the_library_or_the_network_it_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = time.monotonic()
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(CalibrationError, match="pip install 'quantkit\\[datasets\\]'"):
        read_documents("owner/set")
    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(__spec__=1))

    def unreachable(*_: Any, **__: Any) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(CalibrationError, match="the hub did not give split 'train' of the data set owner/set"):
        read_documents("owner/set")
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("source", ["data/chat.jsonl", "a/b/c", "nothing", "./owner/set", "owner/set:a:b:c"])
def test_what_is_no_name_is_a_missing_file(source: str) -> None:
    with pytest.raises(CalibrationError, match="is neither a file nor one of stdlib"):
        read_documents(source)
